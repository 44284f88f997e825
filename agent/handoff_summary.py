"""What a person is told before a call is handed over: written for the record and the page, spoken on the telephone.

Made from the call's own record (storage.calls.CallStore.get_call) and from nothing else: the caller's words as they
were recognised, and what the tools really answered. No model writes here, so nothing can be invented; what was not
understood is not told. Words in the spoken form stay those of the record, digits one by one. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minmo_runtime.text import speak_digits

MAX_SPOKEN_TURNS, MAX_SPOKEN_WORDS = 2, 16
MIN_CONFIDENCE = 0.35  # as agent/call_setup.py: below it the agent itself asked again
_ORDER_TOOLS = ("look_up_order", "change_delivery")


@dataclass(frozen=True)
class Summary:
    written: str
    spoken: tuple[str, ...]  # sentences, in order


def summarise(call: dict[str, Any], greeting: str, closing: str) -> Summary:
    """`greeting` and `closing`: the fixed sentences around the spoken summary."""
    said = [turn["heard_text"] for turn in call["turns"] if _is_telling(turn)]
    results = [line for tool in call["tool_calls"] if (line := _result_of(tool))]
    head = [f"Caller: {call['ani'] or 'number withheld'}", f"Campaign: {call['campaign']}"]
    if call["display_name"]:
        head.insert(1, f"Name as presented: {call['display_name']}")
    written = [*head, *(f"Said: {text}" for text in said), *(f"Found: {line}" for line in results)]
    spoken = [greeting, *(f"the caller said {_short(text)}." for text in _first_and_last(said))]
    spoken += [f"{speak_digits(line)}." for line in results[-1:]]
    return Summary("\n".join(written), (*spoken, closing))


def _is_telling(turn: dict[str, Any]) -> bool:
    """A turn of the caller with words that were understood; no backchannel."""
    is_sure = turn["confidence"] is None or turn["confidence"] >= MIN_CONFIDENCE
    return turn["role"] == "caller" and bool(turn["heard_text"]) and not turn["intent"] and is_sure


def _result_of(tool: dict[str, Any]) -> str:
    """One finished look-up or change in plain words, "" for what tells a person nothing."""
    if tool["state"] != "done" or tool["name"] not in _ORDER_TOOLS:
        return ""
    result, arguments = tool["result"] or {}, tool["arguments"]
    order = f"order {arguments.get('order_number', '')}"
    if tool["name"] == "change_delivery":
        return f"{order} is moved to {arguments['day']}" if result.get("outcome") == "ok" else ""
    if "status" not in result:
        return f"{order} was not found"
    is_dated = "day" in str(result.get("content", ""))
    return f"{order} is {result['status']}" + (f" {result['day']}" if is_dated else "")


def _first_and_last(said: list[str]) -> list[str]:
    """What the call began with, and what led to the hand-off."""
    return said[:1] + said[-1:] if len(said) > MAX_SPOKEN_TURNS else said


def _short(text: str) -> str:
    words = speak_digits(text).rstrip(".?! ").split()
    return " ".join(words[:MAX_SPOKEN_WORDS])
