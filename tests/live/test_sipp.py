"""SIPp (apt: sip-tester) calls us: speech to the agent, the agent's speech to SIPp and back, several calls in a row."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

pytest.importorskip("pjsua2")

from tests.live.served import Served, tools_of, wait_for, what_was  # noqa: E402
from tests.live.sip_agent import RATE, similarity, tone_agent, until, warble  # noqa: E402
from tests.live.sipp import errors_of, mu_law, play, sipp  # noqa: E402
from tests.live.speech import clip, seconds_found  # noqa: E402
from tests.live.stack import whole_stack  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.peers("sipp")]


async def test_speech_from_sipp_is_heard_and_its_bye_ends_the_call(tmp_path):
    voice = warble(2.0, 500)  # again and again
    (tmp_path / "voice.ul").write_bytes(mu_law(voice))
    media = f'<nop><action><exec rtp_stream="{tmp_path}/voice.ul,-1,0,PCMU/8000"/></action></nop>'
    async with tone_agent() as agent:
        with sipp(tmp_path, agent.address, 7500, media, ("-m", "1")) as process:
            await until(lambda: process.poll() is not None, 25)
            assert process.returncode == 0, errors_of(tmp_path)
        call = agent.calls[0]
        await until(lambda: call.is_over.is_set())
        assert similarity(call.heard_samples(), voice) > 0.8
        assert (call.incoming.ani, call.incoming.display_name) == ("sipp", "SIPp")
        assert (call.ended.cause, call.ended.by) == ("normal", "caller")


async def test_what_the_agent_says_reaches_sipp_which_sends_it_back(tmp_path):
    async with tone_agent() as agent:
        with sipp(tmp_path, agent.address, 7500, "", ("-m", "1", "-rtp_echo")) as process:
            await until(lambda: process.poll() is not None, 25)
            assert process.returncode == 0, errors_of(tmp_path)
        call = agent.calls[0]
        await until(lambda: call.is_over.is_set())
        assert similarity(call.heard_samples(), agent.voice) > 0.8


async def test_twelve_calls_three_at_a_time_all_succeed(tmp_path):
    async with tone_agent() as agent:
        with sipp(tmp_path, agent.address, 700, "", ("-m", "12", "-l", "3", "-r", "5")) as process:
            await until(lambda: process.poll() is not None, 25)
            assert process.returncode == 0, errors_of(tmp_path)
        await asyncio.sleep(0.3)
        assert len(agent.calls) == 12 and all(call.is_over.is_set() for call in agent.calls)
        assert {call.ended.cause for call in agent.calls} == {"normal"}


async def test_whole_stack_takes_three_calls_of_sipp_and_keeps_their_rows(tmp_path):
    async with whole_stack(tmp_path) as stack:
        with sipp(tmp_path, stack.address, 2500, "", ("-m", "3", "-l", "3", "-r", "2")) as process:
            await until(lambda: process.poll() is not None, 25)
            assert process.returncode == 0, errors_of(tmp_path)
        await until(lambda: [row["state"] for row in stack.call_rows()] == ["closed"] * 3)
        assert {(row["ani"], row["ended_by"]) for row in stack.call_rows()} == {("sipp", "caller")}


GREETED_MS = 9_000  # notice and greeting last 6 s; SIPp can not wait for them, so it waits longer
ANSWERED_MS = 30_000  # the same for two questions and their answers: a busy machine gives them seconds late


def test_sipp_asks_with_speech_and_is_answered(served: Served, tmp_path) -> None:
    said = clip("hours_day")  # twice: of the first one a starved encoder may miss a word
    media = play(tmp_path, np.concatenate([said, np.zeros(10 * RATE, "<i2"), said]), GREETED_MS)
    with sipp(tmp_path, served.address, ANSWERED_MS, media, ("-m", "1"), "sue", timeout_s=90) as process:
        wait_for(lambda: process.poll() is not None, 90, "SIPp has not ended")
        assert process.returncode == 0, errors_of(tmp_path)
    call = served.closed_call_of("sue")
    assert "saturday" in what_was(call, "caller") and "open" in what_was(call, "caller")
    assert tools_of(call, "opening_hours")[-1]["arguments"] == {"day": "saturday"}
    assert "on saturday we are open" in what_was(call, "agent")
    assert (call["display_name"], call["ended_by"]) == ("SIPp", "caller")


def test_what_the_whole_stack_says_reaches_sipp_and_its_echo_is_in_the_recording(served: Served, tmp_path) -> None:
    """Sound only: this echo is as loud as its source, which no line is and the echo gate does not claim to bear."""
    with sipp(tmp_path, served.address, GREETED_MS, "", ("-m", "1", "-rtp_echo"), "eve", timeout_s=90) as process:
        wait_for(lambda: process.poll() is not None, 90, "SIPp has not ended")
        assert process.returncode == 0, errors_of(tmp_path)
    call = served.closed_call_of("eve")
    recording = served.recording_of(call["call_id"]).samples()
    assert "hello, this is" in what_was(call, "agent")
    # One whole second as it was; elsewhere our jitter buffer may have moved the echo within a second.
    assert max(seconds_found(recording[:, 1], recording[:, 0])) > 0.8
