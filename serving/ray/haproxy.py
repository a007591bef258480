"""Starts HAProxy for Ray Serve with a corrected configuration. Run as a script; imports nothing of Ratchet.

Corrections to the configuration of Ray 2.60:

1. The statistics and metrics ports become loopback; Ray opens them on every address.
2. Limits that Ray lacks: time for headers and idle connections, open connections and health probes of each address. The
   first 16 KB of a body must arrive before the application gets a request.
3. ``X-Forwarded-For`` names the peer, unless that is a trusted proxy. ``Forwarded: for=unknown`` records that there was
   one: what a proxy on this machine forwards did not come from this machine.
4. Bodies are not spliced: HAProxy 2.8 would not notice that a client has left where the body is larger than a buffer
   (16 KB) and the application's connection is reused, and its answer would be computed for no one.
5. The connect timeout is 250 ms (Ray: 5 s): HAProxy waits that long, at most a second, after a refused connection.
6. A request whose replica ended before it answered goes to another replica only if it changes nothing.
7. Each request gets a new ``x-request-id`` unless its own is sane; each answer has it, HAProxy's own too.
8. Answers have a time limit, after which a replica that hangs is 504; operator calls, which may wait for the
   catalog, have a day.
9. HAProxy's own answers, and Ray's 404 before there is an application, are OpenAI error objects with the right status
   (Ray: text, all 500); 503 has ``Retry-After``. Answers to headers that HAProxy cannot read (400) stay as they are.
10. HAProxy ends with its parent (``PR_SET_PDEATHSIG``, which survives exec), instead of keeping the port.
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
"""Ray's lines that are replaced, or dropped."""
REPEATABLE = "/v1/embeddings /v1/classify /v1/search /v1/vqa /v1/chat/completions"
"""Paths of requests that may be sent twice, in addition to GET."""
REQUEST_ID = "^[A-Za-z0-9._~:+/=@-]{1,128}$"
"""IDs that are accepted from clients, as in :mod:`serving.http.request_ids`."""
ERROR_LIMIT = 1
"""After a refused connection a replica counts as down until it answers probes, at least half a second."""
RETRIES = 3
"""Replicas that may be gone before Serve's own proxy is asked: an HAProxy that was replaced knows no later replicas. A
request that crashes the process that reads it crashes one more at most."""
CONNECT_MS = 250
"""Also the pause (default: 1 s) before a request whose replica refused the connection goes to another."""
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
"""Message, type and code of HAProxy's own errors."""
OPERATOR_TIME = "    http-request set-timeout server 24h if { path_beg /admin/ }\n"


def close_binds(text: str) -> str:
    """Make binds of all addresses loopback, except the HTTP frontend's. Binds that name an address stay."""
    return OPEN_BIND.sub(r"\g<1>127.0.0.1:\g<2>", text)


def add_limits(text: str, limits: dict[str, object]) -> str:
    """Add the limits of ``front_limits``, and turn splicing off. Text without Ray's sections stays as it is."""
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
    """HAProxy arguments for an answer of its own."""
    again = " hdr Retry-After 1" if status == 503 else ""
    return f"status {status} content-type application/json string '{BODY.format(*ERRORS[status])}'{again}"


def frontend_rules(limits: dict[str, object]) -> str:
    """Rules of the HTTP frontend. IPv6 addresses count by their /64 network, which one host has."""
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
    """Correct the configuration file, then exec HAProxy. ``limits``: JSON of ``front_limits``."""
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
