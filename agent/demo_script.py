"""What the demo's caller says, and what must come of it: the exchanges, their audio, and the judgement of a finished
call.

Pure but for reading the committed clips. The judgement looks only at what was stored and measured: tool calls, heard
text, figures from the wire.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.caller_script import BargeIn, CallerScript, Hangup, Say, Step, Wait, WaitForAgent
from telephony.clips import read_clip

ASSETS = Path(__file__).with_name("demo_assets")
RATE_HZ = 8_000
DIGIT_GAP_MS = 70
BARGE_IN_AFTER_MS = 1_300
SILENT_MS = 2_000  # longer than a pause between two sentences of the agent, or between a filler and its answer
# What an answer without a tool shows about what was understood. Patterns of the model's own replies.
INTENT_OF_ANSWER = (
    (r"your order number", "order_status"),
    (r"\blook up an order\b|\bopening hours\b", "what_can_you_do"),
    (r"goodbye", "goodbye"),
)
INTENT_OF_TOOL = {
    "look_up_order": "order_status",
    "opening_hours": "opening_hours",
    "change_delivery": "change_delivery",
    "transfer": "person",
    "hang_up": "goodbye",
    "request_callback": "callback",
}
# The words of an answer that say a status (the model words them itself).
STATUS_WORDS = {
    "preparing": ("preparing",),
    "shipped": ("shipped",),
    "delivered": ("delivered",),
    "delayed": ("late",),
    "returned": ("came",),
    "cancelled": ("cancelled",),
    "unpaid": ("payment",),
}
UNDATED = frozenset({"cancelled", "unpaid"})  # the answer names no day


def answer_words(status: str, day: str) -> tuple[tuple[str, ...], ...]:
    """What the answer to a look-up must say: one word of each group."""
    return (STATUS_WORDS[status],) if status in UNDATED else (STATUS_WORDS[status], (day,))


@dataclass(frozen=True)
class Exchange:
    label: str  # the clip, and the caller's step
    said: str
    intent: str
    slots: dict[str, str] = field(default_factory=dict)
    must_say: tuple[tuple[str, ...], ...] = ()  # each: one of these words must be in the answer
    is_barge_in: bool = False

    @property
    def expected(self) -> dict[str, Any]:
        return {"said": self.said, "intent": self.intent, "slots": self.slots}


def exchanges(order_number: str, status: str, day: str, opens: str, closes: str) -> tuple[Exchange, ...]:
    """`opens` and `closes`: Saturday's hours in words."""
    texts = tomllib.loads((ASSETS / "assets.toml").read_text(encoding="utf-8"))["texts"]
    number = Exchange(
        "number", f"{texts['number_prefix']} {order_number}", "order_status", {"order_number": order_number},
        must_say=answer_words(status, day),
    )  # fmt: skip
    hours = Exchange(
        "hours_day", texts["hours_day"], "opening_hours", {"day": "saturday"}, must_say=((opens,), (closes,)),
        is_barge_in=True,
    )  # fmt: skip
    return (
        Exchange("what_can_you_do", texts["what_can_you_do"], "what_can_you_do"),
        hours,
        Exchange("order_status", texts["order_status"], "order_status"),
        number,
        Exchange("goodbye", texts["goodbye"], "goodbye"),
    )


def caller_script(order_number: str) -> CallerScript:
    """The steps of the caller's process."""
    answered = WaitForAgent(silent_ms=SILENT_MS, timeout_ms=15_000)
    steps: list[Step] = [
        answered, Say(_clip("what_can_you_do"), "what_can_you_do"),
        BargeIn(_clip("hours_day"), BARGE_IN_AFTER_MS, "hours_day"),
        answered, Say(_clip("order_status"), "order_status"),
        answered, Say(number_audio(order_number), "number"),
        answered, Say(_clip("goodbye"), "goodbye"),
        Wait(8_000), Hangup(),
    ]  # fmt: skip
    return CallerScript(tuple(steps))


def number_audio(order_number: str) -> bytes:
    """The number digit by digit, from single clips."""
    gap = bytes(2 * RATE_HZ * DIGIT_GAP_MS // 1000)
    return gap.join([_clip("number_prefix"), *(_clip(f"digit_{digit}") for digit in order_number)])


def _clip(name: str) -> bytes:
    return read_clip(ASSETS / f"{name}.flac", RATE_HZ)


# ------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Verdict:
    exchange: Exchange
    got: dict[str, Any]
    fault: str  # "" = as expected


def judge_exchanges(wanted: tuple[Exchange, ...], said: list[dict[str, Any]], call: dict[str, Any]) -> list[Verdict]:
    """`said`: the caller's own report of when each clip left (ms since the answer); `call`: the stored call."""
    starts = {row["label"]: row["start_ms"] for row in said}
    verdicts = []
    for index, exchange in enumerate(wanted):
        begin = starts.get(exchange.label)
        following = [starts[e.label] for e in wanted[index + 1 :] if e.label in starts]
        if begin is None:
            verdicts.append(Verdict(exchange, {}, f"{exchange.label}: the caller never came to say {exchange.said!r}"))
            continue
        got = _got(call, begin, min(following, default=1 << 40))
        verdicts.append(Verdict(exchange, got, _fault(exchange, got)))
    return verdicts


def _got(call: dict[str, Any], begin_ms: int, end_ms: int) -> dict[str, Any]:
    """What the agent understood and said between two things that the caller said."""
    rate = call["sample_rate_hz"] / 1000
    turns = [
        t for t in call["turns"] if t["start_sample"] is not None and begin_ms <= t["start_sample"] / rate < end_ms
    ]
    agent = [t for t in turns if t["role"] == "agent" and not t["turn_id"].startswith("f")]
    caller = [
        t for t in call["turns"] if t["role"] == "caller" and not t["intent"] and _overlaps(t, begin_ms, end_ms, rate)
    ]
    answer = " ".join(t["generated_text"] or "" for t in agent)
    ids = {t["turn_id"] for t in agent}
    tools = [t for t in call["tool_calls"] if t["turn_id"] in ids]
    got: dict[str, Any] = {"heard": " ".join(t["heard_text"] or "" for t in caller), "intent": "", "slots": {}}
    if tools:
        got["intent"] = INTENT_OF_TOOL.get(tools[-1]["name"], tools[-1]["name"])
        got["slots"] = dict(tools[-1]["arguments"])
    else:
        got["intent"] = next((name for pattern, name in INTENT_OF_ANSWER if re.search(pattern, answer)), "")
    got["answer"] = answer
    return got


def _overlaps(turn: dict[str, Any], begin_ms: int, end_ms: int, rate: float) -> bool:
    if turn["start_sample"] is None or turn["end_sample"] is None:
        return False
    middle_ms = (turn["start_sample"] + turn["end_sample"]) / 2 / rate
    return bool(begin_ms <= middle_ms < end_ms)


def _fault(exchange: Exchange, got: dict[str, Any]) -> str:
    what = f"{exchange.label}: on {exchange.said!r} (understood as {got['heard']!r})"
    if not got["answer"] and not got["intent"]:
        return f"{what} the agent gave no answer"
    if got["intent"] != exchange.intent:
        return f"{what} the agent did {got['intent'] or 'something else'!r}, not {exchange.intent!r}: {got['answer']!r}"
    if got["slots"] != exchange.slots:
        return f"{what} the agent took {got['slots']}, not {exchange.slots}"
    for words in exchange.must_say:
        if not any(re.search(rf"\b{re.escape(word)}\b", got["answer"]) for word in words):
            return f"{what} the answer {got['answer']!r} does not say {' or '.join(words)!r}"
    return ""
