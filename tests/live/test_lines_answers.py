"""A call of ours that a voicemail answers, with a SIP stack of somebody else on its side (baresip): the message lands
after the beep in what the voicemail recorded. users.md L6, J4."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

pytest.importorskip("pjsua2")

from agent.dial_socket import Dialled  # noqa: E402
from tests.live.baresip import baresip, silence  # noqa: E402
from tests.live.lines_campaign import MAY_CALL, CallingStack, calling_stack, has_heard  # noqa: E402
from tests.live.lines_peers import free_port  # noqa: E402
from tests.live.sip_agent import RATE  # noqa: E402
from tests.live.speech import clip  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.asyncio(loop_scope="module")]
MESSAGE = "hello, this is anna at acme orders. please call us about your order."
LEAVES = f'voicemail_message = ["{MESSAGE}"]\n{MAY_CALL}on_voicemail = "leave_message"\n'
BEEP_S, BEEP_HZ = 0.5, 1000
LOUD = 400


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CallingStack]:
    async with calling_stack(tmp_path_factory.mktemp("stack"), {}, outbound=LEAVES) as running:
        yield running


def greeting() -> np.ndarray:
    """A machine's words, at least seven seconds in one go: clips of our own without the silence around them."""
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < 7 * RATE:
        said = clip("person")
        loud = np.flatnonzero(np.abs(said) > 300)
        parts += [said[loud[0] : loud[-1] + 1], silence(0.1)]
    return np.concatenate(parts)


def beep() -> np.ndarray:
    time_s = np.arange(int(BEEP_S * RATE)) / RATE
    return (8000 * np.sin(2 * np.pi * BEEP_HZ * time_s)).astype("<i2")


def sounds(samples: np.ndarray) -> np.ndarray:
    """True for each 20 ms that are loud."""
    size = RATE // 50
    blocks = samples[: len(samples) // size * size].reshape(-1, size).astype(int)
    return np.abs(blocks).max(axis=1) > LOUD


@pytest.mark.peers("baresip")
async def test_message_lands_after_the_beep_in_what_the_voicemail_recorded(stack: CallingStack, tmp_path: Path) -> None:
    port = free_port()
    spoken = [silence(0.5), greeting(), silence(0.6), beep()]
    plays = np.concatenate([*spoken, silence(60)])
    with baresip(tmp_path / "voicemail", plays, user="box", port=port, quits_after_s=90) as machine:
        dialled = await stack.dial(uri=f"sip:box@127.0.0.1:{port}", actor="test")
        assert isinstance(dialled, Dialled)
        call = await stack.closed(dialled.call_id)
        recorded = machine.heard()
    assert (call["disposition"], call["cause"], call["ended_by"]) == ("voicemail_left", "voicemail_left", "agent")
    assert has_heard(call, MESSAGE)
    events = stack.events_of(dialled.call_id)
    (verdict,) = [event["payload"] for event in events if event["kind"] == "answered_by"]
    (beep_heard,) = [
        event["payload"]
        for event in events
        if event["kind"] == "answer_evidence" and event["payload"]["sound"] == "beep"
    ]
    assert (verdict["kind"], beep_heard["frequency_hz"]) == ("voicemail", BEEP_HZ)
    assert [metric["value"] for metric in call["metrics"] if metric["name"] == "answer_decision_ms"] == [
        verdict["decision_ms"]
    ]

    # What the machine recorded of us: the notice until the verdict, nothing until the beep's end, the message.
    is_loud = sounds(recorded)
    decided = round(50 * verdict["decision_ms"] / 1000)
    beep_end = round(50 * beep_heard["sample"] / RATE)
    assert is_loud[:decided].any()
    assert not is_loud[decided + 25 : beep_end - 10].any()
    after = np.flatnonzero(is_loud[beep_end - 10 :])
    assert len(after) > 100 and (after[0] - 10) / 50 <= 2.0  # more than two seconds of message, begun at once
