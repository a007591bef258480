"""Starts HAProxy for Ray Serve, with its configuration corrected. Run as a script; imports nothing of ours.

1. Ray 2.60 writes ``bind *:port`` for the statistics page and ``bind :port`` for the metrics, whatever the host in its
   settings: both answer every address of the machine. Here they become loopback. What answers requests stays as it is.
2. Ray sets no time limit for the headers of a request, and lets an idle connection stay for an hour. Here both are
   bounded, each address has a bound of open connections and of health probes, and the first 16 KB of a body must be
   there before a request goes on to the application.
3. Ray passes ``X-Forwarded-For`` on as the client sent it. Here it names the peer, unless that is a trusted proxy. That
   there was one is kept (``Forwarded: for=unknown``): what a proxy on this machine forwards did not come from here.
4. Ray has bodies spliced. HAProxy 2.8 then does not notice that a client has closed its connection, where the body is
   larger than a buffer (16 KB) and the connection to the application is one that it uses again: what the client had
   asked for was computed for no one. Here bodies are copied.
5. After a connection that was refused HAProxy waits as long as for one that does not come to be (a second, with Ray's
   five), though it then asks another replica. Here that is a quarter of a second.
6. A request whose replica ended before it answered is passed to another one. Here that is so for what changes nothing.
7. HAProxy's own answers would have no ``x-request-id``, and Ray takes any that a client sends. Here each request gets a
   new one unless its own is sane, and each answer has it; but for those to headers that HAProxy could not read.
8. Ray sets no time limit for an answer: a request to a replica that stands still would wait for ever. Here it is 504
   when the replica itself would have answered so. A release may wait for the catalog; operator calls have a day.
9. HAProxy's own answers are plain text or HTML, and Ray makes all of them 500. Here each is an error object as of the
   OpenAI API with the status that HAProxy means, 503 with ``Retry-After``, and so is Ray's 404 while there is no
   application yet; but for the 400 to headers that HAProxy could not read, which it has from no configuration.
10. HAProxy outlives a killed parent and keeps the port. Here the kernel is asked to end it with its parent
   (``PR_SET_PDEATHSIG``, which survives exec).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys

PR_SET_PDEATHSIG = 1
OPEN_BIND = re.compile(r"(?<!^frontend http_frontend\n)^([ \t]*bind )\*?:(\d+)", re.MULTILINE)
DEFAULTS = re.compile(r"^defaults\n", re.MULTILINE)
FRONTEND = re.compile(r"^frontend http_frontend\n\s*bind .*\n", re.MULTILINE)
BACKEND = re.compile(r"^backend .*\n", re.MULTILINE)
NO_APPLICATION = re.compile(r"^(backend default_backend\n)[ \t]*http-request return status 404 .*\n", re.MULTILINE)
SERVER_ERRORS = re.compile(r"\berror-limit (\d+|\{\{[^}]*\}\})")
DROPPED = re.compile(
    r"^[ \t]*((timeout (connect|client|server|http-request|http-keep-alive)|retry-on|retries|errorfile) .*"
    r"|option splice-request)\n",
    re.MULTILINE,
)
"""Lines of Ray's that are replaced, or left out."""
REPEATABLE = "/v1/embeddings /v1/classify /v1/search /v1/vqa /v1/chat/completions"
"""Paths of requests that may be answered twice, in addition to those of GET."""
REQUEST_ID = "^[A-Za-z0-9._~:+/=@-]{1,128}$"
"""An id that is taken from a client, as in :mod:`serving.http.request_ids`."""
ERROR_LIMIT = 1
"""A connection that was refused: the replica counts as gone until it answers probes, half a second at least."""
RETRIES = 3
"""As many replicas may be gone before Serve's own proxy is asked, which knows of later ones: an HAProxy that was
replaced goes on with the replicas of its time. A request that ends the process that reads it ends one more at most."""
CONNECT_MS = 250
"""Also what HAProxy waits, where it does not take turns, before it passes a request on whose replica refused the
connection: a second otherwise."""
BODY = '{{"error": {{"message": "{0}", "type": "{1}", "param": null, "code": "{2}"}}}}'

ERRORS = {
    400: ("the request is not HTTP: a header or the first line is broken, or too long.", "invalid_request_error",
          "bad_request"),
    408: ("the request did not arrive in time.", "invalid_request_error", "request_timeout"),
    500: ("the server made a mistake.", "server_error", "internal"),
    502: ("the process that had the request ended before it answered.", "server_error", "bad_gateway"),
    503: ("no process answers; send the request again shortly.", "service_unavailable", "unavailable"),
    504: ("the answer did not come in time.", "timeout_error", "deadline_exceeded"),
}  # fmt: skip
"""Of HAProxy itself: message, type and code."""
OPERATOR_TIME = "    http-request set-timeout server 24h if { path_beg /admin/ }\n"


def close_binds(text: str) -> str:
    """The configuration with binds of all addresses made loopback, but for that of the HTTP frontend, which is where
    clients come from; binds that name an address stay.
    """
    return OPEN_BIND.sub(r"\g<1>127.0.0.1:\g<2>", text)


def add_limits(text: str, limits: dict[str, object]) -> str:
    """Ray's configuration with the limits of ``front_limits``, and without spliced bodies. One without Ray's
    sections stays as it is.
    """
    defaults = (
        f"    timeout connect {CONNECT_MS}ms\n"
        f"    timeout client {limits['idle_ms']}ms\n"
        f"    timeout http-request {limits['header_ms']}ms\n"
        f"    timeout http-keep-alive {limits['idle_ms']}ms\n"
        f"    timeout server {limits['answer_ms']}ms\n"
        "    retry-on conn-failure empty-response\n"
        f"    retries {RETRIES}\n"
    ) + "".join(f"    http-error {error_object(status)}\n" for status in ERRORS)
    text = DROPPED.sub("", text)
    text = NO_APPLICATION.sub(rf"\1    http-request return {error_object(503)}\n", text)
    text = BACKEND.sub(lambda match: match.group() + OPERATOR_TIME, text)
    text = SERVER_ERRORS.sub(f"error-limit {ERROR_LIMIT}", text)
    text = DEFAULTS.sub(lambda match: match.group() + defaults, text)
    return FRONTEND.sub(lambda match: match.group() + frontend_rules(limits), text)


def error_object(status: int) -> str:
    """Arguments of HAProxy for an answer of its own."""
    again = " hdr Retry-After 1" if status == 503 else ""
    return f"status {status} content-type application/json string '{BODY.format(*ERRORS[status])}'{again}"


def frontend_rules(limits: dict[str, object]) -> str:
    """Lines of the HTTP frontend. IPv6 addresses count by their /64 network, which one host has."""
    proxies = " ".join(str(network) for network in limits["proxies"])  # type: ignore[attr-defined]
    others = f" !{{ src {proxies} }}" if proxies else ""
    from_others = f" if{others}" if proxies else ""
    often = BODY.format("the probes of this address are too many.", "rate_limit_error", "rate_limited")
    return f"""\
    option http-buffer-request
    acl has_id req.fhdr(x-request-id) -m reg {REQUEST_ID}
    http-request set-var(txn.request_id) req.fhdr(x-request-id) if has_id
    http-request set-var(txn.request_id) uuid() unless has_id
    http-request set-header x-request-id %[var(txn.request_id)]
    http-after-response set-header x-request-id %[var(txn.request_id)] if {{ var(txn.request_id) -m found }}
    http-after-response set-header x-request-id %[uuid()] unless {{ var(txn.request_id) -m found }}
    stick-table type ipv6 size 100k expire 2m store conn_cur,gpc0_rate(1s)
    tcp-request connection track-sc0 src,ipmask(32,64)
    tcp-request connection reject if {{ sc0_conn_cur gt {limits["per_address"]} }}{others}
    acl is_probe path_beg /health/
    http-request sc-inc-gpc0(0) if is_probe
    http-request return status 429 content-type application/json string '{often}' hdr Retry-After 1 \
if is_probe {{ sc0_gpc0_rate gt {limits["probes_per_second"]} }}{others}
    http-request set-header Forwarded for=unknown if {{ req.hdr(X-Forwarded-For) -m found }}{others}
    http-request del-header X-Forwarded-For{from_others}
    option forwardfor
    http-request disable-l7-retry unless METH_GET or {{ path {REPEATABLE} }}
"""


def main(limits: str, binary: str, arguments: list[str]) -> None:
    """Correct the configuration file, and become HAProxy. ``limits``: JSON of ``front_limits``."""
    path = arguments[arguments.index("-f") + 1] if "-f" in arguments else None
    if path is not None:
        with open(path) as file:  # noqa: PTH123  started without site-packages, for every reload: as little as possible
            text = file.read()
        if "http-buffer-request" not in text:
            with open(path, "w") as file:  # noqa: PTH123
                file.write(add_limits(close_binds(text), json.loads(limits)))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.execv(binary, [binary, *arguments])  # noqa: S606  fixed binary, arguments from Ray


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
