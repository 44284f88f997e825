"""Reading golden vectors: one case of one folder, one scenario of one case, and how far off a result is.

No golden test knows a size, a seed or a number of scenarios: everything is read from the folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """The files of one case (`lm`, `flow`, ...) in one folder of golden vectors."""

    folder: Path
    name: str

    def _existing(self, suffix: str) -> Path:
        path = self.folder / f"{self.name}_{suffix}"
        if not path.is_file():
            pytest.skip(f"{path.name} is not in this golden folder")
        return path

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self._existing("config.json").read_text())

    @property
    def facts(self) -> Any:
        return json.loads(self._existing("facts.json").read_text())

    @property
    def weights_path(self) -> Path:
        return self._existing("weights.safetensors")

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.weights_path)

    def vectors(self) -> dict[str, Tensor]:
        return load_file(self._existing("io.safetensors"))


def scenarios(io: dict[str, Tensor], start: str) -> list[str]:
    """Names of the scenarios whose name begins with `start`, in order; skips where there is none."""
    found = sorted({key.split(".")[0] for key in io if key.startswith(start)})
    if not found:
        pytest.skip(f"no scenario {start}* in this golden folder")
    return found


def scenario(io: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """One scenario's vectors by what follows its name."""
    found = {key[len(name) + 1 :]: value for key, value in io.items() if key.startswith(name + ".")}
    if not found:
        pytest.skip(f"{name} is not in this golden folder")
    return found


def max_error(made: Tensor, expected: Tensor) -> float:
    assert made.shape == expected.shape, (made.shape, expected.shape)
    return float((made - expected).abs().max()) if made.numel() else 0.0
