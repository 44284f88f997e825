"""Numbers in tool lines: only those of the conversation, whichever the model chooses."""

from __future__ import annotations

import pytest

from minmo_runtime.number_guide import NumberGuide
from minmo_runtime.text import TextTokenizer
from minmo_runtime.training.text_tokenizer import build


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(build())


def open_digits(tokenizer: TextTokenizer, context: str, body: str) -> tuple[str, bool] | None:
    guide = NumberGuide(tokenizer)
    choice = guide.choice(tokenizer.encode(body), guide.numbers(tokenizer.encode(context)))
    return None if choice is None else ("".join(sorted(tokenizer.token(t) for t in choice.digits)), choice.may_leave)


@pytest.mark.parametrize(
    ("context", "body", "expected"),
    [
        ("my order is 45612", "look_up_order order_number", ("4", True)),
        ("my order is 45612", "look_up_order order_number 45", ("6", False)),
        ("my order is 45612", "look_up_order order_number 45612", ("", True)),
        ("55 no 55515 please", "look_up_order order_number 55", ("5", True)),  # either is the model's choice
        ("22788 sorry 26149", "look_up_order order_number 2", ("26", False)),
        ("22788 sorry 26149", "change_delivery order_number 26149 day", ("2", True)),
        ("are you open on monday", "opening_hours day", None),  # no number anywhere: nothing to guide
    ],
)
def test_only_numbers_of_the_context_can_be_written(
    tokenizer: TextTokenizer, context: str, body: str, expected: tuple[str, bool] | None
) -> None:
    assert open_digits(tokenizer, context, body) == expected


def test_a_single_digit_is_no_number(tokenizer: TextTokenizer) -> None:
    guide = NumberGuide(tokenizer)
    assert guide.numbers(tokenizer.encode("order numbers have 5 digits. keypad 45612")) == [
        tuple(tokenizer.encode("45612"))
    ]
