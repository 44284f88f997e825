"""Every frame time of the runtime, derived from the checkpoint's numbers; nothing else may hard-code a millisecond of
a frame.

Example (nano): 160-sample fbank hops, four hops an encoder frame (640 samples = 40 ms, 25 Hz), chunks of 4 encoder
frames (160 ms); 25 voice tokens a second, blocks of 5 text to 15 voice tokens (600 ms), 960 samples of 24 kHz audio a
voice token.
"""

from __future__ import annotations

from dataclasses import dataclass

from minmo_runtime.api import INPUT_SAMPLE_RATE_HZ
from minmo_runtime.model.dims import Dims


@dataclass(frozen=True)
class Rates(Dims):
    """Table `[rates]` of checkpoint.toml."""

    encoder_frame_samples: int = 640  # input samples of one encoder frame
    encoder_chunk_frames: int = 4  # encoder frames handled at once
    output_sample_rate_hz: int = 24_000
    voice_token_samples: int = 960  # output samples of one voice token
    text_per_block: int = 5  # MinMo §3.2
    voice_per_block: int = 15

    def __post_init__(self) -> None:
        for name in ("encoder_frame_samples", "encoder_chunk_frames", "output_sample_rate_hz", "voice_token_samples"):
            if getattr(self, name) <= 0:
                raise ValueError(f"rates.{name} = {getattr(self, name)}: must be above 0")

    @property
    def encoder_chunk_samples(self) -> int:
        return self.encoder_frame_samples * self.encoder_chunk_frames

    @property
    def encoder_chunk_s(self) -> float:
        return self.encoder_chunk_samples / INPUT_SAMPLE_RATE_HZ

    @property
    def voice_token_s(self) -> float:
        return self.voice_token_samples / self.output_sample_rate_hz


def input_samples(milliseconds: float) -> int:
    """Milliseconds in samples of the input clock (16 kHz)."""
    return round(milliseconds * INPUT_SAMPLE_RATE_HZ / 1000)
