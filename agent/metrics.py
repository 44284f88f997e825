"""Latencies of a call, from voiced energy in what crossed the wire: the leg's `WireMetric`s become per-turn figures.

All positions are samples of the leg's clock, which counts both directions alike; the model's and the agent's own
timers are never asked. Figures (milliseconds): `first_word_ms` answer -> first agent sound; `voice_to_voice_ms` end
of the caller's speech -> first sound of the answer; `duck_ms` caller's onset -> agent 12 dB quieter; `stop_ms`
caller's onset -> agent's last sound, for a turn that was cut; `pause_ms` the same for one that was resumed.
Definitions: docs/evaluation.md. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from telephony.leg import WireMetric


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

    def answered(self, sample: int) -> None:
        self._answered = sample

    def cut(self, turn_id: str) -> None:
        """The floor was lost to the caller in this turn: its last sound is a stop, not a pause."""
        self._cut_turns.add(turn_id)

    def resumed(self) -> None:
        """The overlap was no interruption; the next silence of the agent has nothing to do with it."""
        self._caller_onset = None

    def hear(self, event: WireMetric, turn_id: str) -> list[dict[str, Any]]:
        """Figures that became known, as arguments of CallStore.add_metric. `turn_id`: what the agent says now."""
        match event.kind:
            case "caller_onset":
                self._is_caller_voiced = True
                self._caller_offset = None
                if self._is_agent_voiced:
                    self._caller_onset, self._overlap_turn = event.sample, turn_id
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

    def _caller_stopped(self, sample: int) -> list[dict[str, Any]]:
        self._caller_offset = sample
        if self._early_onset is None:
            return []
        (onset, turn_id), self._early_onset = self._early_onset, None
        if onset < sample:
            return []  # they spoke at once: that is an overlap, not an answer
        self._caller_offset = None
        return [self._figure("voice_to_voice_ms", onset - sample, turn_id)]

    def _agent_began(self, sample: int, turn_id: str) -> list[dict[str, Any]]:
        figures = []
        if not self._has_spoken and self._answered is not None:
            self._has_spoken = True
            figures.append(self._figure("first_word_ms", sample - self._answered, ""))
        if self._caller_offset is not None:
            name = "filler_ms" if turn_id.startswith("f") else "voice_to_voice_ms"
            figures.append(self._figure(name, sample - self._caller_offset, turn_id))
            self._caller_offset = None
        elif self._is_caller_voiced:
            self._early_onset = (sample, turn_id)
        return figures

    def _agent_stopped(self, sample: int) -> list[dict[str, Any]]:
        onset, self._caller_onset = self._caller_onset, None
        if onset is None or sample < onset:
            return []
        name = "stop_ms" if self._overlap_turn in self._cut_turns else "pause_ms"
        return [self._figure(name, sample - onset, self._overlap_turn)]

    def _figure(self, name: str, num_samples: int, turn_id: str) -> dict[str, Any]:
        return {"turn_id": turn_id, "name": name, "value": round(1000 * num_samples / self.sample_rate_hz, 1)}
