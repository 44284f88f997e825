"""What the lab's caller does: named scripts over committed voices, for the demo line (an orders desk).

Each stimulus carries a label that says what is measured at it: `turn` (an answer is due), `listen` (the same, and
nothing follows that might break it), `pause` (part of a turn: no answer is due yet), `interrupt` (the agent should
stop), `backchannel` and `noise` (it should go on). The clips are the demo
caller's (agent/demo_assets), digits and order follow from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from agent.caller_script import BargeIn, CallerScript, Dtmf, Hangup, Say, Step, Wait, WaitForAgent
from telephony.clips import read_clip

RATE_HZ = 8_000
_ASSETS = Path(__file__).resolve().parent.parent / "demo_assets"
_ANSWERED = WaitForAgent(silent_ms=1_300, timeout_ms=12_000)
_PATIENTLY = WaitForAgent(silent_ms=1_300, timeout_ms=20_000)


def clip(name: str) -> bytes:
    return read_clip(_ASSETS / f"{name}.flac", RATE_HZ)


def number(digits: str, gap_ms: int = 90) -> bytes:
    gap = bytes(2 * RATE_HZ * gap_ms // 1000)
    return gap.join(clip(f"digit_{digit}") for digit in digits)


def _digits(rng: random.Random) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(5))


def order(rng: random.Random) -> tuple[Step, ...]:
    """A question, a number, goodbye: three turns."""
    asked = clip("number_prefix") + number(_digits(rng))
    return (Say(clip("order_status"), "turn"), _ANSWERED, Say(asked, "turn"), _ANSWERED, Say(clip("goodbye"), "turn"),
            _ANSWERED)  # fmt: skip


def pauses(rng: random.Random) -> tuple[Step, ...]:
    """A number read with a pause of 0.5-1.4 s in the middle: who takes the floor there was not patient."""
    digits = _digits(rng)
    first = clip("number_prefix") + number(digits[:2])
    pause = Wait(rng.choice((500, 800, 1100, 1400)))
    return (Say(clip("order_status"), "turn"), _ANSWERED, Say(first, "pause"), pause, Say(number(digits[2:]), "turn"),
            _ANSWERED)  # fmt: skip


def interrupt(rng: random.Random) -> tuple[Step, ...]:
    """A request, or "no wait", spoken into the agent's longest answer."""
    after_ms = rng.choice((800, 1200, 1600))
    said = clip(rng.choice(("order_status", "hours_day", "stop")))
    return (Say(clip("what_can_you_do"), "turn"), BargeIn(said, after_ms, "interrupt"), _ANSWERED)


def backchannel(rng: random.Random) -> tuple[Step, ...]:
    """ "mm-hm", "okay", "right" or "uh huh" into the agent's longest answer."""
    after_ms = rng.choice((800, 1200, 1600))
    said = clip(f"backchannel_{rng.choice(('mm_hm', 'okay', 'right', 'uh_huh'))}")
    return (Say(clip("what_can_you_do"), "turn"), BargeIn(said, after_ms, "backchannel"), _ANSWERED)


def keypad(rng: random.Random) -> tuple[Step, ...]:
    """The number typed (RFC 4733)."""
    return (Say(clip("order_status"), "turn"), _ANSWERED, Dtmf(_digits(rng)), _PATIENTLY)


def listen(_rng: random.Random) -> tuple[Step, ...]:
    """A question, then silence: echo and noise of the line alone must not stop the answer."""
    return (Say(clip("what_can_you_do"), "listen"), _PATIENTLY)


def cough(rng: random.Random) -> tuple[Step, ...]:
    """Two bursts of breath into the agent's longest answer."""
    after_ms = rng.choice((800, 1200, 1600))
    noise = np.random.default_rng(rng.randrange(2**31))
    burst = np.convolve(noise.standard_normal(RATE_HZ // 5), np.ones(3) / 3, "same")
    burst *= np.exp(-np.arange(len(burst)) / (RATE_HZ * 0.05)) * 9_000
    twice = np.concatenate([burst, np.zeros(RATE_HZ // 10), burst * 0.7]).astype("<i2").tobytes()
    return (Say(clip("what_can_you_do"), "turn"), BargeIn(twice, after_ms, "noise"), _ANSWERED)


def television(rng: random.Random) -> tuple[Step, ...]:
    """Somebody else's speech, far away: a sentence played backwards, 18 dB down, into the agent's longest answer."""
    after_ms = rng.choice((800, 1200, 1600))
    speech = np.frombuffer(clip(rng.choice(("hours_day", "number_prefix", "goodbye"))), "<i2")[::-1]
    far = (speech * 10 ** (-18 / 20)).astype("<i2").tobytes()
    return (Say(clip("what_can_you_do"), "turn"), BargeIn(far, after_ms, "noise"), _ANSWERED)


SCENARIOS: dict[str, Callable[[random.Random], tuple[Step, ...]]] = {
    scenario.__name__: scenario
    for scenario in (order, pauses, interrupt, backchannel, keypad, listen, cough, television)
}


def script(name: str, seed: int) -> CallerScript:
    """The opening is heard out first; the call ends with our BYE."""
    steps = SCENARIOS[name](random.Random(seed))
    return CallerScript((WaitForAgent(silent_ms=1_300, timeout_ms=20_000), *steps, Wait(300), Hangup()))
