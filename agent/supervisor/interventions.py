"""What a supervisor does to a running call from the page: hear it, end it, pause its recording. Rights apart, each
audited before it happens (an audit that cannot be written stops it). The agent carries it out (agent/monitor.py).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from agent import monitor
from agent.supervisor.auth import Right
from agent.supervisor.rights import person_with
from storage.audit import append_audit
from storage.entries import SAFE_ID
from storage.search import CallReader


def checked(call_id: str) -> str:
    """A call id that may be asked for."""
    if not SAFE_ID.fullmatch(call_id):
        raise HTTPException(404, "no such call")
    return call_id


def add_interventions(
    app: FastAPI, reader: CallReader, clock: Callable[[], dt.datetime], monitor_socket: Path | None
) -> None:
    def agent_socket() -> Path:
        if monitor_socket is None:
            raise HTTPException(503, "this page runs without an agent")
        return monitor_socket

    async def _audit(name: str, action: str, call_id: str) -> None:
        await run_in_threadpool(append_audit, reader.engine, name, action, now=clock(), object_id=call_id)

    @app.get("/api/calls/{call_id}/listen", response_class=StreamingResponse)
    async def listen(request: Request, call_id: str) -> Response:
        """The call as it is heard now, until it ends: int16, caller left, agent right, at `x-sample-rate`."""
        person = person_with(request, Right.LISTEN)
        socket = agent_socket()
        await _audit(person.name, "listen_live", checked(call_id))
        try:
            rate_hz, pieces = await monitor.listen(socket, call_id)
        except monitor.NotRunning:
            raise HTTPException(404, "this call is not running") from None
        headers = {"x-sample-rate": str(rate_hz), "x-accel-buffering": "no"}
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    @app.post("/api/calls/{call_id}/hang-up")
    async def hang_up(request: Request, call_id: str) -> dict[str, str]:
        """Ends the call at once; its record says cause `supervisor`."""
        person = person_with(request, Right.HANG_UP)
        socket = agent_socket()
        await _audit(person.name, "hang_up", checked(call_id))
        try:
            await monitor.hang_up(socket, call_id)
        except monitor.NotRunning:
            raise HTTPException(404, "this call is not running") from None
        return {"status": "ending"}

    @app.post("/api/calls/{call_id}/recording/{wanted}")
    async def keep_recording(request: Request, call_id: str, wanted: Literal["pause", "go-on"]) -> dict[str, str]:
        """From now on silence is kept in the place of the sound, or the sound again; the call's journal says who."""
        person = person_with(request, Right.PAUSE_RECORDING)
        socket = agent_socket()
        await _audit(person.name, f"recording_{wanted.replace('-', '_')}", checked(call_id))
        try:
            await monitor.keep_recording(socket, call_id, wanted == "go-on", f"supervisor:{person.name}")
        except monitor.NotRunning:
            raise HTTPException(404, "this call is not running") from None
        return {"status": "recording" if wanted == "go-on" else "paused"}
