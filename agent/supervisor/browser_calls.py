"""Calls from the page: a token for one call, then the browser's offer on its way to a media worker and the answer back.

    POST /api/browser-calls/tokens {"did"}          -> token, ICE servers, seconds it lasts     (right: call)
    POST /api/browser-calls {"token", "sdp"}        -> call id, SDP answer; 401, 400, 488, 503 with Retry-After

The offer needs no session: the token says what the call may be (telephony/webrtc/tickets.py), so a page of your own may
start calls with tokens your server makes. The answer comes when the agent has let the call in.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from agent.supervisor.auth import Right
from agent.supervisor.rights import person_with
from agent.supervisor.schemas import BrowserCallAnswer, BrowserCallToken, Me
from storage.audit import append_audit
from storage.search import CallReader
from telephony.webrtc.config import WebRtcConfig
from telephony.webrtc.signaling import Offer, Refused, WorkerChoice
from telephony.webrtc.tickets import MAX_TOKEN_CHARS, TicketOffice, TokenRefused, ice_servers

MAX_SDP_CHARS = 60_000


@dataclass
class BrowserDesk:
    """What browser calls need; `off_because` says why there are none."""

    settings: WebRtcConfig
    tickets: TicketOffice
    workers: WorkerChoice
    turn_secret: bytes = b""
    off_because: str = ""


class TokenWanted(BaseModel):
    did: str = Field(default="", max_length=64, pattern=r"^[\w+*#.-]*$")


class OfferMade(BaseModel):
    token: str = Field(max_length=MAX_TOKEN_CHARS)
    sdp: str = Field(max_length=MAX_SDP_CHARS)


def add_browser_calls(
    app: FastAPI, reader: CallReader, clock: Callable[[], dt.datetime], desk: BrowserDesk | None
) -> None:
    off_because = "this page runs without an agent" if desk is None else desk.off_because

    @app.get("/api/me", response_model=Me)
    def me(request: Request) -> dict[str, object]:
        person = request.state.person
        did = desk.settings.did if desk is not None else ""
        calls = {"is_on": not off_because, "off_because": off_because, "did": did}
        return {"name": person.name, "rights": sorted(person.rights), "browser_calls": calls}

    @app.post("/api/browser-calls/tokens", response_model=BrowserCallToken)
    def sell(request: Request, wanted: TokenWanted) -> dict[str, object]:
        person = person_with(request, Right.CALL)
        if desk is None or off_because:
            raise HTTPException(503, off_because)
        now, settings = clock(), desk.settings
        did = settings.did or wanted.did
        append_audit(reader.engine, person.name, "browser_call", now=now, did=did)
        token = desk.tickets.sell(did, f"web-{person.name}", f"{person.name} (browser)", now.timestamp())
        expires_at_s = int(now.timestamp()) + settings.turn_credential_s
        servers = ice_servers(settings.ice_urls, desk.turn_secret, person.name, expires_at_s)
        policy = "relay" if settings.is_relay_only else "all"
        return {
            "token": token, "expires_in_s": settings.start_within_s, "ice_servers": servers,
            "ice_transport_policy": policy,
        }  # fmt: skip

    @app.post("/api/browser-calls", response_model=BrowserCallAnswer)
    async def offer(request: Request, made: OfferMade) -> dict[str, object]:
        if desk is None or off_because:
            raise HTTPException(503, off_because)
        try:
            ticket = await run_in_threadpool(desk.tickets.take, made.token, clock().timestamp())
        except TokenRefused as error:
            raise HTTPException(401, str(error)) from None
        source = f"{request.client.host}:{request.client.port}" if request.client else ""
        reply = await desk.workers.offer(
            Offer(
                sdp=made.sdp, did=ticket.did, ani=ticket.ani, display_name=ticket.display_name, source_address=source
            )  # fmt: skip
        )
        if isinstance(reply, Refused):
            headers = {"retry-after": str(reply.retry_after_s)} if reply.retry_after_s else None
            raise HTTPException(_http_status(reply.status), reply.reason, headers)
        return {"call_id": f"c-{reply.leg_id}", "sdp": reply.sdp}


def _http_status(sip_status: int) -> int:
    """SIP's answer in HTTP's numbers, where the two differ: 6xx (global failure) is a refusal by us."""
    return 503 if sip_status >= 600 else sip_status
