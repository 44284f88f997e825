"""What is heard over the agent's speech: backchannels, bids for the floor, and sounds that are neither.

Phrases are split into those trained on and those held out. Sounds are 16 kHz waveforms at the level of `Mouth`;
everything random comes from the generators handed in. Knows nothing of scenes or labels. Stage 4.
"""

from __future__ import annotations

import random

import numpy as np
from scipy.signal import lfilter

from minmo_runtime.training import channel, sentences, synthesis
from minmo_runtime.training.data import HumanUtterances
from minmo_runtime.training.spoken import RATE_HZ, Mouth

# The commonest of all backchannels. espeak-ng spells "mm hm" and "mhm" letter by letter, so they are given as phonemes.
HUMS = {
    "train": ("[[m-h'm-]]", "[[@mh'@m]]", "[[m-m-]]", "[[m'h@m]]", "[[m-m'm-]]", "[[m-h'Vm]]"),
    "held": ("[[m-h'@m]]", "[[h'm-]]", "[[@m'hm-]]"),
}
_HUM_SHARE = 0.3
BACKCHANNELS = {
    "train": (
        "uh huh", "right", "yes", "yeah", "i see", "sure", "got it", "oh", "good", "ah okay", "hm", "oh yes", "aha",
        "great", "oh really", "yes yes", "okay yes", "ah i see", "hmm", "yep", "okay good", "ok", "perfect", "exactly",
        "nice", "that's good", "oh good", "of course", "i understand", "oh okay", "right right", "uh huh yes",
        "okay thanks", "very good", "ah yes", "wow", "true", "oh right", "sure sure", "mm", "ah good", "i got it",
    ),
    "held": ("okay", "alright", "yeah okay", "oh i see", "fine", "mmm", "uh huh okay"),
}  # fmt: skip
STOPS = {
    "train": (
        "stop", "wait", "no", "hold on", "excuse me", "sorry", "no no", "wait a second", "hello", "one question",
        "can i say something", "listen", "that's wrong", "not that", "but i want something else", "stop please",
        "no thank you", "one moment", "wait please", "sorry one thing", "excuse me please", "i don't want that", "but",
    ),
    "held": ("no wait", "hang on", "sorry no", "hey", "no stop", "actually"),
}  # fmt: skip
_TWO_SHARE = 0.35  # of the backchannels in training: "yes, i see"
_PEOPLE_SHARE = 0.3  # of interruptions and far voices, where recordings of people are there
_MOUTH_RMS = 0.1


def backchannel(rng: random.Random, split: str) -> str:
    """A phrase for the mouth."""
    if rng.random() < _HUM_SHARE:
        return rng.choice(HUMS[split])
    said = rng.choice(BACKCHANNELS[split])
    if split == "train" and rng.random() < _TWO_SHARE:
        return f"{said} {rng.choice(BACKCHANNELS[split])}"
    return said


def person(people: HumanUtterances | None, rng: np.random.Generator) -> np.ndarray | None:
    """Sometimes a person's words, as loud as the mouth; None: let the mouth speak."""
    if people is None or rng.random() >= _PEOPLE_SHARE:
        return None
    wave = people.draw(rng, digit_share=0.2).waveform
    return wave * np.float32(_MOUTH_RMS / channel.rms(wave))


def noise(mouth: Mouth, people: HumanUtterances | None, rng: np.random.Generator, split: str) -> np.ndarray:
    """A cough, other people's talk further away, or a rest of our own voice that the gate let through."""
    draw = rng.random()
    if draw < 0.35:
        return cough(rng)
    words = random.Random(int(rng.integers(1 << 60)))
    if draw < 0.7:
        far = person(people, rng)
        if far is None:
            voice = synthesis.random_caller_voice(rng, split == "held")
            prosody = synthesis.random_caller_prosody(rng)
            far = mouth.waveform(sentences.caller_utterance(words, split), voice, prosody)
        return far * np.float32(10 ** (-rng.uniform(12, 26) / 20))
    own = mouth.waveform(
        sentences.agent_utterance(words, "train"), synthesis.AGENT_VOICE, synthesis.agent_voice_prosody()
    )
    length = int(rng.uniform(0.15, 0.9) * RATE_HZ)
    start = int(rng.integers(0, max(1, len(own) - length)))
    return own[start : start + length] * np.float32(10 ** (-rng.uniform(10, 26) / 20))


def cough(rng: np.random.Generator) -> np.ndarray:
    """One to three bursts of coloured noise that die away."""
    bursts = []
    for _ in range(int(rng.integers(1, 4))):
        length = int(rng.uniform(0.08, 0.3) * RATE_HZ)
        noise = lfilter([1.0, 0.4], [1.0, -rng.uniform(0.3, 0.9)], rng.standard_normal(length))
        noise *= np.exp(-np.arange(length) / (rng.uniform(0.03, 0.1) * RATE_HZ))
        gap = np.zeros(int(rng.uniform(0.03, 0.2) * RATE_HZ))
        bursts += [noise / max(1e-6, np.abs(noise).max()) * rng.uniform(0.1, 0.5), gap]
    return np.concatenate(bursts).astype(np.float32)
