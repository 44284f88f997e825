"""Whole calls with the shipped weights in which something else happens at the same time: another call, a death."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.demo_script import STATUS_WORDS, number_audio  # noqa: E402
from tests.live.baresip import baresip, silence  # noqa: E402
from tests.live.served import Served, ask, tools_of, wait_for, what_was  # noqa: E402
from tests.live.speech import clip, clip_pcm  # noqa: E402

pytestmark = [pytest.mark.live]


def talk(served: Served, folder: Path, ani: str, pcm: bytes, answer: str) -> dict[str, Any]:
    """A baresip hears the greeting, asks, hears the answer, hangs up."""
    with baresip(folder / ani, silence(170), f"sip:100@{served.address}", user=ani, quits_after_s=170) as peer:
        wait_for(lambda: served.has_said(ani, "how can i help you"), 60, "no greeting")
        ask(served, peer, ani, np.frombuffer(pcm, "<i2"), answer)
        peer.press("b")
        return served.closed_call_of(ani)


@pytest.mark.peers("baresip")
def test_two_calls_at_once_are_both_understood_and_their_rows_are_apart(served: Served, tmp_path: Path) -> None:
    number, status = served.order.order_number, STATUS_WORDS[served.order.status][0]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(talk, served, tmp_path, "one", clip_pcm("hours_day"), "on saturday we are open")
        second = pool.submit(talk, served, tmp_path, "two", number_audio(number), status)
        one, two = first.result(), second.result()
    assert one["started_at"] < two["ended_at"] and two["started_at"] < one["ended_at"]
    assert {(tool["name"], *tool["arguments"].values()) for tool in one["tool_calls"]} == {
        ("opening_hours", "saturday")
    }
    assert {(tool["name"], *tool["arguments"].values()) for tool in two["tool_calls"]} == {("look_up_order", number)}
    assert "saturday" in what_was(one, "caller") and "number" not in what_was(one, "caller")
    assert "number" in what_was(two, "caller") and "saturday" not in what_was(two, "caller")
    assert status not in what_was(one, "agent") and "saturday" not in what_was(two, "agent")


@pytest.mark.peers("baresip")
def test_engine_that_dies_before_it_answers_leaves_the_call_up_and_the_next_one_answers(
    served: Served, tmp_path: Path
) -> None:
    """Design §5: the call stays, a filler is heard, the engine comes back, the caller is answered."""
    with baresip(tmp_path / "b", silence(170), f"sip:100@{served.address}", user="ivy", quits_after_s=170) as peer:
        wait_for(lambda: served.has_said("ivy", "how can i help you"), 60, "no greeting")
        peer.say(clip("hours_day"))
        wait_for(lambda: "open" in what_was(served.call_of("ivy") or {"turns": []}, "caller"), 30, "not understood")
        (killed,) = engines_of(served)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: served.has_said("ivy", "i have a small problem"), 30, "no filler")
        try:
            wait_for(lambda: served.has_said("ivy", "on saturday we are open"), 15, "no answer")
        except TimeoutError:  # a slow machine: the agent has asked the caller to say it again
            ask(served, peer, "ivy", clip("hours_day"), "on saturday we are open")
        peer.press("b")
        call = served.closed_call_of("ivy")
    assert engines_of(served) not in ([killed], [])
    assert "engine_lost" in {defect["kind"] for defect in call["defects"]}
    assert (call["disposition"], call["ended_by"]) == ("completed", "caller")
    assert tools_of(call, "opening_hours")[-1]["arguments"] == {"day": "saturday"}


def asked_of_tools(call: dict[str, Any]) -> set[tuple[str, ...]]:
    return {(tool["name"], *tool["arguments"].values()) for tool in call["tool_calls"]}


def engines_of(served: Served) -> list[int]:
    """Children of the parent process that are engines."""
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"minmo_runtime.server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
