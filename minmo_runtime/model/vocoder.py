"""The vocoder box of the figure: mel frames become a 24 kHz waveform. Which kind is data of the checkpoint.

Both kinds have the same two methods: `new_state()` for one turn of one call, and `push(mel, state, is_final) ->
samples`.
Step 9 of the walk; what comes out is played from step 10 on. Knows nothing of either kind's inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minmo_runtime.model.fixed_shapes import FixedCall
from minmo_runtime.model.hift import (
    HiftDims,
    HiftState,
    HiftVocoder,
    groups_of_equal_shape,
    hift_keys,
    stack_states,
)
from minmo_runtime.model.source_filter import SourceFilterDims, SourceFilterState, SourceFilterVocoder

Vocoder = HiftVocoder | SourceFilterVocoder
VocoderState = HiftState | SourceFilterState
KINDS = ("hift", "source_filter")


def build_vocoder(table: Mapping[str, Any]) -> Vocoder:
    """From the table `[vocoder]`: `kind` and the sizes of that kind; weights are random until loaded."""
    table = dict(table)
    kind = table.pop("kind", None)
    if kind == "hift":
        return HiftVocoder(HiftDims.from_dict(table))
    if kind == "source_filter":
        return SourceFilterVocoder(SourceFilterDims.from_dict(table))
    raise ValueError(f"vocoder.kind = {kind!r}: must be one of {', '.join(KINDS)}")


def load_vocoder(vocoder: Vocoder, weights: dict[str, Tensor]) -> Vocoder:
    """Strict load for serving; HiFT's weight norm is folded afterwards. Released HiFT names are accepted."""
    if isinstance(vocoder, HiftVocoder):
        vocoder.load_state_dict(hift_keys(weights), strict=True)
        return vocoder.fold_weight_norm().eval()
    vocoder.load_state_dict(weights, strict=True)
    return vocoder.eval()


def samples_per_frame(vocoder: Vocoder) -> int:
    return vocoder.dims.samples_per_frame


def sample_rate_hz(vocoder: Vocoder) -> int:
    return vocoder.dims.sampling_rate if isinstance(vocoder, HiftVocoder) else vocoder.dims.sample_rate_hz


def push_rows(
    vocoder: Vocoder,
    mels: Sequence[Tensor],
    states: Sequence[VocoderState],
    finals: Sequence[bool],
    fixed: FixedCall | None = None,
) -> list[Tensor | Exception]:
    """`push` for several turns: samples [S] of each, or what its row raised.

    HiFT's rows of equal shape share one pass, with `fixed` one of a few shapes; the source-filter vocoder costs too
    little to be worth it.
    """
    made: list[Tensor | Exception | None] = [None] * len(mels)
    if isinstance(vocoder, HiftVocoder):
        hift_states = [state for state in states if isinstance(state, HiftState)]
        for rows in groups_of_equal_shape(mels, hift_states, finals):
            whole = stack_states([hift_states[row] for row in rows])
            mel = torch.cat([mels[row] for row in rows])
            samples = vocoder.push(mel, whole, finals[rows[0]], fixed=fixed)
            for index, row in enumerate(rows):
                hift_states[row].take_row(whole, index)
                made[row] = samples[index]
        return [samples for samples in made if samples is not None]
    for row, (mel, state, is_final) in enumerate(zip(mels, states, finals, strict=True)):
        assert isinstance(state, SourceFilterState)
        try:
            made[row] = vocoder.push(mel, state, is_final)[0]
        except Exception as error:  # this row's own; its neighbours' sound is already made
            made[row] = error
    return [samples for samples in made if samples is not None]
