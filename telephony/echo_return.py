"""How strong is the echo of this line? Said once, after some seconds of our own voice; it goes into the call record.

Ten times a second while we speak, until it knows, the last 120 ms are looked at with the correlation of the echo gate
(telephony/echo.py). A line that sends our voice back shows the same delay again and again, however distorted the voice
is; noise and a caller's voice show any delay. The looks that agree tell the loss (ITU-T G.168's echo return loss) and,
the latest of them, what the canceller takes away (echo return loss enhancement) and leaves. Pure. Walk: hop 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from telephony.config import TelephonyConfig
from telephony.leg import EchoMeasured
from telephony.wire_metrics import pcm_dbov

WINDOW_MS = 120  # of one correlation
_EVERY_MS = 100
_NUM_LOOKS = 60  # 6 s of our voice: a notice, a greeting; a canceller that can learn the line has learnt it by then
_OUR_VOICE_DBOV = -45.0
_AUDIBLE_DBOV = -60.0  # what comes back is worth a look; comfort noise is below it
# Looks that must agree on the delay within 5 ms (a pitch period's side peak still counts). Of 60 at another speaker's
# voice 6 did so by chance, at noise 5; at an echo clipped by a loudspeaker 56, at one of 30 dB 37.
_MIN_AGREEING = 12
_SAME_DELAY_MS = 5
# Strong is an echo that the canceller does not get hold of, so that only the gate stands between it and the caller's
# voice, and of which enough is left for voice activity (its 10 ms are up to 6 dB louder than 120 ms). Of lines that
# only delay and disperse (20-400 ms, 0-30 dB) it had taken 9-21 dB by then, and nothing was voiced from there on; of an
# echo that a loudspeaker clips, or that a slipping clock shifts, 0-5 dB, and a quarter to most of it was voiced.
_MIN_ENHANCEMENT_DB = 7.0
_PEAK_DB = 6.0
# What is left may be the caller's voice. Then the loss scatters: 4-20 dB between the tenth and the ninetieth percentile
# where the caller speaks half of the time, at most 3.5 dB where nobody does.
_MAX_SPREAD_DB = 5.0
# Or the delay has moved: our jitter buffer does that when it grows or shrinks, and the canceller learns for 3-5 s then.
_MIN_SHARE = 0.9
_MAX_ROUNDS = 3


@dataclass(frozen=True)
class Likeness:
    """The delay at which our own voice explains the received window best."""

    correlation: float  # 0-1
    delay_samples: int
    loss_db: float  # how much quieter the received window is than ours at that delay, after pre-emphasis


@dataclass(frozen=True)
class _Look:
    delay_samples: int
    loss_db: float
    received_dbov: float
    cleaned_dbov: float


class EchoReturnMeter:
    """One leg, from its answer on. `push` is given each tick after the gate, until it has answered."""

    def __init__(self, leg_id: str, config: TelephonyConfig) -> None:
        self._leg_id, self._rate_hz = leg_id, config.sample_rate_hz
        self._ticks: deque[tuple[bytes, bytes, bytes]] = deque(maxlen=max(1, WINDOW_MS // config.ptime_ms))
        self._every = max(1, _EVERY_MS // config.ptime_ms)
        self._min_left_dbov = config.vad_min_dbov - _PEAK_DB
        self._since_look = 0
        self._num_looks = self._num_rounds = 0
        self._looks: list[_Look] = []

    def push(
        self, received: bytes, cleaned: bytes, sent: bytes, likeness: Callable[[], Likeness | None]
    ) -> EchoMeasured | None:
        """`likeness` of the window that ends with this tick costs a correlation, and is only asked for at a look."""
        self._ticks.append((received, cleaned, sent))
        self._since_look += 1
        if self._since_look < self._every:
            return None
        received, cleaned, sent = (b"".join(direction) for direction in zip(*self._ticks, strict=True))
        if pcm_dbov(sent) < _OUR_VOICE_DBOV:
            return None
        self._since_look = 0
        self._num_looks += 1
        received_dbov = pcm_dbov(received)
        found = likeness() if received_dbov >= _AUDIBLE_DBOV else None
        if found is not None:
            self._looks.append(_Look(found.delay_samples, found.loss_db, received_dbov, pcm_dbov(cleaned)))
        return self._measured() if self._num_looks >= _NUM_LOOKS else None

    def _measured(self) -> EchoMeasured | None:
        """None: it begins anew, since the caller spoke or the delay has moved."""
        agreeing = self._agreeing()
        if len(agreeing) < _MIN_AGREEING:
            return EchoMeasured(leg_id=self._leg_id, verdict="none")
        latest = _least_disturbed(agreeing[-len(agreeing) // 3 :])
        enhancement_db = _median(look.received_dbov - look.cleaned_dbov for look in latest)
        left_dbov = _median(look.cleaned_dbov for look in latest)
        verdict = "cancelled"
        if enhancement_db < _MIN_ENHANCEMENT_DB and left_dbov >= self._min_left_dbov:
            verdict = "unclear" if self._is_doubtful(agreeing) else "strong"
            self._num_rounds += 1
            if verdict == "unclear" and self._num_rounds < _MAX_ROUNDS:
                self._num_looks, self._looks = 0, []
                return None
        return EchoMeasured(
            leg_id=self._leg_id, verdict=verdict,
            return_loss_db=round(_median(look.loss_db for look in _least_disturbed(agreeing)), 1),
            delay_ms=round(1000 * _median(look.delay_samples for look in agreeing) / self._rate_hz),
            enhancement_db=round(enhancement_db, 1), left_dbov=round(left_dbov, 1),
        )  # fmt: skip

    def _agreeing(self) -> list[_Look]:
        """The largest group of looks with the same delay, in their order."""
        if not self._looks:
            return []
        delays = np.array([look.delay_samples for look in self._looks])
        is_same = np.abs(delays[:, None] - delays) <= self._rate_hz * _SAME_DELAY_MS // 1000
        members = is_same[np.argmax(is_same.sum(axis=1))]
        return [look for look, is_member in zip(self._looks, members, strict=True) if is_member]

    def _is_doubtful(self, agreeing: list[_Look]) -> bool:
        """An echo follows our level; with the caller's voice in it, it does not. And it has one delay."""
        low, high = np.percentile([look.loss_db for look in agreeing], (10, 90))
        return bool(high - low > _MAX_SPREAD_DB) or len(agreeing) < _MIN_SHARE * len(self._looks)


def _least_disturbed(looks: list[_Look]) -> list[_Look]:
    """Where the caller speaks too, more comes in than our echo: the half in which the loss is greatest."""
    return sorted(looks, key=lambda look: look.loss_db)[len(looks) // 2 :]


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))
