"""Recognition errors on text, as a CTC encoder makes them: words heard as others, letters lost, words dropped or added.

Used on callers' words before number normalisation. Knows nothing of dialogues. The rates are measured as word error
rate.
"""

from __future__ import annotations

import random

HOMOPHONES = {
    "to": ("two", "too"),
    "for": ("four", "fore"),
    "four": ("for",),
    "two": ("to", "too"),
    "eight": ("ate",),
    "one": ("won",),
    "six": ("sicks",),
    "nine": ("line", "nigh"),
    "oh": ("o",),
    "three": ("tree",),
    "where": ("were", "wear"),
    "where's": ("wears", "where is"),
    "my": ("me", "mine"),
    "is": ("his", "it's"),
    "it's": ("its", "is"),
    "order": ("older", "orders", "ordered"),
    "parcel": ("parcels", "partial"),
    "your": ("you're", "you"),
    "you": ("your", "u"),
    "are": ("our", "r"),
    "open": ("opened", "opens"),
    "hours": ("ours", "our"),
    "want": ("won't", "wont"),
    "know": ("no", "now"),
    "what": ("was", "that"),
    "when": ("then", "win"),
    "the": ("a", "da", "de"),
    "a": ("the", "uh"),
    "person": ("purse on", "persons"),
    "speak": ("speech", "speaks"),
    "talk": ("talks", "took"),
    "delivery": ("deliver", "delivers"),
    "change": ("chain", "changed"),
    "can": ("could", "can't", "ken"),
    "could": ("can", "good"),
    "i'd": ("i", "i'll"),
    "i'm": ("i", "im", "am"),
    "would": ("wood", "will"),
    "like": ("light", "liked"),
    "number": ("numbers", "numb"),
    "please": ("police", "pleas"),
    "bye": ("by", "buy"),
    "hello": ("hallow", "yellow"),
    "yes": ("yet", "yeah"),
    "no": ("know", "now"),
    "on": ("in", "an"),
    "check": ("checked", "shake"),
    "shipped": ("ship", "chipped"),
    "human": ("humans", "you man"),
    "status": ("state us", "statues"),
}
# Words that carry a slot keep their letters more often: an error there is a different value, not a noisy one.
SLOT_WORDS = frozenset(
    """zero oh one two three four five six seven eight nine double triple
    monday tuesday wednesday thursday friday saturday sunday today tomorrow""".split()
)
INSERTED = "uh um the a i and so it is that er".split()


def garble(text: str, rng: random.Random, rate: float) -> str:
    """`rate` is the chance that a word goes wrong (slot words: a third of it)."""
    out: list[str] = []
    for word in text.split():
        if rng.random() >= (rate / 3 if word in SLOT_WORDS else rate):
            out.append(word)
            continue
        draw = rng.random()
        if word in HOMOPHONES and draw < 0.55:
            out.append(rng.choice(HOMOPHONES[word]))
        elif draw < 0.75 or (word in SLOT_WORDS and draw < 0.5):
            out.append(misspelt(word, rng))
        elif draw < 0.88:
            continue
        else:
            out += [word, rng.choice(INSERTED)]
    return " ".join(out) or text


def misspelt(word: str, rng: random.Random) -> str:
    """One letter lost, doubled or replaced: "parcel" -> "pacel"."""
    if len(word) < 3:
        return word
    at = rng.randrange(len(word))
    kind = rng.randrange(3)
    if kind == 0:
        return word[:at] + word[at + 1 :]
    if kind == 1:
        return word[:at] + rng.choice("aeiourstnl") + word[at + 1 :]
    return word[:at] + word[at] + word[at:]
