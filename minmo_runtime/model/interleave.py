"""The order of rows in the voice LM: one-shot, and 5 text to 15 voice tokens interleaved. Pure: no torch, no weights,
no clock.

`VoiceTurn` is one reply being spoken. It says which rows to feed next, which ids may be drawn, and takes the drawn id:

    WAITING --rows ready--> STREAMING --fill--> WAITING ... --text finished--> FINAL --end--> DONE

- A row is the start marker, a query vector (prefix of the caller's turn), a text (semantic) vector, the turn-of-speech
  marker (CosyVoice's task row), or a voice token.
- While text is still coming, blocks of 5 text rows are fed; after 15 voice tokens the block is full (the parent
  forces *fill* there, and never feeds it back), and the next block is awaited. The 15th token's row goes in together
  with the next block: one step less than the parent, the same numbers. When the text is finished, the rest and the
  turn-of-speech marker are fed and decoding runs to *end*.
- `training_layout` is the same order with its targets, so training and serving cannot drift apart (a test replays one
  by the other).

Sources: MinMo (arXiv 2501.06282 §3.2), CosyVoice 2 (arXiv 2412.10117 §2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

IGNORED = -1


class RowKind(Enum):
    START = 0
    TURN_OF_SPEECH = 1
    TEXT = 2
    VOICE = 3
    QUERY = 4


@dataclass(frozen=True)
class Row:
    """One input row. `index` = position in the text or query stream for TEXT and QUERY, the id for VOICE, else 0."""

    kind: RowKind
    index: int = 0


@dataclass(frozen=True)
class InterleaveRules:
    """Numbers of the checkpoint and our decisions about the reference's behaviour.

    `accept_early_fill`: the reference takes a fill drawn before the 15th voice token. Training data has fill only
    there, so for our own weights an early fill is banned by default.
    `repeat_last_input`: the reference feeds what it fed last a second time in front of the final text: a voice token
    (`[s.. t.. TASK]`), or a whole block of text if *fill* was drawn straight behind it. Training data never looks like
    this: off by default, on only to match its golden vectors.
    `continue_whole_prompt`: behind a prompt of whole blocks of voice the reference goes on for 15 voice tokens without
    new text. In training a block of text follows there: off by default, for the golden vectors too.
    `ban_other_stops`: in the last phase only *end* may end the turn; the reference's one-shot decode also ends on fill
    and on the unused id, and its interleaved decode raises on them.
    `min_voice_per_text` bans *end* before that many voice tokens per text row; at `max_voice_per_text` (+
    `max_voice_extra`) the turn ends by itself, so it always ends (the reference's last phase has no cap).
    """

    voice_token_size: int
    num_text: int = 5
    num_voice: int = 15
    interleaved: bool = True
    accept_early_fill: bool = False
    repeat_last_input: bool = False
    continue_whole_prompt: bool = False
    ban_other_stops: bool = True
    min_voice_per_text: float = 0.0
    max_voice_per_text: float = 20.0
    max_voice_extra: int = 50

    @property
    def end_id(self) -> int:
        return self.voice_token_size

    @property
    def unused_id(self) -> int:
        return self.voice_token_size + 1

    @property
    def fill_id(self) -> int:
        return self.voice_token_size + 2


class Phase(Enum):
    WAITING = "waiting"  # for text: nothing may be fed
    STREAMING = "streaming"  # voice tokens of a block, text still open
    FINAL = "final"  # all text fed; decoding to end
    DONE = "done"


class VoiceTurn:
    """One reply's rows. Call `next_rows`, feed them, draw an id outside `banned` from the last row, call `accept`;
    repeat.

    Owned and changed by the call's decoder only.
    """

    def __init__(
        self, rules: InterleaveRules, num_query: int = 0, prompt_voice: Sequence[int] = (), num_prompt_text: int = 0
    ) -> None:
        """`num_prompt_text`: how many of the first text rows belong to the prompt; they do not count for the length
        limits.
        """
        self.rules = rules
        self.phase = Phase.WAITING
        self.voice_tokens: list[int] = []  # emitted speech, without fill and end
        self.decoded: list[int] = []  # the same with fills and end: what repetition-aware sampling looks at
        self._pending = [Row(RowKind.START), *(Row(RowKind.QUERY, index) for index in range(num_query))]
        self._prompt = list(prompt_voice)
        self._num_text = 0
        self._num_prompt_text = num_prompt_text
        self._next_text = 0
        self._is_text_finished = False
        self._last_input: list[Row] = []  # for `repeat_last_input`
        self._is_fed = False  # the pending rows were handed out and await `accept`
        # Voice tokens until the next forced fill; a prompt may end inside a block: (P // 15 + 1) * 15 - P.
        self._until_fill = rules.num_voice - len(self._prompt) % rules.num_voice
        self._is_inside_prompt_block = False  # the prompt's voice ended inside a block: go on from it without new text

    def push_text(self, count: int) -> None:
        """`count` more semantic vectors exist."""
        assert not self._is_text_finished, "text after finish_text"
        self._num_text += count

    def finish_text(self) -> None:
        """No more text will come."""
        self._is_text_finished = True

    def next_rows(self) -> list[Row]:
        """Rows to feed now, in one go; empty while waiting for text and when done."""
        if self.phase is Phase.DONE or self._is_fed:
            return []
        if self.phase is Phase.WAITING and not self._open_block():
            return []
        rows, self._pending, self._is_fed = self._pending, [], True
        return rows

    def give_back(self, rows: list[Row]) -> None:
        """The pass that `next_rows` was called for has failed: the same rows will be asked for again."""
        self._pending, self._is_fed = rows, False

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that may not be drawn now."""
        rules = self.rules
        if self.phase is Phase.STREAMING:
            return (rules.end_id, rules.unused_id) + (() if rules.accept_early_fill else (rules.fill_id,))
        is_short = len(self.voice_tokens) < int(rules.min_voice_per_text * (self._num_text - self._num_prompt_text))
        return ((rules.end_id,) if is_short else ()) + (
            (rules.unused_id, rules.fill_id) if rules.ban_other_stops else ()
        )

    def accept(self, token: int) -> int | None:
        """Take the drawn id; returns the voice token it emits, or None for fill and end."""
        assert self._is_fed and self.phase in (Phase.STREAMING, Phase.FINAL), f"nothing was fed in {self.phase}"
        self._is_fed = False
        if token >= self.rules.voice_token_size:
            self.decoded.append(token)
            is_fill = token == self.rules.fill_id and self.phase is Phase.STREAMING
            self.phase = Phase.WAITING if is_fill else Phase.DONE
            self._until_fill = self.rules.num_voice
            return None
        self.decoded.append(token)
        self.voice_tokens.append(token)
        self._pending = [Row(RowKind.VOICE, token)]
        self._last_input = list(self._pending)
        self._until_fill -= 1
        if self.phase is Phase.STREAMING and self._until_fill == 0:
            self.decoded.append(self.rules.fill_id)
            self.phase, self._until_fill = Phase.WAITING, self.rules.num_voice
        elif self.phase is Phase.FINAL and len(self.voice_tokens) >= self._cap():
            self.phase = Phase.DONE
        return token

    def abandon(self) -> None:
        """End here, whatever the phase (a cut, a failure)."""
        self.phase = Phase.DONE

    def _open_block(self) -> bool:
        """Queue the rows of the next block, or of the rest of the text; False while there is too little text."""
        rules = self.rules
        if rules.interleaved:
            self._weave_prompt()
            if not self._prompt and (self._is_inside_prompt_block or self._available() >= rules.num_text):
                # Behind the first block the row of a forced fill's token waits; in the reference it went in by itself.
                first_row = len(self._pending) if self.decoded else 0
                if not self._is_inside_prompt_block:
                    self._take_text(rules.num_text)
                self._last_input = self._pending[first_row:]
                self._is_inside_prompt_block = False
                self.phase = Phase.STREAMING
                return True
        if not self._is_text_finished:
            return False
        if rules.repeat_last_input and self.decoded:
            self._pending += self._last_input
        self._take_text(self._available())
        self._pending.append(Row(RowKind.TURN_OF_SPEECH))
        self._take_prompt(len(self._prompt))
        self.phase = Phase.FINAL
        return True

    def _weave_prompt(self) -> None:
        """Put a prompt's text and voice in as finished blocks, as far as the text reaches."""
        while self._prompt and self._available() >= self.rules.num_text:
            self._take_text(self.rules.num_text)
            is_open = len(self._prompt) < self.rules.num_voice
            self._is_inside_prompt_block = is_open or self.rules.continue_whole_prompt
            self._take_prompt(self.rules.num_voice)

    def _available(self) -> int:
        return self._num_text - self._next_text

    def _take_text(self, count: int) -> None:
        self._pending += [Row(RowKind.TEXT, self._next_text + offset) for offset in range(count)]
        self._next_text += count

    def _take_prompt(self, count: int) -> None:
        self._pending += [Row(RowKind.VOICE, token) for token in self._prompt[:count]]
        self._prompt = self._prompt[count:]

    def _cap(self) -> int:
        num_text = self._num_text - self._num_prompt_text
        return int(self.rules.max_voice_per_text * num_text) + self.rules.max_voice_extra


@dataclass(frozen=True)
class Layout:
    """Rows of one training example and, per row, the id to predict (IGNORED = no loss)."""

    rows: tuple[Row, ...]
    targets: tuple[int, ...]


def training_layout(num_text: int, voice: Sequence[int], rules: InterleaveRules, num_query: int = 0) -> Layout:
    """Teacher-forcing rows of one utterance. Interleaved only if there is voice enough for it, else one-shot.

    Example with blocks of 2:3, text t0 t1 t2, voice a b c d e: rows S t0 t1 a b c t2 TASK d e,
    targets . . a b c fill . d e end.
    """
    rows = [Row(RowKind.START), *(Row(RowKind.QUERY, index) for index in range(num_query))]
    targets = [IGNORED] * len(rows)
    next_text = next_voice = 0
    if rules.interleaved and len(voice) * rules.num_text > num_text * rules.num_voice:
        while num_text - next_text >= rules.num_text:
            block = list(voice[next_voice : next_voice + rules.num_voice])
            rows += [Row(RowKind.TEXT, next_text + offset) for offset in range(rules.num_text)]
            rows += [Row(RowKind.VOICE, token) for token in block]
            targets += [IGNORED] * (rules.num_text - 1) + block + [rules.fill_id]
            next_text += rules.num_text
            next_voice += rules.num_voice
    rest = list(voice[next_voice:])
    rows += [Row(RowKind.TEXT, index) for index in range(next_text, num_text)]
    rows += [Row(RowKind.TURN_OF_SPEECH), *(Row(RowKind.VOICE, token) for token in rest)]
    targets += [IGNORED] * (num_text - next_text) + rest + [rules.end_id]
    return Layout(tuple(rows), tuple(targets))
