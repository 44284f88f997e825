"""The parents' released files as they are: tensors by their own key names, from the formats they were published in.

    model.safetensors                 Qwen2.5, one file
    model.safetensors.index.json      Qwen2.5-7B, in shards: the index says which file holds which key
    llm.pt, flow.pt, hift.pt, model.pt  CosyVoice 2, SenseVoice-Small: torch files, read with weights_only=True
    am.mvn                            SenseVoice: mean and variance of its features, Kaldi text

Knows nothing of modules: keys and tensors out. A .pt file can hold code; `weights_only` refuses anything but tensors.
Read once, at the start. Sources: facts/minmo.md 2.5 and 3.1.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# Some files wrap their state_dict once: training scripts save {"model": ...} or {"state_dict": ...}.
_WRAPPERS = ("state_dict", "model")


class PublicFileError(Exception):
    """A released file that cannot be read; the message names it and what was expected."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one released checkpoint, on the CPU, under its own key."""
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _read_torch(path)
    try:
        return load_file(str(path))
    except Exception as error:  # safetensors raises its own untyped errors for broken files
        raise PublicFileError(f"{path}: {error}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, ValueError) as error:
        raise PublicFileError(f"{index}: not an index of shards: {error!r}") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise PublicFileError(f"{shard}: named in {index.name}, but not there")
        tensors |= read_tensors(shard)
    if missing := sorted(set(weight_map) - set(tensors)):
        raise PublicFileError(f"{index}: no shard holds {', '.join(missing[:5])}")
    return tensors


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PublicFileError(f"{path}: holds more than tensors and is not loaded (weights_only)") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise PublicFileError(f"{path}: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict):
        raise PublicFileError(f"{path}: holds {type(loaded).__name__}, not a state_dict")
    # CosyVoice's own training adds counters ("epoch", "step") beside the tensors.
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}


def read_am_mvn(path: Path) -> tuple[Tensor, Tensor]:
    """(shift, scale), each [m * M]: features enter as (x + shift) * scale. The "mean" row is already negated."""
    rows = re.findall(r"<LearnRateCoef>\s+\S+\s+\[([^\]]*)\]", path.read_text(encoding="utf-8"))
    if len(rows) != 2:
        raise PublicFileError(f"{path}: has {len(rows)} rows of numbers, an am.mvn has two (AddShift, Rescale)")
    shift, scale = (torch.tensor([float(number) for number in row.split()]) for row in rows)
    if shift.shape != scale.shape:
        raise PublicFileError(f"{path}: {len(shift)} shifts and {len(scale)} scales")
    return shift, scale
