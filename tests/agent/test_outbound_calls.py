"""Calls asked for over HTTP: right, audit, typed refusals; and the leg whose INVITE waits until the agent is ready."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from agent.dial_socket import Dial, Dialled, NotDialled, ask, serve
from agent.outbound import DialledLeg
from agent.supervisor.api import create_app
from agent.supervisor.auth import Door, Right
from agent.supervisor.config import WebConfig
from agent.supervisor.live import LiveTail
from agent.supervisor.outbound_calls import STATUS_OF
from storage import tables
from storage.calls import CallStore
from storage.config import StorageConfig
from telephony.client import CallRefused
from telephony.leg import Answer, Hangup, LegDisconnected, LegError, LegStateChanged, Play, Refer

NOW = dt.datetime(2026, 11, 22, 16, 0, tzinfo=dt.UTC)
ORIGIN = "http://localhost:8080"
WANTED = {"campaign": "acme", "number": "+390212345", "request_id": "r1"}


@dataclass
class Page:
    store: CallStore
    door: Door
    client: httpx.AsyncClient
    asked: list[Dial] = field(default_factory=list)
    answer: Dialled | NotDialled = Dialled("c-1")

    async def sign_in(self, *rights: Right) -> None:
        token = self.door.add_person("ann", frozenset(rights))
        await self.client.post("/login", data={"token": token}, headers={"origin": ORIGIN})

    async def post(self, body: object) -> httpx.Response:
        return await self.client.post("/api/calls", json=body, headers={"origin": ORIGIN})

    async def dial(self, wanted: Dial) -> Dialled | NotDialled:
        self.asked.append(wanted)
        return self.answer

    def audited(self) -> list[tuple[str, str, str]]:
        with self.store.engine.connect() as connection:
            rows = connection.execute(sa.select(tables.audit).order_by(tables.audit.c.id)).all()
        return [(row.actor, row.action, row.detail.get("party", "")) for row in rows]


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    store = CallStore(StorageConfig(folder=tmp_path / "var", is_synced=False, journal_reserve_mib=0))
    door, _ = Door.open(tmp_path / "web.json", session_s=3_600.0)
    socket = tmp_path / "dial.sock"
    live = LiveTail(store.reader, poll_ms=50, max_views=2)
    app = create_app(store.reader, live, WebConfig(), door=door, clock=lambda: NOW, dial_socket=socket)
    transport = httpx.ASGITransport(app=app, client=("203.0.113.9", 4_711))
    async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
        made = Page(store, door, client)
        server = await serve(socket, made.dial)
        yield made
        server.close()
    store.close()


async def test_a_call_needs_its_own_right(page: Page) -> None:
    await page.sign_in(Right.CALL, Right.LISTEN, Right.HANG_UP, Right.EXPORT)
    answer = await page.post(WANTED)
    assert answer.status_code == 403 and "dial" in answer.json()["error"]
    assert not page.asked and ("ann", "place_call", "+390212345") not in page.audited()


async def test_a_call_is_audited_and_the_agent_is_told_who_wants_it(page: Page) -> None:
    await page.sign_in(Right.DIAL)
    answer = await page.post(WANTED)
    assert (answer.status_code, answer.json()) == (202, {"call_id": "c-1", "is_new": True})
    assert page.asked == [Dial(**WANTED, actor="ann")]
    assert ("ann", "place_call", "+390212345") in page.audited()


async def test_an_audit_that_cannot_be_written_stops_the_call(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("insert", {}, Exception("disk full"))

    await page.sign_in(Right.DIAL)
    monkeypatch.setattr("agent.supervisor.outbound_calls.append_audit", broken)
    with pytest.raises(sa.exc.OperationalError):
        await page.post(WANTED)
    assert not page.asked


@pytest.mark.parametrize("code", sorted(STATUS_OF))
async def test_each_refusal_has_its_status_and_its_code(code: str, page: Page) -> None:
    await page.sign_in(Right.DIAL)
    page.answer = NotDialled(code, "because", retry_after_s=7)
    answer = await page.post(WANTED)
    assert (answer.status_code, answer.json()) == (STATUS_OF[code], {"error": "because", "code": code})
    assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize("body", [{}, {"campaign": "a" * 65}, {"campaign": "acme", "uri": "x" * 513}])
async def test_what_is_no_wish_for_a_call_is_refused_before_anybody_is_asked(body: object, page: Page) -> None:
    await page.sign_in(Right.DIAL)
    assert (await page.post(body)).status_code == 422
    assert not page.asked


async def test_nobody_there_is_said_as_such(tmp_path: Path) -> None:
    answer = await ask(tmp_path / "nobody.sock", Dial("acme"))
    assert isinstance(answer, NotDialled) and answer.code == "no_agent"


# ------------------------------------------------------------------------- the leg


async def test_leg_that_no_worker_takes_ends_and_says_so() -> None:
    async def place() -> None:
        raise CallRefused("every line is in use")

    leg = DialledLeg("d1", 8_000, place)  # type: ignore[arg-type]
    await leg.send(Answer(leg_id="d1"))
    events = [event async for event in leg.events()]
    assert isinstance(events[0], LegStateChanged) and isinstance(events[1], LegDisconnected)
    assert (events[1].cause, events[1].by) == ("not_placed", "network")
    await leg.send(Hangup(leg_id="d1"))  # too late, no harm


async def test_leg_that_is_given_up_before_it_is_placed_never_calls() -> None:
    placed: list[str] = []

    async def place() -> None:
        placed.append("called")

    leg = DialledLeg("d1", 8_000, place)  # type: ignore[arg-type]
    with pytest.raises(LegError):
        await leg.send(Refer(leg_id="d1", refer_to="sip:a@b"))
    await leg.send(Hangup(leg_id="d1"))
    await leg.send(Answer(leg_id="d1"))
    events = [event async for event in leg.events()]
    assert events[-1].cause == "cancelled" and not placed  # type: ignore[union-attr]
    await leg.send(Play(leg_id="d1", item_id="a1", pcm=b"", sample_rate_hz=8_000))  # nobody hears it
