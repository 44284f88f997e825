"""The parts of browser calls that need no network: settings, tokens, jitter, offers on their way, addresses."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("aiortc")

from aiortc.rtp import RtpPacket  # noqa: E402

from telephony.caller_timeline import CallerTimeline  # noqa: E402
from telephony.config import TelephonyConfig  # noqa: E402
from telephony.webrtc.config import WebRtcConfig, media_config  # noqa: E402
from telephony.webrtc.ice import MediaLoop, with_public_address  # noqa: E402
from telephony.webrtc.jitter import Promptly  # noqa: E402
from telephony.webrtc.signaling import (  # noqa: E402
    Answered,
    Offer,
    OfferFailed,
    Refused,
    WorkerChoice,
    send_check,
    send_offer,
    serve_offers,
)
from telephony.webrtc.tickets import CLOCK_SKEW_S, TicketOffice, TokenRefused, ice_servers  # noqa: E402

FRAME = 320
OFFER = Offer(sdp="v=0", did="100", ani="web")


def timeline(target_ms: int = 40) -> CallerTimeline:
    return CallerTimeline(16_000, FRAME, target_ms)


def tone(at: int, num: int = FRAME) -> np.ndarray:
    return (np.sin(2 * np.pi * 440 * np.arange(at, at + num) / 16_000) * 8_000).astype(np.int16)


# ------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_calls": 0}, "webrtc.max_calls = 0"),
        ({"bind": "0.0.0.0"}, "one network interface"),
        ({"bind": "example"}, "webrtc.bind"),
        ({"port_first": 30_000}, "port_last"),
        ({"port_first": 30_000, "port_last": 30_003, "num_workers": 1, "max_calls": 5}, "each of 5 calls"),
        ({"ice_urls": ("http://x",)}, "ice_urls"),
        ({"ice_urls": ("turn:host:3478?transport=udp",)}, "turn_secret_file"),
        ({"is_relay_only": True, "ice_urls": ("stun:host:3478",)}, "without a TURN server"),
        ({"call_token_secret_file": "/nowhere"}, "must be a readable file"),
    ],
)
def test_wrong_settings_name_key_and_what_is_allowed(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        WebRtcConfig(**settings)


def test_short_secret_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("short")
    with pytest.raises(ValueError, match="at least 16"):
        WebRtcConfig(call_token_secret_file=str(secret))


def test_browser_leg_is_wideband_whatever_sip_is() -> None:
    assert media_config(TelephonyConfig(codecs=("PCMU/8000",), ptime_ms=30)).samples_per_frame == FRAME


# -------------------------------------------------------------------------- tickets


def office(secret: bytes = b"k" * 32, valid_s: int = 60, spent: set[str] | None = None) -> TicketOffice:
    """`spent` stands for the table of used tokens."""
    used = set() if spent is None else spent

    def spend(nonce: str, _expires_at_s: float, _now_s: float) -> bool:
        is_new = nonce not in used
        used.add(nonce)
        return is_new

    return TicketOffice(secret, valid_s, spend)


def test_token_counts_once_and_ends() -> None:
    spent: set[str] = set()
    ours = office(spent=spent)
    token = ours.sell("100", "web-ann", "Ann", 1_000.0)
    assert ours.take(token, 1_059.0).did == "100"
    for door in (ours, office(spent=spent)):  # the same process, and the next one
        with pytest.raises(TokenRefused, match="used"):
            door.take(token, 1_059.0)
    with pytest.raises(TokenRefused, match="expired"):
        ours.take(ours.sell("100", "a", "b", 1_000.0), 1_060.0)


def test_token_that_another_server_lets_live_too_long_is_refused_with_the_reason_and_not_remembered() -> None:
    spent: set[str] = set()
    ours = office(spent=spent)
    for years in (60.0 + CLOCK_SKEW_S + 1, 10 * 365 * 86_400.0):
        token = office(valid_s=int(years)).sell("100", "a", "b", 1_000.0)  # the same secret
        with pytest.raises(TokenRefused, match=r"at most 60 s \(webrtc.start_within_s\)"):
            ours.take(token, 1_000.0)
    assert not spent
    assert ours.take(office(valid_s=60 + CLOCK_SKEW_S).sell("100", "a", "b", 1_000.0), 1_000.0).did == "100"


def test_token_of_another_secret_or_with_another_number_is_refused() -> None:
    ours = office()
    token = ours.sell("100", "a", "b", 0.0)
    head, claims, signature = token.split(".")
    other = claims[:-4] + ("A" if claims[-4] != "A" else "B") + claims[-3:]
    stranger = office(b"x" * 32).sell("100", "a", "b", 0.0)
    for forged in (stranger, f"{head}.{other}.{signature}", "", ".", "v1.x", "ü" * 50, token[:-1]):
        with pytest.raises(TokenRefused):
            ours.take(forged, 1.0)


def test_turn_credential_is_what_coturn_computes_and_stun_needs_none() -> None:
    servers = ice_servers(("stun:s:3478", "turn:t:3478?transport=udp"), b"secret", "ann", 1_700)
    assert servers[0] == {"urls": ["stun:s:3478"]}
    assert servers[1]["username"] == "1700:ann"
    expected = base64.b64encode(hmac.new(b"secret", b"1700:ann", hashlib.sha1).digest()).decode()
    assert servers[1]["credential"] == expected


# --------------------------------------------------------------------------- jitter


def test_every_packet_goes_on_at_once_and_late_or_doubled_ones_never() -> None:
    buffer = Promptly()

    def given(number: int) -> bool:
        packet = RtpPacket(payload_type=111, sequence_number=number % 65_536, timestamp=number * 960)
        packet._data = b"x"
        return buffer.add(packet)[1] is not None

    assert [given(number) for number in (65_534, 65_535, 65_536, 65_536, 65_535, 65_538, 65_537, 65_539)] == [
        True, True, True, False, False, True, False, True,
    ]  # fmt: skip
    assert buffer.num_late == 3


def test_steady_audio_comes_out_as_it_went_in_after_the_target() -> None:
    line, out, at = timeline(), b"", 0
    for _ in range(50):
        line.push(at, tone(at))
        at += FRAME
        out += line.pull()
    heard = np.frombuffer(out, "<i2")
    start = int(np.flatnonzero(heard)[0]) - 1
    assert start <= 640
    assert np.array_equal(heard[start : start + 15_000], tone(0, 15_000))


def test_lost_packets_are_concealed_for_60_ms_and_time_stays_true() -> None:
    line = timeline(20)
    line.push(0, tone(0))
    line.push(6 * FRAME, tone(6 * FRAME))  # five were lost
    heard = np.concatenate([np.frombuffer(line.pull(), "<i2") for _ in range(7)])
    assert line.num_concealed == 5 * FRAME
    assert np.abs(heard[FRAME : 2 * FRAME]).max() > 3_000
    assert np.abs(heard[5 * FRAME : 6 * FRAME]).max() == 0
    assert np.array_equal(heard[6 * FRAME :], tone(6 * FRAME))


def test_a_stall_of_the_machine_leaves_no_delay_behind() -> None:
    line = timeline(40)
    for number in range(40):
        line.push(number * FRAME, tone(number * FRAME))
        line.pull()
    before = line.in_hand
    for _ in range(3):  # the clock ran on, the packets came late and all at once
        line.pull()
    for number in range(40, 300):
        line.push(number * FRAME, tone(number * FRAME))
        if number >= 43:
            line.pull()
    assert line.in_hand <= before + FRAME // 2


def test_delay_after_a_burst_is_given_back_and_what_nobody_can_hear_is_bounded() -> None:
    line, at = timeline(40), 0
    for _ in range(100):  # a burst of two seconds at once
        line.push(at, tone(at))
        at += FRAME
    assert line.in_hand <= 640 + 6_400
    for _ in range(1_500):
        line.push(at, tone(at))
        at += FRAME
        line.pull()
    assert line.in_hand <= 640 + FRAME


def test_line_that_ran_dry_fills_up_again_before_it_speaks() -> None:
    line = timeline(40)
    line.push(0, tone(0, 2 * FRAME))
    assert any(line.pull()) and any(line.pull()) and not any(line.pull())
    line.push(2 * FRAME, tone(0))
    assert not any(line.pull())
    line.push(3 * FRAME, tone(0))
    assert any(line.pull())


# ------------------------------------------------------------------------ signaling


async def test_full_or_dead_worker_passes_the_offer_to_the_next_and_a_refusal_by_the_agent_does_not() -> None:
    asked: list[str] = []

    async def send(path: Path, _offer: Offer, _timeout_s: float):
        asked.append(path.name)
        if path.name == "dead":
            raise OfferFailed("gone")
        if path.name == "full":
            return Refused(status=503, reason="busy", retry_after_s=5, is_worker_full=True)
        if path.name == "closed":
            return Refused(status=503, reason="closed", retry_after_s=9)
        return Answered(leg_id="b1", sdp="v=0")

    assert isinstance(await WorkerChoice([Path("dead"), Path("full"), Path("free")], 1.0).offer(OFFER, send), Answered)
    assert asked == ["dead", "full", "free"]
    reply = await WorkerChoice([Path("dead"), Path("full")], 1.0).offer(OFFER, send)
    assert isinstance(reply, Refused) and (reply.status, reply.retry_after_s) == (503, 5)
    reply = await WorkerChoice([Path("closed"), Path("free")], 1.0).offer(OFFER, send)
    assert isinstance(reply, Refused) and reply.retry_after_s == 9
    reply = await WorkerChoice([], 1.0).offer(OFFER, send)
    assert isinstance(reply, Refused) and reply.status == 503


async def test_workers_are_asked_in_turn() -> None:
    asked: list[str] = []

    async def send(path: Path, _offer: Offer, _timeout_s: float):
        asked.append(path.name)
        return Answered(leg_id="b1", sdp="v=0")

    choice = WorkerChoice([Path("a"), Path("b")], 1.0)
    for _ in range(4):
        await choice.offer(OFFER, send)
    assert asked == ["a", "b", "a", "b"]


async def test_offer_crosses_the_socket_and_a_caller_who_gives_up_is_noticed(tmp_path: Path) -> None:
    futures: list[asyncio.Future] = []

    def offered(offer: Offer) -> asyncio.Future:
        assert offer == OFFER
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    path = tmp_path / "run" / "offers.sock"
    server = await serve_offers(path, offered)
    waiting = asyncio.create_task(send_offer(path, OFFER, 5.0))
    while not futures:  # noqa: ASYNC110
        await asyncio.sleep(0)
    futures[0].set_result(Answered(leg_id="b7", sdp="v=0\r\n"))
    assert await waiting == Answered(leg_id="b7", sdp="v=0\r\n")
    waiting = asyncio.create_task(send_offer(path, OFFER, 5.0))
    while len(futures) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([futures[1]], timeout=5)
    assert futures[1].cancelled()
    await send_check(path, 5.0)  # asks nobody for a call
    assert len(futures) == 2
    server.close()
    with pytest.raises(OfferFailed):
        await send_offer(tmp_path / "nobody.sock", OFFER, 1.0)
    with pytest.raises(OfferFailed):
        await send_check(tmp_path / "nobody.sock", 1.0)


# ------------------------------------------------------------------------ addresses


def test_media_sockets_take_ports_of_the_range_and_then_there_is_none() -> None:
    with asyncio.Runner(loop_factory=lambda: MediaLoop("127.0.0.1", 27_110, 27_112)) as runner:

        async def take() -> list[int]:
            loop = asyncio.get_running_loop()
            made = [
                await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
                for _ in range(3)
            ]
            with pytest.raises(OSError, match="no UDP port is free from 27110 to 27112"):
                await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))
            ports = [transport.get_extra_info("sockname")[1] for transport, _ in made]
            for transport, _ in made:
                transport.close()
            return ports

        assert sorted(runner.run(take())) == [27_110, 27_111, 27_112]


def test_host_candidate_gets_the_public_address_and_others_keep_theirs() -> None:
    sdp = (
        "c=IN IP4 10.0.0.5\r\n"
        "a=candidate:1 1 udp 2130706431 10.0.0.5 40000 typ host\r\n"
        "a=candidate:2 1 udp 1694498815 198.51.100.7 40000 typ srflx raddr 10.0.0.5 rport 40000\r\n"
    )
    changed = with_public_address(sdp, "203.0.113.9")
    assert "udp 2130706431 203.0.113.9 40000 typ host" in changed
    assert "198.51.100.7 40000 typ srflx" in changed
    assert with_public_address(sdp, "") == sdp
