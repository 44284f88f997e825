"""One part's tensors in a file: read (ours or a parent's, by its own names), written (float32, bfloat16, int8), hashed.

Tensors are stored as float32, bfloat16 or int8 (with `<key>.scale`, one per row) and run in float32. Every difference
between a file and the sizes is named with its key and shape. Knows nothing of checkpoint folders.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minmo_runtime.checkpoint_contents import CheckpointError
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.hift import HiftVocoder, hift_keys
from minmo_runtime.model.voice_lm import VoiceLm
from minmo_runtime.public_files import PublicFileError, read_am_mvn, read_tensors


def check_hash(path: Path, expected: str) -> None:
    if expected and (found := file_hash(path)) != expected:
        raise CheckpointError(f"{path}: sha256 is {found}, checkpoint.toml says {expected}")


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_weights(module: nn.Module, path: Path, cmvn: Path | None = None) -> None:
    """Fill a module from one file (ours or a parent's); every difference is named with its key and shape. `cmvn`: the
    parent's am.mvn, which stands beside its weights."""
    try:
        stored = read_tensors(path)
        if cmvn is not None:
            stored["cmvn_shift"], stored["cmvn_scale"] = read_am_mvn(cmvn)
    except (PublicFileError, OSError) as error:
        raise CheckpointError(str(error)) from error
    scales = {key.removesuffix(".scale"): stored.pop(key) for key in list(stored) if key.endswith(".scale")}
    tensors = {key: _to_float(tensor, scales.get(key)) for key, tensor in stored.items()}
    if isinstance(module, HiftVocoder):
        tensors = hift_keys(tensors)
    if isinstance(module, Backbone) and module.lm_head is None:
        tensors.pop("lm_head.weight", None)  # the tied table a second time
    wanted = module.state_dict()
    for key in wanted.keys() & tensors.keys():
        if wanted[key].shape != tensors[key].shape:
            raise CheckpointError(
                f"{path}: {key} has shape {list(tensors[key].shape)}, the sizes in checkpoint.toml want "
                f"{list(wanted[key].shape)}"
            )
    if isinstance(module, VoiceLm):
        tensors.pop("llm.model.lm_head.weight", None)  # the tied text head a second time; never used
    result = module.load_state_dict(tensors, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"{path}: missing {_some(result.missing_keys)}; not wanted {_some(result.unexpected_keys)}"
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") if keys else "nothing"


def _to_float(tensor: Tensor, scale: Tensor | None) -> Tensor:
    if tensor.dtype == torch.int8:
        assert scale is not None, "an int8 tensor needs its .scale"
        return tensor.float() * scale.float().view(-1, *([1] * (tensor.dim() - 1)))
    return tensor.float() if tensor.is_floating_point() else tensor


def save_weights(module: nn.Module, path: Path, dtype: str = "bfloat16") -> None:
    """Write a module's tensors as float32, bfloat16, or int8 with one scale a row (matrices; the rest stays
    bfloat16)."""
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"dtype {dtype!r}: must be float32, bfloat16 or int8")
    tensors: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        tensor = tensor.detach().contiguous()
        if dtype == "int8" and tensor.dim() >= 2:
            scale = tensor.float().flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
            shape = (-1, *([1] * (tensor.dim() - 1)))
            tensors[key] = (tensor.float() / scale.view(shape)).round().to(torch.int8)
            tensors[f"{key}.scale"] = scale
        elif tensor.is_floating_point() and dtype != "float32":
            tensors[key] = tensor.to(torch.bfloat16)
        else:
            tensors[key] = tensor.clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path))
