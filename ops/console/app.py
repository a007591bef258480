"""`ratchet console`: the application with error pages and static files, and its process."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from core.dependencies import dependency_of
from core.errors import Outage, RatchetError
from core.progress import progress_log
from core.settings import Settings
from ops.console.data import ConsoleData
from ops.console.pages import (
    audit,
    budget,
    feedback,
    gate,
    held,
    models,
    overview,
    pictures,
    playground,
    quarantine,
    releases,
    sign_in,
    stream,
)
from ops.console.public import ReadOnly, SharedPages
from ops.console.request_context import ErrorPage, SignIn, intended, nav, sign_in_link
from ops.console.security import PathPrefix, SecurityMiddleware, Session, Sessions
from ops.console.template_filters import TEMPLATES
from serving.http.request_ids import RequestIds
from updater.gate.report import styles

log = logging.getLogger("ratchet.console")
FORM_BYTES = 256 * 1024
PUBLIC_REQUESTS_PER_MINUTE = 300
"""Per address in public mode: an open page makes six a minute, so fifty screens may share an address."""
PAGES = (
    overview, playground, releases, models, gate, stream, quarantine, feedback, held, budget, audit, pictures, sign_in,
)  # fmt: skip
PUBLIC_PAGES = (overview, releases, models, gate, stream, budget)
STOP_SECONDS = 5
STATIC = Path(__file__).parent / "static"


def build_console(settings: Settings) -> FastAPI:
    """The console's application. Opens its connections with the first request."""
    console, serve = settings.console, settings.serve
    app = FastAPI(title="Ratchet console", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.data = ConsoleData(settings)
    app.state.local = console.on_loopback
    app.state.provider = sign_in.provider(console) if console.oidc.enabled else None
    samples = (pictures,) if console.public_samples else ()
    for page in (*PUBLIC_PAGES, *samples) if console.public else PAGES:
        app.include_router(page.router, dependencies=[Depends(intended)])
    _static(app)
    _errors(app)
    if console.public:
        app.add_middleware(SharedPages)
        app.add_middleware(
            ReadOnly, requests_per_minute=PUBLIC_REQUESTS_PER_MINUTE, trusted_proxies=serve.trusted_proxies
        )
    sessions = Sessions(settings.operator_key(), console.session_hours)
    app.add_middleware(  # the last one is the outermost: its headers are on every answer
        SecurityMiddleware, sessions=sessions, max_body_bytes=serve.max_image_bytes + FORM_BYTES,
        local=console.on_loopback, names=serve.allowed_hosts,
    )  # fmt: skip
    if console.path_prefix:
        app.add_middleware(PathPrefix, prefix=console.path_prefix)
    app.middleware_stack = RequestIds(app.build_middleware_stack())  # also around answers to unexpected errors
    return app


def _static(app: FastAPI) -> None:
    verdict = styles()

    @app.get("/static/verdict.css")
    def verdict_styles() -> Response:
        return Response(verdict, media_type="text/css")

    @app.get("/health/live")
    def alive() -> Response:
        return Response("ok", media_type="text/plain")

    @app.get("/health/ready")
    def ready() -> Response:
        app.state.data.ledger.live()
        return Response("ok", media_type="text/plain")

    app.mount("/static", StaticFiles(directory=STATIC))


def _errors(app: FastAPI) -> None:
    @app.exception_handler(SignIn)
    async def on_sign_in(request: Request, error: SignIn) -> Response:
        link = sign_in_link(error.next_page)
        if request.headers.get("hx-request") == "true":
            return Response(status_code=204, headers={"hx-redirect": link})
        return RedirectResponse(link, 303)

    @app.exception_handler(ErrorPage)
    async def on_refused(request: Request, error: ErrorPage) -> Response:
        return _trouble(request, error.status, error.title, error.message, error.fix)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        titles = {
            404: "There is no such page",
            405: "This page takes no such request",
            413: "What you sent is too large",
        }
        title = titles.get(error.status_code, "That did not work")
        return _trouble(request, error.status_code, title, "", "Go back to the overview.")

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        told = f"{first['loc'][-1]}: {first['msg']}."
        return _trouble(request, 422, "Something is missing", told, "Fill it in and try again.")

    @app.exception_handler(RatchetError)
    async def on_known(request: Request, error: RatchetError) -> Response:
        log.warning("%s: %s", type(error).__name__, error)
        name = dependency_of(error)
        title = "Some of the data cannot be read"
        if name is not None and isinstance(error, Outage):
            title = f"{name.capitalize()}: {error.state}"
        return _trouble(request, 503, title, error.message, error.fix)

    @app.exception_handler(Exception)
    async def on_unknown(request: Request, error: Exception) -> Response:
        log.exception("unexpected", exc_info=error)
        return _trouble(request, 500, "Internal error", "The console's log says which.", "")


def _trouble(request: Request, status: int, title: str, message: str, fix: str) -> Response:
    """An error as a page, or as a box in place of a part of a page. Needs no ledger."""
    session: Session = request.state.session
    data: ConsoleData = request.app.state.data
    public = data.settings.console.public
    if public:
        message = fix = ""  # they may name addresses and paths
    partial = request.headers.get("hx-request") == "true"
    template = TEMPLATES.get_template("trouble_part.html" if partial else "trouble.html")
    page = template.render(
        title=title, message=message, fix=fix, dialog=request.headers.get("hx-target") == "dialog", csrf=session.csrf,
        nav=nav(public), section="", context=None, public=public, here=request.url.path,
    )  # fmt: skip
    return HTMLResponse(page, status)


def run_console(settings: Settings) -> None:
    console = settings.console
    progress_log.info(f"console on http://{console.host}:{console.port}")
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn sends it once more when it has stopped
    uvicorn.run(  # no log_config: the logging setup is the same as in other processes
        build_console(settings), host=console.host, port=console.port, log_config=None, log_level="warning",
        server_header=False, timeout_graceful_shutdown=STOP_SECONDS, limit_concurrency=256,
    )  # fmt: skip
