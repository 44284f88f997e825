"""The web process: opens the database, prints where the page is (and, once, the token), serves until told to stop.

    run_web(config.web, config.storage)      # blocks; SIGTERM or SIGINT end it, and so does the parent's death

Nothing else runs in here, and nothing waits for it: it may be killed at any time.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import importlib.util
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import uvicorn

from agent.readiness import Readiness
from agent.supervisor.api import create_app
from agent.supervisor.auth import Door
from agent.supervisor.browser_calls import BrowserDesk
from agent.supervisor.config import WebConfig
from agent.supervisor.live import LiveTail
from storage.config import StorageConfig
from storage.search import CallReader
from storage.spent_tokens import spend_call_token
from telephony.webrtc.config import WebRtcConfig, read_secret
from telephony.webrtc.signaling import WorkerChoice
from telephony.webrtc.tickets import TicketOffice

PARENT_POLL_S = 1.0


def run_web(
    config: WebConfig,
    storage: StorageConfig,
    *,
    is_new_token_wanted: bool = False,
    parent_pid: int | None = None,
    on_ready: Callable[[str], None] | None = None,
    make_desk: Callable[[CallReader], BrowserDesk] | None = None,
    monitor_socket: Path | None = None,
    dial_socket: Path | None = None,
    examine: Callable[[CallReader], Awaitable[Readiness]] | None = None,
) -> None:
    """Serves the page in this process.

    `on_ready` gets the address; with `parent_pid` the page ends when that is gone. `make_desk` (`browser_desk`) and the
    sockets: see `create_app`.
    """
    listener = _bind(config)
    url = f"{'https' if config.tls_cert_file else 'http'}://{_shown(config.host)}:{listener.getsockname()[1]}/"
    state_file = storage.folder / "web" / "state.json"
    door, token = Door.open(state_file, session_s=config.session_hours * 3_600, is_new_token_wanted=is_new_token_wanted)
    _announce(url, token)
    if on_ready is not None:
        on_ready(url)
    reader = CallReader.open(storage)
    live = LiveTail(reader, poll_ms=config.poll_ms, max_views=config.max_live_views)
    desk = make_desk(reader) if make_desk is not None else None
    app = create_app(
        reader, live, config, door=door, desk=desk, monitor_socket=monitor_socket, dial_socket=dial_socket,
        examine=partial(examine, reader) if examine is not None else None,
    )  # fmt: skip
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # addresses and call ids are in the audit table, not in a log
            server_header=False,
            proxy_headers=config.is_behind_proxy,
            ssl_certfile=config.tls_cert_file or None,
            ssl_keyfile=config.tls_key_file or None,
            timeout_graceful_shutdown=3,
            h11_max_incomplete_event_size=16_384,
        )
    )
    try:
        asyncio.run(_serve(server, listener, live, parent_pid))
    finally:
        reader.close()
        listener.close()


def browser_desk(
    settings: WebRtcConfig, offer_sockets: list[Path], answer_timeout_s: float, reader: CallReader
) -> BrowserDesk:
    """For `create_app`, from the settings."""

    def spend(nonce: str, expires_at_s: float, now_s: float) -> bool:
        at, now = (dt.datetime.fromtimestamp(seconds, dt.UTC) for seconds in (expires_at_s, now_s))
        return spend_call_token(reader.engine, nonce, expires_at=at, now=now)

    off_because = "" if settings.num_workers else "calls from browsers are switched off (webrtc.num_workers = 0)"
    if importlib.util.find_spec("aiortc") is None:
        off_because = "calls from browsers need the optional packages: pip install 'minmo-agent[webrtc]'"
    signing = (
        read_secret("call_token_secret_file", settings.call_token_secret_file)
        if settings.call_token_secret_file
        else secrets.token_bytes(32)
    )
    turn = read_secret("turn_secret_file", settings.turn_secret_file) if settings.turn_secret_file else b""
    workers = WorkerChoice(offer_sockets, answer_timeout_s + 5.0)
    return BrowserDesk(settings, TicketOffice(signing, settings.start_within_s, spend), workers, turn, off_because)


async def _serve(server: uvicorn.Server, listener: socket.socket, live: LiveTail, parent_pid: int | None) -> None:
    async def watch() -> None:
        while not server.should_exit:
            await asyncio.sleep(PARENT_POLL_S / 5)
            if parent_pid is not None and os.getppid() != parent_pid:
                server.should_exit = True
        live.is_stopping = True

    async with asyncio.TaskGroup() as group:
        group.create_task(watch(), name="web/watch")
        await server.serve(sockets=[listener])
        server.should_exit = True


def _bind(config: WebConfig) -> socket.socket:
    """Bound before anything is announced, so a printed address is one that answers."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host.strip("[]"), config.port))
    except OSError as error:
        listener.close()
        raise SystemExit(f"web.host = {config.host!r}, web.port = {config.port}: {error.strerror}") from error
    return listener


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _announce(url: str, token: str | None) -> None:
    how = "sign in with the token printed at the first start (make a new one: minmo serve --new-token)"
    if token is not None:
        how = f"token (shown this once): {token}"
    print(f"Supervisors' page: {url}\n  {how}", file=sys.stderr, flush=True)
