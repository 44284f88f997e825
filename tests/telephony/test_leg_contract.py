"""What every leg promises (telephony/leg.py), on the loopback in process, on a media worker over socket, ring and
SIP, and on one over AudioSocket."""

from __future__ import annotations

import numpy as np
import pytest

from telephony.leg import (
    AudioFrame,
    DtmfReceived,
    Duck,
    Flush,
    Flushed,
    Hangup,
    LegDisconnected,
    LegError,
    LegIncoming,
    LegState,
    LegStateChanged,
    Pause,
    Play,
    PlayoutProgress,
    Refer,
    ReferResult,
    Reject,
    Resume,
    WireMetric,
)

RATE = 8000
LOUDEST_NOISE = 100  # comfort noise of -65 dBov peaks at 85


def play(rig, pcm, item_id="item", rate=RATE, is_final=True):
    return rig.leg.send(Play(leg_id=rig.leg.leg_id, item_id=item_id, pcm=pcm, sample_rate_hz=rate, is_final=is_final))


def loudness(pcm):
    samples = np.frombuffer(pcm, "<i2").astype(float)
    return float(np.sqrt(np.mean(samples**2))) if len(samples) else 0.0


def played_of(rig, item_id="item"):
    return max([event.played_samples for event in rig.of(PlayoutProgress) if event.item_id == item_id], default=0)


async def test_incoming_call_says_who_calls_whom_before_anything_else(rig):
    await rig.until(lambda: rig.of(LegStateChanged))
    incoming = rig.events[0]
    assert isinstance(incoming, LegIncoming)
    assert (incoming.did, incoming.ani, incoming.display_name) == rig.identity
    assert incoming.source_address.startswith("127.0.0.1:")


async def test_answer_confirms_the_leg_with_its_codec_and_then_audio_flows(rig):
    await rig.answer()
    states = [event.state for event in rig.of(LegStateChanged)]
    assert [state for state in states if state is not LegState.EARLY] == [
        LegState.INCOMING, LegState.CONNECTING, LegState.CONFIRMED,
    ]  # fmt: skip
    assert rig.of(LegStateChanged)[-1].codec in ("PCMU/8000", "PCMA/8000", "slin/8000")
    await rig.until(lambda: len(rig.of(AudioFrame)) >= 5)
    confirmed_at = next(i for i, e in enumerate(rig.events) if getattr(e, "state", None) is LegState.CONFIRMED)
    assert not any(isinstance(event, AudioFrame) for event in rig.events[:confirmed_at])


async def test_the_ack_has_its_place_on_the_leg_clock_and_what_waited_for_it_is_heard_at_once(rig, tone):
    await rig.until(lambda: rig.of(LegIncoming))
    await play(rig, tone(0.5))
    await rig.answer()
    onset = await rig.until(lambda: [event.sample for event in rig.of(WireMetric) if event.kind == "agent_onset"])
    answered = [event.sample for event in rig.of(WireMetric) if event.kind == "answered"]
    assert len(answered) == 1 and -RATE // 2 < answered[0] <= 0
    assert 0 <= onset[0] - answered[0] < RATE // 2


async def test_frames_follow_each_other_without_gap_on_the_leg_clock(rig):
    await rig.answer()
    await rig.until(lambda: len(rig.of(AudioFrame)) >= 20)
    frames = rig.of(AudioFrame)
    expected = frames[0].start_sample
    assert expected == 0
    for frame in frames:
        assert frame.start_sample == expected
        expected += len(frame.pcm) // 2


async def test_caller_speech_is_heard_and_voiced_and_silence_is_not(rig, speech):
    await rig.answer()
    await rig.run(1600)
    assert not any(frame.voiced for frame in rig.of(AudioFrame))
    await rig.far_speaks(speech)
    onset = await rig.until(lambda: [event for event in rig.of(WireMetric) if event.kind == "caller_onset"])
    await rig.until(lambda: [frame for frame in rig.of(AudioFrame) if frame.voiced])
    first_voiced = next(frame for frame in rig.of(AudioFrame) if frame.voiced)
    assert 0 <= first_voiced.start_sample - onset[0].sample < 0.2 * RATE
    await rig.until(lambda: [event for event in rig.of(WireMetric) if event.kind == "caller_offset"])
    await rig.run(4000)
    assert not rig.of(AudioFrame)[-1].voiced


async def test_playing_at_24_khz_leaves_at_the_leg_rate_and_every_sample_is_counted(rig, tone):
    await rig.answer()
    await play(rig, tone(0.5, rate=24000), rate=24000)
    finished = await rig.until(lambda: [event for event in rig.of(PlayoutProgress) if event.is_finished])
    assert abs(finished[0].played_samples - 4000) <= 2
    await rig.run(800)
    sent = np.frombuffer(bytes(rig.sent), "<i2")
    audible = np.flatnonzero(np.abs(sent) > 100)
    assert abs((audible[-1] - audible[0] + 1) - 4000) < 40
    assert loudness(rig.far_heard()) > 0


async def test_progress_comes_at_least_every_100_ms_while_playing(rig, tone):
    await rig.answer()
    await play(rig, tone(1.0))
    await rig.until(lambda: any(event.is_finished for event in rig.of(PlayoutProgress)))
    counts = [0] + [event.played_samples for event in rig.of(PlayoutProgress)]
    assert max(np.diff(counts)) <= 0.1 * RATE and counts[-1] == RATE


async def test_items_play_in_the_order_they_were_first_named(rig, tone):
    await rig.answer()
    await play(rig, tone(0.1), "first", is_final=False)
    await play(rig, tone(0.2), "second")
    await rig.run(3200)
    assert played_of(rig, "second") == 0  # the first item is still open
    await play(rig, tone(0.1), "first")
    await rig.until(lambda: played_of(rig, "second") == 1600)
    finished = [event.item_id for event in rig.of(PlayoutProgress) if event.is_finished]
    assert finished == ["first", "second"] and played_of(rig, "first") == 1600


async def test_J13_first_words_are_heard_while_the_rest_is_not_made_yet(rig, tone):
    """users.md J13: a reply is played as it comes, in one piece."""
    await rig.answer()
    await play(rig, tone(0.3), "reply", is_final=False)
    await rig.until(lambda: played_of(rig, "reply") >= 1600)
    await rig.until(lambda: np.abs(np.frombuffer(rig.far_heard(), "<i2").astype(int)).max(initial=0) > 5_000)
    await play(rig, tone(0.2), "reply", is_final=False)
    await play(rig, tone(0.2), "reply")
    await rig.until(lambda: played_of(rig, "reply") == 5600)
    assert [event.item_id for event in rig.of(PlayoutProgress) if event.is_finished] == ["reply"]


async def test_flush_says_exactly_what_was_played_of_each_item_and_the_rest_is_not_heard(rig, tone):
    await rig.answer()
    await play(rig, tone(5.0), "long")
    await play(rig, tone(1.0), "next")
    await rig.until(lambda: played_of(rig, "long") >= 1600)
    await rig.leg.send(Flush(leg_id=rig.leg.leg_id))
    await rig.until(lambda: len(rig.of(Flushed)) == 2)
    flushed = {event.item_id: event.played_samples for event in rig.of(Flushed)}
    assert flushed["next"] == 0 and 1600 <= flushed["long"] < 4 * RATE  # of 5 s; when it stopped is the worker's time
    await rig.run(1600)
    sent = np.frombuffer(bytes(rig.sent), "<i2")
    audible = np.flatnonzero(np.abs(sent) > LOUDEST_NOISE)
    assert abs((audible[-1] - audible[0] + 1) - flushed["long"]) <= 20  # a tone has zeros at its ends


async def test_J6_late_audio_of_a_flushed_item_is_dropped_and_a_new_item_is_heard(rig, tone):
    await rig.answer()
    await play(rig, tone(1.0), "old", is_final=False)
    await rig.until(lambda: played_of(rig, "old") > 0)
    await rig.leg.send(Flush(leg_id=rig.leg.leg_id, item_id="old"))
    await play(rig, tone(1.0), "old")
    await play(rig, tone(0.1), "new")
    await rig.until(lambda: played_of(rig, "new") == 800)
    assert len(rig.of(Flushed)) == 1 and played_of(rig, "old") <= rig.of(Flushed)[0].played_samples


async def test_flush_of_a_finished_item_is_answered_too(rig, tone):
    await rig.answer()
    await play(rig, tone(0.1), "short")
    await rig.until(lambda: played_of(rig, "short") == 800)
    await rig.leg.send(Flush(leg_id=rig.leg.leg_id, item_id="short"))
    flushed = await rig.until(lambda: rig.of(Flushed))
    assert flushed[0].played_samples == 800


async def test_pause_holds_the_exact_sample_and_resume_goes_on_there(rig):
    await rig.answer()
    ramp = np.arange(8000, dtype="<i2") + LOUDEST_NOISE + 1  # every sample tells its number
    await play(rig, ramp.tobytes())
    await rig.until(lambda: played_of(rig) >= 800)
    await rig.leg.send(Pause(leg_id=rig.leg.leg_id))
    await rig.run(1600)
    held = played_of(rig)
    await rig.run(1600)
    assert played_of(rig) == held
    await rig.leg.send(Resume(leg_id=rig.leg.leg_id))
    await rig.until(lambda: played_of(rig) == 8000)
    await rig.run(320)
    sent = np.frombuffer(bytes(rig.sent), "<i2")
    assert np.array_equal(sent[sent > LOUDEST_NOISE], ramp)


async def test_duck_attenuates_by_the_gain_and_resume_restores_it(rig, tone):
    await rig.answer()
    await play(rig, tone(3.0))
    await rig.until(lambda: played_of(rig) >= 1600)
    await rig.leg.send(Duck(leg_id=rig.leg.leg_id, gain_db=-18.0))
    ducked = await rig.until(lambda: [event.sample for event in rig.of(WireMetric) if event.kind == "agent_ducked"])
    await rig.run(4000)
    await rig.leg.send(Resume(leg_id=rig.leg.leg_id))
    restored = await rig.until(lambda: [event.sample for event in rig.of(WireMetric) if event.kind == "agent_unducked"])
    await rig.run(2400)
    sent = bytes(rig.sent)
    before = loudness(sent[2 * (ducked[0] - 1000) : 2 * (ducked[0] - 200)])
    during = loudness(sent[2 * (ducked[0] + 200) : 2 * (restored[0] - 200)])
    after = loudness(sent[2 * (restored[0] + 200) : 2 * (restored[0] + 1000)])
    assert 20 * np.log10(during / before) == pytest.approx(-18, abs=0.5)
    assert after == pytest.approx(before, rel=0.02)


async def test_more_than_30_s_unplayed_is_refused(rig, tone):
    await rig.answer()
    await play(rig, tone(29.0), is_final=False)
    with pytest.raises(LegError, match="unplayed"):
        await play(rig, tone(2.0))
    await rig.leg.send(Flush(leg_id=rig.leg.leg_id))
    await rig.until(lambda: rig.of(Flushed))
    await play(rig, tone(2.0), "again")


async def test_keys_arrive_once_each_and_in_order(rig):
    await rig.answer()
    await rig.run(800)
    await rig.far_presses("12#")
    await rig.until(lambda: len(rig.of(DtmfReceived)) >= 3)
    await rig.run(1600)
    assert [event.digit for event in rig.of(DtmfReceived)] == ["1", "2", "#"]


async def test_caller_hanging_up_ends_the_leg_normally(rig, tone):
    await rig.answer()
    await play(rig, tone(2.0))
    await rig.until(lambda: played_of(rig) > 0)
    await rig.run(600)
    await rig.far_hangs_up()
    ended = (await rig.until(lambda: rig.of(LegDisconnected)))[0]
    assert (ended.cause, ended.by) == ("normal", "caller")
    assert rig.events[-1] is ended
    heard = sum(1 for sample in np.frombuffer(bytes(rig.sent), "<i2") if sample)
    assert abs(played_of(rig) - heard) < 200  # the last count is the final one, not the last periodic report


async def test_caller_giving_up_before_the_answer_is_cancelled(rig):
    await rig.until(lambda: rig.of(LegStateChanged))
    await rig.far_cancels()
    ended = (await rig.until(lambda: rig.of(LegDisconnected)))[0]
    assert (ended.cause, ended.by) == ("cancelled", "caller")


async def test_agent_hanging_up_ends_the_leg_with_the_cause_it_gave(rig):
    await rig.answer()
    await rig.leg.send(Hangup(leg_id=rig.leg.leg_id, cause="transferred"))
    ended = (await rig.until(lambda: rig.of(LegDisconnected)))[0]
    assert (ended.cause, ended.by) == ("transferred", "agent")
    await rig.leg.send(Hangup(leg_id=rig.leg.leg_id))  # both sides may hang up at once
    with pytest.raises(LegError, match="Duck.*disconnected"):
        await rig.leg.send(Duck(leg_id=rig.leg.leg_id))


async def test_rejected_call_ends_with_the_status_given(rig):
    await rig.until(lambda: rig.of(LegStateChanged))
    await rig.leg.send(Reject(leg_id=rig.leg.leg_id, sip_status=503, retry_after_s=7))
    ended = (await rig.until(lambda: rig.of(LegDisconnected)))[0]
    assert (ended.cause, ended.sip_status, ended.by) == ("overloaded", 503, "agent")


async def test_refused_refer_is_reported_and_the_call_goes_on(rig):
    await rig.answer()
    rig.far_refuses_refer()
    await rig.leg.send(Refer(leg_id=rig.leg.leg_id, refer_to="sip:200@127.0.0.1:5999"))
    result = (await rig.until(lambda: rig.of(ReferResult)))[0]
    assert result.sip_status == rig.refusal_status
    frames = len(rig.of(AudioFrame))
    await rig.run(3200)
    assert len(rig.of(AudioFrame)) > frames and not rig.of(LegDisconnected)


async def test_illegal_command_names_command_and_state(rig):
    await rig.until(lambda: rig.of(LegStateChanged))
    with pytest.raises(LegError, match="Refer is not possible in state (incoming|early)"):
        await rig.leg.send(Refer(leg_id=rig.leg.leg_id, refer_to="sip:1@127.0.0.1"))
