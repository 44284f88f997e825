"""Which words a fixed line has in a campaign: the shipped sentences, overridden by the campaign's own.

The same key said twice in one call rotates through its sentences. Protected lines (the notice) can not be overridden.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from policies.caller_claims import filled

LINES_FILE = Path(__file__).with_name("lines.toml")
FURTHER_LINES_FILE = Path(__file__).with_name("further_lines.toml")


@dataclass(frozen=True)
class LineBook:
    """All fixed lines as shipped."""

    protected: Mapping[str, tuple[str, ...]]
    lines: Mapping[str, tuple[str, ...]]
    keypad_text: str  # "{digits}" stands for the number typed

    @classmethod
    def load(cls, path: Path = LINES_FILE) -> LineBook:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        lines = table["lines"] | tomllib.loads(FURTHER_LINES_FILE.read_text(encoding="utf-8"))["lines"]
        return cls(
            protected={key: tuple(texts) for key, texts in table["protected"].items()},
            lines={key: tuple(texts) for key, texts in lines.items()},
            keypad_text=table["keypad"]["order_number"],
        )

    @property
    def keys(self) -> frozenset[str]:
        """What a campaign may put in its own words."""
        return frozenset(self.lines)

    def for_call(self, overrides: Mapping[str, tuple[str, ...]], claims: Mapping[str, str] | None = None) -> CallLines:
        """`claims`: variables of this call. A sentence that needs another one is left out."""
        own = {key: filled(sentences, claims or {}) for key, sentences in overrides.items()}
        return CallLines({**self.lines, **own, **self.protected}, self.keypad_text)


@dataclass
class CallLines:
    """The lines of one call; remembers which sentence comes next."""

    texts: Mapping[str, tuple[str, ...]]
    keypad_text: str
    _num_said: dict[str, int] = field(default_factory=dict)

    def say(self, key: str) -> str:
        """The next sentence of `key`."""
        sentences = self.texts[key]
        number = self._num_said.get(key, 0)
        self._num_said[key] = number + 1
        return sentences[number % len(sentences)]
