"""Short calls of every kind for the soak: answered and talked to, interrupted, keyed, given up while ringing, refused.

Which kind comes next is drawn from a seed. One call is one `RawPeer` (agent/raw_sip_peer.py) in real time on a thread
of its own; what came back is counted and thrown away, so that the bench itself keeps nothing. Knows nothing of the
agent but one number that it serves and one that it does not.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from agent.bench_wire import RTP_HEADER, rtp_address
from agent.lab import rtp
from agent.lab.scenarios import clip
from agent.raw_sip_peer import RawPeer, header, to_tag

# Kind -> how often. Each costs a caller something else, and the agent too.
WEIGHTS = {"listen": 6, "interrupt": 4, "keys": 3, "cancel": 3, "refused": 2, "at_once": 2, "ask": 1}
NOBODY = "999"  # a number that no campaign answers
_ANSWERED_WITHIN_S = 10.0
_ANSWER_S = 2.5  # how long one who asked waits for the answer, and hangs up in the middle of it
_PACKET, _PTIME_S = 160, 0.02
_SILENCE = b"\xff" * _PACKET
_EVENTS = 101  # payload type of RFC 4733 in RawPeer's offer
_KEY_PACKETS = 5
_LEAST_LOUD = 3  # packets with sound, for a call to count as heard


@dataclass(frozen=True)
class Outcome:
    """What became of one call. `is_expected`: what this kind of call should come to."""

    kind: str
    text: str
    is_expected: bool


def kinds(seed: int) -> Iterator[str]:
    """For ever; the same for the same seed."""
    dice = random.Random(seed)
    while True:
        yield dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]


def speech() -> list[bytes]:
    """A committed sentence, mu-law, packet by packet."""
    codes = rtp.encode(rtp.PCMU, np.frombuffer(clip("order_status"), "<i2").astype(float))
    return [codes[at : at + _PACKET].ljust(_PACKET, b"\xff") for at in range(0, len(codes), _PACKET)]


class ShortCall:
    """`run()` lasts as long as the call, on a thread of its own."""

    def __init__(self, target: str, kind: str, seconds: float, sentence: list[bytes]) -> None:
        self._kind, self._seconds, self._sentence = kind, seconds, sentence
        self._peer = RawPeer(target)
        self._peer.socket.settimeout(_ANSWERED_WITHIN_S)
        self._peer.media.setblocking(False)
        self._num_sent = 0
        self._num_loud = 0

    def run(self) -> Outcome:
        try:
            return self._run()
        except TimeoutError:
            return Outcome(self._kind, "no answer", False)
        finally:
            self._peer.close()

    def _run(self) -> Outcome:
        peer = self._peer
        if self._kind == "refused":
            peer.request_uri = peer.request_uri.replace("sip:100@", f"sip:{NOBODY}@")
            peer.to_uri = peer.to_uri.replace("sip:100@", f"sip:{NOBODY}@")
        peer.invite()
        if self._kind == "cancel":
            peer.receive("SIP/2.0 1")  # RFC 3261 §9.1: not before a provisional response
            peer.request("CANCEL")
        final = self._final_of_invite()
        status = final.split(" ", 2)[1]
        if status != "200":
            peer.request("ACK", to_tag=to_tag(final))
            return Outcome(self._kind, status, status == {"cancel": "487", "refused": "404"}.get(self._kind))
        peer.request("ACK", to_tag=to_tag(final))
        self._talk(rtp_address(final))
        peer.request("BYE", cseq=2, to_tag=to_tag(final))
        bye = peer.receive("SIP/2.0")
        while header(bye, "CSeq").split()[-1] != "BYE":
            bye = peer.receive("SIP/2.0")
        is_heard = self._kind in ("at_once", "cancel") or self._num_loud >= _LEAST_LOUD
        is_expected = self._kind != "refused" and is_heard  # a CANCEL may cross the 200 (RFC 3261 §9.1)
        return Outcome(self._kind, "answered" if is_heard else "answered, nothing heard", is_expected)

    def _final_of_invite(self) -> str:
        """Not that of a CANCEL."""
        final = self._peer.final()
        while header(final, "CSeq").split()[-1] != "INVITE":
            final = self._peer.final()
        return final

    def _talk(self, to: tuple[str, int]) -> None:
        nothing: list[bytes] = []
        num_packets = round(self._seconds / _PTIME_S)
        said: dict[str, Callable[[], None]] = {
            "listen": lambda: self._send(to, nothing, num_packets),
            "interrupt": lambda: self._send(to, self._sentence, num_packets),
            "keys": lambda: self._key(to, num_packets),
            "ask": lambda: self._send(to, self._sentence, len(self._sentence) + round(_ANSWER_S / _PTIME_S)),
        }
        said.get(self._kind, lambda: None)()

    def _send(self, to: tuple[str, int], sound: list[bytes], num_packets: int) -> None:
        """`sound`, then silence, so many packets in all and in real time."""
        began_s, first = time.monotonic(), self._num_sent
        for index in range(num_packets):
            self._packet(to, 0, sound[index] if index < len(sound) else _SILENCE, _PACKET * self._num_sent)
            self._hear()
            time.sleep(max(0.0, began_s + (self._num_sent - first) * _PTIME_S - time.monotonic()))

    def _key(self, to: tuple[str, int], num_packets: int) -> None:
        """Digits as telephone events, among silence (RFC 4733 §2.5)."""
        for digit in (1, 2, 3):
            began = _PACKET * self._num_sent
            for index in range(_KEY_PACKETS):
                is_last = index >= _KEY_PACKETS - 3
                duration = _PACKET * min(index + 1, _KEY_PACKETS - 2)
                event = bytes([digit, 0x80 * is_last | 10, *duration.to_bytes(2, "big")])
                self._packet(to, _EVENTS | 0x80 * (index == 0), event, began)
                time.sleep(_PTIME_S)
            self._send(to, [], max(5, num_packets // 3 - _KEY_PACKETS))

    def _packet(self, to: tuple[str, int], kind: int, payload: bytes, timestamp: int) -> None:
        head = RTP_HEADER.pack(0x80, kind, self._num_sent & 0xFFFF, timestamp & 0xFFFFFFFF, 4711)
        self._peer.media.sendto(head + payload, to)
        self._num_sent += 1

    def _hear(self) -> None:
        """Whatever has come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                payload = self._peer.media.recv(2048)[rtp.HEADER_BYTES :]
                self._num_loud += any(code & 0x7F < 0x60 for code in payload)
