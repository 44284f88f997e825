"""AudioSocket without a socket: its messages, its settings, its leg in virtual time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telephony.audiosocket.config import AudioSocketConfig, media_config
from telephony.audiosocket.leg import AudioSocketLeg
from telephony.audiosocket.protocol import RATE_HZ_OF, Kind, Malformed, Message, MessageReader, encode
from telephony.config import TelephonyConfig
from telephony.leg import (
    Answer,
    DtmfReceived,
    LegDisconnected,
    LegError,
    LegIncoming,
    LegStateChanged,
    MediaHealth,
    Play,
    Refer,
    Reject,
)

UUID_BYTES = bytes(range(1, 17))
GOOD = [
    Message(Kind.UUID, UUID_BYTES), Message(Kind.SLIN, bytes(320)), Message(Kind.DTMF, b"5"),
    Message(Kind.SLIN16, bytes(range(256)) * 2 + bytes(128)), Message(Kind.SLIN192, bytes(7680)),
    Message(Kind.ERROR, b"\x01"), Message(Kind.ERROR, b""), Message(Kind.HANGUP, b""),
]  # fmt: skip
BAD = {
    "a long message of an unknown kind": b"\x02\x04\x01",
    "kind after the last slin": b"\x19\x01\x40",
    "hang-up with a payload": b"\x00\x00\x01x",
    "short UUID": b"\x01\x00\x0f",
    "long UUID": b"\x01\x00\x11",
    "UUID in the wrong byte order": b"\x01\x10\x00",
    "key without one": b"\x03\x00\x00",
    "two keys": b"\x03\x00\x02",
    "no audio": b"\x10\x00\x00",
    "half a sample": b"\x10\x01\x41",
    "audio of 65,534 bytes": b"\x10\xff\xfe",
    "audio of 202 ms": b"\x10\x0c\xa0",
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "SIP": b"OPTIONS sip:100@127.0.0.1 SIP/2.0\r\n",
    "TLS": b"\x16\x03\x01\x02\x00",
}


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[begin:end] for begin, end in zip(edges, edges[1:], strict=False)]


def read(pieces: list[bytes]) -> tuple[list[Message], str]:
    """Messages, and why it was malformed ("" = it was not)."""
    reader, found = MessageReader(), []
    try:
        for piece in pieces:
            for message in reader.push(piece):
                found.append(message)  # noqa: PERF402 - those before an error count too
    except Malformed as error:
        return found, str(error)
    return found, ""


def test_a_message_is_its_kind_its_length_in_big_endian_and_its_payload() -> None:
    assert encode(Kind.HANGUP) == b"\x00\x00\x00"
    assert encode(Kind.SLIN, bytes(320)) == b"\x10\x01\x40" + bytes(320)
    assert read([b"\x01\x00\x10" + UUID_BYTES]) == ([Message(Kind.UUID, UUID_BYTES)], "")


@given(cuts=st.lists(st.integers(0, 1 << 16), max_size=40))
def test_messages_are_the_same_however_tcp_splits_them(cuts: list[int]) -> None:
    stream = b"".join(encode(message.kind, message.payload) for message in GOOD)
    assert read(split(stream, cuts)) == (GOOD, "")


def test_messages_arrive_byte_by_byte_and_half_a_message_is_known_as_such() -> None:
    reader = MessageReader()
    stream = encode(Kind.DTMF, b"#")
    for byte in stream[:-1]:
        assert list(reader.push(bytes([byte]))) == [] and reader.is_halfway
    assert list(reader.push(stream[-1:])) == [Message(Kind.DTMF, b"#")] and not reader.is_halfway


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_malformed_is_known_by_the_header_and_what_came_before_it_counts(bad: bytes) -> None:
    found, why = read([encode(Kind.UUID, UUID_BYTES) + bad[:3]])
    assert found == GOOD[:1] and why.isascii() and why.isprintable()


@settings(max_examples=300)
@given(noise=st.binary(max_size=2_000), cuts=st.lists(st.integers(0, 2_000), max_size=8))
def test_random_bytes_are_read_or_refused_the_same_way_whatever_the_pieces_and_never_kept(
    noise: bytes, cuts: list[int]
) -> None:
    whole = read([noise])
    assert read(split(noise, cuts)) == whole
    assert b"".join(encode(message.kind, message.payload) for message in whole[0]) == noise[: _length(whole[0])]
    reader = MessageReader()
    try:
        for _ in reader.push(noise):
            pass
    except Malformed:
        return
    assert len(reader._bytes) < 3 + 65_535


def _length(messages: list[Message]) -> int:
    return sum(3 + len(message.payload) for message in messages)


# ----------------------------------------------------------------------------- settings


def test_it_is_off_and_private_by_default() -> None:
    assert AudioSocketConfig().port == 0
    assert AudioSocketConfig().bind == "127.0.0.1"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"port": 9019}, r"audiosocket\.did = ''"),
        ({"port": 9019, "did": "100", "bind": "192.0.2.1"}, r"audiosocket\.bind = '192\.0\.2\.1': must be a loopback"),
        ({"port": 9019, "did": "100", "bind": "0.0.0.0"}, "must be a loopback address unless"),
        ({"bind": "pbx.example"}, "must be an IP address"),
        ({"allowed_sources": ["10.0.0.1/8"]}, "must be networks"),
        ({"max_calls": 0}, "must be 1 to 50"),
    ],
)
def test_settings_that_cannot_be_kept_do_not_start(values: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AudioSocketConfig(**values)


def test_a_public_address_starts_with_a_list_of_sources() -> None:
    config = AudioSocketConfig(port=9019, did="100", bind="192.0.2.1", allowed_sources=("10.0.0.0/8",))
    assert [str(network) for network in config.networks] == ["10.0.0.0/8"]


# ------------------------------------------------------------------- the leg, in virtual time


class Wire:
    """What the exchange gets."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.is_read = True
        self.is_hung_up = False

    def has_room(self, num_bytes: int) -> bool:
        return self.is_read

    def send_audio(self, message: bytes) -> bool:
        if self.is_read:
            self.sent.append(message)
        return self.is_read

    def hang_up(self) -> None:
        self.is_hung_up = True

    async def closed(self) -> None:
        pass


class Call:
    """A leg, answered, on a clock of its own."""

    def __init__(self, codecs: tuple[str, ...] = ("PCMU/8000",), is_answered: bool = True, **telephony: float) -> None:
        self.events: list = []
        self.config = media_config(TelephonyConfig(codecs=codecs, **telephony))
        self.wire = Wire()
        incoming = LegIncoming(leg_id="a1", did="100", ani="u", sample_rate_hz=self.config.sample_rate_hz)
        self.leg = AudioSocketLeg(
            incoming, self.wire, self.config, AudioSocketConfig(), lambda _leg, event: self.events.append(event)
        )
        self.heard = bytearray()  # by the leg's clock
        receive = self.leg.media.receive
        self.leg.media.receive = lambda pcm: (self.heard.extend(pcm), receive(pcm))[1]
        self.now_s = 0.0
        if is_answered:
            self.leg.carry_out(Answer(leg_id="a1"), 0.0)
            self.leg.on_time(0.0)

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    def run(self, frames: list[bytes], kind: Kind = Kind.SLIN) -> None:
        """A frame each tick; an empty one is none."""
        for frame in frames:
            if frame:
                self.leg.on_message(Message(kind, frame))
            self.leg.tick()
            self.now_s += 0.02
            self.leg.on_time(self.now_s)


def frames_of(rate_hz: int, seconds: float, hz: float = 440.0) -> list[bytes]:
    time_s = np.arange(int(rate_hz * seconds)) / rate_hz
    pcm = (8_000 * np.sin(2 * np.pi * hz * time_s)).astype("<i2").tobytes()
    size = 2 * rate_hz // 50
    return [pcm[at : at + size] for at in range(0, len(pcm) - size + 1, size)]


def pitch_hz(pcm: bytes, rate_hz: int) -> float:
    samples = np.frombuffer(pcm, "<i2").astype(float)
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * rate_hz / len(samples))


@pytest.mark.parametrize("codecs", [("PCMU/8000",), ("G722/16000",)])
@pytest.mark.parametrize("kind", RATE_HZ_OF)
def test_every_rate_reaches_the_leg_at_its_own_and_is_answered_at_theirs(kind: Kind, codecs: tuple[str, ...]) -> None:
    call = Call(codecs)
    rate_hz = RATE_HZ_OF[kind]
    call.run(frames_of(rate_hz, 1.5), kind)
    leg_hz = call.config.sample_rate_hz
    assert pitch_hz(bytes(call.heard[leg_hz:]), leg_hz) == pytest.approx(440, abs=2)
    ours = call.wire.sent
    assert len(ours) == 75 and {message[0] for message in ours} == {kind}  # one each tick, from the first on
    assert {len(message) for message in ours} == {3 + 2 * rate_hz // 50}


@pytest.mark.parametrize("is_audio_first", [True, False])
def test_the_first_audio_says_the_rate_of_the_record_and_of_our_first_word(is_audio_first: bool) -> None:
    call, audio = Call(is_answered=False), Message(Kind.SLIN16, bytes(640))
    answer = Answer(leg_id="a1")
    for step in (audio, answer) if is_audio_first else (answer, audio):
        if step is answer:
            call.leg.carry_out(answer, 0.0)
        else:
            call.leg.on_message(step)
    assert [(event.state, event.codec) for event in call.of(LegStateChanged)] == [
        ("connecting", ""), ("confirmed", "slin/16000"),
    ]  # fmt: skip
    call.leg.tick()
    assert call.wire.sent[0][0] == Kind.SLIN16


def test_a_caller_who_is_held_up_and_comes_all_at_once_costs_at_most_the_bound_and_it_is_given_back() -> None:
    call = Call()
    frames = frames_of(8_000, 1.0)
    call.run(frames)
    call.run([b""] * 50)  # a second of nothing
    for frame in frames * 3:  # and three at once
        call.leg.on_message(Message(Kind.SLIN, frame))
    assert call.leg._timeline.in_hand <= 8 * 440
    call.run(frames * 40)
    assert call.leg._timeline.in_hand <= 8 * 80


def test_a_second_of_delay_after_a_hiccup_is_given_back_within_five() -> None:
    call = Call()
    frames = frames_of(8_000, 1.0)
    call.run(frames)
    call.run([b""] * 50)
    for frame in frames:
        call.leg.on_message(Message(Kind.SLIN, frame))
    assert call.leg._timeline.in_hand > 8 * 400
    call.run(frames * 5)
    assert call.leg._timeline.in_hand <= 8 * 160


def test_what_the_exchange_did_not_read_was_not_heard() -> None:
    call = Call()
    item = np.concatenate([np.frombuffer(frame, "<i2") for frame in frames_of(8_000, 2.0)]).astype("<i2").tobytes()
    play = Play(leg_id="a1", item_id="i", pcm=item, sample_rate_hz=8_000, is_final=True)
    media = call.leg.media
    media.local_commands.append(play)
    call.run([b""] * 10)
    call.wire.is_read = False
    call.run([b""] * 100)
    assert 0 < media.played()["i"] <= 11 * 160 and not media.is_idle
    call.wire.is_read = True
    call.run([b""] * 110)
    assert media.is_idle
    loud = [message for message in call.wire.sent if np.abs(np.frombuffer(message[3:], "<i2")).max() > 2_000]
    assert len(loud) == pytest.approx(100, abs=1)  # the rest is comfort noise


def test_a_message_of_a_later_asterisk_is_passed_over() -> None:
    assert list(MessageReader().push(b"\x42\x00\x02hi" + encode(Kind.DTMF, b"5"))) == [
        Message(Kind.UNKNOWN, b"hi"), Message(Kind.DTMF, b"5"),
    ]  # fmt: skip


def test_an_exchange_that_reads_nothing_is_left_and_nothing_piles_up() -> None:
    call = Call()
    call.wire.is_read = False
    call.run(frames_of(8_000, 4.0))
    assert not call.of(LegDisconnected)
    call.run(frames_of(8_000, 2.0))
    (ended,) = call.of(LegDisconnected)
    assert (ended.cause, ended.by) == ("network_error", "network") and call.wire.is_hung_up


def test_silence_of_an_exchange_is_no_end_until_it_lasts_as_long_as_in_sip() -> None:
    call = Call(rtp_timeout_s=5.0)
    call.run(frames_of(8_000, 0.5))
    call.run([b""] * 200)
    assert not call.of(LegDisconnected)
    call.run([b""] * 80)
    assert [(event.cause, event.by) for event in call.of(LegDisconnected)] == [("media_timeout", "network")]


@pytest.mark.parametrize(
    ("frames", "verdict"), [("voice", "ok"), ("zeros", "silent_in"), ("none", "one_way_in_missing")]
)
def test_the_medias_health_is_told_once_two_seconds_after_the_answer(frames: str, verdict: str) -> None:
    call = Call()
    sent = {"voice": frames_of(8_000, 4.0), "zeros": [bytes(320)] * 200, "none": [b""] * 200}[frames]
    call.run(sent[:90])
    assert not call.of(MediaHealth)
    call.run(sent[90:])
    (health,) = call.of(MediaHealth)
    assert (health.verdict, health.codec) == (verdict, "slin/8000")


def test_keys_count_while_the_call_is_up_and_what_is_no_key_is_nothing() -> None:
    call = Call(is_answered=False)
    call.leg.on_message(Message(Kind.DTMF, b"1"))
    call.leg.carry_out(Answer(leg_id="a1"), 0.0)
    call.leg.on_time(0.0)
    for key in (b"4", b"f", b"\xff", b"*"):
        call.leg.on_message(Message(Kind.DTMF, key))
    assert [event.digit for event in call.of(DtmfReceived)] == ["4", "*"]


def test_there_is_no_transfer_and_the_refusal_says_so() -> None:
    call = Call()
    assert not call.leg.can_transfer
    with pytest.raises(LegError, match="Refer is not possible in a call by AudioSocket"):
        call.leg.carry_out(Refer(leg_id="a1", refer_to="sip:1@127.0.0.1"), 0.0)


def test_a_refused_call_and_one_that_nobody_answers_are_hung_up_on() -> None:
    refused, unheard = Call(is_answered=False), Call(is_answered=False)
    refused.leg.carry_out(Reject(leg_id="a1", sip_status=404), 0.0)
    assert refused.wire.is_hung_up and refused.of(LegDisconnected)[0].sip_status == 404
    for now_s in (0.0, 25.0):
        unheard.leg.on_time(now_s)
    assert unheard.wire.is_hung_up and unheard.of(LegDisconnected)[0].cause == "overloaded"
    assert [event.state for event in unheard.of(LegStateChanged)] == ["disconnected"]


def test_an_error_of_the_exchange_ends_the_call_as_one_of_the_network() -> None:
    call = Call()
    call.leg.on_message(Message(Kind.ERROR, b"\x02"))
    assert [(event.cause, event.by) for event in call.of(LegDisconnected)] == [("network_error", "network")]
