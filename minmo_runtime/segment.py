"""One stretch of the caller's speech, from the gate's onset to the end of its hangover, and what a gate knows at a
moment.

Made and ended by ear.py; the encode job (runner.py) takes the samples and leaves its results here. Holds, does nothing.
Walk: step 6.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minmo_runtime import features
from minmo_runtime.caption_search import CaptionSearch
from minmo_runtime.conversation import AudioVector
from minmo_runtime.ctc import GreedyCtc
from minmo_runtime.loudness import VoicedLevel


@dataclass(eq=False)  # one is itself only: two calls' turns may hold equal values
class Segment:
    """One stretch of caller speech. The gate appends samples; the encode job takes them and writes `ctc`, `text`."""

    start_sample: int
    last_voiced_sample: int
    onset_sample: int  # first voiced sample, behind the pre-roll
    is_overlap: bool  # began while the agent was speaking
    pcm: deque[NDArray[np.int16]] = field(default_factory=deque)  # not yet turned into features
    num_samples: int = 0
    level: VoicedLevel = field(default_factory=VoicedLevel)
    num_frames_encoded: int = 0  # fbank frames
    is_closed: bool = False  # no sample follows
    is_final: bool = False  # all of it is encoded
    is_discarded: bool = False  # a backchannel, noise, echo: forget it
    ctc: GreedyCtc | CaptionSearch = field(default_factory=GreedyCtc)
    text: str = ""
    # Owned by the encode job; opaque here.
    fbank: Any = None
    encoder_state: Any = None
    pending_features: Any = None
    projector_state: Any = None
    audio: list[AudioVector] = field(default_factory=list)  # what the LLM reads of it, behind a trained projector
    settled_voice: Any = None  # full_context.SettledVoice
    settled: Any = None  # full_context.SettledText, of an encoder that runs again over the whole segment

    def append(self, pcm: NDArray[np.int16]) -> None:
        self.pcm.append(pcm)
        self.num_samples += len(pcm)

    def take_pcm(self) -> NDArray[np.int16]:
        """Everything not yet taken, as one array."""
        pcm = np.concatenate(self.pcm) if self.pcm else np.zeros(0, np.int16)
        self.pcm.clear()
        return pcm

    def num_frames_waiting(self) -> int:
        """Fbank frames that could be encoded now."""
        return features.num_frames(self.num_samples) - self.num_frames_encoded

    @property
    def is_spent(self) -> bool:
        """Closed, and every frame of it was encoded: there is no chunk left to run."""
        return self.is_closed and self.num_frames_waiting() <= 0


@dataclass(frozen=True)
class Moment:
    """One due prediction: what the gate knew then, and how many encoder chunks of the call were complete."""

    sample: int
    is_voiced: bool
    silence_samples: int
    voiced_samples: int
    is_agent_speaking: bool
    has_segment: bool
    num_chunks: int
    loudness_db: float | None  # of the open segment beside the caller's own turns
