"""What lies between a mouth and our socket: level, spectral tilt, noise, and the telephone band (G.711 at 8 kHz).

Works on float32 waveforms at 16 kHz; everything random comes from the generator that is handed in.
"""

from __future__ import annotations

import numpy as np
import soxr
from numpy.random import Generator
from scipy.signal import lfilter

RATE_HZ = 16_000
TELEPHONE_RATE_HZ = 8_000


def mu_law(waveform: np.ndarray) -> np.ndarray:
    """G.711 mu-law there and back (ITU-T G.711, 8 bits, mu = 255)."""
    mu = 255.0
    squeezed = np.sign(waveform) * np.log1p(mu * np.abs(np.clip(waveform, -1, 1))) / np.log1p(mu)
    coded = np.round((squeezed + 1) * 127.5) / 127.5 - 1
    return (np.sign(coded) * np.expm1(np.abs(coded) * np.log1p(mu)) / mu).astype(np.float32)


def telephone(waveform: np.ndarray) -> np.ndarray:
    """Through an 8 kHz mu-law line and back to 16 kHz."""
    narrow = soxr.resample(waveform, RATE_HZ, TELEPHONE_RATE_HZ, quality="MQ")
    return soxr.resample(mu_law(narrow), TELEPHONE_RATE_HZ, RATE_HZ, quality="MQ").astype(np.float32)


def noise(rng: Generator, length: int) -> np.ndarray:
    """White to brownish noise of unit RMS."""
    white = rng.standard_normal(length).astype(np.float32)
    colour = rng.uniform(0.0, 0.97)
    coloured = lfilter([1.0], [1.0, -colour], white).astype(np.float32)
    return coloured / max(float(np.sqrt(np.mean(coloured**2))), 1e-9)


def tilt(waveform: np.ndarray, rng: Generator) -> np.ndarray:
    """A gentle first-order slope, brighter or darker."""
    a = rng.uniform(-0.4, 0.4)
    return lfilter([1.0, -a], [1.0], waveform).astype(np.float32)


def rms(waveform: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(waveform)) + 1e-12))


def degrade(
    waveform: np.ndarray, rng: Generator, is_telephone: bool, snr_db: tuple[float, float] = (18.0, 55.0)
) -> np.ndarray:
    """One random line: tilt, noise floor, level -38 to -14 dBFS, telephone band if asked."""
    if rng.random() < 0.6:
        waveform = tilt(waveform, rng)
    level = max(rms(waveform), 1e-4)
    waveform = waveform + noise(rng, len(waveform)) * level * 10 ** (-rng.uniform(*snr_db) / 20)
    waveform = waveform * (10 ** (rng.uniform(-38, -14) / 20) / max(rms(waveform), 1e-6))
    waveform = np.clip(waveform, -1, 1)
    return telephone(waveform) if is_telephone else waveform.astype(np.float32)
