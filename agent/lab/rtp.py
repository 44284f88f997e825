"""RTP of G.711 as the relay sees it: header (RFC 3550 §5.1), both laws (ITU-T G.711), and one direction's story.

`RtpTrack` places every packet by its own time stamp on a clock that it shares with the other direction: a packet cannot
arrive before it was sent, so the earliest arrivals fix the offset and jitter drops out of every timing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

RATE_HZ = 8_000
HEADER_BYTES = 12
PCMU, PCMA = 0, 8
_HEADER = struct.Struct("!BBHII")


@dataclass(frozen=True)
class RtpPacket:
    payload_type: int
    sequence_number: int
    timestamp: int
    ssrc: int
    payload: bytes
    is_marked: bool = False


def parse(packet: bytes) -> RtpPacket | None:
    """None: not RTP version 2, or RTCP, or cut short."""
    if len(packet) < HEADER_BYTES or packet[0] >> 6 != 2 or 72 <= packet[1] & 0x7F <= 76:
        return None
    first, second, sequence_number, timestamp, ssrc = _HEADER.unpack_from(packet)
    start = HEADER_BYTES + 4 * (first & 0x0F)
    if first & 0x10:  # header extension, RFC 3550 §5.3.1
        if len(packet) < start + 4:
            return None
        start += 4 + 4 * struct.unpack_from("!H", packet, start + 2)[0]
    end = len(packet) - (packet[-1] if first & 0x20 else 0)
    return RtpPacket(second & 0x7F, sequence_number, timestamp, ssrc, packet[start:end], bool(second & 0x80))


def build(packet: RtpPacket) -> bytes:
    second = packet.payload_type | 0x80 * packet.is_marked
    return _HEADER.pack(0x80, second, packet.sequence_number, packet.timestamp, packet.ssrc) + packet.payload


def with_payload(original: bytes, payload: bytes) -> bytes:
    """The same packet with other audio of the same length; header and extensions stay as they are."""
    return original[: len(original) - len(payload)] + payload


def _ulaw_table() -> np.ndarray:
    code = ~np.arange(256, dtype=np.uint8)
    magnitude = (((code & 0x0F).astype(np.int32) << 3) + 0x84 << ((code & 0x70) >> 4).astype(np.int32)) - 0x84
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.int16)


def _alaw_table() -> np.ndarray:
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = ((code & 0x70) >> 4).astype(np.int32), (code & 0x0F).astype(np.int32)
    magnitude = np.where(exponent == 0, (mantissa << 4) + 8, (mantissa << 4) + 0x108 << np.maximum(exponent - 1, 0))
    return np.where(code & 0x80, magnitude, -magnitude).astype(np.int16)


def _encoding_of(table: np.ndarray) -> np.ndarray:
    """Nearest code of every 16-bit sample."""
    order = np.argsort(table, kind="stable")
    levels = table[order].astype(np.int32)
    middles = (levels[1:] + levels[:-1]) // 2
    return order[np.searchsorted(middles, np.arange(-32768, 32768))].astype(np.uint8)


DECODE = {PCMU: _ulaw_table(), PCMA: _alaw_table()}
_ENCODE = {kind: _encoding_of(table) for kind, table in DECODE.items()}


def decode(packet: RtpPacket) -> np.ndarray | None:
    """Samples, int16; None for telephone events, comfort noise and anything that is not G.711."""
    table = DECODE.get(packet.payload_type)
    return None if table is None else table[np.frombuffer(packet.payload, np.uint8)]


def encode(payload_type: int, samples: np.ndarray) -> bytes:
    index = np.clip(np.rint(samples), -32768, 32767).astype(np.int32) + 32768
    codes: bytes = _ENCODE[payload_type][index].tobytes()
    return codes


@dataclass
class RtpTrack:
    """One direction, packet by packet, in the order of arrival."""

    arrivals_s: list[float] = field(default_factory=list)
    packets: list[RtpPacket] = field(default_factory=list)

    def add(self, packet: RtpPacket, now_s: float) -> None:
        self.arrivals_s.append(now_s)
        self.packets.append(packet)

    def _extended(self, values: np.ndarray, bits: int) -> np.ndarray:
        """Wrapping counters as growing ones."""
        steps = np.diff(values, prepend=values[:1])
        span = 1 << bits
        extended: np.ndarray = values[0] + np.cumsum((steps + span // 2) % span - span // 2)
        return extended

    def audio(self) -> tuple[np.ndarray, float]:
        """All samples in their place (silence where nothing came) and the time of the first one."""
        heard = [
            (at, p, s) for at, p in zip(self.arrivals_s, self.packets, strict=True) if (s := decode(p)) is not None
        ]
        if not heard:
            return np.zeros(0, np.int16), 0.0
        stamps = self._extended(np.array([p.timestamp for _, p, _ in heard], np.int64), 32)
        offsets = stamps - stamps.min()
        start_s = float(np.min(np.array([at for at, _, _ in heard]) - offsets / RATE_HZ))
        total = int(max(offset + len(samples) for offset, (_, _, samples) in zip(offsets, heard, strict=True)))
        audio = np.zeros(total, np.int16)
        for offset, (_, _, samples) in zip(offsets, heard, strict=True):
            audio[offset : offset + len(samples)] = samples
        return audio, start_s

    def statistics(self) -> dict[str, float | int]:
        """Loss, order and spacing as a receiver at this point sees them (jitter: RFC 3550 §6.4.1)."""
        if len(self.packets) < 2:
            return {"packets": len(self.packets)}
        numbers = self._extended(np.array([p.sequence_number for p in self.packets], np.int64), 16)
        expected, unique = int(numbers.max() - numbers.min()) + 1, len(set(numbers.tolist()))
        arrivals = np.array(self.arrivals_s)
        gaps_ms = 1000 * np.diff(arrivals)
        stamps = self._extended(np.array([p.timestamp for p in self.packets], np.int64), 32)
        jitter = 0.0
        for step in np.abs(np.diff(arrivals - stamps / RATE_HZ)):
            jitter += (1000 * float(step) - jitter) / 16
        p50, p99 = np.percentile(gaps_ms, [50, 99])
        return {
            "packets": len(self.packets), "lost": expected - unique, "duplicates": len(numbers) - unique,
            "reordered": int(np.sum(np.diff(numbers) < 0)), "jitter_ms": round(jitter, 2),
            "gap_p50_ms": round(float(p50), 2), "gap_p99_ms": round(float(p99), 2),
            "gap_max_ms": round(float(gaps_ms.max()), 2),
        }  # fmt: skip
