"""Scenes for stage 4: the caller's channel of a short piece of a call, what is happening in it, and who speaks.

A caller's turn comes in parts with pauses of 0.3-2 s (inside a number, before it, behind an opener, between words) and
ends truly, or with "one moment" and silence. Over the agent's speech: nothing, a backchannel, an interruption (the
agent then stops, as in service), coughs, a television, echo of our own voice that the gate let through. Knows nothing
of encoders. Mix of facts/recipes part C, with more phrasings; pauses get comma intonation in half of the cases, because
a person's voice may or may not stay up.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

import numpy as np

from minmo_runtime.loudness import VoicedLevel
from minmo_runtime.model.duplex import CLASSES
from minmo_runtime.rates import input_samples
from minmo_runtime.text import DIGIT_WORDS
from minmo_runtime.training import channel, corpus, overlaps, sentences, synthesis
from minmo_runtime.training.data import HumanUtterances
from minmo_runtime.training.spoken import RATE_HZ, Mouth
from minmo_runtime.training.voicing import PACKET_MS, voiced_packets

PACKET = input_samples(PACKET_MS)

LABEL = {name: index for index, name in enumerate(CLASSES)}
_AGENT_ONLY_S = 6.0  # after which no further overlap begins
_OPENERS = ("hello", "hi", "yes hello", "um", "well", "okay", "good morning", "hello there", "yes", "so", "uh hi")
_LOOSE = frozenset("uh um er well so hello hi yes okay morning there please and then no hm".split())
_DIGITS = frozenset((*DIGIT_WORDS, "oh", "double", "triple"))
_INTENT_WEIGHTS = {
    "number_only": 5, "order_status_number": 4, "order_status": 2, "hours_day": 2, "hours": 1, "change_both": 3,
    "change_day": 1, "change": 1, "person": 2, "day_only": 2, "yes": 1, "no": 1, "trouble": 1, "repeat": 1, "slower": 1,
    "what_can_you_do": 1, "thanks": 1, "goodbye": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """Something that is judged. `kind`: pause_digits, pause_number (before one), pause_opener (behind "well" or
    "hello"), pause_words, end, waits, backchannel, interrupt, person (one more interruption: a recording of a person),
    noise. Samples of the scene; of an end or a wait, `end` is where its silence ends."""

    kind: str
    start: int
    end: int


@dataclass
class Scene:
    """`pieces` are (first sample behind it, label, whether the agent speaks); `commands` (sample, name) are what the
    agent told the runtime: take_turn, adopt, discard. `heard_before`: an earlier turn of this caller, if there was one.
    """

    waveform: np.ndarray
    pieces: list[tuple[int, int, bool]]
    commands: list[tuple[int, str]]
    marks: list[Mark]
    slot_digits: int
    heard_before: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def level_before(self) -> VoicedLevel:
        """How loud the caller is known to be when the scene begins."""
        level = VoicedLevel()
        pcm = (self.heard_before * 32767).round().clip(-32768, 32767).astype("<i2")
        for index, is_voiced in enumerate(voiced_packets(pcm)):
            if is_voiced:
                level.hear(pcm[index * PACKET : (index + 1) * PACKET])
        return level

    def without_sound(self) -> Scene:
        """What is judged of it."""
        nothing = np.zeros(0, np.float32)
        return dataclasses.replace(self, waveform=nothing, heard_before=nothing)


@dataclass
class SceneWriter:
    """Puts one scene together; everything random comes from `rng`."""

    mouth: Mouth
    rng: np.random.Generator
    split: str
    people: HumanUtterances | None = None  # recordings of people, beside the mouth
    parts: list[np.ndarray] = field(default_factory=list)
    pieces: list[tuple[int, int, bool]] = field(default_factory=list)
    commands: list[tuple[int, str]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    at: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(int(self.rng.integers(1 << 60)))
        self.voice = synthesis.random_caller_voice(self.rng, self.split == "held")
        self.prosody = synthesis.random_caller_prosody(self.rng)

    def write(self) -> Scene:
        kind = self.rng.choice(["caller", "agent_first", "caller_first", "agent_only"])
        if kind == "agent_only":
            while self.at < _AGENT_ONLY_S * RATE_HZ and not self.agent_phase():
                pass
        elif kind == "agent_first":
            if not self.agent_phase():
                self.silence(self.rng.uniform(0.2, 1.2), "idle")
                self.caller_phase(2.4)
        elif kind == "caller_first":
            self.caller_phase(self.rng.uniform(0.5, 1.8), is_answered=True)
            self.agent_phase()
        else:
            self.silence(self.rng.uniform(0.0, 0.4), "idle")
            self.caller_phase(2.4)
        before = self._heard_before() if kind in ("agent_only", "agent_first") else np.zeros(0, np.float32)
        wave = channel.degrade(np.concatenate([before, *self.parts]), self.rng, bool(self.rng.random() < 0.7))
        before, wave = wave[: len(before)], wave[len(before) :]
        slot_digits = corpus.NUM_DIGITS if self.rng.random() < 0.85 else 0
        return Scene(wave, self.pieces, self.commands, self.marks, slot_digits, before)

    def _heard_before(self) -> np.ndarray:
        """An earlier turn of this caller, somewhat louder or quieter; nothing while the agent greets."""
        if self.rng.random() < 0.3:
            return np.zeros(0, np.float32)
        return self.say(" ".join(self._words(False))) * np.float32(10 ** (self.rng.uniform(-3, 3) / 20))

    # ------------------------------------------------------------------ pieces

    def add(self, wave: np.ndarray, label: str, agent_speaks: bool = False) -> None:
        if len(wave):
            self.parts.append(wave.astype(np.float32))
            self.at += len(wave)
            self.pieces.append((self.at, LABEL[label], agent_speaks))

    def silence(self, seconds: float, label: str, agent_speaks: bool = False) -> None:
        """Sometimes with a cough or a click in it: that changes nothing about the turn."""
        wave = np.zeros(int(seconds * RATE_HZ), np.float32)
        if seconds > 0.5 and self.rng.random() < 0.1:
            burst = overlaps.cough(self.rng)
            if self.rng.random() < 0.4:
                burst = burst[: int(0.05 * RATE_HZ)]
            start = int(self.rng.integers(0, max(1, len(wave) - len(burst))))
            burst = burst[: len(wave) - start]
            wave[start : start + len(burst)] += burst
        self.add(wave, label, agent_speaks)

    def say(self, text: str) -> np.ndarray:
        return self.mouth.waveform(text, self.voice, self.prosody)

    # ------------------------------------------------------------------ the caller's turn

    def caller_phase(self, silent_s: float, is_answered: bool = False) -> None:
        waits = self.rng.random() < 0.1
        self.silence(self.rng.uniform(0.3, 1.0), "idle")
        words = self._words(waits)
        cuts = self._cuts(words)
        for start, end in zip([0, *cuts], [*cuts, len(words)], strict=True):
            if start:
                begin = self.at
                self.silence(self.rng.uniform(0.3, 2.0), "user_continues")
                self.marks.append(Mark(pause_kind(words, start), begin, self.at))
            text = " ".join(words[start:end])
            is_up = end < len(words) and self.rng.random() < 0.5
            self.add(self.say(f"{text}," if is_up else text), "user_continues")
        self._end("user_waits" if waits else "user_done", silent_s, is_answered and not waits)

    def _end(self, label: str, silent_s: float, is_answered: bool) -> None:
        begin = self.at
        if is_answered:
            self.commands.append((begin + int(self.rng.uniform(0.25, min(1.0, silent_s)) * RATE_HZ), "take_turn"))
        self.silence(silent_s, label)
        self.marks.append(Mark("end" if label == "user_done" else "waits", begin, self.at))

    def _words(self, waits: bool) -> list[str]:
        rng = self.random
        if waits:
            text = corpus.phrase("wait", self.split, rng)
        elif rng.random() < 0.08:
            text = sentences.caller_utterance(rng, self.split)
        else:
            intent = rng.choices(list(_INTENT_WEIGHTS), list(_INTENT_WEIGHTS.values()))[0]
            spoken = corpus.spoken_number(corpus.order_number(rng, self.split), rng)
            text = corpus.fill_phrase(corpus.phrase(intent, self.split, rng), spoken, corpus.day(rng))
        if rng.random() < 0.12:
            text = f"{rng.choice(_OPENERS)} {text}"
        return text.split()

    def _cuts(self, words: list[str]) -> list[int]:
        """Where pauses stand: likelier before and in numbers, and behind words that open a turn."""
        weights = np.array([_PAUSE_WEIGHTS[pause_kind(words, i)] for i in range(1, len(words))])
        wanted = int(self.rng.choice([0, 1, 2], p=[0.4, 0.4, 0.2]))
        wanted = min(wanted, len(weights))
        if not wanted:
            return []
        chosen = self.rng.choice(np.arange(1, len(words)), wanted, replace=False, p=weights / weights.sum())
        return sorted(int(i) for i in chosen)

    # ------------------------------------------------------------------ over the agent

    def agent_phase(self) -> bool:
        """True if the caller took the floor (and finished the turn)."""
        kind = str(self.rng.choice(["nothing", "noise", "backchannel", "interrupt"], p=[0.07, 0.28, 0.33, 0.32]))
        self.silence(self.rng.uniform(0.5, 1.6), "idle", True)
        begin = self.at
        if kind == "interrupt":
            self._interrupt()
            return True
        if kind == "backchannel":
            self.add(self.say(overlaps.backchannel(self.random, self.split)), "backchannel", True)
        elif kind == "noise":
            self.add(overlaps.noise(self.mouth, self.people, self.rng, self.split), "idle", True)
        if kind != "nothing":
            self.marks.append(Mark(kind, begin, self.at))
            self.commands.append((self.at + int(self.rng.uniform(0.3, 0.8) * RATE_HZ), "discard"))
        self.silence(self.rng.uniform(0.9, 1.6), "idle", True)
        return False

    def _interrupt(self) -> None:
        rng = self.random
        if rng.random() < 0.4:
            text = rng.choice(overlaps.STOPS[self.split])
            if rng.random() < 0.6:
                text = f"{text} {' '.join(self._words(False))}"
        else:
            text = " ".join(self._words(False))
        said = overlaps.person(self.people, self.rng)
        wave, begin = self.say(text) if said is None else said, self.at
        # The agent falls silent here, often only after a short "stop" has ended: service holds first and decides later.
        # Held-out scenes leave the time in which a late decision is still counted.
        stop = int((self.rng.uniform(0.35, 1.5) if self.split == "train" else 1.2) * RATE_HZ)
        self.add(wave[:stop], "interrupt", True)
        self.marks.append(Mark("interrupt" if said is None else "person", begin, begin + len(wave)))
        if len(wave) > stop:
            self.commands.append((self.at, "adopt"))
            self.add(wave[stop:], "user_continues")
        else:
            self.silence((stop - len(wave)) / RATE_HZ + 0.05, "interrupt", True)
            self.commands.append((self.at, "adopt"))
        self._end("user_done", self.rng.uniform(1.0, 2.4) if self.split == "train" else 2.4, False)


_PAUSE_WEIGHTS = {"pause_digits": 2.5, "pause_number": 4.0, "pause_opener": 4.0, "pause_words": 1.0}


def pause_kind(words: list[str], index: int) -> str:
    """What a pause before `words[index]` stands between."""
    before, after = words[index - 1], words[index]
    if after in _DIGITS:
        return "pause_digits" if before in _DIGITS else "pause_number"
    return "pause_opener" if before in _LOOSE else "pause_words"
