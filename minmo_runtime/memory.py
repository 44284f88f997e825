"""How much memory a profile needs, before anything is loaded: weights part by part, and what each call holds.

Sizes come from the tables alone (meta device), so that `minmo doctor` can say "does not fit" without trying. Knows
nothing of what is running. Source of the flow's figure: keys and values of every estimator block at every Euler step,
twice with guidance (115 MB per second of audio at full size in bf16).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from minmo_runtime.checkpoint_contents import module_of, parts
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.model.voice_lm import VoiceLmDims

_BYTES = {"float32": 4, "bfloat16": 2}


def weight_bytes(contents: Mapping[str, Any], config: RuntimeConfig, names: tuple[str, ...]) -> dict[str, int]:
    """Part → bytes of its weights in the wanted number format."""
    with torch.device("meta"):
        return {
            part: sum(p.numel() for p in module_of(part, contents[part]).parameters()) * _BYTES[config.dtype]
            for part in parts()
            if part in contents and part in names
        }


def call_bytes(contents: Mapping[str, Any], config: RuntimeConfig, hears_audio: bool = False) -> int:
    """What one call holds: both LMs' keys and values at full length, the flow's window; `hears_audio`: a listening
    branch beside the LLM's context."""
    size = _BYTES[config.dtype]
    text_length = config.max_context_tokens + 2 * config.max_reply_tokens
    voice_length = config.max_voice_tokens + 2 * config.max_reply_tokens + config.max_context_tokens
    voice = VoiceLmDims.from_dict(contents["voice_lm"]).trunk()
    text = (2 if hears_audio else 1) * _kv_bytes(BackboneDims.from_dict(contents["llm"]), text_length, size)
    held = text + _kv_bytes(voice, voice_length, size)
    flow = FlowDims.from_dict(contents["flow"])
    estimator = flow.estimator
    blocks = (estimator.num_mid_blocks + 2) * estimator.n_blocks
    prompt_s = flow.prompt_context_s if "prompt_voice" in contents.get("files", {}) else 0.0
    frames = round((config.flow_window_s + prompt_s) * flow.token_rate_hz * flow.frames_per_token)
    rows = 2 if flow.inference_cfg_rate > 0 else 1
    width = estimator.num_heads * estimator.attention_head_dim
    return held + blocks * 2 * width * frames * max(1, flow.n_timesteps) * rows * size


def _kv_bytes(dims: BackboneDims, length: int, size: int) -> int:
    return 2 * dims.num_hidden_layers * dims.num_key_value_heads * dims.head_dim * length * size


def free_bytes(device: str) -> int:
    """Of the graphics card, or of this machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
