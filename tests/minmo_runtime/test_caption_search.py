"""The n-gram of pieces sums to one and backs off; the search prefers what callers say, and hears nothing in noise."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from minmo_runtime.caption_search import EDGE, CaptionReader, CaptionSearch, PieceNgram, SearchSettings
from minmo_runtime.ctc import GreedyCtc
from minmo_runtime.training import ngram

VOCAB = 6
SENTENCES = [[1, 2, 3]] * 6 + [[1, 2, 4]] * 2 + [[5]]


@pytest.fixture
def counted(tmp_path: Path) -> PieceNgram:
    ngram.write(tmp_path / "n.safetensors", SENTENCES, VOCAB, order=4, min_count=2)
    return PieceNgram.from_file(tmp_path / "n.safetensors")


def posteriors(rng: np.random.Generator, num_frames: int, sharpness: float = 2.0) -> np.ndarray:
    logits = rng.normal(size=(num_frames, VOCAB)) * sharpness
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("before", [(), (1,), (1, 2), (5, 5), (3, 1, 2), (4, 4, 4, 4)])
def test_every_context_sums_to_one_whether_it_was_seen_or_not(counted: PieceNgram, before: tuple[int, ...]) -> None:
    total = sum(math.exp(counted.log_prob(before, piece)) for piece in range(VOCAB))
    assert total == pytest.approx(1.0, abs=2e-3)  # float16 on disk


def test_what_was_said_often_is_likelier(counted: PieceNgram) -> None:
    assert counted.log_prob((1, 2), 3) > counted.log_prob((1, 2), 4) > counted.log_prob((1, 2), 5)
    assert counted.log_prob((1, 2, 3), EDGE) > math.log(0.5)


def test_without_an_ngram_weight_the_search_finds_the_likeliest_prefix_of_all(counted: PieceNgram) -> None:
    """Against brute force over every path of five frames."""
    rng = np.random.default_rng(3)
    for _ in range(5):
        scores = posteriors(rng, 5)
        sums: dict[tuple[int, ...], float] = {}
        for path in itertools.product(range(VOCAB), repeat=5):
            said = tuple(piece for piece, _ in itertools.groupby(path) if piece != EDGE)
            sums[said] = sums.get(said, 0.0) + math.exp(sum(scores[t, piece] for t, piece in enumerate(path)))
        search = CaptionSearch(counted, SearchSettings(0.0, 0.0, beam=2000, min_log_posterior=-50.0))
        search.push(scores)
        best = max(sums, key=lambda said: sums[said])
        assert tuple(search.tokens) == best or not search._greedy.tokens


def test_chunks_of_any_size_give_the_same_words(counted: PieceNgram) -> None:
    rng = np.random.default_rng(4)
    scores = posteriors(rng, 40)
    whole, parts = CaptionSearch(counted), CaptionSearch(counted)
    whole.push(scores)
    at = 0
    while at < len(scores):
        size = int(rng.integers(1, 6))
        parts.push(scores[at : at + size])
        at += size
    assert parts.tokens == whole.tokens and parts.confidence == pytest.approx(whole.confidence)


def test_a_doubtful_piece_is_heard_as_callers_say_it(counted: PieceNgram) -> None:
    scores = np.full((7, VOCAB), math.log(0.01))
    for frame, piece in ((0, 1), (2, 2), (4, 4)):
        scores[frame, piece] = math.log(0.9)
    scores[4, 4], scores[4, 3] = math.log(0.5), math.log(0.45)
    for frame in (1, 3, 5, 6):
        scores[frame, EDGE] = math.log(0.95)
    greedy, search = GreedyCtc(), CaptionSearch(counted, SearchSettings(weight=0.5, piece_bonus=0.5))
    greedy.push(scores)
    search.push(scores)
    assert greedy.tokens == [1, 2, 4] and search.tokens == [1, 2, 3]


def test_no_words_where_only_the_blank_was_heard(counted: PieceNgram) -> None:
    search = CaptionSearch(counted, SearchSettings(weight=0.1, piece_bonus=3.0))
    scores = np.full((30, VOCAB), math.log(0.02))
    scores[:, EDGE] = math.log(0.9)
    assert not search.push(scores) and search.tokens == [] and search.confidence == 0.0


def test_an_unknown_setting_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key weigth; allowed: ngram, beam"):
        CaptionReader.from_table({"weigth": 0.5}, tmp_path)
    assert isinstance(CaptionReader.from_table({}, tmp_path).new(), GreedyCtc)
