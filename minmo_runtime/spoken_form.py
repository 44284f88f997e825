"""Written text as it is said aloud: for a voice LM that reads text by its own table (the bridge `out`).

The public LLMs write for the eye: Markdown, "$12.50", "3 March 2026", "45612". A text-to-speech parent reads such
things wrongly or not at all, so markup goes (a line or a table cell ends in a pause) and numbers become words
(spoken_numbers.py).

`SpokenStream` does it while text is still coming: it hands out whole words as soon as nothing behind them can change
how they are said ("12" may become "12.50" or "12 March"). Knows nothing of tokens or voices. Walk: step 9.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from minmo_runtime.spoken_numbers import MONTH_PATTERN, YEAR_WORDS, rules_for

_SIGNS = {
    "en": {"%": "percent", "&": "and", "+": "plus", "=": "equals", "@": "at", "×": "times", "÷": "divided by"},
    "zh": {"%": "百分之", "&": "和", "+": "加", "=": "等于"},
}

_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_FENCE = re.compile(r"```.*?(?:```|$)", re.DOTALL)
_RULER = re.compile(r"(?m)^[ \t]*(?:[-=*_][ \t]*){3,}$|^[ \t]*\|?[ \t]*:?-{2,}[-|: \t]*$")
_CELL = re.compile(r"(?m)^[ \t]*\|[ \t]*|[ \t]*\|[ \t]*$")
_MARKDOWN = re.compile(r"(?m)^[ \t]*(?:#{1,6}[ \t]+|>[ \t]?|[-*+•][ \t]+)|[*_`~]{1,3}")
_SNAKE = re.compile(r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])")
_PRODUCT = re.compile(r"(?<=\d)\s*[*×]\s*(?=\d)|(?<=\d)\s+x\s+(?=\d)")
# A line that ends without a mark of its own, and is followed by another.
_LINE_END = re.compile(r"(?<=[^\s\0.,;:!?。，；：！？、])[ \t]*\n(?=\s*\S)")
_CJK_LETTERS = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_CJK = re.compile(f"[{_CJK_LETTERS}]")
_MARKS = ".,?!;:，。？！；：、"
_NO_GAP = re.compile(rf"\s+(?=[{_MARKS}])|(?<=[，。？！；：、])\s+(?=[{_CJK_LETTERS}])")
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f\u200d]")
_URL = re.compile(r"https?://\S+")


def spoken_form(text: str, language: str = "en") -> str:
    """All of a text in words; letters and punctuation stay.

    "**Total:** $12.50 on 3 March." -> "Total: twelve dollars and fifty cents on the third of March."
    """
    text = _LINK.sub(r"\1", _EMOJI.sub(" ", _FENCE.sub(" ", text)))
    text = _CELL.sub("", _RULER.sub("", _URL.sub(" ", text)))
    if language == "en":
        text = _PRODUCT.sub(" times ", text)
    text = _MARKDOWN.sub("", _SNAKE.sub(" ", text))
    pause = "，" if language in ("zh", "yue", "ja") else ", "
    text = _LINE_END.sub(pause, text.replace("|", pause))
    for pattern, replace in rules_for(language):
        text = pattern.sub(replace, text)
    for sign, word in _SIGNS.get("zh" if language == "yue" else language, {}).items():
        text = text.replace(sign, f" {word} ")
    return _NO_GAP.sub("", " ".join(text.split()))


# -------------------------------------------------------------------- streaming

# Not behind one or two digits: "3." may be the day of a German date, or a list's number.
_SENTENCE_END = re.compile(r"(?<!\b\d)(?<!\b\d\d)[.!?](?=\s)|[。！？；]")
# What may be the start of a number, date, link or mark whose end decides how it is said.
_OPEN = re.compile(rf"[\d$€£¥￥*_`~\[\]()|#<>-]|https?|\b(?:{MONTH_PATTERN})\b|\b(?i:the|{YEAR_WORDS})$")
# Whether the line ends here decides on a pause.
_MAY_END_LINE = re.compile(r"\s*(?:\n|$)")
_HOLD_WORDS = 4  # "the 3rd of", "3 March 2026": nothing that is said together is longer


_KANA, _HANGUL = re.compile(r"[\u3040-\u30ff]"), re.compile(r"[\uac00-\ud7af]")


def language_of(text: str, otherwise: str) -> str:
    """By its letters: a reply may change its language in the middle. `otherwise` where there are only signs."""
    for pattern, language in ((_KANA, "ja"), (_HANGUL, "ko"), (_CJK, "zh")):
        if pattern.search(text):
            return language
    is_latin = otherwise not in ("zh", "yue", "ja", "ko") or re.search(r"[A-Za-z]{2}", text)
    return ("en" if otherwise in ("zh", "yue", "ja", "ko") else otherwise) if is_latin else otherwise


class SpokenStream:
    """One reply's text, piece by piece. Each `push` returns words that will not change; `finish` the rest."""

    def __init__(self, language: str = "en", lexicon: Mapping[str, str] | None = None) -> None:
        self._language = language
        self._lexicon = {
            re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE): said for word, said in (lexicon or {}).items()
        }
        self._waiting = ""
        self._has_begun = False

    def push(self, text: str) -> str:
        self._waiting += text
        cut = self._safe_end()
        ready, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return self._say(ready)

    def finish(self) -> str:
        ready, self._waiting = self._waiting, ""
        return self._say(ready)

    def _say(self, text: str) -> str:
        self._language = language_of(text, self._language)
        # What comes later does not begin a line: a dash there is no list's.
        said = spoken_form(("\0" if self._has_begun else "") + text, self._language).replace("\0", "").strip()
        for word, replacement in self._lexicon.items():
            said = word.sub(replacement, said)
        if not any(character.isalnum() for character in said):
            return said if self._has_begun else ""
        joint = " " if self._has_begun and not _CJK.match(said) and said[0] not in _MARKS else ""
        self._has_begun = True
        return joint + said

    def _safe_end(self) -> int:
        """Index behind the last word that later text cannot reach."""
        text = self._waiting
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        sentence = ends[-1] if ends else 0
        ends = [match.start() for match in re.finditer(r"\s+", text)] + [match.end() for match in _CJK.finditer(text)]
        for end in sorted(ends, reverse=True):
            if end <= sentence:
                break
            if _MAY_END_LINE.match(text, end):
                continue
            recent = " ".join(re.findall(r"\S+", text[sentence:end])[-_HOLD_WORDS:])
            if not _OPEN.search(recent[-40:]):
                return end
        return sentence
