"""How a line takes and yields the floor: one typed object per campaign, a named preset plus single values on top.

`[duplex]` of a campaign:

    [duplex]
    preset = "patient"        # standard | patient | brisk | noisy_line
    missed_end_s = 2.2        # any single value, over the preset's

`standard` is the operator's own [turn_taking] of config.toml; every preset says only what differs from it. The names
and ranges are those of agent/floor.py, where each is explained; a test compares the two, because the islands may not
import each other. The call's journal keeps the preset and every value as it took effect.
"""

from __future__ import annotations

import msgspec

from policies.decisions import DuplexDecision

RANGES: dict[str, tuple[float, float]] = {
    "onset_voiced_s": (0, 0.5),
    "pause_after_s": (0.1, 1),
    "decide_min_s": (0.1, 1),
    "decide_max_s": (0.3, 2),
    "interrupt_probability": (0, 1),
    "noise_probability": (0, 1),
    "burst_voiced_s": (0, 1),
    "user_done_probability": (0, 1),
    "end_silence_s": (0.05, 2),
    "likely_end_probability": (0, 1),
    "likely_end_s": (0.2, 5),
    "missed_end_s": (0.5, 5),
    "slot_patience_s": (0.5, 10),
    "wordless_s": (0.1, 5),
    "false_end_voiced_s": (0.04, 1),
    "reprompt_after_s": (2, 60),
}

PRESETS: dict[str, dict[str, float]] = {
    "standard": {},
    # People who search for words or read numbers from paper: an end is believed late, a pause is waited out.
    "patient": {
        "user_done_probability": 0.65, "end_silence_s": 0.3, "likely_end_s": 1.2, "missed_end_s": 1.8,
        "slot_patience_s": 2.6, "false_end_voiced_s": 0.12, "reprompt_after_s": 10.0,
    },
    # Short, practised dialogues: the answer comes at the first sign of an end.
    "brisk": {
        "user_done_probability": 0.45, "end_silence_s": 0.06, "likely_end_s": 0.5, "missed_end_s": 1.0,
        "slot_patience_s": 1.3, "reprompt_after_s": 5.0,
    },
    # Cars, shop floors, a television: hard to interrupt by sound alone, and no noise counts as a turn.
    "noisy_line": {
        "onset_voiced_s": 0.06, "burst_voiced_s": 0.4, "interrupt_probability": 0.6, "noise_probability": 0.6,
        "decide_min_s": 0.6, "decide_max_s": 1.1, "wordless_s": 1.0, "false_end_voiced_s": 0.24,
    },
}  # fmt: skip


class DuplexManner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[duplex]` of a campaign; a value of None is the preset's."""

    preset: str = "standard"
    onset_voiced_s: float | None = None
    pause_after_s: float | None = None
    decide_min_s: float | None = None
    decide_max_s: float | None = None
    interrupt_probability: float | None = None
    noise_probability: float | None = None
    burst_voiced_s: float | None = None
    user_done_probability: float | None = None
    end_silence_s: float | None = None
    likely_end_probability: float | None = None
    likely_end_s: float | None = None
    missed_end_s: float | None = None
    slot_patience_s: float | None = None
    wordless_s: float | None = None
    false_end_voiced_s: float | None = None
    reprompt_after_s: float | None = None

    def own_values(self) -> dict[str, float]:
        """What the campaign itself sets."""
        return {key: value for key in RANGES if (value := getattr(self, key)) is not None}


def manner_faults(manner: DuplexManner) -> list[str]:
    """Every reason why this manner cannot be kept; empty = valid."""
    faults = []
    if manner.preset not in PRESETS:
        faults.append(f"duplex.preset = {manner.preset!r}: must be one of {', '.join(PRESETS)}")
    own = manner.own_values()
    for key, value in own.items():
        low, high = RANGES[key]
        if not low <= value <= high:
            faults.append(f"duplex.{key} = {value}: must be {low:g} to {high:g}")
    decide = PRESETS.get(manner.preset, {}) | own
    given = [key for key in ("decide_min_s", "decide_max_s") if key in decide]
    if len(given) == 1:
        faults.append(f"duplex.{given[0]} = {decide[given[0]]}: decide_min_s and decide_max_s must be set together")
    elif given and not decide["decide_min_s"] < decide["decide_max_s"]:
        faults.append(
            f"duplex.decide_max_s = {decide['decide_max_s']}: must be more than decide_min_s ({decide['decide_min_s']})"
        )
    return faults


def decide_duplex(manner: DuplexManner) -> DuplexDecision:
    own = manner.own_values()
    reasons = [f"campaign asks for {manner.preset}"]
    reasons += [f"campaign sets {key} = {value:g}" for key, value in own.items()]
    return DuplexDecision(preset=manner.preset, values=PRESETS[manner.preset] | own, reasons=tuple(reasons))
