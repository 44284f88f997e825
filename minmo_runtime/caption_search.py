"""The caller's words from CTC posteriors: prefix beam search with an n-gram of word pieces beside it.

The encoder hears sounds in 160 ms chunks and knows little of sentences; the n-gram knows what callers of this
checkpoint's domain say. Both grow chunk by chunk, so captions stay live. Plain Python and numpy over
log-posteriors [T, V]; blank is id 0 and, in the n-gram, stands for the edge of an utterance. Walk: step 8.
Sources: prefix search Hannun et al. arXiv 1408.2873; smoothing Witten and Bell 1991 (interpolated).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from minmo_runtime.ctc import BLANK, GreedyCtc

EDGE = BLANK
BITS = 12  # a piece id + 1 in a packed n-gram: vocabularies up to 4,094 pieces, five of them in 60 bits
MAX_ORDER = 5
_NEVER = -1e30


def pack(pieces: Sequence[int]) -> int:
    """An n-gram as one number; the empty one is 0."""
    key = 0
    for piece in pieces:
        key = (key << BITS) | (piece + 1)
    return key


class PieceNgram:
    """log P(piece | those before it). Immutable and shared by all calls; ~1 MB on disk.

    File (safetensors): `keys` uint64 [N] packed n-grams with `log_probs` float16 [N]; `contexts` uint64 [M] with
    `log_backoffs` float16 [M]; `order` int64 [1], `vocab_size` int64 [1].
    """

    def __init__(
        self, log_probs: dict[int, float], log_backoffs: dict[int, float], order: int, vocab_size: int
    ) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"order {order}: must be 1 to {MAX_ORDER}")
        self._log_probs, self._log_backoffs = log_probs, log_backoffs
        self.order, self.vocab_size = order, vocab_size
        self._floor = -math.log(vocab_size)

    @classmethod
    def from_file(cls, path: Path) -> PieceNgram:
        table = load_file(path)
        return cls(
            dict(zip(table["keys"].tolist(), table["log_probs"].astype(np.float32).tolist(), strict=True)),
            dict(zip(table["contexts"].tolist(), table["log_backoffs"].astype(np.float32).tolist(), strict=True)),
            int(table["order"][0]),
            int(table["vocab_size"][0]),
        )

    def log_prob(self, before: Sequence[int], piece: int) -> float:
        """`before`: the pieces of the utterance so far; its beginning counts as EDGE. `piece` EDGE = the end."""
        context = (EDGE, *before)[-(self.order - 1) :] if self.order > 1 else ()
        penalty = 0.0
        while True:
            found = self._log_probs.get((pack(context) << BITS) | (piece + 1))
            if found is not None:
                return penalty + found
            if not context:
                return penalty + self._log_backoffs.get(0, 0.0) + self._floor
            penalty += self._log_backoffs.get(pack(context), 0.0)
            context = context[1:]


@dataclass(frozen=True)
class SearchSettings:
    """Data of the checkpoint (`[captions]`)."""

    weight: float = 0.4  # of the n-gram against the sound, 0-2
    piece_bonus: float = 1.6  # per piece, against a search that prefers to say little, 0-3
    beam: int = 12  # prefixes kept, 1-64
    min_log_posterior: float = -6.0  # pieces below it are not tried in a frame, -20 to 0


@dataclass(slots=True)
class _Prefix:
    """log P of the sound with this prefix, ending in blank or in its last piece, and what the n-gram adds."""

    blank: float
    piece: float
    language: float

    @property
    def sound(self) -> float:
        return _add(self.blank, self.piece)


def _add(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    if a < b:
        a, b = b, a
    return a if b <= _NEVER / 2 else a + math.log1p(math.exp(b - a))


@dataclass
class CaptionSearch:
    """The words of one segment so far. Owned by the segment's ear; same interface as GreedyCtc.

    Confidence is that of the best path without the n-gram: what was heard, not what is likely to be said.
    """

    ngram: PieceNgram
    settings: SearchSettings = SearchSettings()
    _prefixes: dict[tuple[int, ...], _Prefix] = field(default_factory=lambda: {(): _Prefix(0.0, _NEVER, 0.0)})
    _greedy: GreedyCtc = field(default_factory=GreedyCtc)

    @property
    def tokens(self) -> list[int]:
        """The best prefix, judged as if the utterance ended here."""
        if not self._greedy.tokens:
            return []  # nothing rose above the blank in any frame: noise, and no n-gram may speak for it
        best: tuple[int, ...] = max(self._prefixes, key=self._final_score)
        return list(best)

    @property
    def confidence(self) -> float:
        return self._greedy.confidence

    @property
    def num_frames(self) -> int:
        return self._greedy.num_frames

    def push(self, log_probs: NDArray[np.floating]) -> bool:
        """Take [T, V] more frames; True if the best prefix changed."""
        before = self.tokens
        self._greedy.push(log_probs)
        for frame in log_probs:
            self._step(frame)
        return self.tokens != before

    def _step(self, frame: NDArray[np.floating]) -> None:
        candidates = np.flatnonzero(frame > self.settings.min_log_posterior)
        pieces = [(int(piece), float(frame[piece])) for piece in candidates if piece != BLANK]
        blank = float(frame[BLANK])
        grown: dict[tuple[int, ...], _Prefix] = {}
        for prefix, state in self._prefixes.items():
            sound = state.sound
            stays = state.piece + float(frame[prefix[-1]]) if prefix else _NEVER
            self._merge(grown, prefix, sound + blank, stays, state.language)
            for piece, heard in pieces:
                # The same piece twice needs a blank between.
                base = state.blank if prefix and prefix[-1] == piece else sound
                if base > _NEVER / 2:
                    self._extend(grown, prefix, state, piece, base + heard)
        kept = sorted(grown.items(), key=lambda item: -(item[1].sound + item[1].language))[: self.settings.beam]
        self._prefixes = dict(kept)

    def _extend(
        self, grown: dict[tuple[int, ...], _Prefix], prefix: tuple[int, ...], state: _Prefix, piece: int, heard: float
    ) -> None:
        longer = (*prefix, piece)
        known = grown.get(longer) or self._prefixes.get(longer)
        if known is not None:
            language = known.language
        else:
            settings = self.settings
            language = state.language + settings.weight * self.ngram.log_prob(prefix, piece) + settings.piece_bonus
        self._merge(grown, longer, _NEVER, heard, language)

    @staticmethod
    def _merge(
        grown: dict[tuple[int, ...], _Prefix], prefix: tuple[int, ...], blank: float, piece: float, language: float
    ) -> None:
        known = grown.get(prefix)
        if known is None:
            grown[prefix] = _Prefix(blank, piece, language)
        else:
            known.blank, known.piece = _add(known.blank, blank), _add(known.piece, piece)

    def _final_score(self, prefix: tuple[int, ...]) -> float:
        state = self._prefixes[prefix]
        return state.sound + state.language + self.settings.weight * self.ngram.log_prob(prefix, EDGE)


@dataclass(frozen=True)
class CaptionReader:
    """How a checkpoint turns posteriors into words; without an n-gram it is the best path. Shared by all calls."""

    ngram: PieceNgram | None = None
    settings: SearchSettings = SearchSettings()

    @classmethod
    def from_table(cls, table: Mapping[str, Any], folder: Path) -> CaptionReader:
        """`[captions]` of checkpoint.toml: `ngram` names a file, the rest is SearchSettings; ValueError if wrong."""
        values = dict(table)
        path = folder / str(values.pop("ngram", ""))
        allowed = sorted(SearchSettings.__dataclass_fields__)
        if unknown := sorted(set(values) - set(allowed)):
            raise ValueError(f"unknown key {', '.join(unknown)}; allowed: ngram, {', '.join(allowed)}")
        return cls(PieceNgram.from_file(path) if path.is_file() else None, SearchSettings(**values))

    def new(self) -> CaptionSearch | GreedyCtc:
        """For one segment."""
        return CaptionSearch(self.ngram, self.settings) if self.ngram else GreedyCtc()
