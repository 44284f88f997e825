"""Sentences that speech synthesis reads, from a seed: callers' for the encoder, the agent's for the voice.

Held phrasings and numbers never reach a training split; random words keep the sounds free of the phrases. Knows nothing
of audio or of tokens. Stage 0a. Pieces: `corpus`, `general`.
"""

from __future__ import annotations

import random

from minmo_runtime.text import speak_digits
from minmo_runtime.training import corpus
from minmo_runtime.training.general import general_sentence, random_words

SPLITS = ("train", "held")
RANDOM_SHARE = 0.28  # of caller sentences: words in no order, so that the encoder learns sounds, not phrases
GENERAL_SHARE = 0.25  # of agent sentences


def caller_utterance(rng: random.Random, split: str) -> str:
    """One sentence as a caller speaks it: letters, spaces and apostrophes only."""
    draw = rng.random()
    if draw < RANDOM_SHARE:
        if rng.random() < 0.35:
            return general_sentence(rng)
        words = random_words(rng).split()
        if rng.random() < 0.3:  # domain words out of their phrases
            words.insert(
                rng.randint(0, len(words)), rng.choice((*corpus.DAYS, "order", "delivery", "number", "open", "person"))
            )
        return " ".join(words)
    if draw < RANDOM_SHARE + 0.17:  # bare numbers: the words that matter most
        number = corpus.order_number(rng, split)
        if rng.random() < 0.25:
            number = "".join(rng.choice("0123456789") for _ in range(rng.choice((1, 2, 3, 4, 6, 7))))
        return corpus.spoken_number(number, rng)
    intent = rng.choice(_WEIGHTED_INTENTS)
    number = corpus.order_number(rng, split)
    spoken = corpus.restarted_number(number, rng) if rng.random() < 0.06 else corpus.spoken_number(number, rng)
    return corpus.fill_phrase(corpus.phrase(intent, split, rng), spoken, corpus.day(rng))


_WEIGHTED_INTENTS = (
    *corpus.INTENTS,
    *(
        "order_status",
        "order_status_number",
        "number_only",
        "hours_day",
        "change_day",
        "change_both",
        "day_only",
        "person",
    )
    * 2,
)


def caller_utterances(seed: int, split: str, count: int = 4000) -> list[str]:
    """`count` caller sentences in spoken form. The first pass of a training list covers every phrasing of the split."""
    _check_split(split)
    rng = random.Random(f"caller/{split}/{seed}")
    covering = [
        corpus.fill_phrase(template, corpus.spoken_number(corpus.order_number(rng, split), rng), corpus.day(rng))
        for intent in corpus.INTENTS
        for template in corpus.phrases()[intent][split]
    ]
    rng.shuffle(covering)
    # Covering phrasings are counted in, but never push the random words below their share.
    covering = covering[: int(count * (1 - RANDOM_SHARE) / 2)]
    out = covering + [_uncovered(rng, split, len(covering), count) for _ in range(count - len(covering))]
    rng.shuffle(out)
    return out


def _uncovered(rng: random.Random, split: str, num_covering: int, count: int) -> str:
    extra = RANDOM_SHARE * num_covering / max(1, count - num_covering)
    if rng.random() < extra:
        return general_sentence(rng) if rng.random() < 0.35 else random_words(rng)
    return caller_utterance(rng, split)


def agent_utterance(rng: random.Random, split: str) -> str:
    """One sentence (or answer of several) as the agent writes it: digits not yet spoken out."""
    if rng.random() < GENERAL_SHARE:
        text = general_sentence(rng) if rng.random() < 0.75 else random_words(rng, 3, 8)
        return text + ("?" if text.startswith(("why", "where", "do you", "what")) else ".")
    slots = corpus.random_slots(rng, split)
    draw = rng.random()
    if draw < 0.1 and corpus.agent_lines():
        return rng.choice(corpus.agent_lines()).format_map(_Keep(slots))
    if draw < 0.16:
        return corpus.greeting(rng, slots["name"], slots["shop"])
    family = rng.choice(_WEIGHTED_REPLIES)
    text = corpus.reply(family, **slots)
    if family in SPOKEN_WITH_MORE and rng.random() < 0.5:
        text = f"{text} {corpus.replies()['more']}"
    return text


SPOKEN_WITH_MORE = frozenset(
    "shipped delivered delayed preparing returned cancelled unpaid open_hours closed changed too_late".split()
)
_WEIGHTED_REPLIES = (
    *(name for name in corpus.replies() if name != "more"),
    *sorted(SPOKEN_WITH_MORE),
    "shipped",
    "open_hours",
    "changed",
)


class _Keep(dict[str, str]):
    """format_map that leaves unknown placeholders out."""

    def __missing__(self, key: str) -> str:
        return ""


def agent_utterances(seed: int, split: str, count: int = 4000) -> list[str]:
    """`count` agent sentences in spoken form with light punctuation; every reply family and every fixed line is among
    them.
    """
    _check_split(split)
    rng = random.Random(f"agent/{split}/{seed}")
    slots = corpus.random_slots(rng, split)
    covering = [corpus.reply(family, **slots) for family in corpus.replies()]
    covering += [line.format_map(_Keep(slots)) for line in corpus.agent_lines()]
    texts = covering[:count] + [agent_utterance(rng, split) for _ in range(count - len(covering))]
    rng.shuffle(texts)
    return [speak_digits(text) for text in texts]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
