"""The pure parts alone: play-out arithmetic, rings, resampler, echo gate, voice activity, trunk rules, settings,
causes, watch."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from telephony.agent_watch import AgentState, AgentWatch, WatchAction
from telephony.config import TelephonyConfig
from telephony.echo import MIN_CORRELATION, EchoGate
from telephony.leg import LegError, PlayoutProgress
from telephony.loopback import LoopbackLeg
from telephony.playout import Playout
from telephony.resample import StreamResampler
from telephony.ring import AudioTick, LegRings, RecordKind, pack_audio, unpack_audio
from telephony.sip.causes import cause_of_hangup, cause_of_status
from telephony.sip.refer import OutboundRefer, check_refer_to
from telephony.sip.trunk import Neighbours, TrunkRefused, caller_of, check_outbound, read_invite, split_uri
from telephony.voice_activity import VoiceActivity
from telephony.wire_metrics import VoicedEnergyMeter

RATE = 8000
CONFIG = TelephonyConfig()


def test_ring_gives_back_every_record_whole_across_the_wrap():
    writer = LegRings.create(RATE, 0.05)
    reader = LegRings(os.dup(writer.fd), writer.to_agent_bytes, writer.to_worker_bytes, is_new=False)
    rng, sent, got = random.Random(5), [], []
    for number in range(3000):
        payload = bytes([number % 251]) * rng.randrange(0, 4000)
        if writer.to_worker.write(RecordKind.COMMAND, payload):
            sent.append(payload)
        if rng.random() < 0.3:
            got += [payload for _, payload in reader.to_worker.read()]
    got += [payload for _, payload in reader.to_worker.read()]
    assert got == sent and len(sent) > 1000
    writer.close()
    reader.close()


def test_full_ring_refuses_and_keeps_what_it_has():
    rings = LegRings.create(RATE, 0.05)
    count = 0
    while rings.to_agent.write(RecordKind.EVENT, b"x" * 1000):
        count += 1
    assert count > 100 and not rings.to_agent.write(RecordKind.EVENT, b"y" * 1000)
    assert len(rings.to_agent.read()) == count
    rings.close()


@pytest.mark.parametrize("cleaned", [b"ab" * 3, b"ef" * 3])
@pytest.mark.parametrize("is_voiced", [False, True])
def test_audio_record_carries_both_directions_and_what_was_made_of_the_callers(cleaned, is_voiced):
    tick = AudioTick(7, b"ab" * 3, b"cd" * 3, cleaned, is_voiced)
    assert unpack_audio(pack_audio(tick)) == tick


@pytest.mark.parametrize("seed", range(5))
def test_playout_gives_each_sample_once_for_random_chunks_and_pulls(seed):
    rng = random.Random(seed)
    playout = Playout("leg", TelephonyConfig(comfort_noise_dbov=0))
    samples = np.arange(1, 4001, dtype="<i2")
    position, out, progress = 0, b"", []
    while position < len(samples) or not playout.is_idle:
        if position < len(samples) and rng.random() < 0.5:
            size = rng.randrange(1, 700)
            chunk = samples[position : position + size]
            position += size
            playout.play("item", chunk.tobytes(), is_final=position >= len(samples))
        pcm, events = playout.pull(rng.choice([80, 160, 240]))
        out += pcm
        progress += [event for event in events if isinstance(event, PlayoutProgress)]
    heard = np.frombuffer(out, "<i2")
    assert np.array_equal(heard[heard > 0], samples)
    assert progress[-1].is_finished and progress[-1].played_samples == 4000
    assert playout.sample == len(heard)


def test_playout_ramp_ends_on_the_target_and_never_overshoots():
    playout = Playout("leg", CONFIG)
    playout.play("item", np.full(8000, 10000, "<i2").tobytes())
    playout.duck(-18.0)
    pcm, _ = playout.pull(1600)
    playout.resume()
    back, _ = playout.pull(1600)
    down, up = np.frombuffer(pcm, "<i2"), np.frombuffer(back, "<i2")
    assert np.all(np.diff(down) <= 0) and down[-1] == pytest.approx(10000 * 10 ** (-18 / 20), abs=1)
    assert np.all(np.diff(up) >= 0) and up[-1] == 10000
    assert down[80] == down[-1]  # 10 ms


def test_held_call_plays_nothing_but_its_clock_runs():
    playout = Playout("leg", CONFIG)
    playout.play("item", np.full(800, 5, "<i2").tobytes(), is_final=True)
    pcm, _ = playout.pull(160, is_held=True)
    assert not any(pcm) and playout.sample == 160 and playout.unplayed_samples == 800


@pytest.mark.parametrize(("from_hz", "to_hz"), [(24000, 8000), (8000, 16000), (8000, 24000), (8000, 8000)])
def test_P15_resampler_output_does_not_depend_on_chunk_sizes_and_withholds_at_most_2_ms(from_hz, to_hz):
    rng = random.Random(1)
    signal = (np.sin(np.arange(from_hz) * 0.05) * 8000).astype("<i2").tobytes()
    whole = StreamResampler(from_hz, to_hz)
    expected = whole.push(signal) + whole.finish()
    stream, out, position, withheld = StreamResampler(from_hz, to_hz), b"", 0, 0.0
    while position < len(signal):
        size = 2 * rng.randrange(1, from_hz // 20)
        out += stream.push(signal[position : position + size])
        position = min(position + size, len(signal))
        withheld = max(withheld, position / 2 * to_hz / from_hz - len(out) / 2)
    out += stream.finish()
    assert out == expected
    assert withheld <= 0.002 * to_hz + 1 and abs(len(out) // 2 - to_hz) <= 2


def test_resampler_starts_no_thread_that_a_call_would_wait_for():
    threads = lambda: len(os.listdir("/proc/self/task"))  # noqa: E731
    before, resamplers = threads(), [StreamResampler(8000, 16_000) for _ in range(4)]
    assert all(resampler.push(bytes(320)) for resampler in resamplers)
    assert threads() <= before


def test_resampler_makes_stereo_mono():
    left = (np.sin(np.arange(4800) * 0.05) * 8000).astype("<i2")
    stereo = np.stack([left, left], axis=1).tobytes()
    mono, both = StreamResampler(48_000, 8000), StreamResampler(48_000, 8000, "stereo")
    expected = np.frombuffer(mono.push(left.tobytes()) + mono.finish(), "<i2")
    found = np.frombuffer(both.push(stereo) + both.finish(), "<i2")
    assert len(found) == len(expected) == 800 and np.abs(found.astype(int) - expected).max() <= 2


def noise(seed, seconds=1.0, level=3000.0):
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * level
    smooth = np.convolve(samples, np.ones(4) / 4, "same")
    return smooth


def gate_share(received, sent):
    gate = EchoGate(CONFIG)
    frames = range(0, len(received) - 160, 160)
    as_pcm = lambda samples, at: samples[at : at + 160].astype("<i2").tobytes()  # noqa: E731
    likenesses = [gate.push(as_pcm(received, at), as_pcm(sent, at)) for at in frames]
    return sum(likeness >= MIN_CORRELATION for likeness in likenesses) / len(frames)


@pytest.mark.parametrize("delay_ms", [0, 25, 120, 350])
def test_delayed_quieter_copy_of_our_voice_is_echo(delay_ms):
    sent = noise(1, 2.0)
    delay = delay_ms * RATE // 1000
    received = np.concatenate([np.zeros(delay), sent])[: len(sent)] * 0.2
    assert gate_share(received[delay + 640 :], sent[delay + 640 :]) > 0.7
    assert gate_share(received, sent) > 0.7


def test_another_voice_over_ours_is_not_echo():
    sent, caller = noise(1, 2.0), noise(2, 2.0, 1000)
    assert gate_share(caller, sent) == 0
    assert gate_share(caller + 0.1 * sent, sent) < 0.05  # double talk


def test_echo_on_a_loopback_call_is_not_voiced_and_the_caller_over_it_is(speech):
    from telephony.leg import Answer, AudioFrame, Play

    leg = LoopbackLeg("leg", echo_gain=0.25, echo_delay_ms=60)
    leg.ring()
    leg.send_now(Answer(leg_id="leg"))
    leg.send_now(Play(leg_id="leg", item_id="a", pcm=speech * 3, sample_rate_hz=RATE, is_final=True))
    leg.advance(3 * RATE // 2)
    assert not any(event.voiced for event in leg.drain() if isinstance(event, AudioFrame))
    ours = np.frombuffer(speech, "<i2").astype(float)
    other = np.interp(np.arange(0, RATE - 1, 1.22), np.arange(RATE), ours).astype("<i2")[::-1].copy()
    leg.speak(other.tobytes())
    leg.advance(RATE)
    voiced = [event.voiced for event in leg.drain() if isinstance(event, AudioFrame)]
    assert sum(voiced) > 0.35 * len(voiced)  # a hard caller: our own voice backwards, a little higher


def test_voice_activity_takes_speech_and_leaves_hiss_and_silence(speech):
    def share(pcm):
        activity = VoiceActivity(CONFIG)
        return np.mean([activity.push(pcm[at : at + 320]) for at in range(0, len(pcm), 320)])

    assert share(speech) > 0.8
    assert share(bytes(2 * RATE)) == 0
    assert share(noise(3, 1.0, 30).astype("<i2").tobytes()) == 0


def test_wire_meter_reports_first_and_last_voiced_sample():
    meter = VoicedEnergyMeter("leg", "caller", CONFIG)
    signal = np.zeros(RATE, "<i2")
    signal[1600:4000] = 8000
    found = [metric for at in range(0, RATE, 160) for metric in meter.push(signal[at : at + 160].tobytes())]
    assert [(metric.kind, metric.sample) for metric in found] == [("caller_onset", 1600), ("caller_offset", 4000)]


def test_wire_meter_ignores_steady_noise_and_finds_speech_in_it():
    meter = VoicedEnergyMeter("leg", "caller", CONFIG)
    signal = noise(4, 20.0, 400)
    signal[15 * RATE : 16 * RATE] *= 12
    found = [
        metric
        for at in range(0, len(signal), 160)
        for metric in meter.push(signal[at : at + 160].astype("<i2").tobytes())
    ]
    late = [metric for metric in found if metric.sample > 14 * RATE]
    assert [metric.kind for metric in late] == ["caller_onset", "caller_offset"]
    assert abs(late[0].sample - 15 * RATE) <= 160


# ------------------------------------------------------------------- signalling


def test_only_configured_hosts_can_be_called():
    config = TelephonyConfig(outbound_hosts=("trunk.example", "127.0.0.1:5070"))
    check_outbound("sip:100@trunk.example", config)
    check_outbound("sip:100@127.0.0.1:5070", config)
    for uri in (
        "sip:100@127.0.0.1:5071", "sip:100@other.example", "sip:a@trunk.example\r\nEvil: 1",
        "sip:a@evil.example@trunk.example",
        "tel:+39", "sip:a@trunk.example?Replaces=x", "<sip:100@trunk.example>", "sips:100@trunk.example", "",
    ):  # fmt: skip
        with pytest.raises(TrunkRefused):
            check_outbound(uri, config)


def test_sources_are_loopback_only_unless_listed():
    default = Neighbours(CONFIG)
    assert default.may_call_us("127.0.0.1:5060") and not default.may_call_us("192.0.2.1:5060")
    listed = Neighbours(TelephonyConfig(allowed_sources=("192.0.2.0/24",)))
    assert listed.may_call_us("192.0.2.1:5060") and not listed.may_call_us("127.0.0.1:5060")
    assert not default.may_call_us("nonsense")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('"Ann <b>" <sip:4711@host>;tag=1', ("4711", "Ann <b>")),
        ('"A \\"q\\" <b>" <sip:1@h>', ("1", 'A "q" <b>')),
        ("Ann <sip:+39123:pw@host>", ("+39123", "Ann")),
        ("sip:anonymous@anonymous.invalid;tag=2", ("anonymous", "")),
        ("<tel:+39123>", ("+39123", "")),
        ("garbage", ("", "")),
    ],
)
def test_caller_is_read_from_any_from_header(value, expected):
    ani, name = caller_of(value)
    assert ani == expected[0] and name.startswith(expected[1])


def test_invite_with_folded_and_hostile_headers_is_read():
    uri, headers = read_invite(
        "INVITE sip:100@h SIP/2.0\r\nSubject: a\r\n  b\r\nX: \x00\x1b[31m" + "y" * 900 + "\r\n\r\nbody"
    )
    assert uri == "sip:100@h" and headers["Subject"] == "a b"
    assert len(headers["X"]) <= 512 and headers["X"].isprintable()
    assert read_invite("") == ("", {})


def test_uri_is_split_into_user_host_and_port():
    assert split_uri("sip:100@127.0.0.1:5070;transport=udp") == ("100", "127.0.0.1", 5070)
    assert split_uri("<sips:a%20b@[::1]>") == ("a%20b", "::1", 0)
    assert split_uri("sip:host.example") == ("", "host.example", 0)
    with pytest.raises(ValueError, match="not a SIP URI"):
        split_uri("http://x")


def test_refer_target_cannot_smuggle_headers():
    check_refer_to("sip:200@host;transport=udp?Subject=x")
    for target in ("sip:a@b>\r\nX: y", 'sip:"a"@b', "http://x", "sip:a b"):
        with pytest.raises(ValueError, match="refer_to"):
            check_refer_to(target)


def test_refer_is_reported_once_with_its_final_outcome():
    refer = OutboundRefer("leg", now_s=0.0, timeout_s=30)
    assert refer.on_status(202, "Accepted", False) is None and refer.on_status(180, "Ringing", False) is None
    result = refer.on_status(200, "OK", True)
    assert result is not None and result.sip_status == 200
    assert refer.on_status(200, "OK", True) is None and refer.on_time(99.0) is None
    late = OutboundRefer("leg", now_s=0.0, timeout_s=30)
    assert late.on_time(29.9) is None
    timeout = late.on_time(30.0)
    assert timeout is not None and timeout.sip_status == 408
    assert late.on_party_gone() is None


def test_refer_whose_party_leaves_is_of_unknown_outcome_only_when_it_was_accepted():
    refer = OutboundRefer("leg", now_s=0.0, timeout_s=30)
    assert refer.on_party_gone() is None
    refer.on_status(202, "Accepted", False)
    result = refer.on_party_gone()
    assert result is not None and result.sip_status == 0
    assert refer.on_party_gone() is None and refer.on_status(200, "OK", True) is None


def test_every_status_has_a_cause():
    assert (
        cause_of_status(486) == "busy"
        and cause_of_status(488) == "no_common_codec"
        and cause_of_status(603) == "rejected"
    )
    assert {cause_of_status(status) for status in (300, 302, 380)} == {"redirected"}
    assert cause_of_hangup("transferred") == "transferred" and cause_of_hangup("whatever") == "normal"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ptime_ms": 25}, r"telephony\.ptime_ms = 25: must be 10, 20, 30 or 40"),
        ({"max_calls": 0}, r"telephony\.max_calls = 0: must be 1 to 512"),
        ({"max_calls": True}, r"telephony\.max_calls = True: must be a int"),
        ({"sip_bind": "0.0.0.0"}, r"telephony\.sip_bind = '0\.0\.0\.0': must be a loopback address"),
        ({"codecs": ["G729/8000"]}, r"telephony\.codecs = "),
        ({"outbound_hosts": "host"}, r"telephony\.outbound_hosts = 'host': must be a list of strings"),
        ({"handoff_uri": "http://x"}, r"telephony\.handoff_uri = "),
        ({"allowed_sources": ["300.1.1.1"]}, r"telephony\.allowed_sources = "),
    ],
)
def test_bad_setting_is_named_with_its_value_and_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        TelephonyConfig(**settings)


def test_agent_watch_apologises_offers_again_and_gives_up():
    watch = AgentWatch(TelephonyConfig(agent_stall_s=4, agent_lost_hold_s=10))
    assert not watch.can_take_calls and watch.on_lost(0.0) is WatchAction.NOTHING
    watch.on_connected(1.0)
    assert watch.can_take_calls and watch.on_time(4.9) is WatchAction.NOTHING
    assert watch.on_time(5.1) is WatchAction.APOLOGISE_IF_SILENT and watch.on_time(6.0) is WatchAction.NOTHING
    watch.on_sign_of_life(7.0)
    assert watch.state is AgentState.PRESENT
    assert watch.on_lost(8.0) is WatchAction.APOLOGISE and watch.on_lost(8.1) is WatchAction.NOTHING
    watch.on_connected(12.0)
    assert watch.on_lost(13.0) is WatchAction.APOLOGISE
    assert watch.on_time(22.9) is WatchAction.NOTHING and watch.on_time(23.1) is WatchAction.GIVE_UP
    assert watch.state is AgentState.ABSENT


def test_play_beyond_the_bound_is_refused_whole():
    playout = Playout("leg", TelephonyConfig(max_unplayed_s=1))
    playout.play("a", bytes(2 * RATE))
    with pytest.raises(LegError, match="at most 8000"):
        playout.play("b", bytes(2))
    assert playout.unplayed_samples == RATE
