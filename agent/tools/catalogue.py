"""Which tools there are, what they take, and what the model is told when they cannot run.

Arguments come from a model: strings, exactly as generated, possibly wrong in every way. They are validated here before
anything else sees them. The words of the results are the line format that the checkpoint was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_KEYS = re.compile(r"[0-9*#A-D]{1,16}")  # of a menu, a door, an extension; longer numbers are dialled, not pressed
_ASKED_TODAY = ("today", "tomorrow")


@dataclass(frozen=True)
class CallFrame:
    """What a validator may know of the call."""

    order_digits: int
    today: int  # weekday, 0 = monday
    claims: Mapping[str, str] = field(default_factory=dict)  # of the caller's line: for arguments the model leaves out


def _order_number(value: str, frame: CallFrame) -> str | None:
    digits = re.sub(r"[\s-]", "", value)
    is_number = digits.isascii() and digits.isdigit() and (not frame.order_digits or len(digits) == frame.order_digits)
    return digits if is_number else None


def _day(value: str, frame: CallFrame) -> str | None:
    word = value.strip().lower()
    if word in _ASKED_TODAY:
        return WEEKDAYS[(frame.today + _ASKED_TODAY.index(word)) % 7]
    return word if word in WEEKDAYS else None


def _keys(value: str, _frame: CallFrame) -> str | None:
    keys = re.sub(r"[\s,-]", "", value).upper()
    return keys if _KEYS.fullmatch(keys) else None


Validator = Callable[[str, CallFrame], str | None]
_VALIDATORS: Mapping[str, Validator] = {"order_number": _order_number, "day": _day, "keys": _keys}


@dataclass(frozen=True)
class Tool:
    name: str
    parameters: tuple[str, ...] = ()
    has_side_effect: bool = False


TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool("look_up_order", ("order_number",)),
        Tool("opening_hours", ("day",)),
        Tool("change_delivery", ("order_number", "day"), has_side_effect=True),
        Tool("transfer", has_side_effect=True),
        Tool("hang_up", has_side_effect=True),
        Tool("request_callback", has_side_effect=True),
        Tool("send_keys", ("keys",), has_side_effect=True),
        Tool("pause_recording"),  # no side effect that must wait: what is not kept harms nobody
        Tool("go_on_recording"),
    )
}


RECORDING_TOOLS = {"pause_recording": False, "go_on_recording": True}
"""The call carries them out itself, at once: is sound kept from now on?"""


@dataclass(frozen=True)
class BadArguments(Exception):
    """The model's request cannot be carried out; `parameter` is the first one at fault, "" = the tool itself."""

    parameter: str
    reason: str

    def __str__(self) -> str:
        return self.reason


def validate(name: str, arguments: Mapping[str, str], allowed: tuple[str, ...], frame: CallFrame) -> dict[str, str]:
    """The arguments in canonical form. Raises BadArguments."""
    tool = TOOLS.get(name)
    if tool is None or name not in allowed:
        raise BadArguments("", f"no tool {name!r} on this line")
    unknown = sorted(set(arguments) - set(tool.parameters))
    if unknown:
        raise BadArguments(unknown[0], f"{name} takes no {unknown[0]!r}")
    clean = {}
    for parameter in tool.parameters:
        said = arguments.get(parameter, "") or frame.claims.get(parameter, "")
        value = _VALIDATORS[parameter](said, frame)
        if value is None:
            raise BadArguments(parameter, f"{parameter} {said!r} is not valid")
        clean[parameter] = value
    return clean


def refusal_line(name: str, error: BadArguments) -> str:
    """What the model is told about a request that was not carried out."""
    if error.parameter == "order_number":
        return "status not_found" if name == "look_up_order" else "result not_found"
    return "error"
