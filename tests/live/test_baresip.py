"""baresip (apt: baresip-core) calls us: speech both ways, keys, hold, and a blind transfer that it carries out."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from agent.demo_script import STATUS_WORDS  # noqa: E402
from tests.live.baresip import baresip, silence  # noqa: E402
from tests.live.served import Served, ask, tools_of, wait_for, what_was  # noqa: E402
from tests.live.sip_agent import RATE, loud_seconds, similarity, tone_agent, until, warble  # noqa: E402
from tests.live.speech import clip, recognised, seconds_found, word_error_of  # noqa: E402
from tests.live.stack import whole_stack  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("baresip")]


async def test_speech_crosses_both_ways_and_baresip_hangs_up(tmp_path):
    voice = warble(6.0, 500)  # any second of it will do: a late process damages some
    source = np.concatenate([silence(0.5), voice, silence(20)])  # its player ends the call at the end of the file
    async with tone_agent() as agent:
        with baresip(tmp_path / "b", source, dial=f"sip:100@{agent.address}") as peer:
            await until(lambda: agent.calls and len(agent.calls[0].heard) > 8 * 2 * RATE, 25)
            peer.press("b")
            await until(lambda: agent.calls[0].is_over.is_set())
            await asyncio.sleep(0.3)
            call = agent.calls[0]
            assert call.incoming.did == "100" and call.incoming.ani == "baresip"
            assert similarity(call.heard_samples(), voice) > 0.8, peer.text()[-2000:]
            peer.press("q")
            await until(lambda: peer.process.poll() is not None)
            assert similarity(peer.heard(), agent.voice) > 0.8
            assert (call.ended.cause, call.ended.by) == ("normal", "caller")


async def test_keys_pressed_in_baresip_arrive(tmp_path):
    async with tone_agent() as agent:
        with baresip(tmp_path / "b", silence(25), dial=f"sip:100@{agent.address}") as peer:
            await until(lambda: agent.calls and len(agent.calls[0].heard) > RATE)
            for key in "123#":
                peer.press(key)
                await asyncio.sleep(0.4)
            await until(lambda: len(agent.calls[0].digits) >= 4)
            assert agent.calls[0].digits == "123#", peer.text()[-2000:]
            peer.press("b")
            await until(lambda: agent.calls[0].is_over.is_set())


async def test_hold_and_resume_keep_the_call_and_its_clock(tmp_path):
    voice = warble(20.0, 500)
    async with tone_agent() as agent:
        with baresip(tmp_path / "b", voice, dial=f"sip:100@{agent.address}") as peer:
            await until(lambda: agent.calls and len(agent.calls[0].heard) > RATE)
            call = agent.calls[0]
            peer.press("x")
            await asyncio.sleep(1.5)
            held = call.heard_samples()[-RATE // 2 :]
            assert np.abs(held).max() < 100, "audio during hold"
            peer.press("X")
            await asyncio.sleep(1.0)
            resumed = call.heard_samples()[-RATE // 4 :]
            assert np.abs(resumed).max() > 4000, peer.text()[-2000:]
            peer.press("b")
            await until(lambda: call.is_over.is_set())
            assert call.ended.cause == "normal"


async def test_blind_transfer_is_carried_out_and_its_outcome_reported(tmp_path):
    async with tone_agent() as target:
        async with tone_agent(refer_to=f"sip:200@{target.address}") as agent:
            with baresip(tmp_path / "b", silence(25), dial=f"sip:100@{agent.address}") as peer:
                await until(lambda: agent.calls and agent.calls[0].is_over.is_set())
                result = agent.calls[0].refer_result
                assert result is not None and result.sip_status == 200, peer.text()[-2000:]
                assert agent.calls[0].ended.cause == "transferred"
                await until(lambda: target.calls and len(target.calls[0].heard) > RATE)
                assert target.calls[0].incoming.did == "200"


async def test_whole_stack_greets_baresip_and_keeps_a_row_of_the_call(tmp_path):
    async with whole_stack(tmp_path) as stack:
        with baresip(tmp_path / "b", silence(60), dial=f"sip:100@{stack.address}") as peer:
            await until(lambda: any(row["state"] != "closed" for row in stack.call_rows()))
            await asyncio.sleep(4)
            peer.press("b")
            await until(lambda: stack.call_rows()[0]["state"] == "closed")
            peer.press("q")
            await until(lambda: peer.process.poll() is not None)
            assert loud_seconds(peer.heard()) > 1.0, "no greeting"
        (row,) = stack.call_rows()
        assert (row["did"], row["ani"], row["ended_by"]) == ("100", "baresip", "caller")
        assert row["codec"] in ("PCMU/8000", "PCMA/8000")


def test_baresip_asks_and_is_answered_with_speech_that_is_understood_on_both_sides(served: Served, tmp_path) -> None:
    """With the shipped weights: words both ways, judged by what each side has kept of the other's sound."""
    with baresip(tmp_path / "b", silence(170), f"sip:100@{served.address}", user="ada", quits_after_s=170) as peer:
        wait_for(lambda: served.has_said("ada", "how can i help you"), 60, "no greeting")
        ask(served, peer, "ada", clip("hours_day"), "on saturday we are open")
        peer.press("b")
        call = served.closed_call_of("ada")
        peer.press("q")
        wait_for(lambda: peer.process.poll() is not None, 10, "baresip has not ended")
        heard = peer.heard()
    assert "saturday" in what_was(call, "caller") and "open" in what_was(call, "caller")
    assert tools_of(call, "opening_hours")[-1]["arguments"] == {"day": "saturday"}
    # Sound: what the recording says was played is what baresip decoded, but for a late packet. Words: most of them.
    exact = np.array(seconds_found(served.recording_of(call["call_id"]).samples()[:, 1], heard)) > 0.8
    assert len(exact) >= 3 and exact.mean() >= 0.75
    assert loud_seconds(heard) > 5
    assert word_error_of(what_was(call, "agent"), recognised(served.engine_socket, heard)) <= 0.6


def test_a_number_typed_in_baresip_is_looked_up_and_answered(served: Served, tmp_path) -> None:
    with baresip(tmp_path / "b", silence(170), f"sip:100@{served.address}", user="kay", quits_after_s=170) as peer:
        wait_for(lambda: served.has_said("kay", "how can i help you"), 60, "no greeting")
        for key in served.order.order_number:
            peer.press(key)
            time.sleep(0.4)
        wait_for(lambda: served.has_said("kay", STATUS_WORDS[served.order.status][0]), 60, "no answer")
        peer.press("b")
        call = served.closed_call_of("kay")
    (tool,) = tools_of(call, "look_up_order")
    assert tool["arguments"] == {"order_number": served.order.order_number}
    assert [turn["source"] for turn in call["turns"] if turn["role"] == "caller"] == ["keypad"]
    assert served.order.day in what_was(call, "agent")
