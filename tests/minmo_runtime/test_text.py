"""Spoken numbers, tool lines, display case and the tokenizer's promises."""

from __future__ import annotations

import random

import pytest

from minmo_runtime.text import (
    TextStream,
    TextTokenizer,
    chat_turn,
    digit_runs,
    display_case,
    format_tool_line,
    normalise_spoken,
    parse_tool_line,
    speak_digits,
    system_prompt,
    time_words,
)
from minmo_runtime.training import corpus, sentences
from minmo_runtime.training.text_tokenizer import build


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(build())


@pytest.mark.parametrize(
    ("spoken", "written"),
    [
        ("it is four five double six two please", "it is 45662 please"),
        ("oh four two seven three", "04273"),
        ("triple seven one nought", "77710"),
        ("four five six uh one two", "45612"),  # a hesitation inside a number
        ("four five for one two", "45412"),  # heard as a word, between digits
        ("three o five one two", "30512"),
        ("forty five six twelve", "45612"),
        ("four five no four five six one two", "45 no 45612"),  # a restart stays visible
        ("one moment please", "one moment please"),
        ("i have two dogs", "i have two dogs"),
        ("are you open from nine to five", "are you open from nine to five"),
        ("at nine thirty", "at nine thirty"),
        ("double trouble", "double trouble"),
        ("keypad 45612", "keypad 45612"),
        ("keypad 0", "keypad 0"),
        ("", ""),
    ],
)
def test_spoken_numbers_become_digits_only_in_runs(spoken: str, written: str) -> None:
    assert normalise_spoken(spoken) == written


def test_written_numbers_survive_being_spoken_and_heard_again() -> None:
    rng = random.Random(3)
    for _ in range(300):
        number = corpus.order_number(rng, "train")
        assert digit_runs(normalise_spoken(corpus.spoken_number(number, rng))) == [number]
        assert normalise_spoken(speak_digits(number)) == number


def test_digits_are_spoken_one_by_one() -> None:
    assert speak_digits("order 45612. it's 3?") == "order four five six one two. it's three?"


@pytest.mark.parametrize(
    ("hour", "minute", "said"),
    [
        (9, 30, "nine thirty"),
        (17, 0, "five"),
        (13, 5, "one oh five"),
        (0, 15, "twelve fifteen"),
        (12, 45, "twelve forty five"),
    ],
)
def test_times_are_said_on_the_twelve_hour_clock(hour: int, minute: int, said: str) -> None:
    assert time_words(hour, minute) == said


def test_tool_lines_are_read_as_they_are_written() -> None:
    arguments = {"order_number": "45612", "day": "friday"}
    line = format_tool_line("change_delivery", arguments)
    assert line == "change_delivery order_number 45612 day friday"
    assert parse_tool_line(line) == ("change_delivery", arguments)
    assert parse_tool_line("hang_up") == ("hang_up", {})


@pytest.mark.parametrize("line", ["", "look_up_order order_number", "opening_hours day monday and"])
def test_broken_tool_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="tool line"):
        parse_tool_line(line)


def test_display_case_changes_letters_not_words() -> None:
    text = "hello, this is mia. i'm open on monday. is that ok? yes"
    shown = display_case(text)
    assert shown == "Hello, this is Mia. I'm open on Monday. Is that ok? Yes"
    assert shown.lower() == text


def test_value_has_one_token_form_wherever_it_stands(tokenizer: TextTokenizer) -> None:
    said = tokenizer.encode("on wednesday 45612")
    called = tokenizer.encode("<tool_call>change_delivery order_number 45612 day wednesday</tool_call>")
    number, day = said[2:], said[1]
    assert called[3:8] == number
    assert called[9] == day


def test_digits_and_hanzi_are_single_tokens(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("90210")) == 5
    assert len(tokenizer.encode("你好世界")) == 4
    assert tokenizer.vocab_size <= 8192


@pytest.mark.parametrize(
    "text",
    [
        "where is my order 45612?",
        "i'd like to zxqvy on wednesday, please.",
        "你好世界 hello",
        "a café and ☃ for order 12.",
        "look_up_order order_number 45612",
    ],
)
def test_decoding_gives_the_text_back_also_piece_by_piece(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == text


def test_every_word_of_the_domain_is_one_token(tokenizer: TextTokenizer) -> None:
    words = {word for text in sentences.caller_utterances(5, "train", 1500) for word in text.split()}
    split = sorted(word for word in words if len(tokenizer.encode(word)) > 1)
    assert len(split) <= 0.01 * len(words), split


def test_chat_turns_open_and_close_by_special_tokens(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(chat_turn("user", "hello"))
    assert ids[0] == tokenizer.special("<|im_start|>")
    assert ids[-1] == tokenizer.special("<|im_end|>")
    assert tokenizer.special("<tool_response>") in tokenizer.encode(chat_turn("tool", "status shipped day monday"))
    with pytest.raises(KeyError):
        tokenizer.special("<|nothing|>")


def test_system_prompt_is_the_policies_form() -> None:
    style = "speak in a calm voice at a normal pace."
    assert system_prompt("Anna", "Acme Orders", style) == (
        "you are anna at acme orders. speak in a calm voice at a normal pace. order numbers have 5 digits."
    )
