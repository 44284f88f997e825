"""Which samples of which agent turn were really heard: the call's account of everything it gave to the leg.

The leg counts in items and in samples of its own rate, the runtime in turns and in samples of its output rate. One
turn may need several items (a filler that is heard in the middle closes the first one). Pure; the leg's reports are
the only truth, `estimate` only bridges the 100 ms between two of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

VOICED_DBOV = -50.0  # quieter audio at the start of a reply is its silence, not its first sound
_BLOCK_MS = 10
MAX_AHEAD_S = 20.0  # given to the leg beyond what was heard; the leg itself refuses more than 30 s
_DRY_MARGIN_S = 0.12  # longer than the leg's longest pause between two reports


@dataclass
class Item:
    item_id: str
    turn_id: str
    given_samples: float = 0.0  # leg rate
    played_samples: int = 0
    is_final_given: bool = False
    is_over: bool = False  # finished or flushed
    reported_at: float = 0.0


@dataclass
class Speech:
    """The audio of one agent turn."""

    turn_id: str
    rate_hz: int  # of its own audio
    items: list[Item] = field(default_factory=list)
    waiting: deque[bytes] = field(default_factory=deque)  # beyond MAX_AHEAD_S
    made_samples: int = 0  # own rate
    first_voiced: int | None = None  # own rate
    is_complete: bool = False  # all of it was made
    is_cut: bool = False

    @property
    def played_samples_of_leg(self) -> int:
        return sum(item.played_samples for item in self.items)


@dataclass(frozen=True)
class Piece:
    """What to give to the leg next."""

    item_id: str
    turn_id: str
    pcm: bytes
    rate_hz: int
    is_final: bool


@dataclass
class PlayoutBook:
    leg_rate_hz: int
    speeches: dict[str, Speech] = field(default_factory=dict)
    _items: dict[str, Item] = field(default_factory=dict)

    # ------------------------------------------------------------- what is made

    def add(self, turn_id: str, pcm: bytes, rate_hz: int, *, is_final: bool, now: float) -> list[Piece]:
        """New audio of a turn; returns what may go to the leg now."""
        speech = self.speeches.setdefault(turn_id, Speech(turn_id, rate_hz))
        if speech.is_cut:
            return []
        if speech.first_voiced is None and (offset := _first_voiced(pcm, rate_hz)) is not None:
            speech.first_voiced = speech.made_samples + offset
        speech.made_samples += len(pcm) // 2
        speech.is_complete = speech.is_complete or is_final
        if pcm:
            speech.waiting.append(pcm)
        return self._release(speech, now)

    def _release(self, speech: Speech, now: float) -> list[Piece]:
        pieces = []
        item = self._open_item(speech, now)
        while speech.waiting and item.given_samples - item.played_samples < MAX_AHEAD_S * self.leg_rate_hz:
            pcm = speech.waiting.popleft()
            item.given_samples += len(pcm) // 2 * self.leg_rate_hz / speech.rate_hz
            pieces.append(Piece(item.item_id, speech.turn_id, pcm, speech.rate_hz, False))
        if speech.is_complete and not speech.waiting and not item.is_final_given:
            item.is_final_given = True
            pieces.append(Piece(item.item_id, speech.turn_id, b"", speech.rate_hz, True))
        return pieces

    def _open_item(self, speech: Speech, now: float) -> Item:
        if speech.items and not speech.items[-1].is_over:
            return speech.items[-1]
        item_id = speech.turn_id if not speech.items else f"{speech.turn_id}.{len(speech.items)}"
        item = Item(item_id, speech.turn_id, reported_at=now)
        speech.items.append(item)
        self._items[item_id] = item
        return item

    # ------------------------------------------------------------ what is played

    def played(
        self, item_id: str, played_samples: int, *, is_over: bool, now: float
    ) -> tuple[Speech, list[Piece]] | None:
        """A report of the leg (progress or flush): the speech it belongs to, and what may follow. None = not ours."""
        item = self._items.get(item_id)
        if item is None:
            return None
        item.played_samples = max(item.played_samples, played_samples)
        item.is_over = item.is_over or is_over
        item.reported_at = now
        speech = self.speeches[item.turn_id]
        return speech, ([] if speech.is_cut or item.is_over else self._release(speech, now))

    def is_audible(self, speech: Speech) -> bool:
        """Its first voiced sample has left."""
        return speech.first_voiced is not None and self.played_of(speech) > speech.first_voiced

    def is_heard_out(self, speech: Speech) -> bool:
        return speech.is_complete and not speech.waiting and all(item.is_over for item in speech.items)

    def played_of(self, speech: Speech) -> int:
        """Samples of the turn that were played, at the rate of its own audio."""
        played = round(speech.played_samples_of_leg * speech.rate_hz / self.leg_rate_hz)
        return min(played, speech.made_samples)

    def is_dry(self, turn_id: str, now: float) -> bool:
        """Everything given of an incomplete turn must have left by now."""
        speech = self.speeches.get(turn_id)
        if speech is None or speech.is_complete or speech.is_cut or not speech.items or speech.waiting:
            return False
        item = speech.items[-1]
        left_s = (item.given_samples - item.played_samples) / self.leg_rate_hz
        return item.played_samples > 0 and now - item.reported_at > left_s + _DRY_MARGIN_S

    # ----------------------------------------------------------------- what ends

    def cut(self, turn_id: str) -> str:
        """The turn is cut: nothing more of it goes out. Returns the item to flush, "" when none was given."""
        speech = self.speeches.get(turn_id)
        if speech is None:
            self.speeches[turn_id] = Speech(turn_id, 1, is_cut=True)
            return ""
        speech.is_cut = True
        speech.waiting.clear()
        return speech.items[-1].item_id if speech.items and not speech.items[-1].is_over else ""

    def hold_for_filler(self, turn_id: str) -> str:
        """A filler shall be heard before the rest of an unfinished turn: the (dry) item to flush, "" when none."""
        speech = self.speeches.get(turn_id)
        if speech is None or not speech.items or speech.items[-1].is_over:
            return ""
        return speech.items[-1].item_id


def _first_voiced(pcm: bytes, rate_hz: int) -> int | None:
    """First sample of the first 10 ms louder than VOICED_DBOV."""
    samples = np.frombuffer(pcm, "<i2").astype(np.float32)
    size = rate_hz * _BLOCK_MS // 1000
    limit = (32768.0**2) * 10 ** (VOICED_DBOV / 10)
    for start in range(0, len(samples), size):
        block = samples[start : start + size]
        if float(np.mean(block * block)) > limit:
            return start
    return None
