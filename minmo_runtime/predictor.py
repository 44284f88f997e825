"""The job of the trained duplex predictor: each owed moment of a call becomes one posterior.

A moment is answered when every encoder chunk that was complete then is encoded, and before the next one is (scheduler),
so what a step sees depends on the caller's audio alone and never on how late the engine is: the same steps as in
training. Rows are not batched; a step is a small fraction of an encoder chunk. Walk: step 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minmo_runtime.api import DuplexPrediction
from minmo_runtime.duplex_steps import facts, last_pieces, pool
from minmo_runtime.model.duplex import CLASSES, StepInputs
from minmo_runtime.rows import StreamFailure, each
from minmo_runtime.segment import Moment
from minmo_runtime.stream import Stream
from minmo_runtime.weights import Checkpoint


class Predictor:
    """Owns nothing but references: a call's state is in its stream."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.duplex = checkpoint.modules.duplex
        self.tokenizer = checkpoint.ctc_tokenizer
        self.device, self.dtype = device, dtype

    @property
    def step_ms(self) -> int:
        """0 without a trained predictor."""
        return self.duplex.dims.step_ms if self.duplex is not None else 0

    @property
    def reads_hidden(self) -> bool:
        """Whether it reads the LLM's hidden states (prefill.py hands them on), not the encoder's frames."""
        return self.duplex is not None and self.duplex.dims.input == "llm+projector"

    def predict(self, streams: list[Stream], now: float) -> dict[str, str]:
        """Answer each call's oldest moment."""
        return each(streams, lambda _, stream: self._predict(stream, now))

    def _predict(self, stream: Stream, now: float) -> None:
        assert self.duplex is not None, "no predictor in this checkpoint"
        moment = stream.moments.popleft()
        if stream.predictor_state is None:
            stream.predictor_state = self.duplex.init_state()
        steps = self._inputs(stream, moment)
        chances = self.duplex.forward_chunk(steps, stream.predictor_state)[0].float().exp()
        if not bool(torch.isfinite(chances).all()):
            raise StreamFailure("the duplex predictor gave NaN")
        posterior: dict[str, Any] = dict(zip(CLASSES, chances.tolist(), strict=True))
        stream.predicted(DuplexPrediction(call_id=stream.call_id, sample=moment.sample, **posterior), now)

    def _inputs(self, stream: Stream, moment: Moment) -> StepInputs:
        """One step, [1, ...] each."""
        assert self.duplex is not None
        dims, view = self.duplex.dims, stream.ear.view(moment, stream.slot_digits)
        vector = pool(stream.new_frames, dims.input_size // 2)
        stream.new_frames = []
        pieces = last_pieces(self.tokenizer, view, stream.ear.heard_so_far(overlap=False), dims.piece_window)
        return StepInputs(
            self._on_device(vector)[None],
            torch.tensor([moment.is_agent_speaking], device=self.device),
            self._on_device(torch.tensor([facts(view)[: dims.num_facts]])) if dims.num_facts else None,
            torch.tensor([pieces], device=self.device) if dims.piece_window else None,
        )

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)
