"""Calls that the agent places for a campaign, asked for over HTTP.

    POST /api/calls {"campaign", "number" | "uri", "request_id"?}     202 {call_id, is_new}       (right: dial)

Audited before the agent is asked (an audit that cannot be written stops it). A refusal is typed: {"error", "code"},
with Retry-After where it is a matter of time. Which numbers and hosts may be called, campaign and operator decide, and
the agent checks (agent/outbound.py).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from agent.dial_socket import Dial, NotDialled, ask
from agent.supervisor.auth import Right
from agent.supervisor.rights import person_with
from agent.supervisor.schemas import DialledCall, DialRefusal
from storage.audit import append_audit
from storage.search import CallReader

STATUS_OF = {
    "unknown_campaign": 404, "not_allowed": 403, "bad_target": 422, "busy": 503, "closing": 503, "storage_full": 503,
    "no_agent": 503,
}  # fmt: skip


class CallWanted(BaseModel):
    """Exactly one of number and uri."""

    campaign: str = Field(max_length=64)
    number: str = Field(default="", max_length=64)
    uri: str = Field(default="", max_length=512)
    request_id: str = Field(default="", max_length=128)  # the same again places no second call


def add_outbound_calls(
    app: FastAPI, reader: CallReader, clock: Callable[[], dt.datetime], dial_socket: Path | None
) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": DialRefusal} for status in sorted(set(STATUS_OF.values()))
    }

    @app.post("/api/calls", response_model=DialledCall, status_code=202, responses=refusals)
    async def place_call(request: Request, wanted: CallWanted) -> Response | dict[str, object]:
        person = person_with(request, Right.DIAL)
        party = wanted.number or wanted.uri
        await run_in_threadpool(
            append_audit, reader.engine, person.name, "place_call", now=clock(), campaign=wanted.campaign, party=party,
            request_id=wanted.request_id,
        )  # fmt: skip
        if dial_socket is None:
            return _refuse(NotDialled("no_agent", "this page runs without an agent"))
        answer = await ask(dial_socket, Dial(**wanted.model_dump(), actor=person.name))
        if isinstance(answer, NotDialled):
            return _refuse(answer)
        return {"call_id": answer.call_id, "is_new": answer.is_new}


def _refuse(refused: NotDialled) -> Response:
    headers = {"retry-after": str(refused.retry_after_s)} if refused.retry_after_s else None
    content = {"error": refused.reason, "code": refused.code}
    return JSONResponse(content, status_code=STATUS_OF[refused.code], headers=headers)
