"""Who has answered a call that we placed: a verdict from what the callee sounds like and what it says.

Sound comes first, for it needs no recogniser and tells within a second (users.md L6, J4): who says a word and waits is
a person; who speaks on for three seconds is a machine; a beep is an answering machine, the special information tone a
carrier's announcement. Words come second and overturn it, for a call screener sounds like either: interim captions are
compared with phrases (prompts/answer_phrases.toml) as they grow, nobody waits for a final one. A machine may turn out a
person later (somebody picks up during the greeting), and a person a machine.

    strength    UNSURE  lengths only    HEARD  a beep, six seconds of speech    SAID  phrases, network tones

A weaker finding never overturns a stronger one, but that a person has come overturns every machine. Pure; time is the
leg's samples. What follows from a verdict: agent/callee_side.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from agent.prompts.answer_phrases import AnswerPhrases
from telephony.leg import AnswerEvidence


class AnsweredBy(StrEnum):
    UNDECIDED = "undecided"
    HUMAN = "human"
    VOICEMAIL = "voicemail"
    IVR = "ivr"
    CALL_SCREENER = "call_screener"
    CARRIER_MESSAGE = "carrier_message"


PEOPLE = (AnsweredBy.UNDECIDED, AnsweredBy.HUMAN)  # whom we speak to; the others are machines


class Strength(IntEnum):
    NONE = 0
    UNSURE = 1
    HEARD = 2
    SAID = 3


MACHINE_SPEAKS_S = 3.0  # in one go: a person would have waited for us by now
MACHINE_SPEAKS_ON_S = 5.0  # over our own opening, after a short word that sounded like a person's
SURELY_MACHINE_S = 6.0
PERSON_SPEAKS_S = 3.0  # at most, then a pause
PERSON_WAITS_S = 1.5  # after a longer utterance, without a beep: a person with a long greeting
KEPT_CAPTIONS = 64


@dataclass(frozen=True)
class Verdict:
    kind: AnsweredBy
    reason: str
    was: AnsweredBy


@dataclass
class WhoAnswered:
    """One call's callee. Each method returns a verdict when it changes, else None."""

    rate_hz: int
    phrases: AnswerPhrases = field(default_factory=AnswerPhrases.load)
    kind: AnsweredBy = AnsweredBy.UNDECIDED
    strength: Strength = Strength.NONE
    spoken_samples: int = 0  # in all utterances that are over
    last_end: int | None = None  # of the latest utterance
    _captions: dict[int, tuple[int, str]] = field(default_factory=dict)  # first sample -> (last, text)
    _read_from: int = 0  # words before it have been weighed

    @property
    def is_machine(self) -> bool:
        return self.kind not in PEOPLE

    @property
    def is_sure(self) -> bool:
        return self.strength > Strength.UNSURE

    # ------------------------------------------------------------------- sound

    def hear(self, evidence: AnswerEvidence, *, may_be_person: bool, is_greeted: bool) -> Verdict | None:
        """`may_be_person`: a machine would be silent now (it records, or it has passed on who calls). `is_greeted`: our
        opening was heard out, so that what follows is an answer, however long it is."""
        match evidence.kind:
            case "special_information":
                return self._find(AnsweredBy.CARRIER_MESSAGE, Strength.SAID, "special information tone")
            case "busy":
                return self._find(AnsweredBy.CARRIER_MESSAGE, Strength.SAID, "busy tone after the answer")
            case "fax":
                return self._find(AnsweredBy.IVR, Strength.SAID, "fax tone")
            case "beep" if self.kind not in (AnsweredBy.CALL_SCREENER, AnsweredBy.CARRIER_MESSAGE):
                return self._find(AnsweredBy.VOICEMAIL, Strength.HEARD, f"beep of {evidence.frequency_hz} Hz")
            case "speaking":
                return self._on_speaking(evidence, is_greeted)
            case "utterance":
                return self._on_utterance(evidence, may_be_person, is_greeted)
        return None

    def _on_speaking(self, evidence: AnswerEvidence, is_greeted: bool) -> Verdict | None:
        """Told again and again while one utterance goes on."""
        length_s = evidence.num_samples / self.rate_hz
        self.last_end = None
        reason = f"spoke {length_s:.1f} s without a pause"
        total_s = (self.spoken_samples + evidence.num_samples) / self.rate_hz
        if self.kind is AnsweredBy.VOICEMAIL and total_s >= SURELY_MACHINE_S:
            self.strength = max(self.strength, Strength.HEARD)
        limit_s = MACHINE_SPEAKS_S if self.kind is AnsweredBy.UNDECIDED else MACHINE_SPEAKS_ON_S
        if self.is_machine or is_greeted or length_s < limit_s:
            return None
        return self._find(AnsweredBy.VOICEMAIL, Strength.UNSURE, reason)

    def _on_utterance(self, evidence: AnswerEvidence, may_be_person: bool, is_greeted: bool) -> Verdict | None:
        """It has spoken, and waits."""
        length_s = evidence.num_samples / self.rate_hz
        self.spoken_samples += evidence.num_samples
        self.last_end = evidence.sample
        if self.kind is AnsweredBy.UNDECIDED and (is_greeted or length_s <= PERSON_SPEAKS_S):
            how = "answered our greeting" if is_greeted else f"spoke {length_s:.1f} s, then waited"
            return self._find(AnsweredBy.HUMAN, Strength.UNSURE, how)
        if length_s > PERSON_SPEAKS_S:
            return None
        said = self._words_since(evidence.sample - evidence.num_samples)
        if self.is_machine and self.phrases.is_person(said):
            return self._person_came(f"said {said!r} and waited", evidence.sample)
        if self.is_machine and may_be_person and not self.phrases.find(said)[0]:
            return self._person_came(f"spoke {length_s:.1f} s where a machine is silent", evidence.sample)
        return None

    def pass_time(self, sample: int) -> Verdict | None:
        """A voice of some seconds that looked like a machine, has ended and waits: a business answers so."""
        if self.kind is not AnsweredBy.VOICEMAIL or self.is_sure or self.last_end is None:
            return None
        if sample - self.last_end < PERSON_WAITS_S * self.rate_hz:
            return None
        spoke_s = self.spoken_samples / self.rate_hz
        return self._person_came(f"spoke {spoke_s:.1f} s, then waited {PERSON_WAITS_S} s without a beep", self.last_end)

    # ------------------------------------------------------------------- words

    def read(self, text: str, start_sample: int, end_sample: int) -> Verdict | None:
        """A caption, interim or final; a later one with the same `start_sample` takes its place."""
        self._captions[start_sample] = (end_sample, text)
        while len(self._captions) > KEPT_CAPTIONS:
            del self._captions[min(self._captions)]
        # Once words have decided, only new ones may decide otherwise.
        weighed = text if self.strength is Strength.SAID else self._words_since(self._read_from)
        kind, words = self.phrases.find(weighed)
        if not kind or (self.kind is AnsweredBy.CALL_SCREENER and kind == AnsweredBy.IVR):
            return None  # a screener asks to stay on the line, too
        return self._find(AnsweredBy(kind), Strength.SAID, f"said {words!r}")

    def _words_since(self, sample: int) -> str:
        kept = [(start, text) for start, (end, text) in self._captions.items() if end > sample]
        return " ".join(text for _, text in sorted(kept))

    # ------------------------------------------------------------------- private

    def _find(self, kind: AnsweredBy, strength: Strength, reason: str) -> Verdict | None:
        if strength < self.strength or kind is self.kind:
            self.strength = max(self.strength, strength) if kind is self.kind else self.strength
            return None
        return self._decide(kind, strength, reason)

    def _person_came(self, reason: str, sample: int) -> Verdict:
        """What was said until now was the machine's, and is weighed no more."""
        self._read_from = sample
        self.spoken_samples = 0
        return self._decide(AnsweredBy.HUMAN, Strength.UNSURE, reason)

    def _decide(self, kind: AnsweredBy, strength: Strength, reason: str) -> Verdict:
        was, self.kind, self.strength = self.kind, kind, strength
        return Verdict(kind, reason, was)
