"""The supervisors' page: an application over the database, for its own process. Calls never depend on it.

    GET  /                                   the console (redirects to /login)
    GET  /login   POST /login   POST /logout token in, cookie out
    GET  /api/summary?hours=24               open calls, latencies measured on the wire
    GET  /api/calls?text=&campaign=&disposition=&state=open|closed&before=&limit=
    GET  /api/calls/{id}                     call, turns, tools, metrics, defects
    GET  /api/calls/{id}/events?after_seq=   its journal
    GET  /api/calls/{id}/recording           WAV, caller left, agent right; Range is honoured    (right: playback)
    GET  /api/calls/{id}/peaks?bins=         for drawing the two lanes                          (right: playback)
    GET  /api/live?call_id=                  server-sent events, one per journal row; Last-Event-ID goes on
    GET  /api/me                             who is signed in, with which rights
    GET  /api/export/calls.csv | .json       lists of calls to take away                       (right: export)
    GET  /api/calls/{id}/listen   POST /api/calls/{id}/hang-up      hear, end a running call   (rights: listen, hang_up)
    POST /api/calls/{id}/recording/pause | go-on                       what is kept of it  (right: pause_recording)
    POST /api/browser-calls/tokens   POST /api/browser-calls        call from the page         (right: call)
    POST /api/calls                          the agent calls somebody for a campaign        (right: dial)
    GET  /api/security?kind=&limit=          what strangers and broken peers tried
    GET  /api/openapi.json                   the same for machines
    GET  /healthz  /readyz  /metrics         for machines that watch us (health.py)

Everything but /login, its style sheet and icon, the last line and the offer of a browser call (which has a token of its
own) needs the cookie (guard.py). All reading of calls, hearing, hanging up and exports are audited.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Form, Header, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse

from agent.supervisor import schemas
from agent.supervisor.auth import Door, Right, TooManyAttempts, WrongToken
from agent.supervisor.browser_calls import BrowserDesk, add_browser_calls
from agent.supervisor.config import WebConfig
from agent.supervisor.exports import add_exports
from agent.supervisor.guard import Guard, cookie_name
from agent.supervisor.health import Examine, add_health
from agent.supervisor.interventions import add_interventions, checked
from agent.supervisor.live import LiveTail, TooManyViews
from agent.supervisor.outbound_calls import add_outbound_calls
from agent.supervisor.recordings import add_recordings
from agent.supervisor.rights import Auditor, person_with
from storage.audit import append_audit
from storage.entries import UnknownCall
from storage.search import CallReader
from storage.security import list_security_events
from storage.unmeasured import UnmeasuredCount

CONSOLE = Path(__file__).parent / "console"
CONTENT_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
# Wire metrics on the summary line, in this order.
SHOWN_METRICS = ("voice_to_voice_ms", "first_word_ms", "duck_ms", "stop_ms")
MAX_LISTED = 100  # calls in one answer, without the right to export
MAX_CAUGHT_UP = 2_000  # rows of everybody's calls that a live view goes back, without it
LOGIN_ERRORS = {
    401: "That is not the token. It was printed when the page was started for the first time.",
    429: "Too many attempts. Wait a minute, then try again.",
}
Clock = Callable[[], dt.datetime]


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def create_app(
    reader: CallReader, live: LiveTail, config: WebConfig, *, door: Door, clock: Clock = _utc_now,
    desk: BrowserDesk | None = None, monitor_socket: Path | None = None, dial_socket: Path | None = None,
    examine: Examine | None = None,
) -> FastAPI:  # fmt: skip
    """The application; `clock` is the shell's. `desk`: browser calls; `monitor_socket`, `dial_socket`: the agent's
    (agent/monitor.py, agent/dial_socket.py); `examine`: would a call be taken (agent/readiness.py). Without them the
    page shows calls and no more."""
    app = FastAPI(title="MinMo supervisors", openapi_url="/api/openapi.json", docs_url=None, redoc_url=None)
    app.add_middleware(Guard, config=config, door=door, clock=lambda: clock().timestamp())
    _add_errors(app)
    _add_console(app)
    _add_session(app, reader, door, config, clock)
    auditor = Auditor(reader, clock)
    _add_calls(app, reader, clock, auditor)
    _add_live(app, reader, live, door, config, clock, auditor)
    add_recordings(app, reader, auditor)
    add_health(app, reader, config, examine)
    add_exports(app, reader, clock)
    add_interventions(app, reader, clock, monitor_socket)
    add_browser_calls(app, reader, clock, desk)
    add_outbound_calls(app, reader, clock, dial_socket)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refuse(_request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_input(_request: Request, error: RequestValidationError) -> Response:
        where = [".".join(str(part) for part in problem["loc"]) for problem in error.errors()]
        return JSONResponse({"error": f"not valid: {', '.join(where)}"}, status_code=422)

    @app.exception_handler(UnknownCall)
    async def refuse_call(_request: Request, _error: UnknownCall) -> Response:
        return JSONResponse({"error": "no such call"}, status_code=404)


def _add_console(app: FastAPI) -> None:
    # Read once, served by exact name: no path from a request ever reaches the file system.
    assets = {path.name: path.read_bytes() for path in CONSOLE.iterdir() if path.suffix in CONTENT_TYPES}
    index = (CONSOLE / "index.html").read_bytes()

    @app.get("/", include_in_schema=False)
    def console() -> Response:
        return Response(index, media_type="text/html; charset=utf-8")

    @app.get("/console/{name}", include_in_schema=False)
    def asset(name: str) -> Response:
        if name not in assets:
            raise HTTPException(404, "no such file")
        return Response(assets[name], media_type=CONTENT_TYPES[Path(name).suffix])


def _add_session(app: FastAPI, reader: CallReader, door: Door, config: WebConfig, clock: Clock) -> None:
    page = (CONSOLE / "login.html").read_text(encoding="utf-8")

    def login_page(status: int = 200, headers: dict[str, str] | None = None) -> Response:
        message = f'<p class="problem" role="alert">{LOGIN_ERRORS[status]}</p>' if status != 200 else ""
        return HTMLResponse(page.replace("<!-- message -->", message), status_code=status, headers=headers)

    @app.get("/login", include_in_schema=False)
    def ask() -> Response:
        return login_page()

    @app.post("/login")
    def login(request: Request, token: Annotated[str, Form(max_length=200)]) -> Response:
        """Form field `token`; sets the session cookie and redirects to the console."""
        source = request.client.host if request.client else ""
        now = clock()
        try:
            cookie = door.login(token.strip(), source, now.timestamp())
        except WrongToken:
            append_audit(reader.engine, "unknown", "login_refused", now=now, source=source)
            return login_page(401)
        except TooManyAttempts as error:
            return login_page(429, {"retry-after": str(error.retry_after_s)})
        person = door.who(cookie, now.timestamp())
        append_audit(reader.engine, person.name if person else "unknown", "login", now=now, source=source)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            cookie_name(config),
            cookie,
            max_age=round(config.session_hours * 3_600),
            path="/",
            secure=config.is_https,
            httponly=True,
            samesite="strict",
        )
        return response

    @app.post("/logout")
    def logout(request: Request) -> Response:
        """Ends every session there is."""
        door.sign_out_everywhere()
        append_audit(reader.engine, request.state.person.name, "logout", now=clock())
        response = RedirectResponse("/login", status_code=303)
        response.delete_cookie(cookie_name(config), path="/", secure=config.is_https, httponly=True, samesite="strict")
        return response


def _add_calls(app: FastAPI, reader: CallReader, clock: Clock, auditor: Auditor) -> None:
    unmeasured = UnmeasuredCount(reader)

    @app.get("/api/summary", response_model=schemas.Summary)
    def summary(hours: Annotated[int, Query(ge=1, le=744)] = 24) -> dict[str, Any]:
        since = clock() - dt.timedelta(hours=hours)
        values = {name: reader.get_metric_values(name, since=since) for name in SHOWN_METRICS}
        latencies = [percentiles(name, found) for name, found in values.items() if found]
        num_calls, num_turns = unmeasured.since(since)
        return {
            "num_open_calls": reader.num_open_calls(), "latencies": latencies, "hours": hours,
            "num_unmeasured_calls": num_calls, "num_unmeasured_turns": num_turns,
        }  # fmt: skip

    @app.get("/api/calls", response_model=schemas.CallList)
    def list_calls(
        request: Request,
        text: Annotated[str, Query(max_length=200)] = "",
        campaign: Annotated[str, Query(max_length=64)] = "",
        disposition: Annotated[str, Query(max_length=32)] = "",
        state: Literal["open", "closed"] | None = None,
        before: schemas.UtcTime | None = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
    ) -> dict[str, Any]:
        """More than MAX_LISTED at once needs the right `export`."""
        if limit > MAX_LISTED:
            person_with(request, Right.EXPORT)
        is_open = None if state is None else state == "open"
        filters = {"text": text, "campaign": campaign, "disposition": disposition}
        asked = filters | {"state": state or "", "before": str(before or ""), "limit": limit}
        auditor.note(request, "list", filters={key: value for key, value in asked.items() if value})
        return {"calls": reader.list_calls(limit=limit, before=before, is_open=is_open, **filters)}

    @app.get("/api/security", response_model=schemas.SecurityEventList)
    def list_security(
        kind: Annotated[str, Query(max_length=32)] = "", limit: Annotated[int, Query(ge=1, le=1_000)] = 100
    ) -> dict[str, Any]:
        return {"events": list_security_events(reader.engine, limit=limit, kind=kind)}

    @app.get("/api/calls/{call_id}", response_model=schemas.CallDetail)
    def get_call(request: Request, call_id: str) -> dict[str, Any]:
        call = reader.get_call(checked(call_id))
        auditor.note(request, "view", call_id)
        return call | {"num_turns": len(call["turns"])}

    @app.get("/api/calls/{call_id}/events", response_model=schemas.EventList)
    def get_events(
        request: Request, call_id: str, after_seq: Annotated[int, Query(ge=-1, lt=1 << 31)] = -1
    ) -> dict[str, Any]:
        auditor.note(request, "view", checked(call_id))
        return {"events": reader.get_events(call_id, after_seq=after_seq)}


def _add_live(
    app: FastAPI, reader: CallReader, live: LiveTail, door: Door, config: WebConfig, clock: Clock, auditor: Auditor
) -> None:
    @app.get("/api/live", response_class=StreamingResponse)
    async def follow(
        request: Request,
        call_id: str = "",
        after_id: Annotated[int | None, Query(ge=0, lt=1 << 63)] = None,
        last_event_id: Annotated[str, Header()] = "",
    ) -> Response:
        """Server-sent events `journal`: {call_id, seq, kind, payload, at}. Of all calls, from far back: `export`."""
        if call_id:
            checked(call_id)
        if re.fullmatch(r"\d{1,18}", last_event_id):
            after_id = int(last_event_id)
        if after_id is not None and not call_id and Right.EXPORT not in request.state.person.rights:
            after_id = max(after_id, await run_in_threadpool(reader.last_journal_id) - MAX_CAUGHT_UP)
        await run_in_threadpool(auditor.note, request, "follow", call_id)
        try:
            live.check_room()
        except TooManyViews:
            raise HTTPException(503, "too many live views", {"retry-after": "10"}) from None
        cookie = request.cookies.get(cookie_name(config), "")
        stream = live.stream(
            call_id=call_id,
            after_id=after_id,
            is_allowed=lambda: door.is_signed_in(cookie, clock().timestamp()),
        )
        return StreamingResponse(stream, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def percentiles(name: str, values: list[float]) -> dict[str, Any]:
    """Nearest rank; `values` is not empty. Example: p50 of [1, 2, 3, 4] is 2."""
    ranked = sorted(values)

    def at(share: float) -> float:
        return ranked[max(0, math.ceil(share * len(ranked)) - 1)]

    return {"name": name, "n": len(ranked), "p50": at(0.50), "p95": at(0.95)}
