"""What the first sounds after the answer say about who answered a call that we placed: evidence, no verdict.

SIP answers 200 for a person, an answering machine, a menu and a carrier's announcement alike (users.md L6). What
differs is in the sound: a person says a word and waits; a machine speaks on, then beeps; a network plays the special
information tone (ITU-T E.180: three rising tones near 950, 1400 and 1800 Hz, a third of a second each), ringback or
busy; a fax machine whistles (ITU-T T.30: 1100 Hz calling, 2100 Hz called). agent/answered_by.py makes a verdict of it,
together with the words.

Lengths of Asterisk's AMD (app_amd: 0.8 s of silence after a greeting of at most 1.5 s is a person) were the start;
`minmo bench answers` measures ours. Runs in the media worker on the clock thread, for outbound legs only, until it is
told to stop or `_LISTENS_S` are over. Pure; time is the leg's samples, and its first sample is the answer.
"""

from __future__ import annotations

import numpy as np

from telephony.leg import AnswerEvidence
from telephony.tone_detection import Tone, ToneTracker
from telephony.wire_metrics import dbov

_LISTENS_S = 90.0
_MIN_VOICED_DBOV = -60.0  # far below any voice: the gaps inside words, whose end the voice activity bridges, may go
_PAUSE_S = 0.6  # silence, hangover included, that ends an utterance: a person waits for us
_RINGS_ON_S = 0.04  # the voice activity hears a tone's last window longer than we do
_MIN_UTTERANCE_S = 0.06  # less is a click or a breath
_SPEAKING_AFTER_S, _SPEAKING_EVERY_S = 2.0, 0.5  # an utterance that goes on is told of from then on, so often

_BEEP_HZ, _BEEP_S = (400.0, 2000.0), (0.12, 3.0)
_BEEP_SILENCE_DB = 12.0
_SIT_HZ = ((890.0, 1010.0), (1340.0, 1460.0), (1740.0, 1830.0))
_SIT_S, _SIT_GAP_S = (0.2, 0.45), 0.12
_CADENCE_S, _CADENCE_GAP_S, _CADENCE_TONES = (0.15, 0.7), (0.12, 0.8), 4
_CALL_PROGRESS_HZ = (330.0, 520.0)  # ringback, busy and dial tones of E.180 Supplement 2, the lower frequency
_RINGBACK_S = (0.7, 2.6)
_FAX_CALLED_HZ, _FAX_CALLED_S = 2100.0, 1.0
_FAX_CALLING_HZ, _FAX_CALLING_WITHIN_HZ = 1100.0, 40.0
_FAX_CALLING_S, _FAX_CALLING_GAP_S = (0.4, 0.65), (2.5, 3.6)
_WAIT_FOR_CADENCE_S = 0.9  # a tone before any word may be the first of many


class AnswerDetector:
    """One outbound leg. `hangover_ms`: how long `is_voiced` outlasts the voice."""

    def __init__(self, leg_id: str, rate_hz: int, hangover_ms: int) -> None:
        self._leg_id, self._rate = leg_id, rate_hz
        self._hangover = hangover_ms * rate_hz // 1000
        self._tones = ToneTracker(rate_hz)
        self._sample = 0
        self._start: int | None = None  # of the utterance that is open
        self._last_voiced = 0
        self._told_s = 0.0
        self._deaf_until = 0  # the voice activity still rings with a tone
        self._has_spoken = False
        self._heard: list[Tone] = []
        self._maybe_beep: Tone | None = None

    def push(self, received: bytes, is_voiced: bool) -> list[AnswerEvidence]:
        """The next samples of the wire (int16 mono), and whether the voice activity hears more than our echo in them.
        Not the samples without echo: a canceller that has learned wrongly while both spoke adds what was not there."""
        if self._sample >= _LISTENS_S * self._rate:
            return []
        self._sample += len(received) // 2
        evidence = [found for tone in self._tones.push(received) for found in self._on_tone(tone)]
        evidence += self._waited_for_cadence()
        return evidence + self._listen(is_voiced and _is_audible(received))

    # ---------------------------------------------------------------- utterances

    def _listen(self, is_voiced: bool) -> list[AnswerEvidence]:
        since = self._tones.since
        if since is not None and self._sample - since >= _BEEP_S[0] * self._rate:  # vowels are as pure for a moment
            self._deaf_until = self._sample + self._hangover + int(_RINGS_ON_S * self._rate)
            if self._start is not None and since - self._start < _MIN_UTTERANCE_S * self._rate:
                self._start = None  # it was the tone that sounded like a voice
            self._last_voiced = min(self._last_voiced, since + self._hangover)
        if is_voiced and self._sample > self._deaf_until:
            return self._voiced()
        return self._unvoiced()

    def _voiced(self) -> list[AnswerEvidence]:
        if self._start is None:
            self._start, self._told_s = self._sample, _SPEAKING_AFTER_S - _SPEAKING_EVERY_S
        self._last_voiced = self._sample
        length_s = (self._sample - self._start) / self._rate
        if length_s < self._told_s + _SPEAKING_EVERY_S:
            return []
        self._told_s += _SPEAKING_EVERY_S
        self._has_spoken = True
        return [self._evidence("speaking", self._sample, self._sample - self._start)]

    def _unvoiced(self) -> list[AnswerEvidence]:
        if self._start is None:
            return []
        end = max(self._start, self._last_voiced - self._hangover)
        if self._sample - end < _PAUSE_S * self._rate:
            return []
        length, self._start = end - self._start, None
        if length < _MIN_UTTERANCE_S * self._rate:
            return []
        self._has_spoken = True
        return [self._evidence("utterance", end, length)]

    # --------------------------------------------------------------------- tones

    def _on_tone(self, tone: Tone) -> list[AnswerEvidence]:
        length_s = (tone.end_sample - tone.start_sample) / self._rate
        self._heard = [*self._heard[-(_CADENCE_TONES - 1) :], tone]
        self._maybe_beep = None
        if self._is_special_information():
            return [self._of_tone("special_information", tone)]
        if self._is_cadence():
            return [self._of_tone("busy", tone)]
        if self._is_fax(tone, length_s):
            return [self._of_tone("fax", tone)]
        is_progress = _CALL_PROGRESS_HZ[0] <= tone.frequency_hz <= _CALL_PROGRESS_HZ[1]
        if is_progress and _RINGBACK_S[0] <= length_s <= _RINGBACK_S[1] and not self._has_spoken_now():
            return [self._of_tone("ringback", tone)]
        if not self._may_be_beep(tone, length_s):
            return []
        if self._has_spoken_now():
            return [self._of_tone("beep", tone)]
        self._maybe_beep = tone
        return []

    def _has_spoken_now(self) -> bool:
        """Somebody has; also in an utterance that the tone has cut short."""
        return self._has_spoken or self._start is not None

    def _waited_for_cadence(self) -> list[AnswerEvidence]:
        """A machine without a greeting: nothing has followed its one tone."""
        tone = self._maybe_beep
        if tone is None:
            return []
        is_like_fax = abs(tone.frequency_hz - _FAX_CALLING_HZ) <= _FAX_CALLING_WITHIN_HZ
        wait_s = _FAX_CALLING_GAP_S[1] + 1.0 if is_like_fax else _WAIT_FOR_CADENCE_S
        if self._sample - tone.end_sample < wait_s * self._rate:
            return []
        self._maybe_beep = None
        return [] if self._tones.since is not None else [self._of_tone("beep", tone)]

    def _may_be_beep(self, tone: Tone, length_s: float) -> bool:
        return (
            not tone.second_hz
            and _BEEP_HZ[0] <= tone.frequency_hz <= _BEEP_HZ[1]
            and _BEEP_S[0] <= length_s <= _BEEP_S[1]
            and tone.silence_db >= _BEEP_SILENCE_DB
        )

    def _is_special_information(self) -> bool:
        last = self._heard[-3:]
        if len(last) < 3:
            return False
        for tone, (low, high) in zip(last, _SIT_HZ, strict=True):
            if tone.second_hz or not low <= tone.frequency_hz <= high:
                return False
        return all(self._is_next(*pair, _SIT_S, (0.0, _SIT_GAP_S)) for pair in zip(last, last[1:], strict=False))

    def _is_cadence(self) -> bool:
        """The same tone again and again: busy, congestion."""
        if len(self._heard) < _CADENCE_TONES:
            return False
        pairs = list(zip(self._heard, self._heard[1:], strict=False))
        is_same = all(abs(a.frequency_hz - b.frequency_hz) < 15 for a, b in pairs)
        return is_same and all(self._is_next(*pair, _CADENCE_S, _CADENCE_GAP_S) for pair in pairs)

    def _is_next(self, tone: Tone, after: Tone, length_s: tuple[float, float], gap_s: tuple[float, float]) -> bool:
        lengths = [(each.end_sample - each.start_sample) / self._rate for each in (tone, after)]
        gap = (after.start_sample - tone.end_sample) / self._rate
        are_long_enough = all(length_s[0] <= length <= length_s[1] for length in lengths)
        return are_long_enough and gap_s[0] - 0.06 <= gap <= gap_s[1]

    def _is_fax(self, tone: Tone, length_s: float) -> bool:
        if tone.second_hz:
            return False
        if abs(tone.frequency_hz - _FAX_CALLED_HZ) <= 20 and length_s >= _FAX_CALLED_S:
            return True
        are_calls = all(abs(each.frequency_hz - _FAX_CALLING_HZ) <= _FAX_CALLING_WITHIN_HZ for each in self._heard[-2:])
        return are_calls and len(self._heard) > 1 and self._is_next(
            self._heard[-2], tone, _FAX_CALLING_S, _FAX_CALLING_GAP_S
        )  # fmt: skip

    # ------------------------------------------------------------------- private

    def _of_tone(self, kind: str, tone: Tone) -> AnswerEvidence:
        return self._evidence(kind, tone.end_sample, tone.end_sample - tone.start_sample, tone.frequency_hz)

    def _evidence(self, kind: str, sample: int, num_samples: int, frequency_hz: float = 0.0) -> AnswerEvidence:
        return AnswerEvidence(
            leg_id=self._leg_id, kind=kind, sample=sample, num_samples=num_samples, frequency_hz=round(frequency_hz)
        )


def _is_audible(received: bytes) -> bool:
    samples = np.frombuffer(received, "<i2").astype(np.float32)
    return dbov(float(samples @ samples) / len(samples)) > _MIN_VOICED_DBOV
