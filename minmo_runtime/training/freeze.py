"""What a stage may change, enforced: gradients by pattern, and hashes of every other tensor before and after.

A pattern in the stage's TOML names tensors as "<part>.<key>". Knows nothing of what the tensors are for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from minmo_runtime.training.resume import load_tensors
from minmo_runtime.training.stage import StageConfig


class FrozenTensorChanged(Exception):
    """A stage changed weights that its TOML does not name as trainable."""


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """One hash for a whole set, in any order: a part's identity (later parts keep the voice tokenizer's)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensor_hash(tensors[name])}\n".encode())
    return digest.hexdigest()


def part_hash(path: Path) -> str:
    return tensors_hash(load_tensors(path)[0])


def shipped_hashes(work_dir: Path) -> dict[str, str]:
    """Hash of every shipped tensor, by "<part>.<key>"."""
    return {
        f"{path.stem}.{name}": tensor_hash(tensor)
        for path in sorted((work_dir / "ship").glob("*.safetensors"))
        for name, tensor in load_tensors(path)[0].items()
    }


def changed_frozen(before: Mapping[str, str], after: Mapping[str, str], stage: StageConfig) -> list[str]:
    """Names of tensors that this stage may not change and that were changed, dropped or added: of its own parts and of
    its `frozen_parts`. Other stages may run beside it and ship theirs.
    """
    judged = {*stage.parts, *stage.frozen_parts}

    def is_judged(name: str) -> bool:
        return not stage.is_trainable(name) and ("*" in judged or name.split(".", 1)[0] in judged)

    return [name for name in sorted({*before, *after}) if is_judged(name) and before.get(name) != after.get(name)]


@contextmanager
def only_trainable(stage: StageConfig, modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Give gradients to the tensors the TOML names, to no other; on leaving, assert that the others are what they were.

    `modules` are by part name. Yields the names of the trainable parameters.
    """
    named = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
    trainable = [name for name in named if stage.is_trainable(name)]
    if not trainable:
        raise ValueError(f"stage {stage.name}: no tensor of {', '.join(modules)} matches {', '.join(stage.trainable)}")
    for name, parameter in named.items():
        parameter.requires_grad_(name in set(trainable))
    before = {name: tensor_hash(p) for name, p in named.items() if not stage.is_trainable(name)}
    yield trainable
    changed = [name for name, was in before.items() if tensor_hash(named[name]) != was]
    if changed:
        raise FrozenTensorChanged(f"stage {stage.name} changed frozen tensors: {', '.join(changed[:5])}")
