"""Training state in one safetensors file: weights, their moving average, optimiser moments, and where we are. No
pickle.

Written beside and renamed, so that a kill leaves the old state. Knows nothing of losses, data or time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Atomic: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata=metadata or {})
    temporary.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def save_state(
    path: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimisers: Sequence[torch.optim.Optimizer],
    progress: dict[str, Any],
) -> None:
    """`progress` is plain JSON. Only trainable weights are written: the frozen ones lie in their own part files."""
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    numbers: dict[str, Any] = {}
    for index, optimiser in enumerate(optimisers):
        for number, moments in optimiser.state_dict()["state"].items():
            for name, value in moments.items():
                key = f"optimiser.{index}.{number}.{name}"
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:
                    numbers[key] = value
    save_tensors(path, tensors, {"progress": json.dumps(progress), "numbers": json.dumps(numbers)})


def load_state(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimisers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Put everything back in place; returns `progress`."""
    tensors, metadata = load_tensors(path)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stored = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if set(wanted) != set(stored):
        different = sorted(set(wanted) ^ set(stored))[:5]
        raise ValueError(f"{path.name}: not the state of this model; differing tensors: {', '.join(different)}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])
        for name, tensor in average.items():
            tensor.copy_(tensors[f"average.{name}"])
    moments: dict[str, Any] = {name: t for name, t in tensors.items() if name.startswith("optimiser.")}
    moments |= json.loads(metadata["numbers"])
    for index, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, Any]] = {}
        for key, value in moments.items():
            _, owner, number, name = key.split(".", 3)
            if int(owner) == index:
                state.setdefault(int(number), {})[name] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return dict(json.loads(metadata["progress"]))
