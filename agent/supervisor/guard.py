"""What every request passes before a handler sees it: Host, Origin, size, session; and what every answer carries.

Plain ASGI, because it must also cover streams. Host: against DNS rebinding. Origin: against other sites' pages; the
cookie is SameSite=Strict besides. Bodies are small here: a login form, and the offer of a browser call. Who is signed
in goes on to the handlers as `request.state.person`.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent.supervisor.auth import Door, Person
from agent.supervisor.config import WebConfig

MAX_BODY_BYTES = 4_096
OFFER_PATH = "/api/browser-calls"  # opened by a call token instead of a session
MAX_OFFER_BYTES = 65_536  # an SDP with many candidates
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = frozenset(
    {"/login", "/healthz", "/readyz", "/metrics", "/console/console.css", "/console/icon.svg", OFFER_PATH}
)  # seen without signing in; /metrics asks for itself (health.py)
# No inline script or style, nothing from elsewhere, no frame around us.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src 'self'; img-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with "no-referrer" browsers send Origin: null on the login form
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
}


def cookie_name(config: WebConfig) -> str:
    """With the __Host- prefix a browser accepts it only over TLS, for this host, and never from a sub-domain."""
    return "__Host-minmo_session" if config.is_https else "minmo_session"


class Guard:
    """ASGI middleware; `clock` gives seconds since the epoch."""

    def __init__(self, app: ASGIApp, *, config: WebConfig, door: Door, clock: Callable[[], float]) -> None:
        self._app = app
        self._config = config
        self._door = door
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
                if self._config.is_https:
                    headers["strict-transport-security"] = "max-age=31536000"
            await send(message)

        if scope["type"] != "http":  # no WebSocket is spoken here
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_secured)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        method, path = scope["method"], scope["path"]
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _without_port(hosts[0]) not in self._config.host_names:
            return _refuse(400, "unknown host")
        origin = headers.get("origin")
        is_safe = method in SAFE_METHODS
        if (origin is not None and not self._is_own_origin(origin, hosts[0])) or (origin is None and not is_safe):
            return _refuse(403, "request from another origin")
        if not is_safe:
            length = headers.get("content-length", "")
            allowed = MAX_OFFER_BYTES if path == OFFER_PATH else MAX_BODY_BYTES
            if not (length.isascii() and length.isdigit()) or int(length) > allowed:
                return _refuse(413, f"a body of at most {allowed} bytes with its length is needed")
        person = self._person(headers)
        scope.setdefault("state", {})["person"] = person
        if path in OPEN_PATHS or person is not None:
            return None
        if path == "/" and is_safe:
            return RedirectResponse("/login", status_code=303)
        return _refuse(401, "sign in first")

    def _is_own_origin(self, origin: str, host: str) -> bool:
        parts = urlsplit(origin)
        return parts.scheme == ("https" if self._config.is_https else "http") and parts.netloc.lower() == host.lower()

    def _person(self, headers: Headers) -> Person | None:
        cookie = cookie_parser(headers.get("cookie", "")).get(cookie_name(self._config), "")
        return self._door.who(cookie, self._clock()) if cookie else None


def _without_port(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


def _refuse(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)
