"""Speech from text with espeak-ng, for training only (stage 0): through ctypes, in-process, hundreds of times real
time.

espeak-ng is a development tool: nothing at run time imports this file. One process holds one espeak-ng instance, so
parallel synthesis means several processes. Phoneme events come with every utterance: aligned frame labels for free.

Trap (espeak-ng 1.51): it lists at most 350 voices; with more, *every* `lang+variant` fails. `prepare_voice_folder`
therefore
copies the data folder, drops what is not needed and adds at most 190 random variants.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

ESPEAK_RATE_HZ = 22_050
ACCENTS = (
    "gmw/en-US",
    "gmw/en",
    "gmw/en-GB-x-rp",
    "gmw/en-GB-scotland",
    "gmw/en-GB-x-gbclan",
    "gmw/en-GB-x-gbcwmd",
    "gmw/en-029",
)
TRAIN_VARIANTS = (
    "m1 m2 m3 m4 m5 m6 m8 f1 f2 f3 f5 croak klatt klatt2 klatt3 klatt4 adam alex Alicia Andy anikaRobot aunty belinda "
    "benjamin boris david ed edward grandma grandpa Gene Jacky Lee linda marcelo max Michael michel miguel Mike mike2 "
    "Mr_serious norbert paul pedro quincy rob robert sandro shelby steph steph2 steph3 travis Tweaky victor zac"
).split()
HELD_OUT_VARIANTS = ("m7", "f4", "Andrea", "caleb", "h000", "h001", "h002", "h003")
NUM_RANDOM_VARIANTS = 180
# The one voice the agent speaks with. It is not among the held-out voices.
AGENT_VOICE = "gmw/en-US+f2"
AGENT_RATE_WPM = 165
AGENT_PITCH = 45
AGENT_PITCH_RANGE = 55

_PHONEME_EVENT = 7  # espeakEVENT_PHONEME
_READS_TEXT = 1 | 0x100  # espeakCHARS_UTF8 | espeakPHONEMES


@dataclass(frozen=True)
class PhonemeEvent:
    """Phoneme `name` begins at `start_s`."""

    start_s: float
    name: str


@dataclass(frozen=True)
class Prosody:
    """Controls of one utterance: rate in words per minute, pitch and pitch range 0-99."""

    rate_wpm: int = 170
    pitch: int = 50
    pitch_range: int = 50


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def system_data_folder() -> Path:
    """Where Debian and most distributions keep espeak-ng-data; FileNotFoundError names the package to install."""
    for root in ("/usr/lib/x86_64-linux-gnu", "/usr/share", "/usr/local/share", "/usr/lib"):
        folder = Path(root) / "espeak-ng-data"
        if folder.is_dir():
            return folder
    raise FileNotFoundError("espeak-ng-data not found; for training run: sudo apt-get install espeak-ng")


def _random_variant(rng: np.random.Generator, name: str) -> str:
    """Text of one random voice variant (ranges: facts/recipes, 'Data')."""
    is_female = rng.random() < 0.5
    tract = rng.uniform(1.0, 1.25) if is_female else rng.uniform(0.86, 1.06)
    low = rng.uniform(120, 210) if is_female else rng.uniform(58, 130)
    lines = ["language variant", f"name {name}", f"gender {'female' if is_female else 'male'}"]
    lines.append(f"pitch {low:.0f} {low * rng.uniform(1.2, 1.8):.0f}")
    for formant in range(9):
        frequency = 100 * tract * rng.uniform(0.94, 1.06)
        lines.append(f"formant {formant} {frequency:.0f} {rng.uniform(65, 110):.0f} {rng.uniform(75, 160):.0f}")
    lines.append(f"flutter {rng.integers(0, 10)}")
    lines.append(f"roughness {rng.integers(0, 5)}")
    lines.append(f"voicing {rng.integers(60, 130)}")
    lines.append(f"consonants {rng.integers(70, 130)} {rng.integers(70, 130)}")
    if rng.random() < 0.3:
        lines.append(f"echo {rng.integers(10, 120)} {rng.integers(5, 20)}")
    if rng.random() < 0.4:
        lines.append("breath " + " ".join(str(v) for v in rng.integers(0, 5, 8)))
    if rng.random() < 0.5:
        lines.append(f"tone 600 {rng.integers(120, 220)} 1200 {rng.integers(90, 180)} 2400 {rng.integers(60, 160)}")
    return "\n".join(lines) + "\n"


def prepare_voice_folder(folder: Path, seed: int = 0) -> Path:
    """Copy espeak-ng's data with random voice variants r000.. (training) and h000..h003 (held out); idempotent."""
    data = folder / "espeak-ng-data"
    if (data / ".complete").exists():
        return data
    if data.exists():
        shutil.rmtree(data)
    shutil.copytree(system_data_folder(), data)
    shutil.rmtree(data / "voices" / "mb", ignore_errors=True)
    for language in (data / "lang").iterdir():
        if language.name not in ("gmw", "sit", "roa"):
            shutil.rmtree(language, ignore_errors=True)
    variants = data / "voices" / "!v"
    rng = np.random.default_rng(seed)
    names = [f"r{i:03d}" for i in range(NUM_RANDOM_VARIANTS)] + [v for v in HELD_OUT_VARIANTS if v.startswith("h0")]
    for name in names:
        (variants / name).write_text(_random_variant(rng, name))
    (data / ".complete").touch()
    return data


class Espeak:
    """One espeak-ng instance (process-wide: create one per process)."""

    def __init__(self, data_folder: Path | None = None) -> None:
        self._lib = ctypes.CDLL("libespeak-ng.so.1")
        folder = str((data_folder or system_data_folder()).parent)
        rate = self._lib.espeak_Initialize(
            2, 0, os.fsencode(folder), 1
        )  # synchronous: no thread that can deadlock; phoneme events on
        if rate != ESPEAK_RATE_HZ:
            raise RuntimeError(f"espeak_Initialize({folder}) returned {rate}: must be {ESPEAK_RATE_HZ}")
        self._pieces: list[np.ndarray] = []
        self._events: list[PhonemeEvent] = []
        self._callback = _CALLBACK(self._on_audio)  # kept referenced: C holds only the pointer
        self._lib.espeak_SetSynthCallback(self._callback)
        self._voice = ""

    def _on_audio(self, wav: object, num_samples: int, events: object) -> int:
        if wav and num_samples > 0:
            self._pieces.append(np.ctypeslib.as_array(wav, shape=(num_samples,)).copy())  # type: ignore[arg-type,call-overload]
        index = 0
        while events[index].type != 0:  # type: ignore[index]
            event = events[index]  # type: ignore[index]
            if event.type == _PHONEME_EVENT:
                name = bytes(event.id.string).split(b"\0")[0].decode("utf-8", "replace")
                self._events.append(PhonemeEvent(event.audio_position / 1000.0, name))
            index += 1
        return 0

    def synthesise(self, text: str, voice: str, prosody: Prosody = Prosody()) -> tuple[np.ndarray, list[PhonemeEvent]]:
        """Speak `text`: float32 waveform in [-1, 1] at 22.05 kHz, and its phoneme events. "[[...]]" in it are phonemes.

        `voice` is "lang+variant", e.g. "gmw/en-US+f2". ValueError if espeak-ng does not know it.
        """
        if voice != self._voice:
            if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
                raise ValueError(f"voice = {voice!r}: unknown to espeak-ng (more than 350 voices in the folder?)")
            self._voice = voice
        for parameter, value in ((1, prosody.rate_wpm), (2, 100), (3, prosody.pitch), (4, prosody.pitch_range)):
            self._lib.espeak_SetParameter(parameter, int(value), 0)
        self._pieces, self._events = [], []
        raw = text.encode()
        self._lib.espeak_Synth(raw, len(raw) + 1, 0, 0, 0, _READS_TEXT, None, None)
        self._lib.espeak_Synchronize()
        if not self._pieces:
            return np.zeros(0, np.float32), []
        return np.concatenate(self._pieces).astype(np.float32) / 32768.0, self._events


def to_rate(waveform: np.ndarray, rate_hz: int, from_rate_hz: int = ESPEAK_RATE_HZ) -> np.ndarray:
    """Offline resampling (soxr HQ)."""
    return soxr.resample(waveform, from_rate_hz, rate_hz).astype(np.float32) if rate_hz != from_rate_hz else waveform


def trim_silence(
    waveform: np.ndarray, rate_hz: int, keep_s: float = 0.05, floor: float = 0.003
) -> tuple[np.ndarray, float]:
    """Cut outer silence but `keep_s`; returns the waveform and how many seconds were cut in front."""
    voiced = np.flatnonzero(np.abs(waveform) > floor)
    if len(voiced) == 0:
        return waveform, 0.0
    keep = int(keep_s * rate_hz)
    start, end = max(0, voiced[0] - keep), min(len(waveform), voiced[-1] + keep)
    return waveform[start:end], start / rate_hz


def random_caller_voice(rng: np.random.Generator, held_out: bool) -> str:
    """A voice name: training voices and held-out voices never overlap."""
    accent = ACCENTS[rng.integers(len(ACCENTS))] if rng.random() > 0.4 else ACCENTS[0]
    if held_out:
        return f"{accent}+{HELD_OUT_VARIANTS[rng.integers(len(HELD_OUT_VARIANTS))]}"
    if rng.random() < 0.7:
        return f"{accent}+r{rng.integers(NUM_RANDOM_VARIANTS):03d}"
    return f"{accent}+{TRAIN_VARIANTS[rng.integers(len(TRAIN_VARIANTS))]}"


def random_caller_prosody(rng: np.random.Generator) -> Prosody:
    return Prosody(int(rng.uniform(125, 230)), int(rng.uniform(25, 75)), int(rng.uniform(20, 90)))


def agent_voice_prosody() -> Prosody:
    return Prosody(AGENT_RATE_WPM, AGENT_PITCH, AGENT_PITCH_RANGE)
