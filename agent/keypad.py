"""The keypad as a second way to say things: an order number, or 0 for a person.

Pure: digits and times in, an outcome out. A number is complete at its known length or at '#'; '*' starts anew; a
pause of `digit_timeout_s` closes it. A 0 that nothing follows asks for a person; order numbers may begin with 0. A row
of keys that goes on behind a whole number is none (a card, say): the rest of it is thrown away.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

LONE_ZERO_S = 1.2  # people type digits of a number two to four a second
ROW_PAUSE_S = 2.0  # cards are typed in groups; keys farther apart belong to different numbers
DIGIT_TIMEOUT_S = 4.0  # ITU-T E.161 gives no figure; IVR practice is 3-5 s between digits


class Outcome(StrEnum):
    NOTHING = "nothing"
    NUMBER = "number"
    INCOMPLETE = "incomplete"
    PERSON = "person"


@dataclass
class Keypad:
    """Collects one number at a time; `digits` holds the last complete one after NUMBER."""

    num_digits: int  # length of an order number; 0 = the line has none
    digit_timeout_s: float = DIGIT_TIMEOUT_S
    digits: str = ""
    _typed: str = ""
    _last_at: float = 0.0
    _is_whole: bool = False  # the last key made a number whole
    _is_too_long: bool = False

    def press(self, digit: str, now: float) -> Outcome:
        is_same_row = now - self._last_at < ROW_PAUSE_S
        self._last_at = now
        if digit.isdigit() and is_same_row and (self._is_whole or self._is_too_long):
            self._is_whole, self._is_too_long = False, True
            return Outcome.NOTHING
        self._is_whole = self._is_too_long = False
        if digit == "0" and not self.num_digits:
            return Outcome.PERSON
        if digit == "*":
            self._typed = ""
            return Outcome.NOTHING
        if digit == "#":
            return self._close() if self._typed else Outcome.NOTHING
        if not digit.isdigit() or not self.num_digits:  # A-D, or a line without numbers
            return Outcome.NOTHING
        self._typed += digit
        return self._close() if len(self._typed) == self.num_digits else Outcome.NOTHING

    def tick(self, now: float) -> Outcome:
        if self._is_too_long and now - self._last_at >= ROW_PAUSE_S:
            self._is_too_long = False
            return Outcome.INCOMPLETE
        if self._typed == "0" and now - self._last_at >= LONE_ZERO_S:
            return self._close()
        if self._typed and now - self._last_at >= self.digit_timeout_s:
            return self._close()
        return Outcome.NOTHING

    def _close(self) -> Outcome:
        typed, self._typed = self._typed, ""
        if typed == "0":
            return Outcome.PERSON
        if len(typed) != self.num_digits:
            return Outcome.INCOMPLETE
        self.digits, self._is_whole = typed, True
        return Outcome.NUMBER
