"""The sizes of each module, as frozen dataclasses read from the tables of `checkpoint.toml`.

A checkpoint folder says how large its modules are; no module knows whether it is nano or 8B. One dataclass per module,
one table per dataclass, and a key that the dataclass does not have is refused, so that a mistyped size cannot pass
unseen. It knows nothing of weights or of files. Read at the start, before step 8 of the walk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

DimsT = TypeVar("DimsT", bound="Dims")


@dataclass(frozen=True)
class Dims:
    """Parent of every module's sizes: only the strict reader."""

    @classmethod
    def from_dict(cls: type[DimsT], table: Mapping[str, Any]) -> DimsT:
        """Build from one TOML table; lists become tuples, unknown or missing keys raise ValueError with the allowed
        names.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(table) - set(known))
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown key {', '.join(unknown)}; allowed: {', '.join(known)}")
        needed = [name for name, field in known.items() if _is_required(field) and name not in table]
        if needed:
            raise ValueError(f"{cls.__name__}: missing key {', '.join(needed)}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})

    def to_dict(self) -> dict[str, Any]:
        """The TOML table again (tuples as lists)."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@dataclass(frozen=True)
class BackboneDims(Dims):
    """Qwen2's own names (`config.json` of a Qwen2 checkpoint)."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"backbone: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"backbone: head_dim {self.head_dim} must be even (rotary pairs)")


@dataclass(frozen=True)
class EncoderDims(Dims):
    """Voice encoder. SenseVoice-Small: front_end "lfr", m 7, n 6, fsmn_padding "symmetric", chunk_frames 0 (full
    context).
    """

    output_size: int
    attention_heads: int
    linear_units: int
    num_blocks: int
    vocab_size: int
    kernel_size: int = 11
    tp_blocks: int = 0
    num_mel_bins: int = 80
    front_end: str = "conv"  # "conv": two causal stride-2 convolutions; "lfr": stacked frames
    lfr_m: int = 1
    lfr_n: int = 1
    fsmn_padding: str = "causal"
    chunk_frames: int = 0  # encoder frames seen at once; 0 = full context
    left_context_frames: int = 0
    num_queries: int = 0
    has_cmvn: bool = False  # mean and variance travel in the weights
    languages: tuple[str, ...] = ()
    emotions: tuple[str, ...] = ()
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class VoiceTokenizerDims(Dims):
    """FSQ bottleneck after `cut_layer` blocks of the voice encoder; the product of `levels` is the number of voice
    tokens.
    """

    cut_layer: int
    levels: tuple[int, ...]
