"""Latencies of a call, from voiced energy in what crossed the wire: the leg's `WireMetric`s become per-turn figures.

All positions are samples of the leg's clock, which counts both directions alike; the model's and the agent's own
timers are never asked. Figures (milliseconds): `first_word_ms` ACK -> first agent sound; `voice_to_voice_ms` end
of the caller's speech -> first sound of the answer; `duck_ms` caller's onset -> agent 12 dB quieter; `stop_ms`
caller's onset -> agent's last sound, for a turn that was cut; `pause_ms` the same for one that was resumed. Calls that
we place have `answer_decision_ms` too (callee_side.py).
Definitions: docs/evaluation.md. Beside them stands what the runtime counts of its own work (`EngineCounts`). Pure.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from minmo_runtime.api import ContextReused, DraftEnded, JobOverran
from telephony.leg import EchoMeasured, WireMetric

Figure = dict[str, Any]  # arguments of CallStore.add_metric


def echo_figures(event: EchoMeasured) -> list[Figure]:
    """Of the whole call: the line's echo (ITU-T G.168)."""
    values = {"echo_return_loss_db": event.return_loss_db, "echo_delay_ms": event.delay_ms}
    if event.verdict != "unclear":  # what is left may be the caller's voice
        values["echo_enhancement_db"] = event.enhancement_db
    return [{"turn_id": "", "name": name, "value": value} for name, value in values.items()]


@dataclass
class WireTimes:
    sample_rate_hz: int
    _answered: int | None = None
    _has_spoken: bool = False
    _caller_onset: int | None = None  # while the agent was audible
    _caller_offset: int | None = None  # not answered yet
    _is_caller_voiced: bool = False
    _is_agent_voiced: bool = False
    _early_onset: tuple[int, str] | None = None  # agent began before the caller's offset was reported
    _cut_turns: set[str] = field(default_factory=set)
    _overlap_turn: str = ""
    _held_ms: float | None = None  # the agent fell silent in an overlap that is not decided yet

    @property
    def answered_sample(self) -> int:
        """Where the ACK stands on the leg's clock, as far as it was told; a leg's first sample is close to it."""
        return self._answered or 0

    def cut(self, turn_id: str) -> list[Figure]:
        """The floor was lost to the caller in this turn: its last sound, before or after now, is a stop."""
        self._cut_turns.add(turn_id)
        return self._decided("stop_ms") if turn_id == self._overlap_turn else []

    def on_hold(self) -> None:
        """A hold began or ended: a figure across it would measure the hold."""
        self._caller_onset = self._caller_offset = self._early_onset = self._held_ms = None

    def resumed(self) -> list[Figure]:
        """The overlap was no interruption: a silence of the agent in it was a pause."""
        figures = self._decided("pause_ms")
        self._caller_onset = None
        return figures

    def _decided(self, name: str) -> list[Figure]:
        held_ms, self._held_ms = self._held_ms, None
        if held_ms is None:
            return []
        self._caller_onset = None
        return [self._named(name, held_ms, self._overlap_turn)]

    def hear(self, event: WireMetric, turn_id: str) -> list[Figure]:
        """Figures that became known, as arguments of CallStore.add_metric. `turn_id`: what the agent says now."""
        match event.kind:
            case "answered":
                self._answered = event.sample
            case "caller_onset":
                self._is_caller_voiced = True
                self._caller_offset = None
                if self._is_agent_voiced:
                    self._caller_onset, self._overlap_turn, self._held_ms = event.sample, turn_id, None
            case "caller_offset":
                self._is_caller_voiced = False
                return self._caller_stopped(event.sample)
            case "agent_onset":
                self._is_agent_voiced = True
                return self._agent_began(event.sample, turn_id)
            case "agent_ducked" if self._caller_onset is not None:
                return [self._figure("duck_ms", event.sample - self._caller_onset, self._overlap_turn)]
            case "agent_offset":
                self._is_agent_voiced = False
                return self._agent_stopped(event.sample)
        return []

    def _caller_stopped(self, sample: int) -> list[Figure]:
        self._caller_offset = sample
        if self._early_onset is None:
            return []
        (onset, turn_id), self._early_onset = self._early_onset, None
        if onset < sample:
            return []  # they spoke at once: that is an overlap, not an answer
        self._caller_offset = None
        return [self._figure("voice_to_voice_ms", onset - sample, turn_id)]

    def _agent_began(self, sample: int, turn_id: str) -> list[Figure]:
        figures = []
        self._held_ms = None  # it was a pause, and goes on
        if not self._has_spoken and self._answered is not None:
            self._has_spoken = True
            figures.append(self._figure("first_word_ms", sample - self._answered, ""))
        if self._caller_offset is not None:
            is_filler = turn_id.startswith("f")
            name = "filler_ms" if is_filler else "voice_to_voice_ms"
            figures.append(self._figure(name, sample - self._caller_offset, turn_id))
            if not is_filler:  # behind a filler the answer is still awaited
                self._caller_offset = None
        elif self._is_caller_voiced:
            self._early_onset = (sample, turn_id)
        return figures

    def _agent_stopped(self, sample: int) -> list[Figure]:
        if self._caller_onset is None or sample < self._caller_onset:
            return []
        self._held_ms = self._to_ms(sample - self._caller_onset)  # a pause or a stop: the decision tells
        return self._decided("stop_ms") if self._overlap_turn in self._cut_turns else []

    def _figure(self, name: str, num_samples: int, turn_id: str) -> Figure:
        return self._named(name, self._to_ms(num_samples), turn_id)

    def _named(self, name: str, value: float, turn_id: str) -> Figure:
        return {"turn_id": turn_id, "name": name, "value": value}

    def _to_ms(self, num_samples: int) -> float:
        return round(1000 * num_samples / self.sample_rate_hz, 1)


@dataclass
class OverlapCounts:
    """Voices over the agent that were no bid for the floor: it went on. Where it had already fallen silent, that was a
    phantom pause: the caller heard it stop for nothing."""

    num_resumed: int = 0
    num_phantom_pauses: int = 0
    _is_paused: bool = False

    def paused(self) -> None:
        self._is_paused = True

    def cut(self) -> None:
        """It was a bid for the floor after all."""
        self._is_paused = False

    def resumed(self) -> None:
        self.num_resumed += 1
        self.num_phantom_pauses += self._is_paused
        self._is_paused = False

    def figures(self) -> list[Figure]:
        values = {"overlaps_resumed": self.num_resumed, "phantom_pauses": self.num_phantom_pauses}
        return [{"turn_id": "", "name": name, "value": value, "source": "floor"} for name, value in values.items()]


@dataclass
class EngineCounts:
    """What the runtime tells of its own work for this call: replies written ahead of the decision to speak, jobs that
    took longer than they should, and positions of its context that need not be read again."""

    drafts: Counter[str] = field(default_factory=Counter)  # outcome -> how many
    num_long_jobs: int = 0
    longest_ms: dict[str, float] = field(default_factory=dict)  # part -> its longest job, of those that were too long
    reused: Counter[str] = field(default_factory=Counter)  # source -> positions

    def draft_ended(self, event: DraftEnded) -> None:
        self.drafts[event.outcome] += 1

    def job_overran(self, event: JobOverran) -> None:
        self.num_long_jobs += 1
        self.longest_ms[event.part] = max(event.milliseconds, self.longest_ms.get(event.part, 0.0))

    def context_reused(self, event: ContextReused) -> None:
        self.reused[event.source] += event.num_positions

    def figures(self) -> list[Figure]:
        """Of the whole call; told by the runtime, not by the wire."""
        values = {
            "drafted": self.drafts.total(),
            "drafts_committed": self.drafts["committed"],
            "drafts_discarded": self.drafts["discarded"],
            "long_jobs": self.num_long_jobs,
            "positions_from_prefix": self.reused["prefix"],
            "positions_from_branch": self.reused["branch"],
            **{f"longest_{part}_ms": value for part, value in sorted(self.longest_ms.items())},
        }
        return [{"turn_id": "", "name": name, "value": value, "source": "runtime"} for name, value in values.items()]
