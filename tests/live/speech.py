"""What the callers of the live tests say, and what our own encoder hears in what they recorded.

The clips are the demo's, and one more made in the same way (minmo_runtime/training/demo_assets.py, voice
gmw/en-US+m7, held out of training): `clips/person.flac`, "i would like to speak to a person".
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from agent.demo_script import ASSETS
from agent.engine_link import EngineLink
from agent.recognise import plain_words, recognise, word_error_rate
from telephony.clips import read_clip

RATE_HZ = 8_000
CLIPS = Path(__file__).with_name("clips")


def clip_pcm(name: str) -> bytes:
    """int16 mono at 8 kHz."""
    found = next(folder / f"{name}.flac" for folder in (ASSETS, CLIPS) if (folder / f"{name}.flac").is_file())
    return read_clip(found, RATE_HZ)


def clip(name: str) -> np.ndarray:
    return np.frombuffer(clip_pcm(name), "<i2")


def recognised(engine_socket: Path, samples: np.ndarray) -> str:
    """The words that our encoder hears, over the engine's socket."""

    async def ask() -> str:
        link = EngineLink(engine_socket)
        try:
            return await recognise(await link.runtime(), samples.astype("<i2").tobytes(), RATE_HZ, "recorded-by-peer")
        finally:
            await link.close()

    return asyncio.run(ask())


def word_error_of(said: str, heard: str) -> float:
    """0 = every word; numbers are compared digit by digit."""
    assert plain_words(said), "nothing was said"
    return word_error_rate(said, heard)


def seconds_found(played: np.ndarray, heard: np.ndarray) -> list[float]:
    """For each second of `played` with sound in it: its best normalised correlation anywhere in `heard` (1 = exact)."""
    found = []
    size = 1 << (len(heard) + RATE_HZ).bit_length()
    spectrum = np.fft.rfft(heard.astype(float), size)
    energy = np.concatenate([[0.0], np.cumsum(heard.astype(float) ** 2)])
    window = energy[RATE_HZ:] - energy[:-RATE_HZ]
    first = int(np.argmax(np.abs(played) > 200))  # what comes before is silent here, but may not be there
    for start in range(first, len(played) - RATE_HZ + 1, RATE_HZ):
        piece = played[start : start + RATE_HZ].astype(float)
        if np.abs(piece).mean() < 100:
            continue
        products = np.fft.irfft(spectrum * np.conj(np.fft.rfft(piece, size)), size)[: len(window)]
        found.append(float(np.max(products / np.sqrt(np.maximum(window, window.max() * 1e-3) * np.sum(piece**2)))))
    return found
