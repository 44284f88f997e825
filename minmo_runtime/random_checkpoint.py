"""A complete checkpoint folder with random weights: for tests and for measuring compute before anything is trained.

It speaks noise and understands nothing, and says so: its name is "random", and every part is listed as untrained in
its label. Sizes come from tables like those of checkpoint.toml: `NANO` (what the shipped checkpoint has) and `TINY`
(fast tests).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minmo_runtime.checkpoint_contents import module_of, parts, toml_of
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.voice_lm import VoiceLm
from minmo_runtime.weight_files import save_weights

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|turn_of_speech|>",
)

NANO: dict[str, dict[str, Any]] = {
    "encoder": {
        "output_size": 192,
        "attention_heads": 4,
        "linear_units": 768,
        "num_blocks": 6,
        "vocab_size": 500,
        "kernel_size": 11,
        "chunk_frames": 4,
        "left_context_frames": 80,
        "has_cmvn": True,
    },
    "llm": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 704,
        "vocab_size": 8192,
    },
    "output_projector": {"llm_hidden_size": 256, "semantic_size": 256, "form": "residual"},
    "voice_lm": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 704,
        "speech_token_size": 2187,
        "text_vocab_size": 8192,
    },
    "flow": {
        "vocab_size": 2187,
        "n_timesteps": 2,
        "inference_cfg_rate": 0.0,
        "mean_weight": 1.0,
        "noise_scale": 0.3,
        "left_context_s": 1.2,
        "encoder": {
            "output_size": 192,
            "attention_heads": 4,
            "linear_units": 768,
            "num_blocks": 3,
            "num_up_blocks": 2,
            "static_chunk_size": 15,
            "pre_lookahead_len": 3,
        },
        "estimator": {"channels": 128, "num_heads": 4, "num_mid_blocks": 2, "n_blocks": 1},
    },
    "vocoder": {"kind": "source_filter"},
}

TINY: dict[str, dict[str, Any]] = {
    "encoder": {**NANO["encoder"], "output_size": 32, "linear_units": 64, "num_blocks": 2, "left_context_frames": 16},
    "llm": {
        **NANO["llm"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 300,
    },
    "output_projector": {"llm_hidden_size": 32, "semantic_size": 32, "form": "residual"},
    "voice_lm": {
        **NANO["voice_lm"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "speech_token_size": 27,
        "text_vocab_size": 300,
    },
    "flow": {
        **NANO["flow"],
        "vocab_size": 27,
        "spk_embed_dim": 8,
        "encoder": {
            **NANO["flow"]["encoder"],
            "output_size": 32,
            "linear_units": 48,
            "num_blocks": 1,
            "num_up_blocks": 1,
        },
        "estimator": {"channels": 32, "num_heads": 2, "num_mid_blocks": 1, "n_blocks": 1},
    },
    "vocoder": {"kind": "source_filter", "width": 32, "num_blocks": 2, "f0_width": 32},
}


def byte_tokenizer() -> Tokenizer:
    """264 tokens: the special ones, then one per byte. Every text goes through unchanged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def letter_tokenizer(vocab_size: int) -> Tokenizer:
    """CTC pieces: blank, the word mark, letters and the apostrophe; the rest of the ids are never produced by a
    text."""
    pieces = ["<blank>", "▁", *"abcdefghijklmnopqrstuvwxyz'"]
    pieces += [f"<unused{i}>" for i in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def write_random_checkpoint(
    folder: str | Path,
    seed: int = 0,
    dims: Mapping[str, Mapping[str, Any]] = TINY,
    without: tuple[str, ...] = (),
    dtype: str = "float32",
) -> Path:
    """Write checkpoint.toml, weights and tokenizers. `without` leaves connectors out (their bridges then stand in)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {part: copy.deepcopy(dict(dims[part])) for part in parts() if part in dims and part not in without}
    byte_tokenizer().save(str(folder / "text_tokenizer.json"))
    letter_tokenizer(tables["encoder"]["vocab_size"]).save(str(folder / "ctc_tokenizer.json"))
    torch.manual_seed(seed)
    for part, table in tables.items():
        module = module_of(part, table)
        if isinstance(module, (Backbone, VoiceLm)):
            module.init_weights(torch.Generator().manual_seed(seed))
        save_weights(module, folder / f"{part}.safetensors", dtype)
    contents = {
        "name": "random UNTRAINED",
        "facts": {"languages": ["en"], "emotions": ["neutral"], "rates": ["normal"], "voices": ["agent"]},
        "tokenizers": {"text": "text_tokenizer.json", "ctc": "ctc_tokenizer.json"},
        **tables,
    }
    (folder / "checkpoint.toml").write_text(toml_of(contents), encoding="utf-8")
    return folder
