"""Card-like digit runs are taken out of every text before it is stored (PCI DSS 4.0.1 3.5: no readable card number at
rest).

A run is 13-19 digits, written ("4111 1111-1111 1111"), spoken ("four one one one", "double four", "forty two"), or
both mixed. Written text must pass the Luhn check (ISO/IEC 7812-1 annex B); heard text is masked without it, because
one misrecognised digit would otherwise keep the other fifteen. Pure: text in, text out. Digits read across several
turns are not joined here.
"""

from __future__ import annotations

import re
from typing import Any

MASK = "[card number removed]"
MIN_DIGITS, MAX_DIGITS = 13, 19

_UNITS = {
    "zero": "0", "oh": "0", "o": "0", "nought": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9",
}  # fmt: skip
_TEENS = {
    "ten": "10", "eleven": "11", "twelve": "12", "thirteen": "13", "fourteen": "14", "fifteen": "15", "sixteen": "16",
    "seventeen": "17", "eighteen": "18", "nineteen": "19",
}  # fmt: skip
_TENS = {
    "twenty": "2", "thirty": "3", "forty": "4", "fifty": "5", "sixty": "6", "seventy": "7", "eighty": "8",
    "ninety": "9",
}  # fmt: skip
_HANZI = {
    "零": "0", "〇": "0", "一": "1", "幺": "1", "二": "2", "两": "2", "三": "3", "四": "4", "五": "5", "六": "6",
    "七": "7", "八": "8", "九": "9",
}  # fmt: skip
_REPEATS = {"double": 2, "triple": 3, "treble": 3}
_FILLERS = {"um", "uh", "er", "erm", "hm", "and", "then", "dash", "space", "hyphen"}
# One token at a time: a word, a digit of any script, separators, or any other character (which breaks a run).
_SEPARATORS = " \t\r\n\u00a0,.;:/-\u2010\u2011\u2012\u2013\u2014\u2015·…"
_TOKEN = re.compile(rf"[^\W\d_]+(?:'\w+)?|\d|[{re.escape(_SEPARATORS)}]+|.", re.DOTALL)
_SPLIT_HANZI = re.compile("([" + "".join(_HANZI) + "])")


def passes_luhn(digits: str) -> bool:
    """ISO/IEC 7812-1 annex B: from the right, every second digit doubled, the sum a multiple of ten."""
    total = 0
    for index, character in enumerate(reversed(digits)):
        value = int(character) * (1 + index % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _tokens(text: str) -> list[tuple[str, int, int]]:
    found = []
    for match in _TOKEN.finditer(text):
        piece, start = match.group(), match.start()
        parts = _SPLIT_HANZI.split(piece) if any(c in _HANZI for c in piece) else [piece]
        for part in parts:
            if part:
                found.append((part.lower(), start, start + len(part)))
                start += len(part)
    return found


# A unit is (digits, start, end): the smallest piece of text that stands for whole digits.
_Unit = tuple[str, int, int]


def _digits_of(token: str) -> str | None:
    if len(token) == 1 and token.isdecimal():
        return str(int(token))  # int() folds full-width and Arabic-Indic digits
    return _UNITS.get(token) or _TEENS.get(token) or _HANZI.get(token)


def _runs(text: str) -> list[list[_Unit]]:
    """Maximal stretches of digits with only separators and fillers between them."""
    runs: list[list[_Unit]] = []
    run: list[_Unit] = []
    repeat, repeat_start = 1, -1
    tens: _Unit | None = None  # "forty" waiting for its unit

    def settle_tens() -> None:
        nonlocal tens
        if tens is not None:
            run.append((tens[0] + "0", tens[1], tens[2]))
            tens = None

    for token, start, end in _tokens(text):
        digits = _digits_of(token)
        if digits is not None:
            if tens is not None and len(digits) == 1 and digits != "0" and token.isalpha():
                run.append((tens[0] + digits, tens[1], end))
                tens = None
            else:
                settle_tens()
                run.append((digits * repeat, repeat_start if repeat > 1 else start, end))
            repeat = 1
        elif token in _TENS:
            settle_tens()
            tens, repeat = (_TENS[token], start, end), 1
        elif token in _REPEATS:
            settle_tens()
            repeat, repeat_start = _REPEATS[token], start
        elif token in _FILLERS or not token.strip(_SEPARATORS):
            continue
        else:
            settle_tens()
            if run:
                runs.append(run)
            run, repeat = [], 1
    settle_tens()
    if run:
        runs.append(run)
    return runs


def _card_spans(run: list[_Unit], needs_luhn: bool) -> list[tuple[int, int]]:
    """Spans of text inside one run that look like a card, overlapping ones joined: rather a digit too many than one
    left.

    A span begins and ends where the text has a gap: digits written in one piece are one number, not many.
    """
    spans: list[tuple[int, int]] = []
    is_gap = [index in (0, len(run)) or run[index - 1][2] < run[index][1] for index in range(len(run) + 1)]
    for first in range(len(run)):
        digits = ""
        for last in range(first, len(run) if is_gap[first] else first):
            digits += run[last][0]
            if len(digits) > MAX_DIGITS:
                break
            if not is_gap[last + 1] or len(digits) < MIN_DIGITS or (needs_luhn and not passes_luhn(digits)):
                continue
            start, end = run[first][1], run[last][2]
            if spans and start <= spans[-1][1]:
                start, end = spans[-1][0], max(end, spans.pop()[1])
            spans.append((start, end))
    return spans


def mask_card_numbers(text: str, *, is_heard: bool = False) -> str:
    """`text` without card-like runs.

    `is_heard`: the text comes from a recogniser or a keypad, so Luhn is not asked for.
    """
    if len(text) < MIN_DIGITS:
        return text
    masked, position = [], 0
    for run in _runs(text):
        if sum(len(unit[0]) for unit in run) < MIN_DIGITS:
            continue
        for start, end in _card_spans(run, needs_luhn=not is_heard):
            masked += [text[position:start], MASK]
            position = end
    return "".join(masked) + text[position:]


def mask_value(value: Any, *, is_heard: bool = False) -> Any:
    """The same for every string inside nested lists and dicts; numbers and None pass."""
    if isinstance(value, str):
        return mask_card_numbers(value, is_heard=is_heard)
    if isinstance(value, dict):
        return {mask_card_numbers(str(key)): mask_value(item, is_heard=is_heard) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask_value(item, is_heard=is_heard) for item in value]
    return value
