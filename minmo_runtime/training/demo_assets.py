"""The demo caller's audio: sentences and single digits in a voice held out of training, as small FLAC files.

    python -m minmo_runtime.training.demo_assets OUT_FOLDER [--voice gmw/en-US+m7]

Run at development time only (espeak-ng); the result is committed, so that `make demo` needs no speech synthesis.
Digits are single clips: any order number can be said with them. The phrasings are the corpus' held-out ones. Also
writes assets.toml (what is said in which file).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import soundfile

from minmo_runtime.text import DIGIT_WORDS
from minmo_runtime.training.synthesis import (
    ESPEAK_RATE_HZ,
    HELD_OUT_VARIANTS,
    Espeak,
    Prosody,
    prepare_voice_folder,
    to_rate,
    trim_silence,
)  # fmt: skip

RATE_HZ = 8_000  # what crosses the wire anyway
VOICE = "gmw/en-US+m7"
PROSODY = Prosody(rate_wpm=155, pitch=45, pitch_range=55)
PEAK = 0.45  # -7 dBFS, an ordinary telephone level
SENTENCES = {
    "order_status": "can you look for my order",
    "number_prefix": "yes the number is",
    "what_can_you_do": "what can you help with",
    "hours_day": "on saturday are you open",
    "goodbye": "great bye",
    "stop": "no wait",
    "backchannel_mm_hm": "[[m-h'm-]]",  # espeak-ng would spell "mm hm" letter by letter
    "backchannel_okay": "okay",
    "backchannel_right": "right",
    "backchannel_uh_huh": "uh huh",
}


def make(folder: Path, voice: str, work_folder: Path) -> int:
    """Writes every clip; returns the number of bytes."""
    if voice.split("+")[-1] not in HELD_OUT_VARIANTS:
        raise ValueError(f"voice = {voice!r}: must be one of the held-out variants {', '.join(HELD_OUT_VARIANTS)}")
    espeak = Espeak(prepare_voice_folder(work_folder))
    folder.mkdir(parents=True, exist_ok=True)
    texts = SENTENCES | {f"digit_{value}": word for value, word in enumerate(DIGIT_WORDS)}
    total = 0
    for name, text in texts.items():
        total += _write(folder / f"{name}.flac", espeak, text, voice)
    lines = [
        "# Written by minmo_runtime/training/demo_assets.py; the voice is held out of training.",
        f'voice = "{voice}"',
        "\n[texts]",
    ]
    lines += [f'{name} = "{text}"' for name, text in texts.items()]
    (folder / "assets.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return total


def _write(path: Path, espeak: Espeak, text: str, voice: str) -> int:
    waveform, _ = espeak.synthesise(text, voice, PROSODY)
    waveform, _ = trim_silence(waveform, ESPEAK_RATE_HZ, keep_s=0.02)
    waveform = to_rate(waveform, RATE_HZ)
    waveform *= PEAK / max(1e-6, float(np.abs(waveform).max()))
    soundfile.write(path, waveform, RATE_HZ, format="FLAC", subtype="PCM_16")
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--voice", default=VOICE)
    parser.add_argument("--work", type=Path, default=Path("work/voices"), help="where espeak-ng's data is prepared")
    arguments = parser.parse_args()
    print(f"{make(arguments.folder, arguments.voice, arguments.work)} bytes")


if __name__ == "__main__":
    main()
