"""Written text as it is said aloud: for a voice LM that reads text by its own table (the bridge `out`).

The public LLMs write for the eye: Markdown, "$12.50", "3 March 2026", "45612". A text-to-speech parent reads such
things wrongly or not at all, so they become words first; numbers through num2words (languages it knows; Chinese by
the table here, which it lacks). Long digit runs are order or phone numbers and are read digit by digit, as callers
and agents do.

`SpokenStream` does it while text is still coming: it hands out whole words as soon as nothing behind them can change
how they are said ("12" may become "12.50" or "12 March"). Knows nothing of tokens or voices. Walk: step 9.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Longer runs are numbers of things (orders, phones), not amounts; so are those with a leading zero.
MAX_AMOUNT_DIGITS = 4
_CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "CNY", "￥": "CNY"}
_MINOR = {"USD": ("dollar", "cent"), "EUR": ("euro", "cent"), "GBP": ("pound", "penny"), "CNY": ("yuan", "fen")}
_PLURAL = {"penny": "pence", "yuan": "yuan", "fen": "fen"}
_MONTHS = "january february march april may june july august september october november december".split()
_CHINESE_DIGITS = "零一二三四五六七八九"
_CHINESE_MINOR = {"USD": "美元", "EUR": "欧元", "GBP": "英镑", "CNY": "元"}
_CHINESE_UNITS = ("", "十", "百", "千")
_CHINESE_GROUPS = ("", "万", "亿")
_SIGNS = {"en": {"%": "percent", "&": "and", "+": "plus", "=": "equals", "@": "at"}, "zh": {"%": "百分之"}}

_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_FENCE = re.compile(r"```.*?(?:```|$)", re.DOTALL)
_MARKDOWN = re.compile(r"(?m)^\s*(?:#{1,6}\s+|>\s?|[-*+]\s+)|[*_`~]{1,3}|^\s*[-=*_]{3,}\s*$|\|")
_EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f\u200d]")
_URL = re.compile(r"https?://\S+")
_AMOUNT = re.compile(r"([$€£¥￥])\s?(\d[\d,]*)(?:\.(\d{1,2}))?(?![\d.]*\d)")
_ISO_DATE = re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b")
_DAY_MONTH = re.compile(rf"\b(\d{{1,2}})(?:st|nd|rd|th)?\s+({'|'.join(_MONTHS)})(?:,?\s+(\d{{4}}))?\b", re.IGNORECASE)
_MONTH_DAY = re.compile(rf"\b({'|'.join(_MONTHS)})\s+(\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s+(\d{{4}}))?\b", re.IGNORECASE)
_CHINESE_DATE = re.compile(r"(\d{4})年")
_TIME = re.compile(r"\b([01]?\d|2[0-3]):([0-5]\d)(?:\s*([ap])\.?m\b\.?)?", re.IGNORECASE)
_ORDINAL = re.compile(r"\b(\d+)(?:st|nd|rd|th)\b")
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|\d+")
_PERCENT_ZH = re.compile(r"(\d+(?:\.\d+)?)\s?%")


def spoken_form(text: str, language: str = "en") -> str:
    """All of a text in words; letters and punctuation stay.

    "**Total:** $12.50 on 3 March." -> "Total: twelve dollars and fifty cents on the third of March."
    """
    text = _LINK.sub(r"\1", _EMOJI.sub(" ", _FENCE.sub(" ", text)))
    text = _MARKDOWN.sub(" ", _URL.sub(" ", text))
    say = _Chinese() if language in ("zh", "yue") else _Words(language)
    for pattern, replace in say.rules():
        text = pattern.sub(replace, text)
    for sign, word in _SIGNS.get(language, {}).items():
        text = text.replace(sign, f" {word} ")
    return re.sub(r"\s+([.,?!;:，。？！；：])", r"\1", " ".join(text.split()))


Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]


@dataclass(frozen=True)
class _Words:
    """Languages of num2words; amounts, dates and times are put together for English, elsewhere only their numbers."""

    language: str

    def rules(self) -> list[Rule]:
        english: list[Rule] = [
            (_AMOUNT, lambda m: self.amount(_CURRENCIES[m[1]], m[2], m[3])),
            (_ISO_DATE, lambda m: self.date(int(m[3]), _month(int(m[2])), m[1]) if _month(int(m[2])) else m[0]),
            (_DAY_MONTH, lambda m: self.date(int(m[1]), m[2], m[3])),
            (_MONTH_DAY, lambda m: self.date(int(m[2]), m[1], m[3])),
            (_TIME, lambda m: self.time(int(m[1]), int(m[2]), m[3])),
            (_ORDINAL, lambda m: self.number(m[1], "ordinal")),
        ]
        return [*(english if self.language == "en" else []), (_NUMBER, lambda m: self.plain_number(m[0]))]

    def number(self, digits: str, kind: str = "cardinal") -> str:
        try:
            from num2words import num2words
        except ImportError as error:
            raise RuntimeError("num2words is not installed: pip install 'minmo-agent[public]'") from error
        value = float(digits) if "." in digits else int(digits)
        try:
            words = num2words(value, lang=self.language, to=kind)
        except NotImplementedError:
            words = num2words(value, to=kind)
        return words.replace(",", "").replace("-", " ")

    def plain_number(self, digits: str) -> str:
        bare = digits.replace(",", "")
        is_negative, bare = bare.startswith("-"), bare.lstrip("-")
        whole = bare.partition(".")[0]
        is_grouped = "," in digits and re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", digits) is not None
        is_code = (len(whole) > MAX_AMOUNT_DIGITS and not is_grouped) or (len(whole) > 1 and whole[0] == "0")
        if is_code:
            said = " ".join(self.number(digit) for digit in bare if digit.isdigit())
        else:
            said = self.number(bare)
        said = f" {self.minus()} {said} " if is_negative else f" {said} "
        return said + ("," if digits.endswith(",") else "")

    def minus(self) -> str:
        return {"en": "minus", "de": "minus", "fr": "moins", "es": "menos"}.get(self.language, "-")

    def amount(self, currency: str, whole: str, minor: str | None) -> str:
        big, small = _MINOR[currency]
        value, cents = int(whole.replace(",", "")), int((minor or "0").ljust(2, "0"))
        said = f"{self.number(str(value))} {_plural(big, value)}"
        return f"{said} and {self.number(str(cents))} {_plural(small, cents)}" if cents else said

    def date(self, day: int, month: str, year: str | None) -> str:
        said = f"the {self.number(str(day), 'ordinal')} of {month.capitalize()}"
        return f"{said}, {self.number(year, 'year')}" if year else said

    def time(self, hour: int, minute: int, half: str | None) -> str:
        said = self.number(str(hour))
        if minute:
            said += f" {'oh ' if minute < 10 else ''}{self.number(str(minute))}"
        elif not half:
            said += " o'clock" if 1 <= hour <= 12 else " hundred hours"
        return f"{said} {half.lower()} m" if half else said


class _Chinese:
    """Numbers of Mandarin (and, near enough, Cantonese)."""

    def rules(self) -> list[Rule]:
        return [
            (_AMOUNT, lambda m: self._amount(_CURRENCIES[m[1]], m[2].replace(",", ""), m[3])),
            (_CHINESE_DATE, lambda m: "".join(_CHINESE_DIGITS[int(digit)] for digit in m[1]) + "年"),
            (_ISO_DATE, lambda m: f"{self._digits(m[1])}年{self.number(m[2])}月{self.number(m[3])}日"),
            (_TIME, lambda m: f"{self.number(m[1])}点" + (f"{self.number(m[2])}分" if int(m[2]) else "")),
            (_PERCENT_ZH, lambda m: "百分之" + self._decimal(m[1])),
            (_NUMBER, lambda m: self._plain(m[0])),
        ]

    def number(self, digits: str) -> str:
        """ "10203" -> 一万零二百零三."""
        value = int(digits)
        if value == 0:
            return _CHINESE_DIGITS[0]
        groups: list[str] = []
        while value:
            groups.append(f"{value % 10_000:04d}")
            value //= 10_000
        said = ""
        for index in range(len(groups) - 1, -1, -1):
            group = groups[index]
            if int(group) == 0:
                continue
            if said and group[0] == "0":
                said += _CHINESE_DIGITS[0]
            said += self._group(group.lstrip("0")) + _CHINESE_GROUPS[index]
        return said.removeprefix("一") if said.startswith("一十") else said

    @staticmethod
    def _group(digits: str) -> str:
        said, is_zero = "", False
        for place, digit in zip(range(len(digits) - 1, -1, -1), digits, strict=True):
            if digit == "0":
                is_zero = True
                continue
            said += (_CHINESE_DIGITS[0] if is_zero else "") + _CHINESE_DIGITS[int(digit)] + _CHINESE_UNITS[place]
            is_zero = False
        return said

    @staticmethod
    def _digits(digits: str) -> str:
        return "".join(_CHINESE_DIGITS[int(digit)] for digit in digits if digit.isdigit())

    def _decimal(self, digits: str) -> str:
        whole, _, rest = digits.partition(".")
        return self.number(whole) + (f"点{self._digits(rest)}" if rest else "")

    def _plain(self, digits: str) -> str:
        bare = digits.replace(",", "").lstrip("-")
        whole = bare.partition(".")[0]
        is_code = (len(whole) > MAX_AMOUNT_DIGITS and "," not in digits) or (len(whole) > 1 and whole[0] == "0")
        said = self._digits(bare) if is_code or len(whole) > 12 else self._decimal(bare)
        return ("负" if digits.startswith("-") else "") + said

    def _amount(self, currency: str, whole: str, minor: str | None) -> str:
        return self._decimal(f"{whole}.{minor}" if minor else whole) + _CHINESE_MINOR[currency]


def _plural(unit: str, count: int) -> str:
    return unit if count == 1 else _PLURAL.get(unit, unit + "s")


def _month(number: int) -> str:
    return _MONTHS[number - 1] if 1 <= number <= 12 else ""


# -------------------------------------------------------------------- streaming

_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？；\n]")
# What may be the start of a number, date, link or mark whose end decides how it is said.
_OPEN = re.compile(rf"[\d$€£¥￥*_`~\[\]()|#<>-]|https?|{'|'.join(_MONTHS)}", re.IGNORECASE)
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
        said = spoken_form(text, self._language)
        for word, replacement in self._lexicon.items():
            said = word.sub(replacement, said)
        if not any(character.isalnum() for character in said):
            return said if self._has_begun else ""
        joint = " " if self._has_begun and not _CJK.match(said) else ""
        self._has_begun = True
        return joint + said

    def _safe_end(self) -> int:
        """Index behind the last word that later text cannot reach."""
        text = self._waiting
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        sentence = ends[-1] if ends else 0
        ends = [match.start() for match in re.finditer(r"\s", text)] + [match.end() for match in _CJK.finditer(text)]
        for end in sorted(ends, reverse=True):
            if end <= sentence:
                break
            recent = " ".join(re.findall(r"\S+", text[sentence:end])[-_HOLD_WORDS:])
            if not _OPEN.search(recent[-40:]):
                return end
        return sentence
