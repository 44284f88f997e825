"""For machines that watch us: is the page's process alive, would a call be taken, and figures for Prometheus.

    GET /healthz    200 while this process lives: says nothing of calls
    GET /readyz     200 while a call would be taken, else 503; per role what is up (agent/readiness.py)
    GET /metrics    Prometheus text exposition (agent/supervisor/exposition.py)

None needs a session. /readyz asks every role again only when its last answer is older than KEPT_S, however often it is
asked. /metrics is for programs on this machine; with `web.metrics_token_file`, for whoever brings that token. Behind a
proxy everybody looks like this machine, so there the token is a must.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from agent.readiness import Readiness
from agent.supervisor.config import WebConfig
from agent.supervisor.exposition import CONTENT_TYPE, Exposition
from storage.search import CallReader

KEPT_S = 1.0
Examine = Callable[[], Awaitable[Readiness]]


class Examined:
    """The last answer of every role, asked again when it is old; one question at a time."""

    def __init__(self, examine: Examine, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._examine, self._clock_s = examine, clock_s
        self._asking = asyncio.Lock()
        self._last: tuple[float, Readiness] | None = None

    async def now(self) -> Readiness:
        async with self._asking:
            if self._last is None or self._clock_s() - self._last[0] > KEPT_S:
                found = await self._examine()
                self._last = (self._clock_s(), found)
            return self._last[1]


def add_health(app: FastAPI, reader: CallReader, config: WebConfig, examine: Examine | None) -> None:
    """Without `examine` the page runs without an agent, and is never ready."""
    examined = Examined(examine) if examine is not None else None
    exposition = Exposition(reader)
    token = config.read_metrics_token()

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        if examined is None:
            return JSONResponse({"is_ready": False, "roles": []}, status_code=503)
        found = await examined.now()
        content: dict[str, Any] = {"is_ready": found.is_ready, "roles": [asdict(role) for role in found.roles]}
        return JSONResponse(content, status_code=200 if found.is_ready else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        check_reader(request, config, token)
        found = await examined.now() if examined is not None else None
        text = await run_in_threadpool(exposition.text, found)
        return Response(text, media_type=CONTENT_TYPE)


def check_reader(request: Request, config: WebConfig, token: str) -> None:
    """401 or 403 unless the figures are for whoever asks."""
    if token:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "the token of web.metrics_token_file is needed", {"www-authenticate": "Bearer"})
    elif config.is_behind_proxy or not _is_this_machine(request):
        raise HTTPException(403, "only programs on this machine may read this; others with web.metrics_token_file")


def _is_this_machine(request: Request) -> bool:
    try:
        return ipaddress.ip_address(request.client.host if request.client else "").is_loopback
    except ValueError:
        return False
