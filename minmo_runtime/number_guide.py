"""Inside a tool call, a number can only be one that stands in the conversation.

A small LLM sometimes loses its place in a number with repeated digits (22788 -> 2788). What it may not do is make a
number up: while it writes digits into a tool line, only digits that continue a number of the context are open to it,
and it may leave the number only where one ends. Which number, and whether one at all, stays its choice. Knows
nothing of tools or of calls. Walk: step 9, beside the choice of the next token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minmo_runtime.text import TextTokenizer


@dataclass(frozen=True)
class Choice:
    """What may come next: which of the digit tokens, and whether anything else may."""

    digits: frozenset[int]
    may_leave: bool


class NumberGuide:
    """One per checkpoint; holds no state of a call."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Digits are single tokens of the text tokenizer; a checkpoint without them is not guided."""
        ids = [tokenizer.encode(digit) for digit in "0123456789"]
        self.digit_ids = frozenset(token[0] for token in ids) if all(len(token) == 1 for token in ids) else frozenset()

    def numbers(self, context_ids: Iterable[int]) -> list[tuple[int, ...]]:
        """Runs of two and more digits in the context, each once, in order."""
        found: dict[tuple[int, ...], None] = {}
        run: list[int] = []
        for token in (*context_ids, -1):
            if token in self.digit_ids:
                run.append(token)
                continue
            if len(run) > 1:
                found[tuple(run)] = None
            run = []
        return list(found)

    def choice(self, body_ids: Sequence[int], numbers: Sequence[tuple[int, ...]]) -> Choice | None:
        """For the next token behind `body_ids` (the tool line so far); None: anything may come.

        Context 45612, line "look_up_order order_number 4 5": only 6 may come. Behind "... 4 5 6 1 2": anything but a
        digit.
        """
        if not numbers or not self.digit_ids:
            return None
        start = len(body_ids)
        while start > 0 and body_ids[start - 1] in self.digit_ids:
            start -= 1
        written = tuple(body_ids[start:])
        digits = frozenset(
            number[len(written)]
            for number in numbers
            if len(number) > len(written) and number[: len(written)] == written
        )
        return Choice(digits, may_leave=not written or written in numbers)

    def close(self, scores: Tensor, body_ids: Sequence[int], numbers: Sequence[tuple[int, ...]]) -> Tensor:
        """scores [V] of the next token behind `body_ids`, with everything that may not come at minus infinity."""
        choice = self.choice(body_ids, numbers)
        if choice is None:
            return scores
        closed = scores.clone() if choice.may_leave else torch.full_like(scores, -torch.inf)
        closed[list(self.digit_ids)] = -torch.inf
        if choice.digits:
            kept = list(choice.digits)
            closed[kept] = scores[kept]
        return closed
