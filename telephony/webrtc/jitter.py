"""A browser's RTP packets, which come early, late or never.

aiortc's own jitter buffer holds 80 ms back and stops for 320 ms at a lost packet, so `Promptly` takes its place: every
packet goes to the decoder at once, late ones are dropped. What was decoded goes to telephony/caller_timeline.py, where
its RTP timestamp says (RFC 3550 §5.1).
"""

from __future__ import annotations

from aiortc.jitterbuffer import JitterBuffer, JitterFrame
from aiortc.rtp import RtpPacket
from aiortc.utils import uint16_gt


class Promptly(JitterBuffer):
    """The interface of aiortc's jitter buffer, without waiting."""

    def __init__(self) -> None:
        super().__init__(capacity=16)
        self._newest: int | None = None
        self.num_late = 0

    def add(self, packet: RtpPacket) -> tuple[bool, JitterFrame | None]:
        if self._newest is not None and not uint16_gt(packet.sequence_number, self._newest):
            self.num_late += 1
            return False, None
        self._newest = packet.sequence_number
        return False, JitterFrame(data=packet._data, timestamp=packet.timestamp)  # type: ignore[attr-defined]
