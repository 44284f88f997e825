"""What callers and agents say, as text: phrasings, numbers, days and replies, the pieces of which `dialogues` builds
whole calls and `sentences` what speech synthesis reads.

Phrasings marked "held" and a reserved fifth of all order numbers never reach a training split. Knows nothing of audio
or of tokens. Stage 0a. Data: phrases.toml (callers), replies.toml (model), the agent's own fixed lines (lines.toml of
the agent).
"""

from __future__ import annotations

import random
import tomllib
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from minmo_runtime.text import DIGIT_WORDS, time_words
from minmo_runtime.training.general import ADJECTIVES, ALL_WORDS, NOUNS, NUMBERS

HERE = Path(__file__).parent
# Training reads the sentences that the agent says by itself, so that the voice knows them. A data file, not an import.
AGENT_LINES = HERE.parents[1] / "agent" / "prompts" / "lines.toml"
NUM_DIGITS = 5
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DAYS = (*WEEKDAYS, "today", "tomorrow")
NAMES = "mia emma anna leo max nora sam lucy alex eva tom julia ben clara david sarah paul lena mark nina".split()
SHOPS = (
    "the garden shop",
    "the book store",
    "north star",
    "blue river",
    "the shoe market",
    "green hill",
    "city electronics",
    "sunny home",
    "red bird",
    "the coffee house",
    "the toy corner",
    "silver lake",
    "acme orders",
    "harbor books",
)
SHAPE_SHARE = 0.6  # of training phrasings: the more ways to say it, the better unseen ones are understood


@cache
def phrases() -> dict[str, Any]:
    return tomllib.loads((HERE / "phrases.toml").read_text(encoding="utf-8"))


@cache
def replies() -> dict[str, str]:
    table = tomllib.loads((HERE / "replies.toml").read_text(encoding="utf-8"))
    return {"more": table["more"], **table["replies"]}


@cache
def agent_lines() -> tuple[str, ...]:
    """The agent's fixed sentences; empty where only the runtime is installed."""
    if not AGENT_LINES.exists():
        return ()
    found: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)

    collect(tomllib.loads(AGENT_LINES.read_text(encoding="utf-8")))
    return tuple(line for line in found if " " in line)


# ---------------------------------------------------------------- slots


def is_reserved_number(digits: str) -> bool:
    """A fifth of all numbers, drawn by a hash that does not change between runs, is kept for tests."""
    return zlib.crc32(digits.encode()) % 5 == 0


def order_number(rng: random.Random, split: str) -> str:
    """Five digits of this split; half of them with a repeated neighbour, where small models lose their place."""
    while True:
        digits = [rng.choice("0123456789") for _ in range(NUM_DIGITS)]
        if rng.random() < 0.4:
            at = rng.randrange(NUM_DIGITS - 1)
            digits[at + 1] = digits[at]
            if rng.random() < 0.25 and at + 2 < NUM_DIGITS:
                digits[at + 2] = digits[at]
        number = "".join(digits)
        if is_reserved_number(number) == (split == "held"):
            return number


def spoken_number(number: str, rng: random.Random) -> str:
    """Digit words; sometimes "oh", "double six", a hesitation."""
    zero = "oh" if rng.random() < 0.4 else "zero"
    uses_double = rng.random() < 0.35
    hesitates = rng.random() < 0.06
    words: list[str] = []
    at = 0
    while at < len(number):
        digit = zero if number[at] == "0" else DIGIT_WORDS[int(number[at])]
        if uses_double and number[at : at + 3] == number[at] * 3 and rng.random() < 0.5:
            words += ["triple", digit]
            at += 3
        elif uses_double and number[at : at + 2] == number[at] * 2:
            words += ["double", digit]
            at += 2
        else:
            words.append(digit)
            at += 1
        if hesitates and at < len(number) and rng.random() < 0.3:
            words.append(rng.choice(("uh", "um")))
    return " ".join(words)


def restarted_number(number: str, rng: random.Random) -> str:
    """A false start and a correction; often one that nearly equals the number itself."""
    wrong = list(number)
    if rng.random() < 0.6:
        at = rng.randrange(len(wrong))
        wrong[at] = rng.choice([digit for digit in "0123456789" if digit != number[at]])
    else:
        wrong = [rng.choice("0123456789") for _ in number]
    if rng.random() < 0.6:
        wrong = wrong[: rng.randint(2, len(wrong))]
    turn = rng.choice(("no", "sorry", "no sorry", "no wait", "wait", "i mean", "no i mean", "sorry i mean", "no it is"))
    return f"{spoken_number(''.join(wrong), rng)} {turn} {spoken_number(number, rng)}"


def day(rng: random.Random) -> str:
    return rng.choice(DAYS) if rng.random() < 0.4 else rng.choice(WEEKDAYS)


def on_day(name: str) -> str:
    """ "on monday", but "today"."""
    return f"on {name}" if name in WEEKDAYS else name


def with_strange_words(template: str, intent: str, rng: random.Random) -> str:
    """Some words that carry neither slot nor intent replaced or lost: callers word things as nobody foresaw."""
    words = []
    for word in template.split():
        if "{" in word or word.startswith(KEPT_STEMS) or (word in KEPT_WORDS and intent in CHANGE_INTENTS):
            words.append(word)
        elif rng.random() > STRANGE_WORD_SHARE:
            words.append(word)
        elif rng.random() < 0.75:
            words.append(rng.choice(_carrier_words()))
    return " ".join(words)


@cache
def _carrier_words() -> tuple[str, ...]:
    """Words that may stand anywhere without changing what is asked for."""
    barred = set(NUMBERS) | set(DAYS) | KEPT_WORDS | {"no", "wait", "mean", "sorry", "open", "shut", "for", "to"}
    return tuple(word for word in ALL_WORDS if word not in barred and not word.startswith(KEPT_STEMS))


def fill_phrase(template: str, spoken: str, day_name: str) -> str:
    """Put a spoken number and a day into a caller's phrasing; "on today" becomes "today"."""
    if day_name not in WEEKDAYS:
        for preposition in ("on ", "this ", "next "):
            template = template.replace(preposition + "{d}", "{d}")
    return template.replace("{n}", spoken).replace("{d}", day_name)


def template(intent: str, split: str, rng: random.Random) -> str:
    """A phrasing of the intent; in training mostly put together from shapes, but never one that is held out."""
    table = phrases()
    shapes = table["shapes"].get(intent)
    if split == "train" and shapes and rng.random() < SHAPE_SHARE:
        words = " ".join(part for part in (rng.choice(choices) for choices in rng.choice(shapes)) if part)
        if words not in held_phrases():
            return words
    text: str = rng.choice(table[intent][split])
    return text


def phrase(intent: str, split: str, rng: random.Random) -> str:
    """A phrasing, wrapped by openers, polite requests and closers where they fit."""
    table = phrases()
    text = template(intent, split, rng)
    if intent.startswith(("order_status", "hours")) and text.startswith(("when ", "where ", "what ", "how ", "which ")):
        if rng.random() < 0.15:
            text = f"{rng.choice(table['requests'])} {text}"
    if intent in WRAPPED_INTENTS:
        if rng.random() < 0.3:
            text = f"{rng.choice(table['openers'])} {text}"
        if rng.random() < 0.12:
            text = f"{text} {rng.choice(table['closers'])}"
    elif intent in ("number_only", "day_only") and rng.random() < 0.12:
        text = f"{rng.choice(('uh', 'um', 'yes', 'okay', 'sure', 'so', 'well', 'yes sure', 'of course'))} {text}"
    if rng.random() < 0.05:
        words = text.split()
        words.insert(rng.randint(0, len(words)), rng.choice(table["fillers"]))
        text = " ".join(words)
    return text


WRAPPED_INTENTS = frozenset(
    "order_status order_status_number hours_day hours change change_day change_number change_both person trouble "
    "who_are_you are_you_robot what_can_you_do off_topic how_are_you slower".split()
)
# What makes a change of delivery one, and not a question about an order: never replaced, never put in.
CHANGE_INTENTS = frozenset("change_day change_number change_both".split())
KEPT_STEMS = ("chang", "mov", "resched", "postpon", "deliver", "bring")
KEPT_WORDS = frozenset(
    """day date another different later new better have get send want need like prefer give make arrive
    it it's my order number instead""".split()
)
STRANGE_WORD_SHARE = 0.25
INTENTS = tuple(name for name, value in phrases().items() if isinstance(value, dict) and name != "shapes")


@cache
def held_phrases() -> frozenset[str]:
    return frozenset(text for intent in INTENTS for text in phrases()[intent]["held"])


def persona_name(rng: random.Random) -> str:
    """Mostly one of the list; sometimes made of syllables, so that any name of a campaign can be copied."""
    if rng.random() < 0.75:
        return rng.choice(NAMES)
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))


def shop_name(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(SHOPS)
    return f"{rng.choice(('the', rng.choice(NOUNS)))} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


# ---------------------------------------------------------------- the agent's words


def reply(family: str, **slots: str) -> str:
    """The agent's sentence of a family, slots filled in written form (digits)."""
    text = replies()[family]
    if "on_d" in slots:
        text = text.replace("{on_d}", slots["on_d"])
    return text.format(**{key: value for key, value in slots.items() if key != "on_d"})


def random_slots(rng: random.Random, split: str) -> dict[str, str]:
    day_name = day(rng)
    return {
        "n": order_number(rng, split),
        "on_d": on_day(day_name),
        "open": time_words(rng.randint(6, 11), rng.choice((0, 0, 0, 30, 15, 45))),
        "close": time_words(rng.randint(12, 22), rng.choice((0, 0, 0, 30, 15, 45))),
        "name": persona_name(rng),
        "shop": shop_name(rng),
    }


def greeting(rng: random.Random, name: str, shop: str) -> str:
    return rng.choice(
        (
            f"hello, this is {name}. how can i help you?",
            f"hello, this is {name} from {shop}. how can i help you?",
            f"welcome to {shop}. my name is {name}. how can i help you?",
            f"good morning, this is {shop}. how can i help you?",
            f"hi, {name} here. what can i do for you?",
        )
    )
