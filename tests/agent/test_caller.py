"""The synthetic caller: its script in virtual time, and whole calls of its own worker to another."""

from __future__ import annotations

import asyncio
import socket
import wave

import numpy as np
import pytest

from agent.caller import call_once, play_script
from agent.caller_script import BargeIn, CallerScript, Dtmf, Hangup, Say, ScriptPlayer, Wait, WaitForAgent
from telephony.leg import Answer, LegState, Play
from telephony.loopback import LoopbackLeg

RATE = 8000
VOICE = (np.sin(np.arange(RATE) * 0.5) * 8000).astype("<i2").tobytes()  # one second


def play_through(script, agent_says, seconds):
    """Run a script against an agent that speaks at given seconds; [(sample, action)] and the player."""
    leg = LoopbackLeg("caller")
    leg.ring()
    leg.send_now(Answer(leg_id="caller"))
    player, done = ScriptPlayer(script, RATE), []
    for tick in range(int(seconds * 50)):
        for at_s in agent_says:
            if tick == int(at_s * 50):
                leg.speak(VOICE)
        leg.advance(160)
        for event in leg.drain():
            for action in player.on_event(event):
                done.append((player.sample, action))
                if isinstance(action, Say):
                    play = Play(
                        leg_id="caller", item_id=player.say_item, pcm=action.pcm, sample_rate_hz=RATE, is_final=True
                    )
                    leg.send_now(play)
                if isinstance(action, Hangup):
                    leg.hang_up()
        if leg.state is LegState.DISCONNECTED:
            for event in leg.drain():
                player.on_event(event)
            break
    return done, player


def test_caller_speaks_once_the_agent_has_been_silent_long_enough():
    script = CallerScript((WaitForAgent(silent_ms=900), Say(VOICE, "hello"), Hangup()))
    done, player = play_through(script, [0.5], 6)
    assert [type(action) for _, action in done] == [Say, Hangup]
    assert done[0][0] == pytest.approx(int((0.5 + 1.0 + 0.9) * RATE), abs=400)
    assert player.is_over and player.said[0].label == "hello"
    assert player.own_segments[0].offset_sample - player.own_segments[0].onset_sample == pytest.approx(RATE, abs=200)


def test_caller_waits_for_an_answer_to_what_it_said_not_for_older_speech():
    script = CallerScript((WaitForAgent(), Say(VOICE), WaitForAgent(silent_ms=500), Hangup()))
    done, player = play_through(script, [0.2, 5.0], 9)
    assert done[-1][0] == pytest.approx(int((5.0 + 1.0 + 0.5) * RATE), abs=400)
    assert len(player.agent_segments) == 2


def test_clip_waits_for_the_greeting_behind_the_notice_and_for_the_answer_behind_a_filler():
    # From 0.5 s the notice, from 3.2 s the greeting; a filler 1.6 s behind the clip, the answer 1.7 s behind that.
    done, player = play_through(play_script(VOICE), [0.5, 3.2, 9.3, 12.0], 20)
    assert [type(action) for _, action in done] == [Say, Hangup]
    assert len(player.agent_segments) == 4 and player.timed_out_steps == []


class NoNames(socket.socket):
    """A machine that can resolve nothing."""

    def connect(self, address):
        raise socket.gaierror(-2, "Name or service not known")


def test_what_cannot_be_called_or_pressed_is_told_before_a_call_is_made(monkeypatch):
    with pytest.raises(ValueError, match="keys '12x': must be 1 to 64 of"):
        play_script(b"", "12x")
    monkeypatch.setattr("agent.caller.socket.socket", NoNames)
    with pytest.raises(ValueError, match="pbx.example: Name or service not known"):
        call_once("sip:100@pbx.example")


def test_barge_in_comes_the_given_time_after_the_agents_onset():
    script = CallerScript((BargeIn(VOICE, after_ms=600), Hangup()))
    done, player = play_through(script, [1.0], 5)
    assert done[0][0] == pytest.approx(int(1.6 * RATE), abs=200)
    assert player.timed_out_steps == []


def test_agent_that_never_speaks_is_waited_for_only_so_long_and_it_is_noted():
    script = CallerScript((WaitForAgent(timeout_ms=1000), Wait(500), Dtmf("1"), Hangup()))
    done, player = play_through(script, [], 5)
    assert player.timed_out_steps == [0]
    assert [type(action) for _, action in done] == [Dtmf, Hangup]
    assert done[0][0] == pytest.approx(int(1.5 * RATE), abs=200)


async def test_call_over_sip_records_both_directions_and_times_the_answer(tmp_path):
    pytest.importorskip("pjsua2")
    from agent.caller import run_caller
    from tests.live.sip_agent import similarity, tone_agent, warble

    voice = warble(6.0, 500)  # any second of it will do: a late process damages some
    record = tmp_path / "calls" / "out.wav"
    script = CallerScript((WaitForAgent(silent_ms=300), Say(voice.tobytes(), "clip"), Dtmf("12"), Wait(800), Hangup()))
    async with tone_agent() as agent:
        report = await run_caller(f"sip:100@{agent.address}", script, record)
        await asyncio.sleep(0.2)
    assert report.answered and report.codec == "PCMU/8000" and (report.cause, report.ended_by) == ("normal", "us")
    assert 0 <= report.first_agent_onset_ms < 500
    assert report.agent_speech_ms[-1][1] - report.agent_speech_ms[0][0] == pytest.approx(6000, abs=300)
    assert report.own_speech_ms[-1][1] - report.own_speech_ms[0][0] == pytest.approx(6000, abs=300)
    with wave.open(str(record)) as file:
        assert (file.getnchannels(), file.getframerate()) == (2, RATE)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)
    assert similarity(samples[:, 0], voice) > 0.8 and similarity(samples[:, 1], agent.voice) > 0.8
    assert agent.calls[0].digits == "12" and similarity(agent.calls[0].heard_samples(), voice) > 0.8


async def test_call_that_nobody_answers_is_reported_not_raised():
    pytest.importorskip("pjsua2")
    from agent.caller import run_caller
    from tests.live.sip_agent import tone_agent, until

    async with tone_agent(max_calls=1) as agent:
        address = agent.address
        busy = asyncio.create_task(run_caller(f"sip:100@{address}", CallerScript((Wait(20000), Hangup()))))
        await until(lambda: agent.calls and agent.calls[0].heard)
        report = await run_caller(f"sip:100@{address}", CallerScript((Hangup(),)))
        assert not report.answered and (report.cause, report.sip_status) == ("overloaded", 503)
        agent.calls[0].leg.hang_up()
        assert (await busy).ended_by == "agent"
