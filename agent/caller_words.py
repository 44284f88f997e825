"""What the caller is saying now: captions of the runtime put together to the text of the open turn.

Captions come late, are revised while a segment is open, and may close after the floor has changed; each one carries
its place on the caller's clock, and that place alone says to which turn it belongs. Pure; counts samples of the
runtime's input rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minmo_runtime.api import Caption
from minmo_runtime.text import normalise_spoken


@dataclass
class CallerWords:
    """Segments by their first sample. `turn_from` is moved by the call when the floor goes from one party to the
    other.
    """

    turn_from: int = 0
    segments: dict[int, Caption] = field(default_factory=dict)

    def hear(self, caption: Caption) -> bool:
        """Takes a caption; true when it belongs to the open turn (else to one before)."""
        self.segments[caption.start_sample] = caption
        while len(self.segments) > 64:
            del self.segments[min(self.segments)]
        return self._is_open(caption)

    def begin_turn(self, sample: int) -> None:
        """What is heard up to here belongs to the turn that is over."""
        self.turn_from = sample

    @property
    def text(self) -> str:
        return " ".join(c.text for c in self._open_segments() if c.text)

    @property
    def confidence(self) -> float:
        """Mean over segments, weighted by length; 1.0 when there is nothing."""
        spoken = [(c.confidence, max(1, len(c.text))) for c in self._open_segments() if c.text]
        total = sum(weight for _, weight in spoken)
        return sum(value * weight for value, weight in spoken) / total if total else 1.0

    @property
    def span(self) -> tuple[int, int]:
        """First and last sample of the open turn's segments."""
        found = self._open_segments()
        return (found[0].start_sample, max(c.end_sample for c in found)) if found else (self.turn_from, self.turn_from)

    def _open_segments(self) -> list[Caption]:
        return [self.segments[start] for start in sorted(self.segments) if self._is_open(self.segments[start])]

    def _is_open(self, caption: Caption) -> bool:
        # By its middle: a segment's first sample includes the pre-roll, which may reach into the turn before.
        return (caption.start_sample + caption.end_sample) // 2 >= self.turn_from


def count_trailing_digits(text: str) -> int:
    """Digits of the number at the end of `text`, written or spoken: "it is four five double six" -> 4; "45 please" ->
    0.
    """
    words = normalise_spoken(text).replace(",", " ").replace(".", " ").split()
    count = 0
    while words and words[-1].isdigit():
        count += len(words.pop())
    return count
