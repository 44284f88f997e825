"""What a duplex posterior would do to a call: pauses taken over, delay behind true ends, overlaps that stop the agent.

The rules are those of agent/turn_taking with its default settings (the islands do not import each other; a test holds
the numbers equal), so the bridge and a trained predictor are judged as the caller would suffer them, on the same
scenes. Pure arithmetic on arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minmo_runtime.duplex_steps import FACT_NAMES
from minmo_runtime.model.duplex import CLASSES
from minmo_runtime.rates import input_samples
from minmo_runtime.training.duplex_scenes import LABEL, Mark

_FACT = {name: index for index, name in enumerate(FACT_NAMES)}
MS = input_samples(1)
_SHORTEST_END_MS = 2000  # silence behind an end in which every rule has had its time


@dataclass(frozen=True)
class FloorRules:
    """Names and defaults of agent/floor.TurnTakingConfig."""

    end_silence_s: float = 0.12
    likely_end_probability: float = 0.3
    likely_end_s: float = 0.7
    missed_end_s: float = 1.6
    slot_patience_s: float = 1.6
    reprompt_after_s: float = 7.0
    user_done_probability: float = 0.5
    interrupt_probability: float = 0.5
    noise_probability: float = 0.75
    decide_min_s: float = 0.5
    decide_max_s: float = 0.9
    burst_silence_s: float = 0.1
    burst_voiced_s: float = 0.3


@dataclass
class Judged:
    """One scene: posterior [T, 6] and what the floor's rules look at."""

    chances: np.ndarray
    facts: np.ndarray
    speaks: np.ndarray
    samples: np.ndarray
    marks: list[Mark]
    is_answered: bool  # the agent takes the turn at a drawn time: the true end cannot be judged

    def fact(self, name: str) -> np.ndarray:
        return self.facts[:, _FACT[name]]


def bridge_chances(facts: np.ndarray, every: int = 2) -> np.ndarray:
    """The endpointer's posterior out of the facts, held for `every` steps as it comes in service (160 ms)."""
    chances = np.zeros((len(facts), len(CLASSES)), np.float32)
    for name in ("user_done", "user_waits", "interrupt", "backchannel"):
        chances[:, LABEL[name]] = facts[:, _FACT[f"bridge_{name}"]]
    chances[:, LABEL["idle"]] = 1.0 - chances.sum(1)
    held = np.arange(len(facts)) // every * every + every - 1  # a prediction stands at the last of its steps
    return chances[np.maximum(0, np.where(held <= np.arange(len(facts)), held, held - every))]


def floor_taken(scene: Judged, rules: FloorRules) -> tuple[np.ndarray, np.ndarray]:
    """[T] where the agent would take the floor: by prediction, and by the patience behind it."""
    silence_s = scene.fact("silence_3200") * 3.2
    has_words, is_slot_open = scene.fact("has_text") > 0, scene.fact("is_slot_open") > 0
    predicted = np.zeros(len(silence_s), bool)
    waited = np.zeros(len(silence_s), bool)
    has_waited = False
    for t, chances in enumerate(scene.chances):
        if scene.fact("is_voiced")[t]:
            has_waited = False
        elif not scene.speaks[t] and chances[LABEL["user_waits"]] >= rules.user_done_probability:
            has_waited = True
        if scene.speaks[t] or silence_s[t] < rules.end_silence_s or (has_waited and silence_s[t] < 3.2):
            continue
        may_be_over = has_words[t] and not is_slot_open[t]
        is_likely = may_be_over and chances[LABEL["user_done"]] >= rules.likely_end_probability
        patience = rules.slot_patience_s if is_slot_open[t] else rules.missed_end_s
        waited[t] = silence_s[t] >= (min(patience, rules.likely_end_s) if is_likely else patience)
        predicted[t] = may_be_over and chances[LABEL["user_done"]] >= rules.user_done_probability
    return predicted, waited


def agent_stopped(scene: Judged, mark: Mark, rules: FloorRules) -> float:
    """Seconds from the mark's beginning until the agent would stop for good; inf if it goes on."""
    within = np.flatnonzero((scene.samples > mark.start) & (scene.samples <= mark.end + 1000 * MS) & scene.speaks)
    voiced = scene.fact("is_voiced") > 0
    onset, last_voiced, voiced_s, is_resumed = -1, 0, 0.0, False
    before = 0
    for t in within:
        sample = int(scene.samples[t])
        step_s = (sample - before) / MS / 1000 if before else 0.08
        before = sample
        if voiced[t]:
            onset = sample if onset < 0 else onset
            last_voiced, voiced_s = sample, voiced_s + step_s
        if onset < 0:
            continue
        elapsed, silence = (sample - onset) / MS / 1000 + step_s / 2, (sample - last_voiced) / MS / 1000
        interrupt, other = scene.chances[t, LABEL["interrupt"]], 1.0 - scene.chances[t, LABEL["interrupt"]]
        is_over = silence >= rules.burst_silence_s
        if is_resumed and (is_over or interrupt >= rules.interrupt_probability):
            return float("inf") if is_over else (sample - mark.start) / MS / 1000
        if is_resumed:
            continue
        if is_over and (voiced_s < rules.burst_voiced_s or (elapsed >= rules.decide_min_s and other > interrupt)):
            return float("inf")
        if elapsed >= rules.decide_min_s and interrupt >= rules.interrupt_probability:
            if voiced_s >= rules.burst_voiced_s:
                return (sample - mark.start) / MS / 1000
        if elapsed >= rules.decide_max_s:
            if interrupt > 0.5 or not (is_over or other > rules.noise_probability):
                return (sample - mark.start) / MS / 1000
            is_resumed = True
    return float("inf")


def score(scenes: list[Judged], rules: FloorRules = FloorRules()) -> dict[str, float]:
    """Rates over all marks, with their n."""
    pauses: dict[str, list[tuple[bool, bool]]] = {}
    delays: list[float] = []
    waits: list[bool] = []
    stops: dict[str, list[float]] = {"interrupt": [], "person": [], "backchannel": [], "noise": []}
    for scene in scenes:
        predicted, waited = floor_taken(scene, rules)
        for mark in scene.marks:
            inside = (scene.samples > mark.start) & (scene.samples <= mark.end)
            if mark.kind in stops:
                stops[mark.kind].append(agent_stopped(scene, mark, rules))
            elif mark.kind.startswith("pause"):
                pauses.setdefault(mark.kind, []).append(
                    (bool(predicted[inside].any()), bool((predicted | waited)[inside].any()))
                )
            elif mark.kind == "waits":
                waits.append(bool((predicted | waited)[inside].any()))
            elif not scene.is_answered and mark.end - mark.start >= _SHORTEST_END_MS * MS:
                first = np.flatnonzero((predicted | waited) & inside)
                late = scene.samples[first[0]] - mark.start if len(first) else np.inf
                delays.append(float(late) / MS / 1000)
    interrupts = stops["interrupt"] + stops["person"]
    every = [pair for found in pauses.values() for pair in found]
    scores = {
        "takeover": _mean([any_ for _, any_ in every]),
        "takeover_predicted": _mean([predicted for predicted, _ in every]),
        "n_pauses": float(len(every)),
        "delay_p50_s": float(np.median(delays)) if delays else float("inf"),
        "delay_p90_s": float(np.quantile(delays, 0.9, method="higher")) if delays else float("inf"),
        "ends_unanswered": _mean([not np.isfinite(delay) for delay in delays]),
        "n_ends": float(len(delays)),
        "takeover_waits": _mean(waits),
        "n_waits": float(len(waits)),
        "interrupts_640ms": _mean([late <= 0.64 for late in interrupts]),
        "interrupts_1s": _mean([late <= 1.0 for late in interrupts]),
        "n_interrupts": float(len(interrupts)),
        "backchannels_stopped": _mean([np.isfinite(late) for late in stops["backchannel"]]),
        "n_backchannels": float(len(stops["backchannel"])),
        "noises_stopped": _mean([np.isfinite(late) for late in stops["noise"]]),
        "n_noises": float(len(stops["noise"])),
    }
    if people := stops["person"]:
        scores["people_1s"] = _mean([late <= 1.0 for late in people])
        scores["people_stop"] = _mean([np.isfinite(late) for late in people])
        scores["n_people"] = float(len(people))
    return scores | {f"takeover_{kind}": _mean([any_ for _, any_ in found]) for kind, found in sorted(pauses.items())}


def _mean(values: list[bool]) -> float:
    return float(np.mean(values)) if values else 0.0


def shifted(chances: np.ndarray, name: str, odds: float) -> np.ndarray:
    """The posterior with the odds of one class divided by `odds`; that is what a bias of -log(odds) does."""
    changed = chances.copy()
    changed[:, LABEL[name]] /= odds
    return changed / changed.sum(1, keepdims=True)
