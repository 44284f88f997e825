"""The verdict on a call's audio shortly after the answer: does it cross both ways? Named in the call record.

Plain arithmetic on what was counted, by pjmedia (RFC 3550 §6.4) or by a leg itself, and how loud it was; knows no
pjsip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from telephony.leg import MediaHealth

_MIN_LOST = 10  # a report of the first packets alone proves nothing
_AUDIBLE_LEVEL = 8  # of 255, pjmedia's linear level: about -45 dBov


@dataclass
class MediaCounts:
    """What was counted since the answer."""

    packets_in: int = 0
    packets_out: int = 0
    lost_in: int = 0
    lost_out: int = 0  # as the party's receiver reports say
    num_reports: int = 0  # receiver reports of the party
    reported_out: float = 0.0  # of packets_out, what had left by the last of them
    level_in: int = 0  # loudest, 0-255


def health_of(
    leg_id: str, counts: MediaCounts, *, codec: str, is_held: bool, promised_address: str, source_address: str
) -> MediaHealth:
    """One-way audio is said only when it is known: silence of RTCP proves nothing (many carriers send none)."""
    if is_held:
        verdict = "held"
    elif not counts.packets_in:
        verdict = "one_way_in_missing"
    elif counts.num_reports and counts.lost_out >= max(counts.reported_out * 0.9, _MIN_LOST):
        verdict = "one_way_out_missing"
    elif counts.level_in < _AUDIBLE_LEVEL:
        verdict = "silent_in"
    else:
        verdict = "ok"
    return MediaHealth(
        leg_id=leg_id, verdict=verdict, codec=codec, packets_in=counts.packets_in, packets_out=counts.packets_out,
        lost_in=counts.lost_in, level_in=counts.level_in, promised_address=promised_address,
        source_address=source_address,
    )  # fmt: skip


def level_of(pcm: bytes) -> int:
    """int16 -> 0-127, as pjmedia says it: the mean magnitude on the scale of mu-law (ITU-T G.711), 16 steps an octave.

    magnitude 64 + bias 132 = 196 = 0b1100_0100, octave 0, step 8 -> 8
    """
    biased = min(32767, int(np.abs(np.frombuffer(pcm, "<i2").astype(np.int32)).mean()) + 132) if pcm else 132
    octave = biased.bit_length() - 8
    return 16 * octave + (biased >> (octave + 3)) % 16
