"""Audio files as the leg's samples: for the synthetic caller, the apology and the lab. Reads whatever FFmpeg reads."""

from __future__ import annotations

from pathlib import Path

import av


def read_clip(path: Path | str, rate_hz: int = 8000) -> bytes:
    """The file's first audio track as int16 mono at `rate_hz`."""
    parts = []
    with av.open(str(path)) as file:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate_hz)
        for frame in file.decode(audio=0):
            parts += [out.to_ndarray().tobytes() for out in resampler.resample(frame)]
        parts += [out.to_ndarray().tobytes() for out in resampler.resample(None)]
    return b"".join(parts)
