"""Numbers, amounts, dates, times and phone numbers of a language as the words that people say.

A language is a list of rules (pattern, what it becomes), applied in order: what is said together (a date, an amount)
comes before the plain number. English and Chinese have their own; the other languages of num2words have numbers,
amounts, per cent and their decimal comma ("12,50 €" is twelve euros fifty, not one thousand two hundred and fifty).
Long digit runs are order or phone numbers and are read digit by digit, as callers and agents do.

Knows nothing of markup, streams or voices (spoken_form.py does). Walk: step 9.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

# Longer runs are numbers of things (orders, phones), not amounts; so are those with a leading zero.
MAX_AMOUNT_DIGITS = 4
MIN_PHONE_DIGITS = 7
CURRENCIES = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "CNY", "￥": "CNY"}
_MINOR = {"USD": ("dollar", "cent"), "EUR": ("euro", "cent"), "GBP": ("pound", "penny"), "CNY": ("yuan", "fen")}
_PLURAL = {"penny": "pence", "yuan": "yuan", "fen": "fen", "foot": "feet", "inch": "inches"}
MONTHS = "January February March April May June July August September October November December".split()
# Capital letters tell "May 2" from "you may 2".
_MONTH_OF = {name: name for name in MONTHS} | {name[:3]: name for name in MONTHS} | {"Sept": MONTHS[8]}
MONTH_PATTERN = "|".join(sorted(_MONTH_OF, key=len, reverse=True))
# Behind these a number of four digits is a year.
YEAR_WORDS = "in|since|by|from|until|till|of|year|before|after|during|q[1-4]"
_SCALES = {"k": "thousand", "m": "million", "b": "billion", "bn": "billion"}
_UNITS = {
    "kg": "kilogram", "g": "gram", "mg": "milligram", "km/h": "kilometer per hour", "km": "kilometer",
    "cm": "centimeter", "mm": "millimeter", "ml": "milliliter", "l": "liter", "lbs": "pound", "lb": "pound",
    "oz": "ounce",
    "mph": "mile per hour", "ft": "foot", "GB": "gigabyte", "MB": "megabyte", "°C": "degree Celsius",
    "°F": "degree Fahrenheit", "°": "degree", "hrs": "hour", "min": "minute",
}  # fmt: skip
_PER = "month|year|week|day|hour|night|person|item|piece"
_FRACTIONS = {2: ("half", "halves"), 4: ("quarter", "quarters")}
# A comma before the decimals, a point or a space between thousands.
_DECIMAL_COMMA = frozenset("de fr es it pt nl pl ru uk cs sv da no nb fi tr id vi ro hu".split())
_PERCENT = {
    "de": "Prozent", "fr": "pour cent", "es": "por ciento", "it": "per cento", "pt": "por cento", "nl": "procent",
    "pl": "procent", "ru": "процентов", "sv": "procent", "da": "procent", "ja": "パーセント", "ko": "퍼센트",
}  # fmt: skip
_MINUS = {"en": "minus", "de": "minus", "fr": "moins", "es": "menos", "it": "meno", "pt": "menos", "nl": "min"}
_MINUS |= {"ja": "マイナス", "ko": "마이너스"}
_DENSE = ("ja", "ko")  # numbers are written into the text without spaces

Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]

# `(?<![A-Za-z0-9.])`, not a word boundary: Chinese, Japanese and Korean letters stand right before their numbers.
_AMOUNT = re.compile(r"(?:US|(?<![A-Za-z]))([$€£¥￥])\s?(\d[\d,]*)(?:\.(\d{1,2}))?(?![\d.]*\d)")
_SCALED = re.compile(
    r"(?:US|(?<![A-Za-z]))([$€£¥￥])\s?(\d+(?:\.\d+)?)\s?(k|m|bn?|thousand|million|billion)\b", re.IGNORECASE
)
_ISO_DATE = re.compile(r"(?<![\d-])(\d{4})-(\d{2})-(\d{2})(?![\d-])")
_US_DATE = re.compile(r"(?<![\d/])(\d{1,2})/(\d{1,2})/(\d{4})(?![\d/])")
_DAY_MONTH = re.compile(
    rf"\b(?:the\s+)?(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?({MONTH_PATTERN})\b(?:,?\s+(\d{{4}})\b)?"
)
_MONTH_DAY = re.compile(rf"\b(?:the\s+)?({MONTH_PATTERN})\s+(\d{{1,2}})(?:st|nd|rd|th)?\b(?!:\d)(?:,?\s+(\d{{4}})\b)?")
_MONTH_YEAR = re.compile(rf"\b({MONTH_PATTERN})\s+(\d{{4}})\b")
_YEAR = re.compile(rf"\b({YEAR_WORDS})\s+((?:19|20)\d\d)\b(?![,.]\d)", re.IGNORECASE)
_DECADE = re.compile(r"\b((?:19|20)\d)0s\b")
_TIME = re.compile(r"(?<![\d:])([01]?\d|2[0-3]):([0-5]\d)(?![\d:])(?:\s*([ap])\.?m\b\.?)?", re.IGNORECASE)
_HOUR = re.compile(r"\b(1[0-2]|[1-9])\s?([ap])\.?m\b\.?", re.IGNORECASE)
_PHONE = re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\) ?)?\d{1,8}(?:[ .-]\d{2,8}){0,5}(?![\w])")
_ORDINAL = re.compile(r"\b(\d+)(?:st|nd|rd|th)\b")
_PER_UNIT = re.compile(rf"(?<=\w)\s?/\s?({_PER})\b", re.IGNORECASE)
_MEASURE = re.compile(rf"(?<![\w.])(-?\d[\d,]*(?:\.\d+)?)\s?({'|'.join(map(re.escape, _UNITS))})(?![\w/])")
_FRACTION = re.compile(r"(?<![\w/.])(\d{1,2})/(\d{1,2})(?![\w/])")
_RANGE = re.compile(r"(?<![\w.,-])(\d{1,4})\s?[-–]\s?(\d{1,4})(?![\w-]|[.,]\d)")
_YEARS = re.compile(r"(?<![\w.,-])((?:19|20)\d\d)\s?[-–]\s?((?:19|20)\d\d)(?![\w-]|[.,]\d)")
_DOTTED = re.compile(r"(?<![\w.])\d+(?:\.\d+){2,}(?![\w])")
_CODE = re.compile(r"\b(?=[A-Za-z0-9-]*\d)(?=[A-Za-z0-9-]*[A-Za-z])[A-Za-z0-9]+(?:-[A-Za-z0-9]+)+\b")
_HASH = re.compile(r"#\s?(?=\d)")
_EMAIL = re.compile(r"\b([\w.+-]+)@([\w-]+(?:\.[\w-]+)+)\b")
_PERCENT_SIGN = re.compile(r"(?<=\d)\s?%")
_NUMBER = re.compile(r"(?<![A-Za-z0-9.])-?\d[\d,]*(?:\.\d+)?|\d+")
_COMMA_NUMBER = re.compile(r"(?<![\w,])-?\d{1,3}(?:[. \u00a0\u202f]\d{3})+(?:,\d+)?(?!\d)|(?<![\w,])-?\d+(?:,\d+)?|\d+")
_THOUSANDS = r"\d{1,3}(?:[. \u00a0\u202f]\d{3})+|\d+"
_COMMA_AMOUNT = re.compile(
    r"(?:(?:US|(?<![A-Za-z]))([$€£])\s?(\d[\d.]*)(?:,(\d{1,2}))?"
    rf"|({_THOUSANDS})(?:,(\d{{1,2}}))?\s?([$€£]))(?!\d)"
)


def rules_for(language: str) -> list[Rule]:
    """In the order in which they are to be applied."""
    if language in ("zh", "yue"):
        return Chinese().rules()
    return English("en").rules() if language == "en" else Words(language).rules()


def _plural(word: str, count: float) -> str:
    first, _, rest = word.partition(" ")
    return word if count == 1 else f"{_PLURAL.get(first, first + 's')} {rest}".rstrip()


@dataclass(frozen=True)
class Words:
    """A language of num2words: its numbers, amounts and per cent."""

    language: str

    def rules(self) -> list[Rule]:
        gap, percent = "" if self.language in _DENSE else " ", _PERCENT.get(self.language, "%")
        rules: list[Rule] = [(_PERCENT_SIGN, lambda _: f"{gap}{percent}{gap}")]
        if self.language not in _DECIMAL_COMMA:
            return [*rules, (_NUMBER, lambda m: self.plain_number(m[0]))]
        return [
            *rules,
            (_COMMA_AMOUNT, self._comma_amount),
            (_COMMA_NUMBER, lambda m: self.plain_number(_with_point(m[0]))),
        ]

    def number(self, digits: str, kind: str = "cardinal", **options: str) -> str:
        try:
            from num2words import num2words
        except ImportError as error:
            raise RuntimeError("num2words is not installed: pip install 'minmo-agent[public]'") from error
        value = float(digits) if "." in digits else int(digits)
        try:
            words = num2words(value, lang=self.language, to=kind, **options)
        except (NotImplementedError, AttributeError, TypeError):
            if options:
                raise
            words = num2words(value)
        return words.replace(",", "").replace("-", " ")

    def plain_number(self, digits: str) -> str:
        bare = digits.replace(",", "")
        is_negative, bare = bare.startswith("-"), bare.lstrip("-")
        whole = bare.partition(".")[0]
        is_grouped = "," in digits and re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", digits) is not None
        is_code = (len(whole) > MAX_AMOUNT_DIGITS and not is_grouped) or (len(whole) > 1 and whole[0] == "0")
        said = self.digits(bare) if is_code else self.number(bare)
        if is_negative and not is_code:
            said = f"{_MINUS.get(self.language, '-')} {said}"
        return (said if self.language in _DENSE else f" {said} ") + ("," if digits.endswith(",") else "")

    def digits(self, text: str) -> str:
        joint = "" if self.language in _DENSE else " "
        return joint.join(self.number(digit) for digit in text if digit.isdigit())

    def _comma_amount(self, match: re.Match[str]) -> str:
        sign, whole, minor = match[1] or match[6], match[2] or match[4], match[3] or match[5]
        value = f"{re.sub(r'[^0-9]', '', whole)}.{(minor or '0').ljust(2, '0')}"
        try:
            if not minor:  # "zwölf Euro", without "und null Cent"
                return f" {self.number(value.partition('.')[0])} {_comma_currency(self, sign)} "
            return f" {self.number(value, 'currency', currency=CURRENCIES[sign])} "
        except (NotImplementedError, AttributeError, TypeError):  # a language without this currency: the number alone
            return f" {self.number(value)} {_MINOR[CURRENCIES[sign]][0]} "


def _comma_currency(words: Words, sign: str) -> str:
    """The currency's plural, from what num2words says of two: "due euro e zero centesimi" -> "euro"."""
    return words.number("2.00", "currency", currency=CURRENCIES[sign]).split()[1]


def _with_point(digits: str) -> str:
    """ "1.234,5" -> "1,234.5", as the other languages write it."""
    whole, _, decimals = digits.partition(",")
    return re.sub(r"[. \u00a0\u202f]", ",", whole) + (f".{decimals}" if decimals else "")


class English(Words):
    """Everything an agent says in English."""

    def rules(self) -> list[Rule]:
        return [
            (_EMAIL, lambda m: f"{m[1].replace('.', ' dot ')} at {m[2].replace('.', ' dot ')}"),
            (_HASH, lambda _: "number "),
            (_SCALED, self._scaled),
            (_AMOUNT, lambda m: self.amount(CURRENCIES[m[1]], m[2], m[3])),
            (_PER_UNIT, lambda m: f" per {m[1]}"),
            (_ISO_DATE, lambda m: self.date(int(m[3]), int(m[2]), m[1]) or m[0]),
            (
                _US_DATE,
                lambda m: self.date(int(m[2]), int(m[1]), m[3]) or self.date(int(m[1]), int(m[2]), m[3]) or m[0],
            ),
            (_DAY_MONTH, lambda m: self._named_date(m[1], m[2], m[3]) or m[0]),
            (_MONTH_DAY, lambda m: self._named_date(m[2], m[1], m[3]) or m[0]),
            (_MONTH_YEAR, lambda m: f"{_MONTH_OF[m[1]]} {self.number(m[2], 'year')}"),
            (_YEAR, lambda m: f"{m[1]} {self.number(m[2], 'year')}"),
            (_DECADE, self._decade),
            (_TIME, lambda m: self.time(int(m[1]), int(m[2]), m[3])),
            (_HOUR, lambda m: f"{self.number(m[1])} {m[2].lower()} m"),
            (_ORDINAL, lambda m: self.number(m[1], "ordinal")),
            (_MEASURE, self._measure),
            (_FRACTION, self._fraction),
            (_DOTTED, lambda m: " point ".join(self.number(part) for part in m[0].split("."))),
            (_PHONE, self._phone),
            (_YEARS, lambda m: f"{self.number(m[1], 'year')} to {self.number(m[2], 'year')}"),
            (_RANGE, lambda m: f"{self.number(m[1])} to {self.number(m[2])}"),
            (_CODE, self._code),
            (_NUMBER, lambda m: self.plain_number(m[0])),
        ]

    def amount(self, currency: str, whole: str, minor: str | None) -> str:
        big, small = _MINOR[currency]
        value, cents = int(whole.replace(",", "")), int((minor or "0").ljust(2, "0"))
        said = f"{self.number(str(value))} {_plural(big, value)}" if value or not cents else ""
        if not cents:
            return said
        return f"{said} and {self._cents(cents, small)}" if said else self._cents(cents, small)

    def _cents(self, cents: int, name: str) -> str:
        return f"{self.number(str(cents))} {_plural(name, cents)}"

    def _scaled(self, match: re.Match[str]) -> str:
        scale = _SCALES.get(match[3].lower(), match[3].lower())
        return f"{self.number(match[2])} {scale} {_plural(_MINOR[CURRENCIES[match[1]]][0], 2)}"

    def date(self, day: int, month: int, year: str | None) -> str:
        """Empty if there is no such day."""
        if not (1 <= month <= len(MONTHS) and 1 <= day <= 31):
            return ""
        said = f"the {self.number(str(day), 'ordinal')} of {MONTHS[month - 1]}"
        return f"{said}, {self.number(year, 'year')}" if year else said

    def _named_date(self, day: str, month: str, year: str | None) -> str:
        return self.date(int(day), MONTHS.index(_MONTH_OF[month]) + 1, year)

    def _decade(self, match: re.Match[str]) -> str:
        return self.number(match[1] + "0", "year").removesuffix("y") + "ies"

    def time(self, hour: int, minute: int, half: str | None) -> str:
        said = self.number(str(hour))
        if minute:
            said += f" {'oh ' if minute < 10 else ''}{self.number(str(minute))}"
        elif not half:
            said += " o'clock" if 1 <= hour <= 12 else " hundred hours"
        return f"{said} {half.lower()} m" if half else said

    def _measure(self, match: re.Match[str]) -> str:
        count = float(match[1].replace(",", ""))
        return f"{self.plain_number(match[1])} {_plural(_UNITS[match[2]], count)}"

    def _fraction(self, match: re.Match[str]) -> str:
        top, bottom = int(match[1]), int(match[2])
        if not 1 <= top < bottom <= 10:
            return f"{self.number(match[1])} {self.number(match[2])}"  # twenty four seven
        one, many = _FRACTIONS.get(bottom, (self.number(match[2], "ordinal"), self.number(match[2], "ordinal") + "s"))
        return f"{self.number(match[1])} {one if top == 1 else many}"

    def _phone(self, match: re.Match[str]) -> str:
        """Digit by digit, a pause between the groups; anything else is left to the rules behind."""
        text = match[0]
        groups = re.findall(r"\d+", text)
        looks = text[0] in "+(0" or ("-" in text and len(groups) > 2)
        if not looks or len(groups) < 2 or sum(map(len, groups)) < MIN_PHONE_DIGITS:
            return text
        said = ", ".join(self.digits(group) for group in groups)
        return f"plus {said}" if text[0] == "+" else said

    def _code(self, match: re.Match[str]) -> str:
        """ "A-1234-B": letters as they are, runs of three digits and more one by one."""
        parts = re.findall(r"[A-Za-z]+|\d+", match[0])
        return " ".join(
            part if part.isalpha() else self.digits(part) if len(part) > 2 or part[0] == "0" else self.number(part)
            for part in parts
        )


# --------------------------------------------------------------------- Chinese

_CHINESE_DIGITS = "零一二三四五六七八九"
_CHINESE_CURRENCIES = {"USD": "美元", "EUR": "欧元", "GBP": "英镑", "CNY": "元"}
_CHINESE_UNITS = ("", "十", "百", "千")
_CHINESE_GROUPS = ("", "万", "亿", "万亿")
# What is counted or measured: in front of it a long number is an amount, not a code, and a lone 2 is 两.
_COUNTED = "元块个件位天年周人条张台份家种次公里米斤克升度"
_TWO = re.compile(rf"(?<![\d.])2(?=[{_COUNTED.replace('度', '').replace('克', '')}])(?!年\d)")
_CHINESE_YEAR = re.compile(r"(\d{4})年")
_CHINESE_MEASURE = re.compile(rf"(?<![A-Za-z0-9.-])(\d{{5,12}})(?=[{_COUNTED}万亿])")
_CHINESE_PHONE = re.compile(r"(?<![\d.-])\d{3,4}(?:[- ]\d{3,8}){1,2}(?![\d-])")
_CHINESE_RANGE = re.compile(r"(?<![\d.-])(\d{1,4})\s?[-–~～至]\s?(\d{1,4})(?![\d.-])")
_CHINESE_FRACTION = re.compile(r"(?<![\d/.])(\d{1,3})/(\d{1,3})(?![\d/])")
_PERCENT_ZH = re.compile(r"(\d+(?:\.\d+)?)\s?%")


class Chinese:
    """Numbers of Mandarin (and, near enough, Cantonese)."""

    def rules(self) -> list[Rule]:
        return [
            (_AMOUNT, lambda m: self._amount(CURRENCIES[m[1]], m[2].replace(",", ""), m[3])),
            (_CHINESE_YEAR, lambda m: self._digits(m[1]) + "年"),
            (_ISO_DATE, lambda m: f"{self._digits(m[1])}年{self.number(m[2])}月{self.number(m[3])}日"),
            (_TIME, lambda m: self._time(m[1], m[2])),
            (_PERCENT_ZH, lambda m: "百分之" + self._decimal(m[1])),
            (_CHINESE_FRACTION, lambda m: f"{self.number(m[2])}分之{self.number(m[1])}"),
            (_CHINESE_PHONE, lambda m: "，".join(self._digits(group) for group in re.findall(r"\d+", m[0]))),
            (_CHINESE_RANGE, lambda m: f"{self.number(m[1])}到{self.number(m[2])}"),
            (_TWO, lambda _: "两"),
            (_CHINESE_MEASURE, lambda m: self.number(m[1])),
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
        said, is_gap = "", False
        for index in range(len(groups) - 1, -1, -1):
            group = groups[index]
            if int(group) == 0:
                is_gap = bool(said)
                continue
            if said and (is_gap or group[0] == "0"):
                said += _CHINESE_DIGITS[0]
            said, is_gap = said + self._group(group.lstrip("0")) + _CHINESE_GROUPS[index], False
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
        return "".join(_CHINESE_DIGITS[int(digit)] for digit in digits)

    def _decimal(self, number: str) -> str:
        whole, _, fraction = number.partition(".")
        return self.number(whole) + (f"点{self._digits(fraction)}" if fraction else "")

    def _amount(self, currency: str, whole: str, minor: str | None) -> str:
        minor = (minor or "").rstrip("0")
        return self._decimal(whole + (f".{minor}" if minor else "")) + _CHINESE_CURRENCIES[currency]

    def _time(self, hour: str, minute: str) -> str:
        said = "两" if int(hour) == 2 else self.number(hour)
        if not int(minute):
            return f"{said}点"
        return f"{said}点{'零' if int(minute) < 10 else ''}{self.number(minute)}分"

    def _plain(self, digits: str) -> str:
        is_grouped = re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", digits) is not None
        bare = digits.replace(",", "").lstrip("-")
        whole = bare.partition(".")[0]
        is_code = (len(whole) > MAX_AMOUNT_DIGITS and not is_grouped) or (len(whole) > 1 and whole[0] == "0")
        said = self._digits(bare.replace(".", "")) if is_code else self._decimal(bare)
        return ("负" if digits.startswith("-") and not is_code else "") + said + ("," if digits.endswith(",") else "")
