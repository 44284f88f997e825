"""Words that tell who has answered, as data (answer_phrases.toml) and as patterns. Pure once loaded."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PHRASES_FILE = Path(__file__).with_name("answer_phrases.toml")
CLASSES = ("carrier_message", "call_screener", "voicemail", "ivr")  # the first that fits counts
PERSON = "person"
MAX_WORDS_OF_A_PERSON = 6
_DIGITS = dict(zip("0123456789", "zero one two three four five six seven eight nine".split(), strict=True))
_CJK = r"\u3400-\u9fff"


@dataclass(frozen=True)
class AnswerPhrases:
    """`patterns`: class -> one pattern of all its phrases in all languages."""

    patterns: Mapping[str, re.Pattern[str]]

    @classmethod
    @cache
    def load(cls, path: Path = PHRASES_FILE) -> AnswerPhrases:
        """ValueError for a class that there is not."""
        found: dict[str, list[str]] = {kind: [] for kind in (*CLASSES, PERSON)}
        for language, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            for kind, phrases in table.items():
                if kind not in found:
                    raise ValueError(f"{path.name}: {language}.{kind}: must be one of {', '.join(found)}")
                found[kind] += [_pattern(phrase) for phrase in phrases]
        return cls({kind: re.compile("|".join(parts)) for kind, parts in found.items() if parts})

    def find(self, text: str) -> tuple[str, str]:
        """(class, the words that say so), both "" when no phrase of a machine is in `text`."""
        plain = plain_words(text)
        for kind in CLASSES:
            if hit := self.patterns[kind].search(plain):
                return kind, hit.group(0).strip()
        return "", ""

    def is_person(self, text: str) -> bool:
        """A few words, as somebody says them who picks up."""
        plain = plain_words(text)
        is_short = 0 < len(plain.split()) <= MAX_WORDS_OF_A_PERSON
        return is_short and bool(self.patterns[PERSON].search(plain)) and not self.find(text)[0]


def plain_words(text: str) -> str:
    """Lower case, digits as words, no punctuation, no spaces between Chinese characters."""
    spoken = re.sub(r"\d", lambda digit: f" {_DIGITS[digit.group(0)]} ", text.lower().replace("'", "").replace("’", ""))
    words = " ".join(re.findall(r"\w+", spoken))
    return re.sub(rf"(?<=[{_CJK}]) (?=[{_CJK}])", "", words)


def _pattern(phrase: str) -> str:
    parts = [re.escape(plain_words(part)) for part in phrase.split("*")]
    if re.search(f"[{_CJK}]", phrase):
        return r".{0,6}?".join(parts)
    return r"\b" + r"(?: \w+){0,3}? ".join(parts) + r"\b"
