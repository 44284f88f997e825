from __future__ import annotations

import random

import pytest

from storage.masking import MASK, mask_card_numbers, mask_value, passes_luhn

WORDS = "zero one two three four five six seven eight nine".split()


def card(rng: random.Random, length: int) -> str:
    body = "".join(rng.choice("0123456789") for _ in range(length - 1))
    return next(body + last for last in "0123456789" if passes_luhn(body + last))


@pytest.mark.parametrize("number", ["4111111111111111", "378282246310005", "6011111111111117", "30569309025904"])
def test_known_test_cards_pass_luhn_and_are_masked(number: str) -> None:
    assert passes_luhn(number)
    assert mask_card_numbers(f"it is {number}, thanks") == f"it is {MASK}, thanks"


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "4111.1111.1111.1111",
        "４１１１１１１１１１１１１１１１",
        "4111 uh 1111 um 1111 and then 1111",
        "four one one one, one one one one, one one one one, one one one one",
        "four triple one double one double one double one double one double one double one",
        "forty one eleven eleven eleven eleven eleven eleven eleven",
        "4 one 1 one 1 one 1 one 1 one 1 one 1 one 1 one",
        "四一一一一一一一一一一一一一一一",
    ],
)
def test_every_way_to_write_or_say_a_card_is_masked(text: str) -> None:
    masked = mask_card_numbers(f"my card: {text} ok?")
    assert masked == f"my card: {MASK} ok?"


@pytest.mark.parametrize(
    "text",
    [
        "order 45612 was shipped",
        "one two three four five",
        "call me on 030 1234567",
        "4111111111111112",  # Luhn fails
        "twenty five past ten",
        "",
    ],
)
def test_ordinary_numbers_stay(text: str) -> None:
    assert mask_card_numbers(text) == text


def test_heard_card_with_one_wrong_digit_is_masked() -> None:
    assert mask_card_numbers("4111 1111 1111 1112", is_heard=True) == MASK


def test_order_number_before_a_card_does_not_hide_it() -> None:
    masked = mask_card_numbers("45612 and 4111111111111111")
    assert "1111" not in masked


def test_of_500_spoken_or_written_cards_none_is_left() -> None:
    rng = random.Random(7)
    for _ in range(500):
        number = card(rng, rng.randint(13, 19))
        spoken = " ".join(WORDS[int(digit)] for digit in number)
        grouped = " ".join(number[at : at + 4] for at in range(0, len(number), 4))
        for text in (number, grouped, spoken):
            assert mask_card_numbers(f"the number is {text}.") == f"the number is {MASK}."


def test_nested_values_are_masked_and_numbers_pass() -> None:
    value = {"a": ["4111111111111111", 7], "b": {"c": "fine"}, "d": None}
    assert mask_value(value) == {"a": [MASK, 7], "b": {"c": "fine"}, "d": None}
