"""Warm hand-off over real SIP: the person is called, told what was said, connected on a key; otherwise the caller stays
with the agent, with a sentence and a callback. users.md J3, L7."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

pytest.importorskip("pjsua2")

from agent.raw_sip_peer import PCMU, RawPeer, header, to_tag  # noqa: E402
from tests.live.baresip import baresip, silence  # noqa: E402
from tests.live.lines_campaign import CallingStack, calling_stack, has_heard  # noqa: E402
from tests.live.lines_peers import free_port  # noqa: E402
from tests.live.sip_agent import similarity, warble  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.asyncio(loop_scope="module")]
RING_S = 6.0


@pytest.fixture(scope="module")
def desk_port() -> int:
    return free_port()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, desk_port: int) -> AsyncIterator[CallingStack]:
    handoff = {"uri": f"sip:desk@127.0.0.1:{desk_port}", "manner": "warm", "ring_s": RING_S, "accept_s": 4.0}
    async with calling_stack(tmp_path_factory.mktemp("stack"), settings={"handoff": handoff}) as running:
        yield running


class Party(RawPeer):
    """One end of a call with a voice: it sends what it is given, 20 ms at a time, and keeps what it hears."""

    def __init__(self, target: str, port: int = 0) -> None:
        super().__init__(target)
        if port:
            self.socket.close()
            self.socket = type(self.socket)(2, 2)
            self.socket.bind(("127.0.0.1", port))
            self.port = port
        self.socket.settimeout(30)
        self.heard = bytearray()
        self._voice = b""
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def talk(self, to: str, voice: bytes) -> None:
        """`to`: the SDP of the other side; `voice`: mu-law, repeated."""
        port = int(next(line for line in to.splitlines() if line.startswith("m=audio")).split()[1])
        self._thread = threading.Thread(target=self._run, args=(("127.0.0.1", port), voice), daemon=True)
        self._thread.start()

    def _run(self, target: tuple[str, int], voice: bytes) -> None:
        begun = time.monotonic()
        for number in range(10_000):
            if self._is_closed:
                return
            at = 160 * number % max(160, len(voice))
            head = b"\x80\x00" + (number & 0xFFFF).to_bytes(2, "big") + (160 * number).to_bytes(4, "big") + b"\0\0\0\1"
            self.media.sendto(head + voice[at : at + 160].ljust(160, b"\xff"), target)
            while (left_s := begun + 0.02 * number - time.monotonic()) > 0:
                self.media.settimeout(left_s)
                try:
                    packet = self.media.recv(2048)
                except TimeoutError:
                    break
                if packet[1] & 0x7F == 0:
                    self.heard += packet[12:]

    def close(self) -> None:
        self._is_closed = True
        if self._thread is not None:
            self._thread.join()
        super().close()


class Caller(Party):
    """Rings, is greeted, and presses 0 for a person."""

    cseq = 10
    tag_of_agent = ""

    async def come_in(self, stack: CallingStack) -> dict[str, Any]:
        earlier = {call["call_id"] for call in stack.calls()}
        self.invite()
        ok = await asyncio.to_thread(self.final)
        self.tag_of_agent = to_tag(ok)
        self.request("ACK", to_tag=self.tag_of_agent)
        self.talk(ok, b"\xff" * 160)
        return await stack.until(lambda call: call["call_id"] not in earlier and has_heard(call, "how can i help you"))

    async def wants_a_person(self) -> None:
        self.in_dialog("INFO", "Signal=0\r\nDuration=160\r\n", "Content-Type: application/dtmf-relay\r\n")
        await asyncio.to_thread(self.final)

    def in_dialog(self, method: str, body: str = "", headers: str = "") -> None:
        self.cseq += 1
        self.request(method, self.cseq, self.tag_of_agent, body, headers)


@pytest.fixture
def caller(stack: CallingStack) -> Iterator[Caller]:
    party = Caller(stack.address)
    yield party
    if party.tag_of_agent:
        party.in_dialog("BYE")  # again, or because the test failed: the next one finds a free line
    party.close()


@pytest.fixture
def desk(stack: CallingStack, desk_port: int) -> Iterator[Party]:
    party = Party(stack.address, desk_port)
    yield party
    party.close()


async def rung(stack: CallingStack, caller: Caller, desk: Party) -> tuple[str, dict[str, Any]]:
    """The caller wants a person, and the desk's telephone rings: (its INVITE, the call)."""
    call = await caller.come_in(stack)
    await caller.wants_a_person()
    return await asyncio.to_thread(desk.receive, "INVITE"), call


def handoff_of(call: dict[str, Any]) -> dict[str, Any]:
    (handoff,) = call["handoffs"]
    return handoff


def press(desk: Party, invite: str, digit: str) -> None:
    """A key of the person, by SIP INFO in the dialog that our INVITE made."""
    own_tag = header(invite, "From").partition("tag=")[2].split(";")[0]
    desk.call_id = header(invite, "Call-ID")
    desk.request_uri = header(invite, "Contact").partition("<")[2].partition(">")[0]
    body, kind = f"Signal={digit}\r\nDuration=160\r\n", "Content-Type: application/dtmf-relay\r\n"
    desk.request("INFO", int(digit) + 1, own_tag, body, kind)


async def answers(desk: Party, invite: str) -> None:
    desk.respond(invite, "200 OK", desk.sdp(PCMU))
    await asyncio.to_thread(desk.receive, "ACK")
    desk.talk(invite, mu_law(warble(4.0, 300)))


async def hears_the_person(caller: Caller) -> None:
    """In two windows of six: on a busy machine the person's packets come late, and a jitter buffer conceals."""
    found = []
    for _ in range(6):
        caller.heard.clear()
        await asyncio.sleep(3.0)
        found.append(similarity(pcm_of(caller.heard), warble(4.0, 300)))
        if sum(likeness > 0.8 for likeness in found) == 2:
            return
    raise AssertionError(f"the caller hears something else: {found}")


async def test_person_is_told_takes_the_call_with_a_key_and_talks_to_the_caller(
    stack: CallingStack, caller: Caller, desk: Party, desk_port: int
) -> None:
    invite, call = await rung(stack, caller, desk)
    assert header(invite, "From").startswith("<sip:raw@") and header(invite, "X-Minmo-Call") == call["call_id"]
    await answers(desk, invite)
    await stack.until(lambda now: now["handoffs"] and now["handoffs"][0]["state"] == "answered", call["call_id"])
    async with asyncio.timeout(20):
        while loudest(desk.heard) < 1000:  # noqa: ASYNC110 - the thread of `desk` fills it: the summary
            await asyncio.sleep(0.1)
    press(desk, invite, "0")  # another key means nothing
    press(desk, invite, "1")
    closed = await stack.closed(call["call_id"])
    assert (closed["disposition"], closed["cause"]) == ("transferred", "transferred")
    handoff = handoff_of(closed)
    assert (handoff["state"], handoff["target"]) == ("accepted", f"sip:desk@127.0.0.1:{desk_port}")
    assert "Caller: raw" in handoff["summary"] and "Campaign: acme" in handoff["summary"]
    await hears_the_person(caller)
    caller.in_dialog("BYE")
    assert await asyncio.to_thread(desk.receive, "BYE")


@pytest.mark.parametrize(("answer", "status"), [("486 Busy Here", 486), ("603 Decline", 603), ("180 Ringing", 480)])
async def test_person_who_does_not_take_it_leaves_the_caller_with_the_agent_and_a_sentence(
    answer: str, status: int, stack: CallingStack, caller: Caller, desk: Party
) -> None:
    invite, call = await rung(stack, caller, desk)
    desk.respond(invite, answer)
    if status == 480:  # nobody answers: the caller does not wait in silence, then we give up
        cancel = await asyncio.to_thread(desk.receive, "CANCEL")
        desk.respond(cancel, "200 OK")
        desk.respond(invite, "487 Request Terminated")
    back = await stack.until(
        lambda now: has_heard(now, "no one is free right now. we will call you back"), call["call_id"]
    )
    assert back["state"] == "open" and handoff_of(back)["state"] == "failed"
    assert str(status) in handoff_of(back)["reason"] and back["callback_requests"][0]["number"] == "raw"
    caller.in_dialog("BYE")
    assert (await stack.closed(call["call_id"]))["disposition"] == "completed"


async def test_person_who_answers_but_presses_nothing_is_left_and_the_caller_stays(
    stack: CallingStack, caller: Caller, desk: Party
) -> None:
    invite, call = await rung(stack, caller, desk)
    await answers(desk, invite)
    assert await asyncio.to_thread(desk.receive, "BYE")  # after the summary and accept_s
    back = await stack.until(lambda now: has_heard(now, "no one is free right now"), call["call_id"])
    assert "nobody took the call" in handoff_of(back)["reason"]
    caller.in_dialog("BYE")
    await stack.closed(call["call_id"])


@pytest.mark.parametrize("is_answered", [False, True])
async def test_caller_who_hangs_up_meanwhile_ends_the_second_leg(
    is_answered: bool, stack: CallingStack, caller: Caller, desk: Party
) -> None:
    invite, call = await rung(stack, caller, desk)
    desk.respond(invite, "180 Ringing")
    if is_answered:
        await answers(desk, invite)
    caller.in_dialog("BYE")
    ending = await asyncio.to_thread(desk.receive, "BYE" if is_answered else "CANCEL")
    desk.respond(ending, "200 OK")
    if not is_answered:
        desk.respond(invite, "487 Request Terminated")
    closed = await stack.closed(call["call_id"])
    assert handoff_of(closed)["state"] == "abandoned" and closed["cause"] == "normal"


@pytest.mark.peers("baresip")
async def test_desk_that_is_baresip_hears_the_summary_and_is_asked_for_the_key(
    stack: CallingStack, caller: Caller, desk_port: int, tmp_path: Path
) -> None:
    with baresip(tmp_path / "desk", silence(60), user="desk", port=desk_port, quits_after_s=90) as person:
        call = await caller.come_in(stack)
        await caller.wants_a_person()
        await stack.until(lambda now: now["handoffs"] and now["handoffs"][0]["state"] == "answered", call["call_id"])
        await asyncio.sleep(3.0)
        person.press("1")
        closed = await stack.closed(call["call_id"])
        assert closed["disposition"] == "transferred" and handoff_of(closed)["state"] == "accepted"
        caller.in_dialog("BYE")


def mu_law(samples: np.ndarray) -> bytes:
    magnitude = np.minimum(np.abs(samples.astype(int)), 32635) + 132
    exponent = np.floor(np.log2(magnitude)).astype(int) - 7
    coded = ~((samples < 0) * 0x80 | exponent << 4 | (magnitude >> (exponent + 3)) & 0x0F) & 0xFF
    return coded.astype(np.uint8).tobytes()


def pcm_of(payload: bytes | bytearray) -> np.ndarray:
    """From the definition of G.711."""
    value = ~np.frombuffer(bytes(payload), np.uint8).astype(int) & 0xFF
    magnitude = (((value & 0x0F) << 3) + 132 << ((value >> 4) & 7)) - 132
    return np.where(value & 0x80, -magnitude, magnitude).astype("<i2")


def loudest(payload: bytes | bytearray) -> int:
    return int(np.max(np.abs(pcm_of(payload)), initial=0))
