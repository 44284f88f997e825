"""CTC greedy captions and the alignment of what was heard, on made-up posteriors."""

from __future__ import annotations

import numpy as np

from minmo_runtime.ctc import GreedyCtc, align_prefix, heard_words


def frames(*labels: int, vocab: int = 6, sure: float = 0.9) -> np.ndarray:
    probs = np.full((len(labels), vocab), (1 - sure) / (vocab - 1))
    probs[np.arange(len(labels)), labels] = sure
    return np.log(probs)


def test_repeats_merge_blanks_drop_and_chunks_do_not_matter() -> None:
    scores = frames(0, 1, 1, 0, 1, 2, 2, 3, 0)
    whole, parts = GreedyCtc(), GreedyCtc()
    whole.push(scores)
    for cut in range(0, len(scores), 2):
        parts.push(scores[cut : cut + 2])
    assert whole.tokens == parts.tokens == [1, 1, 2, 3]
    assert parts.num_frames == len(scores)


def test_confidence_is_the_mean_of_the_tokens_peaks() -> None:
    greedy = GreedyCtc()
    assert greedy.confidence == 0.0
    greedy.push(np.concatenate([frames(1, sure=0.6), frames(1, sure=0.8), frames(0, 2, sure=0.5)]))
    assert abs(greedy.confidence - (0.8 + 0.5) / 2) < 1e-9


def test_alignment_finds_the_last_frame_of_each_token() -> None:
    assert align_prefix(frames(0, 1, 1, 0, 2, 0, 3, 3), [1, 2, 3]) == [2, 4, 7]


def test_alignment_stops_at_the_prefix_that_was_said() -> None:
    assert len(align_prefix(frames(0, 1, 1, 0, 2, 0, 0, 0), [1, 2, 3, 4])) == 2
    assert align_prefix(frames(0, 0, 0, 0), [1, 2]) == []


def test_alignment_keeps_a_blank_between_equal_tokens() -> None:
    assert align_prefix(frames(1, 0, 1), [1, 1]) == [0, 2]
    assert len(align_prefix(frames(1, 1, 1), [1, 1])) == 1


def test_only_whole_words_before_the_cut_count() -> None:
    words = [[1], [2, 3], [4]]
    ends = [2, 5, 8, 11]
    assert heard_words(words, ends, played_frames=6, num_frames=20) == 1
    assert heard_words(words, ends, played_frames=9, num_frames=20) == 2
    assert heard_words(words, ends, played_frames=20, num_frames=20) == 3


def test_a_word_that_fills_the_audio_to_its_cut_end_is_not_whole() -> None:
    assert heard_words([[1], [2]], [2, 9], played_frames=10, num_frames=10) == 1
