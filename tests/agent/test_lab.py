"""The wire lab without a SIP stack: what the line does to packets, and what is read from them."""

from __future__ import annotations

import asyncio
import random
import socket
from xml.etree import ElementTree

import numpy as np
import pytest

from agent.lab import plot, rtp
from agent.lab.concealment import _pesq_figures, distance, pesq_of
from agent.lab.fake_engine import LINES
from agent.lab.line import PROFILES, LineProfile, LossyDirection
from agent.lab.measure import Voice, measure, stimuli, summary
from agent.lab.relay import EchoPath, Relay
from agent.lab.run import by_line, chosen_lines, listing, main
from agent.lab.scenarios import SCENARIOS, script

RATE = rtp.RATE_HZ
PTIME_S = 0.02


def fates(profile: LineProfile, seed: int = 3, packets: int = 20_000) -> list[list[float]]:
    direction = LossyDirection(profile, seed)
    return [direction.pass_on(number * PTIME_S) for number in range(packets)]


def runs_of_loss(found: list[list[float]]) -> list[int]:
    lengths, length = [], 0
    for fate in found:
        if not fate:
            length += 1
        elif length:
            lengths.append(length)
            length = 0
    return lengths


def test_a_clean_line_passes_every_packet_at_once_and_in_order():
    assert fates(PROFILES["clean"], packets=500) == [[number * PTIME_S] for number in range(500)]


def test_the_same_seed_gives_every_packet_the_same_fate_and_another_seed_another():
    assert fates(PROFILES["worst"], packets=2000) == fates(PROFILES["worst"], packets=2000)
    assert fates(PROFILES["worst"], packets=2000) != fates(PROFILES["worst"], seed=4, packets=2000)


@pytest.mark.parametrize(("loss", "burst_ms"), [(0.01, 20), (0.05, 20), (0.03, 80), (0.2, 200)])
def test_loss_has_the_rate_and_the_burst_length_that_were_asked_for(loss, burst_ms):
    found = fates(LineProfile(loss=loss, burst_ms=burst_ms), packets=100_000)
    lengths = runs_of_loss(found)
    assert sum(not fate for fate in found) / len(found) == pytest.approx(loss, rel=0.2)
    wanted = max(burst_ms / 20, 1 / (1 - loss))  # independent losses have neighbours by chance
    assert np.mean(lengths) == pytest.approx(wanted, rel=0.15)


def test_jitter_delays_but_never_swaps_and_reorder_does():
    steady = [fate[0] for fate in fates(LineProfile(delay_ms=10, jitter_ms=20), packets=5000)]
    assert steady == sorted(steady)
    late = np.array(steady) - np.arange(5000) * PTIME_S
    assert late.min() >= 0.01 and late.max() > 0.05
    swapped = [fate[0] for fate in fates(LineProfile(reorder=0.05), packets=5000)]
    assert 0.03 < sum(b < a for a, b in zip(swapped, swapped[1:], strict=False)) / 5000 < 0.07


def test_a_duplicate_comes_twice():
    twice = sum(len(fate) == 2 for fate in fates(LineProfile(duplicate=0.1), packets=5000))
    assert 400 < twice < 600


@pytest.mark.parametrize("values", [{"loss": 0.9}, {"jitter_ms": -1}, {"noise_dbov": 3}])
def test_an_impossible_line_is_refused_by_name(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} = .*: must be"):
        LineProfile(**values)


# ------------------------------------------------------------------------------ RTP


@pytest.mark.parametrize("payload_type", [rtp.PCMU, rtp.PCMA])
def test_g711_comes_back_within_its_quantisation_and_codes_come_back_exactly(payload_type):
    table = rtp.DECODE[payload_type]
    codes = rtp.encode(payload_type, table.astype(float))
    assert np.array_equal(table[np.frombuffer(codes, np.uint8)], table)
    samples = np.linspace(-30_000, 30_000, 4001)
    again = table[np.frombuffer(rtp.encode(payload_type, samples), np.uint8)]
    assert np.max(np.abs(again - samples) / (np.abs(samples) + 300)) < 0.04


def test_mu_law_has_the_values_of_the_standard():
    table = rtp.DECODE[rtp.PCMU]  # ITU-T G.711 table 2a: the ends and the two zeros
    assert (table[0x00], table[0x80], table[0xFF], table[0x7F]) == (-32124, 32124, 0, 0)


def packet(number: int, samples: np.ndarray | None = None, first_stamp: int = 0) -> rtp.RtpPacket:
    audio = np.zeros(160) if samples is None else samples
    stamp = (first_stamp + 160 * number) % 2**32
    return rtp.RtpPacket(rtp.PCMU, number % 2**16, stamp, 7, rtp.encode(rtp.PCMU, audio))


def test_header_extension_padding_and_csrcs_are_not_audio():
    plain = packet(5)
    assert rtp.parse(rtp.build(plain)) == plain
    head, body = rtp.build(plain)[:12], plain.payload
    with_all = bytes([0xB1]) + head[1:] + b"csrc" + b"\xbe\xde\x00\x01" + b"ext." + body + b"\x00\x00\x03"
    found = rtp.parse(with_all)
    assert found is not None and found.payload == body
    assert rtp.parse(b"\x80\xc8" + bytes(20)) is None  # RTCP sender report
    assert rtp.parse(b"\x40" + bytes(20)) is None and rtp.parse(b"short") is None


def track(samples: np.ndarray, start_s: float = 100.0, lost: set[int] = frozenset(), jitter_s: float = 0.0, **first):
    found, rng = rtp.RtpTrack(), random.Random(1)
    for number in range(len(samples) // 160):
        if number not in lost:
            late = rng.random() * jitter_s
            found.add(packet(number, samples[160 * number :][:160], **first), start_s + number * PTIME_S + late)
    return found


def test_audio_lies_where_its_time_stamps_say_through_loss_jitter_and_wrap_around():
    ramp = np.repeat(np.arange(1, 41) * 500.0, 160)
    found = track(ramp, lost={7, 8}, jitter_s=0.05, first_stamp=2**32 - 1600)
    audio, start_s = found.audio()
    assert len(audio) == len(ramp) and start_s == pytest.approx(100.0, abs=0.01)
    assert not audio[7 * 160 : 9 * 160].any()
    assert np.allclose(audio[9 * 160 :], ramp[9 * 160 :], rtol=0.04)
    assert found.statistics()["lost"] == 2 and found.statistics()["packets"] == 38


# --------------------------------------------------------------------------- timings


def tone(*spans: tuple[float, float], seconds: float = 12.0, level: float = 6000.0) -> np.ndarray:
    time_s = np.arange(round(seconds * RATE)) / RATE
    wave = np.sin(2 * np.pi * 200 * time_s) * level
    mask = np.zeros(len(wave))
    for begin, end in spans:
        mask[round(begin * RATE) : round(end * RATE)] = 1
    return wave * mask


def said(label: str, begin: float, end: float) -> dict[str, object]:
    return {"label": label, "start_ms": round(begin * 1000), "end_ms": round(end * 1000)}


def only(result: dict) -> dict:
    (found,) = result["stimuli"]
    return found


def test_voice_to_voice_is_from_the_callers_last_to_the_agents_first_sound():
    result = measure([said("turn", 2, 3)], track(tone((2, 3))), track(tone((0.4, 1.5), (3.64, 5))))
    assert only(result)["voice_to_voice_ms"] == pytest.approx(640, abs=20)
    assert result["first_word_ms"] == pytest.approx(400, abs=20)


def test_an_interruption_is_stopped_or_missed():
    caller = track(tone((3, 4)))
    stopped = only(measure([said("interrupt", 3, 4)], caller, track(tone((1, 3.5), (5, 6)))))
    assert stopped["stop_ms"] == pytest.approx(500, abs=20) and stopped["was_speaking"]
    missed = only(measure([said("interrupt", 3, 4)], caller, track(tone((1, 9)))))
    assert missed["stop_ms"] is None


def test_a_duck_is_found_where_the_agent_became_12_db_quieter():
    quiet = [(begin, begin + 0.4) for begin in np.arange(3.16, 6, 0.5)]  # as speech: with gaps
    loud = tone((1, 3.16), level=8000.0) + tone(*quiet, level=8000.0 * 10 ** (-18 / 20))
    found = only(measure([said("backchannel", 3, 3.4)], track(tone((3, 3.4))), track(loud)))
    assert found["duck_ms"] == pytest.approx(160, abs=40) and not found["is_false_stop"]


def test_silence_of_more_than_700_ms_at_a_backchannel_is_a_false_stop():
    heard = track(tone((1, 3.3), (4.2, 6)))
    found = only(measure([said("backchannel", 3, 3.4)], track(tone((3, 3.4))), heard))
    assert found["is_false_stop"] and found["silence_ms"] == pytest.approx(900, abs=40)


def test_an_answer_that_breaks_off_for_more_than_700_ms_with_nobody_speaking_is_a_false_stop():
    caller = track(tone((2, 3)))
    whole = only(measure([said("listen", 2, 3)], caller, track(tone((3.6, 5), (5.4, 7)))))
    broken = only(measure([said("listen", 2, 3)], caller, track(tone((3.6, 5), (5.9, 7)))))
    assert not whole["is_false_stop"] and whole["gap_ms"] == pytest.approx(400, abs=30)
    assert broken["is_false_stop"] and broken["voice_to_voice_ms"] == pytest.approx(600, abs=30)
    counted = summary([measure([said("listen", 2, 3)], caller, track(tone((3.6, 5), (5.9, 7))))])
    assert counted["false_stops"] == "1/1" and counted["false_stops_by_kind"]["listen"] == "1/1"


def test_an_onset_inside_a_pause_is_a_taken_pause():
    spoken = [said("pause", 2, 3), said("turn", 4, 5)]
    caller = track(tone((2, 3), (4, 5)))
    patient = measure(spoken, caller, track(tone((5.6, 6))))["stimuli"][0]
    taken = measure(spoken, caller, track(tone((3.5, 4.2), (5.6, 6))))["stimuli"][0]
    assert not patient["is_taken"] and taken["is_taken"] and patient["pause_ms"] == pytest.approx(1000, abs=30)


def test_stimuli_are_found_where_they_crossed_the_wire_whatever_the_report_is_off_by():
    found = stimuli([said("turn", 2.2, 3.2), said("interrupt", 6.3, 7.3)], Voice.of(track(tone((2, 3), (6.2, 7.2)))))
    assert [(s.label, round(s.onset_s - 100, 1)) for s in found] == [("turn", 2.0), ("interrupt", 6.2)]
    assert stimuli([said("turn", 2, 3)], Voice.of(track(tone()))) == []


def test_the_summary_says_every_figure_with_its_n():
    calls = [
        measure([said("turn", 2, 3)], track(tone((2, 3))), track(tone((3.5 + late, 5)))) for late in (0.0, 0.1, 0.2)
    ]
    calls.append(measure([said("turn", 2, 3)], track(tone((2, 3))), track(tone((0.1, 1)))))
    found = summary(calls)
    assert found["voice_to_voice_ms"]["n"] == 3 and found["voice_to_voice_ms"]["p50"] == pytest.approx(600, abs=20)
    assert found["unanswered_turns"] == "1/4" and found["stop_ms"] == {"p50": None, "p95": None, "n": 0}


# ---------------------------------------------------------------------- echo and relay


def test_the_relays_echo_has_the_delay_and_the_return_loss_that_were_asked_for():
    path = EchoPath(LineProfile(echo_delay_ms=100, echo_return_loss_db=12), seed=2)
    voice = np.random.default_rng(1).standard_normal(160 * 200) * 3000
    heard = []
    for start in range(0, len(voice), 160):
        path.sent(voice[start : start + 160])
        heard.append(path.received(np.zeros(160)))
    echo = np.concatenate(heard)
    correlation = np.correlate(echo[:8000], voice[:4000], "valid")
    assert abs(int(np.argmax(np.abs(correlation))) - 800) <= 8
    assert 10 * np.log10(np.mean(voice**2) / np.mean(echo[1600:] ** 2)) == pytest.approx(12, abs=1)


def test_noise_of_a_line_has_its_level():
    path = EchoPath(LineProfile(noise_dbov=-40), seed=2)
    noise = np.concatenate([path.received(np.zeros(160)) for _ in range(200)])
    assert 20 * np.log10(np.sqrt(np.mean(noise**2)) / 32768) == pytest.approx(-40, abs=1)


SDP = "v=0\r\no=- 1 1 IN IP4 {host}\r\ns=-\r\nc=IN IP4 {host}\r\nt=0 0\r\nm=audio {port} RTP/AVP 0\r\na=rtcp:{rtcp}\r\n"


def sip(start: str, port: int) -> bytes:
    body = SDP.format(host="127.0.0.1", port=port, rtcp=port + 1)
    return f"{start}\r\nCall-ID: abc\r\nCSeq: 1 INVITE\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def media_port(message: bytes) -> int:
    body = message.split(b"\r\n\r\n", 1)[1]
    assert int(message.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) == len(body)
    assert b"a=rtcp" not in body
    return int(body.split(b"m=audio ")[1].split()[0])


async def test_both_directions_of_a_call_pass_the_relay_and_are_recorded_there():
    loop = asyncio.get_running_loop()

    def endpoint() -> socket.socket:
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        found.bind(("127.0.0.1", 0))
        found.setblocking(False)
        return found

    sockets = caller, agent, caller_rtp, agent_rtp = [endpoint() for _ in range(4)]
    try:
        async with Relay(f"127.0.0.1:{agent.getsockname()[1]}", PROFILES["clean"]) as relay, asyncio.timeout(10):
            host, port = relay.address.split(":")
            invite = sip("INVITE sip:100@127.0.0.1 SIP/2.0", caller_rtp.getsockname()[1])
            await loop.sock_sendto(caller, invite, (host, int(port)))
            invited, relay_side = await loop.sock_recvfrom(agent, 4096)
            await loop.sock_sendto(agent, sip("SIP/2.0 200 OK", agent_rtp.getsockname()[1]), relay_side)
            answered = await loop.sock_recv(caller, 4096)
            sent = rtp.build(packet(1, np.full(160, 800.0)))
            await loop.sock_sendto(caller_rtp, sent, ("127.0.0.1", media_port(answered)))
            assert await loop.sock_recv(agent_rtp, 2048) == sent
            await loop.sock_sendto(agent_rtp, sent, ("127.0.0.1", media_port(invited)))
            assert await loop.sock_recv(caller_rtp, 2048) == sent
            call = relay.calls[b"abc"]
            assert len(call.from_caller.packets) == len(call.from_agent.packets) == 1
    finally:
        for each in sockets:
            each.close()


# ------------------------------------------------------------------------ around it


def test_every_scenario_is_a_script_with_an_ear_for_it_in_the_fake():
    assert set(LINES) == {*SCENARIOS, "many"}  # of the bench
    for name in SCENARIOS:
        assert script(name, 1) == script(name, 1) and len(script(name, 1).steps) > 3


def test_a_picture_of_a_call_is_well_formed_and_shows_every_stretch():
    call = measure([said("turn", 2, 3)], track(tone((2, 3))), track(tone((3.6, 5))))
    tree = ElementTree.fromstring(plot.timeline(call | {"line": "<worst>", "scenario": "order"}))
    assert len(tree.findall("{*}rect")) == 1 + len(call["caller_s"]) + len(call["agent_s"])


def test_a_picture_of_the_figures_has_a_dot_for_every_value_and_a_bar_for_every_count():
    call = {"line": "clean"} | measure([said("turn", 2, 3)], track(tone((2, 3))), track(tone((3.6, 5))))
    calls = [call] * 3
    (line,) = by_line(calls, [LineProfile()])
    assert line["values_ms"]["voice_to_voice_ms"] == pytest.approx([600] * 3, abs=20)
    tree = ElementTree.fromstring(plot.figures(line))
    assert len(tree.findall("{*}circle")) == 6  # first word and answer of each call
    assert len(tree.findall("{*}rect")) == 1 + 2  # unanswered turns are the one count that has an n


@pytest.mark.parametrize("name", ["cough", "television"])
def test_noises_of_the_lab_are_loud_enough_to_be_found_on_the_wire(name):
    (noise,) = [step for step in script(name, 3).steps if getattr(step, "label", "") == "noise"]
    samples = np.frombuffer(noise.pcm, "<i2")
    assert Voice.of(track(np.concatenate([np.zeros(8000), samples, np.zeros(8000)]))).stretches


def test_loss_is_heard_as_distance_and_silence():
    rng = np.random.default_rng(0)
    wanted = np.convolve(rng.standard_normal(16_000), np.ones(8), "same") * 800
    holes = wanted.copy()
    for start in range(1600, 16_000, 1600):
        holes[start : start + 320] = 0
    assert distance(wanted, wanted)["log_spectral_distance_db"] == 0
    assert distance(holes, wanted)["log_spectral_distance_db"] > 1 and distance(holes, wanted)["silent_share"] > 0.05


def test_without_the_pesq_package_there_is_no_pesq_and_everything_else_stands(monkeypatch):
    monkeypatch.setattr("agent.lab.concealment.importlib.util.find_spec", lambda _name: None)
    assert pesq_of(np.zeros(8_000), np.zeros(8_000)) is None
    assert _pesq_figures(None, None) == {} and _pesq_figures(3.5, 4.0) == {"pesq": 3.5, "pesq_drop": 0.5}


def test_flags_go_over_a_named_line_and_wrong_ones_are_refused(capsys):
    from agent.lab.run import _parser

    options = _parser().parse_args(["--line", "mobile", "--loss", "0.1"])
    (line,) = chosen_lines(options)
    assert (line.name, line.loss, line.jitter_ms) == ("mobile+own", 0.1, PROFILES["mobile"].jitter_ms)
    with pytest.raises(SystemExit):
        main(["--loss", "7"])
    assert "loss = 7: must be 0 to 0.5" in capsys.readouterr().err


def test_the_list_names_every_line_and_scenario():
    assert all(name in listing() for name in (*PROFILES, *SCENARIOS))
