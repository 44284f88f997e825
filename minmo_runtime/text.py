"""Text forms of the runtime: tokenizer, spoken numbers, tool lines, display case.

Everything the model reads or writes is lower case with light punctuation; numbers are digits ("45612") on the page and
single digit words in the ear ("four five six one two"). The functions here go between the two, the same ones in
training and in service. Knows nothing of audio, of calls or of what a tool does. Walk: between steps 8 and 9, and on
captions in step 10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPOKEN_DIGITS = {word: str(value) for value, word in enumerate(DIGIT_WORDS)} | {"oh": "0", "nought": "0"}
# Written alike or heard alike; a digit only between two digit words ("four five for one two"), or "o" beside one.
DIGIT_HOMOPHONES = {
    "o": "0",
    "won": "1",
    "to": "2",
    "too": "2",
    "tree": "3",
    "for": "4",
    "fore": "4",
    "sicks": "6",
    "ate": "8",
    "line": "9",
}
REPEATS = {"double": 2, "triple": 3}
TEENS = {
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
    "thirteen": "13",
    "fourteen": "14",
    "fifteen": "15",
    "sixteen": "16",
    "seventeen": "17",
    "eighteen": "18",
    "nineteen": "19",
}
TENS = {
    "twenty": "2",
    "thirty": "3",
    "forty": "4",
    "fifty": "5",
    "sixty": "6",
    "seventy": "7",
    "eighty": "8",
    "ninety": "9",
}
HESITATIONS = frozenset({"uh", "um", "er", "hm"})
MIN_DIGITS = 2  # "one moment" keeps its word
MIN_DIGITS_IF_UNSURE = 4  # "nine thirty" and "nine to five" are times, "forty five six twelve" a number


# ---------------------------------------------------------------- spoken numbers


def normalise_spoken(text: str) -> str:
    """Digit words to digits, where at least two stand in a row; everything else unchanged.

    "it is four five double six two please" -> "it is 45662 please"; "one moment" stays;
    "four five no four six" -> "45 no 46".
    """
    words = text.lower().split()
    out: list[str] = []
    position = 0
    while position < len(words):
        digits, end = _read_digits(words, position)
        if digits:
            out.append(digits)
            position = end
        else:
            out.append(words[position])
            position += 1
    return " ".join(out)


def _read_digits(words: Sequence[str], start: int) -> tuple[str, int]:
    """The longest run of digits from `start`: the digits ("" if too short for a number) and the index behind it."""
    digits, end, is_unsure = "", start, False
    position = start
    while position < len(words):
        piece, width, is_guess = _read_piece(words, position)
        if not piece and digits:
            piece, width, is_guess = _read_inside(words, position)
        if not piece:
            break
        digits, is_unsure = digits + piece, is_unsure or is_guess
        position += width
        end = position
    needed = MIN_DIGITS_IF_UNSURE if is_unsure else MIN_DIGITS
    return (digits, end) if len(digits) >= needed else ("", start)


def _read_piece(words: Sequence[str], position: int) -> tuple[str, int, bool]:
    """Digits, number of words read, and whether they are sure only in a longer run (tens)."""
    word = words[position]
    following = words[position + 1] if position + 1 < len(words) else ""
    if word in SPOKEN_DIGITS:
        return SPOKEN_DIGITS[word], 1, False
    if word.isdigit() and word.isascii():
        return word, 1, False
    if word in REPEATS and following in SPOKEN_DIGITS:
        return SPOKEN_DIGITS[following] * REPEATS[word], 2, False
    if word in TEENS:
        return TEENS[word], 1, True
    if word in TENS:
        if following in SPOKEN_DIGITS and following not in ("zero", "oh", "nought"):
            return TENS[word] + SPOKEN_DIGITS[following], 2, True
        return TENS[word] + "0", 1, True
    return "", 0, False


def _read_inside(words: Sequence[str], position: int) -> tuple[str, int, bool]:
    """Inside a run: a hesitation or a homophone counts only if a sure digit follows."""
    if position + 1 >= len(words):
        return "", 0, False
    piece, width, is_unsure = _read_piece(words, position + 1)
    if not piece:
        return "", 0, False
    if words[position] in HESITATIONS:
        return piece, width + 1, is_unsure
    if words[position] in DIGIT_HOMOPHONES:
        return DIGIT_HOMOPHONES[words[position]] + piece, width + 1, True  # unsure: asks for a longer run
    return "", 0, False


def speak_digits(text: str) -> str:
    """Every digit as its word, for synthesis and CTC targets: "order 45612." -> "order four five six one two."."""
    spoken = re.sub(r"\d", lambda match: f" {DIGIT_WORDS[int(match[0])]} ", text)
    return re.sub(r"\s+([.,?!;:])", r"\1", " ".join(spoken.split()))


def time_words(hour: int, minute: int = 0) -> str:
    """A time as the agent says it, twelve-hour: 9:30 -> "nine thirty", 17:00 -> "five", 13:05 -> "one oh five"."""
    names = (*DIGIT_WORDS, *TEENS)
    said = names[(hour - 1) % 12 + 1]
    if minute == 0:
        return said
    if minute < 10:
        return f"{said} oh {DIGIT_WORDS[minute]}"
    if minute < 20:
        return f"{said} {names[minute]}"
    tens = list(TENS)[minute // 10 - 2]
    return f"{said} {tens}" if minute % 10 == 0 else f"{said} {tens} {DIGIT_WORDS[minute % 10]}"


def digit_runs(text: str) -> list[str]:
    """All written numbers of a text, in order."""
    return re.findall(r"[0-9]+", text)


# ---------------------------------------------------------------- tool lines


def format_tool_line(name: str, arguments: dict[str, str]) -> str:
    """look_up_order, {"order_number": "45612"} -> "look_up_order order_number 45612"."""
    return " ".join([name, *(f"{key} {value}" for key, value in arguments.items())])


def parse_tool_line(line: str) -> tuple[str, dict[str, str]]:
    """The inverse; ValueError if a key stands without a value or nothing is there.

    Qwen2.5's own form is understood too: {"name": "look_up_order", "arguments": {"order_number": "45612"}}.
    """
    if line.startswith("{"):
        return _parse_json_call(line)
    words = line.split()
    if not words or len(words) % 2 == 0:
        raise ValueError(f"tool line {line!r}: expected a name and pairs of key and value")
    return words[0], dict(zip(words[1::2], words[2::2], strict=True))


def _parse_json_call(line: str) -> tuple[str, dict[str, str]]:
    try:
        call = json.loads(line)
        arguments = call.get("arguments") or {}
        return str(call["name"]), {str(key): str(value) for key, value in arguments.items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"tool line {line!r}: expected an object with name and arguments") from error


# ---------------------------------------------------------------- for the eye

_PROPER = {
    word: word.capitalize()
    for word in ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "mia")
}


def display_case(text: str, names: Iterable[str] = ()) -> str:
    """Model text for a transcript: capitals of sentences, "I", weekdays and the given names; no word is changed."""
    proper = _PROPER | {name.lower(): name for name in names}
    is_start = True
    out = []
    for word in text.split():
        bare = word.rstrip(".,?!;:")
        shown = proper.get(bare, bare)
        if bare == "i" or bare.startswith("i'"):
            shown = "I" + bare[1:]
        if is_start:
            shown = shown[:1].upper() + shown[1:]
        out.append(shown + word[len(bare) :])
        is_start = word[-1] in ".?!"
    return " ".join(out)


# ---------------------------------------------------------------- tokenizer


class TextTokenizer:
    """The text tokenizer of a checkpoint, from its `text_tokenizer.json`. Special tokens are found by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Qwen2.5 adds <tool_call> without calling it special; it is one all the same.
        self._specials = {added.content: token_id for token_id, added in tokenizer.get_added_tokens_decoder().items()}

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        return cls(Tokenizer.from_file(str(path)))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def special(self, name: str) -> int:
        """Id of a special token; KeyError with the name if this checkpoint has none."""
        return self._specials[name]

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._specials.values())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text or of text with special tokens written out; nothing is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The vocabulary entry itself, for logs."""
        return self._tokenizer.id_to_token(token_id) or ""


class TextStream:
    """Decodes one reply token by token: each `push` returns the text that is new and will not change any more.

    Byte pieces are held back until the character is whole (the next other token, or `finish`). One per reply.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        if self._tokenizer.token(token_id).startswith("<0x"):
            return ""
        # Byte-level vocabularies (Qwen's) have no such names: there an open character decodes to the replacement sign.
        return "" if self._tokenizer.decode(self._ids).endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """What is still held back."""
        whole = self._tokenizer.decode(self._ids)
        new = whole[len(self.text) :]
        self.text = whole
        return new


# ---------------------------------------------------------------- the dialogue on the page (ChatML)

ROLE_OPEN = "<|im_start|>{role}\n"
TURN_CLOSE = "<|im_end|>"
SYSTEM_LINE = "you are {name} at {shop}. {style} order numbers have {digits} digits."


def system_prompt(name: str, shop: str, style: str, digits: int = 5) -> str:
    """The system turn in the form nano was trained on; `style` is the policy's instruction sentence."""
    line = SYSTEM_LINE.format(name=name.lower(), shop=shop.lower(), style=style.lower(), digits=digits)
    return " ".join(line.split())


def chat_turn(role: str, text: str, is_open: bool = False) -> str:
    """One turn with its special tokens written out; an open turn has no end yet (somebody goes on).

    Roles: system, user, assistant, and tool, whose content is wrapped into a user turn as Qwen2.5's template does.
    """
    if role == "tool":
        role, text = "user", f"<tool_response>{text}</tool_response>"
    return ROLE_OPEN.format(role=role) + text + ("" if is_open else TURN_CLOSE)
