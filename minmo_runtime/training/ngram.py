"""The n-gram of word pieces that captions are searched with, counted over callers' training sentences (stage 0a).

Held-out phrasings never enter it. Rare long n-grams are dropped; what they held goes to the shorter ones, so every
context still sums to one. Knows nothing of audio. Written as `ship/caption_ngram.safetensors`
(minmo_runtime/caption_search.py documents the file).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from minmo_runtime.caption_search import BITS, EDGE, pack
from minmo_runtime.training import sentences

NGRAM_FILE = "caption_ngram.safetensors"
NUM_LISTS = 40  # lists of 4,000 sentences
FIRST_SEED = 90_000


def count(sentences: Iterable[Sequence[int]], order: int) -> dict[tuple[int, ...], Counter[int]]:
    """Followers of every context of up to `order - 1` pieces; utterances begin and end with EDGE."""
    followers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for sentence in sentences:
        ids = (EDGE, *sentence, EDGE)
        for at in range(1, len(ids)):
            for length in range(min(order, at + 1)):
                followers[ids[at - length : at]][ids[at]] += 1
    return followers


def write(path: Path, sentences: Iterable[Sequence[int]], vocab_size: int, order: int = 4, min_count: int = 6) -> int:
    """Count and store; n-grams of more than two pieces need `min_count` sightings. Returns how many were kept."""
    if vocab_size + 1 >= 1 << BITS:
        raise ValueError(f"vocab_size {vocab_size}: must be below {(1 << BITS) - 1}")
    followers = count(sentences, order)
    probabilities: dict[tuple[int, ...], float] = {}
    backoffs: dict[tuple[int, ...], float] = {}
    for context in sorted(followers, key=len):
        found = followers[context]
        total = sum(found.values()) + len(found)  # Witten-Bell: as many escapes as different followers
        kept = {p: n for p, n in found.items() if n >= min_count or len(context) < 2}
        if not kept:
            continue
        left = (total - sum(kept.values())) / total
        backoffs[context] = math.log(left)
        for piece, number in kept.items():
            shorter = (
                _probability(probabilities, backoffs, context[1:], piece, vocab_size) if context else 1 / vocab_size
            )
            probabilities[(*context, piece)] = math.log(number / total + left * shorter)
    _save(path, probabilities, backoffs, order, vocab_size)
    return len(probabilities)


def _probability(
    probabilities: dict[tuple[int, ...], float],
    backoffs: dict[tuple[int, ...], float],
    context: tuple[int, ...],
    piece: int,
    vocab_size: int,
) -> float:
    penalty = 0.0
    while (*context, piece) not in probabilities:
        penalty += backoffs.get(context, 0.0)
        if not context:
            return math.exp(penalty) / vocab_size
        context = context[1:]
    return math.exp(penalty + probabilities[(*context, piece)])


def _save(
    path: Path,
    probabilities: dict[tuple[int, ...], float],
    backoffs: dict[tuple[int, ...], float],
    order: int,
    vocab_size: int,
) -> None:
    keys = sorted((pack(ngram), value) for ngram, value in probabilities.items())
    contexts = sorted((pack(context), value) for context, value in backoffs.items())
    table = {
        "keys": np.array([key for key, _ in keys], np.uint64),
        "log_probs": np.array([value for _, value in keys], np.float16),
        "contexts": np.array([key for key, _ in contexts], np.uint64),
        "log_backoffs": np.array([value for _, value in contexts], np.float16),
        "order": np.array([order], np.int64),
        "vocab_size": np.array([vocab_size], np.int64),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(table, path)


def write_for_callers(path: Path, tokenizer: Tokenizer, num_lists: int = NUM_LISTS) -> int:
    """From the corpus, training split only."""
    texts = [text for index in range(num_lists) for text in sentences.caller_utterances(FIRST_SEED + index, "train")]
    sentences = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return write(path, sentences, tokenizer.get_vocab_size())
