"""Timings of one call from the RTP of both directions: who was audible when, and what followed each stimulus.

Uses nothing but the packets that the relay saw: voiced energy with the wire metrics' own rule
(telephony/wire_metrics.py), on one clock for both parties. The caller's report only says which stimulus was which; no
timer of the agent or the model is asked. Figures hold the line's delay towards the agent once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.lab.rtp import RATE_HZ, RtpTrack
from telephony.config import TelephonyConfig
from telephony.wire_metrics import VoicedEnergyMeter, dbov

FALSE_STOP_SILENCE_S = 0.7  # design §7
MISSED_STOP_S = 1.5  # an agent that still speaks so long after an interruption did not stop
_DUCK_DB = 12.0
_DUCKED_VOICE_DBOV = -55.0  # an agent that has ducked by 18 dB is quiet, not silent
_BLOCK = RATE_HZ // 50
_MATCH_S = 0.6  # how far a stimulus may lie from where the caller's report puts it


@dataclass(frozen=True)
class Stretch:
    """One party audible, in seconds of the relay's clock."""

    onset_s: float
    offset_s: float


@dataclass(frozen=True)
class Voice:
    """One direction: its audio in place, and its voiced stretches."""

    samples: np.ndarray
    start_s: float
    stretches: tuple[Stretch, ...]

    @classmethod
    def of(cls, track: RtpTrack, voiced_dbov: float = -45.0) -> Voice:
        samples, start_s = track.audio()
        meter = VoicedEnergyMeter("lab", "caller", TelephonyConfig(wire_voiced_dbov=voiced_dbov))
        silence = bytes(2 * RATE_HZ)  # so that the last stretch ends
        stretches: list[Stretch] = []
        onset: int | None = None
        for event in meter.push(samples.astype("<i2").tobytes() + silence):
            if event.kind == "caller_onset":
                onset = event.sample
            elif onset is not None:
                stretches.append(Stretch(start_s + onset / RATE_HZ, start_s + event.sample / RATE_HZ))
                onset = None
        return cls(samples, start_s, tuple(stretches))

    def is_audible(self, at_s: float) -> bool:
        return any(s.onset_s <= at_s < s.offset_s for s in self.stretches)

    def next_onset(self, after_s: float) -> float | None:
        return next((s.onset_s for s in self.stretches if s.onset_s > after_s), None)

    def longest_silence(self, from_s: float, to_s: float) -> float:
        edges = [from_s]
        for s in self.stretches:
            if s.offset_s > from_s and s.onset_s < to_s:
                edges += [max(from_s, s.onset_s), min(to_s, s.offset_s)]
        edges.append(to_s)
        return max(after - before for before, after in zip(edges[::2], edges[1::2], strict=True))

    def longest_gap(self, after_s: float, within_s: float = 8.0) -> float | None:
        """Longest silence between the stretches that begin in `within_s` from `after_s`; None: there is not even one.

        Nobody says anything meanwhile: a gap that is too long is an answer that the line's own echo or noise broke.
        """
        own = [s for s in self.stretches if after_s < s.onset_s]
        own = [s for s in own if s.onset_s < own[0].onset_s + within_s]
        gaps = [later.onset_s - earlier.offset_s for earlier, later in zip(own, own[1:], strict=False)]
        return max(gaps, default=0.0) if own else None

    def level(self, from_s: float, to_s: float) -> float:
        """dBov of the loudest 20 ms in between."""
        first, last = (max(0, round((at - self.start_s) * RATE_HZ)) for at in (from_s, to_s))
        part = self.samples[first:last].astype(np.float64)
        blocks = part[: len(part) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        return max((dbov(float(power)) for power in np.mean(blocks**2, axis=1)), default=-96.0)


@dataclass(frozen=True)
class Stimulus:
    """One thing the caller said, where it really crossed the wire."""

    label: str
    onset_s: float
    offset_s: float


def stimuli(said: list[dict[str, Any]], caller: Voice) -> list[Stimulus]:
    """The caller's report (ms of its own clock) laid over its voiced stretches; the first one fixes the offset."""
    if not said or not caller.stretches:
        return []
    zero_s = caller.stretches[0].onset_s - said[0]["start_ms"] / 1000
    found = []
    for item in said:
        begin, end = zero_s + item["start_ms"] / 1000 - _MATCH_S / 2, zero_s + item["end_ms"] / 1000 + _MATCH_S / 2
        inside = [s for s in caller.stretches if s.onset_s >= begin and s.offset_s <= end]
        if inside:
            found.append(Stimulus(item["label"], inside[0].onset_s, inside[-1].offset_s))
    return found


def outcome(stimulus: Stimulus, agent: Voice, next_onset_s: float | None) -> dict[str, Any]:
    """What the agent did about it; every time in ms."""
    begin, end = stimulus.onset_s, stimulus.offset_s
    result: dict[str, Any] = {"label": stimulus.label, "at_s": round(begin, 3)}
    match stimulus.label:
        case "turn" | "listen":
            answer = agent.next_onset(end)
            is_answered = answer is not None and (next_onset_s is None or answer < next_onset_s)
            result["voice_to_voice_ms"] = _ms(answer - end) if is_answered and answer is not None else None
            if stimulus.label == "listen":
                gap = agent.longest_gap(end)
                result |= {"gap_ms": None if gap is None else _ms(gap), "was_speaking": gap is not None}
                result["is_false_stop"] = gap is not None and gap > FALSE_STOP_SILENCE_S
        case "pause":
            until = next_onset_s if next_onset_s is not None else end
            onset = agent.next_onset(end)
            result |= {"pause_ms": _ms(until - end), "is_taken": onset is not None and onset < until}
        case "interrupt":
            result["was_speaking"] = agent.is_audible(begin)
            stop = next((s.offset_s for s in agent.stretches if s.onset_s <= begin < s.offset_s), begin)
            result["stop_ms"] = _ms(stop - begin) if stop - begin <= MISSED_STOP_S else None
            result["duck_ms"] = _duck_ms(begin, agent) if result["was_speaking"] else None
        case "backchannel" | "noise":
            result["was_speaking"] = agent.is_audible(begin)
            silence = agent.longest_silence(begin, end + 2 * FALSE_STOP_SILENCE_S)
            result |= {"silence_ms": _ms(silence), "is_false_stop": silence > FALSE_STOP_SILENCE_S}
            result["duck_ms"] = _duck_ms(begin, agent) if result["was_speaking"] else None
    return result


def _duck_ms(begin_s: float, agent: Voice) -> int | None:
    """Until nothing as loud as 12 dB below the agent's level before is heard for 200 ms; None: not within a second."""
    before = agent.level(begin_s - 0.5, begin_s)
    for step in range(50):
        at = begin_s + step * 0.02
        if agent.level(at, at + 0.2) <= before - _DUCK_DB:
            return _ms(at - begin_s)
    return None


def measure(said: list[dict[str, Any]], from_caller: RtpTrack, from_agent: RtpTrack) -> dict[str, Any]:
    """One call; plain data, ready for JSON."""
    caller, agent = Voice.of(from_caller), Voice.of(from_agent, _DUCKED_VOICE_DBOV)
    zero_s = min((track.arrivals_s[0] for track in (from_caller, from_agent) if track.arrivals_s), default=0.0)
    given = stimuli(said, caller)
    onsets = [*(s.onset_s for s in given[1:]), None][: len(given)]
    first = agent.stretches[0].onset_s if agent.stretches else None
    return {
        "first_word_ms": None if first is None else _ms(first - zero_s),
        "stimuli": [outcome(s, agent, after) | {"at_s": round(s.onset_s - zero_s, 3)}
                    for s, after in zip(given, onsets, strict=True)],
        "caller_s": [_span(s, zero_s) for s in caller.stretches],
        "agent_s": [_span(s, zero_s) for s in agent.stretches],
        "rtp": {"from_caller": from_caller.statistics(), "from_agent": from_agent.statistics()},
    }  # fmt: skip


def _span(stretch: Stretch, zero_s: float) -> tuple[float, float]:
    return round(stretch.onset_s - zero_s, 3), round(stretch.offset_s - zero_s, 3)


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


# ------------------------------------------------------------------------- summary


def summary(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Percentiles and counts over calls, each with its n."""
    found = [stimulus for call in calls for stimulus in call["stimuli"]]

    def times(label: str, name: str) -> list[float]:
        return [s[name] for s in found if s["label"] == label and s.get(name) is not None]

    turns = [s for s in found if s["label"] in ("turn", "listen")]
    pauses = [s for s in found if s["label"] == "pause"]
    stops = [s for s in found if s["label"] == "interrupt" and s["was_speaking"]]
    disturbed = {
        kind: [s for s in found if s["label"] == kind and s["was_speaking"]]
        for kind in ("backchannel", "noise", "listen")
    }
    every = [s for stimuli_of_kind in disturbed.values() for s in stimuli_of_kind]
    return {
        "calls": len(calls),
        "first_word_ms": spread([c["first_word_ms"] for c in calls if c["first_word_ms"] is not None]),
        "voice_to_voice_ms": spread(times("turn", "voice_to_voice_ms") + times("listen", "voice_to_voice_ms")),
        "unanswered_turns": f"{sum(s['voice_to_voice_ms'] is None for s in turns)}/{len(turns)}",
        "duck_ms": spread(times("interrupt", "duck_ms") + times("backchannel", "duck_ms")),
        "stop_ms": spread([s["stop_ms"] for s in stops if s["stop_ms"] is not None]),
        "missed_stops": f"{sum(s['stop_ms'] is None for s in stops)}/{len(stops)}",
        "false_stops": f"{sum(s['is_false_stop'] for s in every)}/{len(every)}",
        "false_stops_by_kind": {
            kind: f"{sum(s['is_false_stop'] for s in of_kind)}/{len(of_kind)}" for kind, of_kind in disturbed.items()
        },
        "pauses_taken": f"{sum(s['is_taken'] for s in pauses)}/{len(pauses)}",
    }


def spread(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"p50": None, "p95": None, "n": 0}
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50)), "p95": round(float(p95)), "n": len(values)}


def values_ms(calls: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Every single value behind the summary's percentiles, for pictures."""
    found: dict[str, list[float]] = {"first_word_ms": [c["first_word_ms"] for c in calls if c["first_word_ms"]]}
    for name in ("voice_to_voice_ms", "duck_ms", "stop_ms"):
        found[name] = [
            s[name] for call in calls for s in call["stimuli"]
            if s.get(name) is not None and not (name == "duck_ms" and s["label"] == "noise")
        ]  # fmt: skip
    return found
