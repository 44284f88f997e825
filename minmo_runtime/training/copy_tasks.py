"""Copy tasks: short dialogues whose only point is to carry values over, every slot type, among words that mean nothing.

Beside the whole calls of `dialogues` in stage 0g: long copies teach copying far sooner than calls do. Knows nothing of
tokens or of training. Source of the recipe: design facts, recipes part 2 §A.
"""

from __future__ import annotations

import random

from minmo_runtime.text import digit_runs, normalise_spoken
from minmo_runtime.training import corpus, general
from minmo_runtime.training.dialogues import DialogueWriter, Turn


def copy_task(rng: random.Random, split: str) -> list[Turn]:
    """A short dialogue whose only point is to carry values over: every slot type, among words that mean nothing."""
    writer = DialogueWriter(rng, split, 0.0)
    number, day_name = corpus.order_number(rng, split), corpus.day(rng)
    before, after = general.random_words(rng, 0, 3), general.random_words(rng, 0, 2)
    spoken = corpus.restarted_number(number, rng) if rng.random() < 0.25 else corpus.spoken_number(number, rng)
    kind = rng.choice(("number", "number", "day", "both", "status", "hours", "words", "words", "name", "repeat"))
    if kind == "number":
        writer.turns.append(Turn("user", _written(before, "order", spoken, after)))
        writer._call("look_up_order", order_number=_number_in(writer, number))
    elif kind == "day":
        writer.turns.append(Turn("user", _written(before, "open", day_name, after)))
        writer._call("opening_hours", day=day_name)
    elif kind == "both":
        parts = ["order", spoken, day_name] if rng.random() < 0.6 else [day_name, "order", spoken]
        writer.turns.append(Turn("user", _written("deliver", before, *parts, after)))
        writer._call("change_delivery", order_number=_number_in(writer, number), day=day_name)
        writer._changed(number, day_name)
    elif kind == "status":
        writer._look_up(number)
        writer.turns[0] = Turn("assistant", writer.turns[0].text)
    elif kind == "hours":
        writer._hours(day_name)
        writer.turns[0] = Turn("assistant", writer.turns[0].text)
    elif kind == "words":
        for _ in range(rng.randint(1, 2)):
            items = _copied_items(rng)
            writer.turns += [Turn("user", f"say {items}"), Turn("assistant", items, True, "copy")]
    elif kind == "name":
        writer._open()
        writer.turns.append(Turn("user", corpus.phrase("who_are_you", split, rng)))
        writer._small("who_are_you")
    else:
        slots = corpus.random_slots(rng, split)
        family = rng.choice(("shipped", "changed", "open_hours", "delayed", "not_found", "closed", "delivered"))
        text = corpus.reply(family, **slots)
        writer.turns += [
            Turn("assistant", text),
            Turn("user", corpus.phrase("repeat", split, rng)),
            Turn("assistant", text, True, "repeat"),
        ]
    return writer.turns


def _copied_items(rng: random.Random) -> str:
    """3-16 digits (often repeated ones), words, or both: long copies teach copying far sooner than short ones."""
    count = rng.randint(3, 16)
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choice("0123456789") for _ in range(count))
    if kind == 1:
        return "".join(rng.choice("0123456789") * rng.choice((1, 1, 2, 2, 3)) for _ in range(count // 2 + 1))
    if kind == 2:
        return general.random_words(rng, 3, 16)
    pools = (general.ALL_WORDS, "0123456789", corpus.DAYS)
    return " ".join(rng.choice(rng.choice(pools)) for _ in range(count))


def _written(*parts: str) -> str:
    return normalise_spoken(" ".join(part for part in parts if part))


def _number_in(writer: DialogueWriter, number: str) -> str:
    """The number as it stands in the caller's turn (a neighbouring digit word may have joined it)."""
    runs = digit_runs(writer.turns[-1].text)
    return runs[-1] if runs else number
