"""A training stage as data: what it trains, what it must leave alone, which gates it has to pass.

One TOML per stage in `training/stages/`. The driver (`training/train.py`) reads it, calls `run` of the named module,
and checks gates and frozen tensors. Every stage trainer is a module of this package with

    def run(stage: StageConfig, work_dir: Path, budget_s: float) -> dict[str, float]

which returns its gate metrics (rates in [0, 1], counts as numbers) and follows this layout of the work folder:

    <work_dir>/ship/<part>.safetensors   the current weights of one part; keys are the module's own state_dict keys
    <work_dir>/stages/<stage>/           the stage's own folder: resume state, score lists; free form
    <work_dir>/stages/<stage>/result.json  written by the driver: metrics, gates, seconds, hashes

`run` must go on from its own folder when it is called again, and must be quick when there is nothing left to do. It
knows nothing of other stages; this file knows nothing of torch.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES_DIR = Path(__file__).with_name("stages")
PARENTS = ("0a", "0b", "0c", "0d", "0e", "0f", "0g", "0h")
CONNECTORS = ("1a", "1b", "1c", "2a", "2b", "3", "4")
STAGE_ORDER = PARENTS + CONNECTORS


@dataclass(frozen=True)
class Gate:
    """One bar that a stage's metrics must pass. Exactly one of `at_most`, `at_least`, `at_most_of`, `at_least_of` is
    given.

    `at_most_of = "x"`: metric <= max(x * ratio, x + margin); `at_least_of = "x"`: metric >= x - margin.
    `count` names the metric that holds n, which must reach `min_count`.
    """

    metric: str
    at_most: float | None = None
    at_least: float | None = None
    at_most_of: str = ""
    at_least_of: str = ""
    ratio: float = 1.0
    margin: float = 0.0
    count: str = ""
    min_count: int = 0

    def __post_init__(self) -> None:
        given = [self.at_most is not None, self.at_least is not None, bool(self.at_most_of), bool(self.at_least_of)]
        if sum(given) != 1:
            raise ValueError(f"gate {self.metric}: exactly one of at_most, at_least, at_most_of, at_least_of is needed")

    def check(self, metrics: Mapping[str, float]) -> GateResult:
        """Compare; a metric that is missing fails the gate and says so."""
        missing = [
            name
            for name in (self.metric, self.at_most_of, self.at_least_of, self.count)
            if name and name not in metrics
        ]
        if missing:
            return GateResult(self.metric, False, f"not measured: {', '.join(missing)}")
        value, limit, sign = metrics[self.metric], self._limit(metrics), "<=" if self._is_upper() else ">="
        n = int(metrics[self.count]) if self.count else 0
        passed = (value <= limit if self._is_upper() else value >= limit) and n >= self.min_count
        size = f", n = {n} {self.count} (needs {self.min_count})" if self.count else ""
        return GateResult(self.metric, passed, f"{value:.4f} {sign} {limit:.4f}{size}")

    def _is_upper(self) -> bool:
        return self.at_most is not None or bool(self.at_most_of)

    def _limit(self, metrics: Mapping[str, float]) -> float:
        if self.at_most is not None:
            return self.at_most
        if self.at_least is not None:
            return self.at_least
        if self.at_most_of:
            reference = metrics[self.at_most_of]
            return max(reference * self.ratio, reference + self.margin)
        return metrics[self.at_least_of] - self.margin


@dataclass(frozen=True)
class GateResult:
    metric: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.metric}: {self.detail}"


@dataclass(frozen=True)
class StageConfig:
    """One stage's TOML.

    `module` is the trainer's name inside this package; `parts` are the weight files the stage may write; `trainable`
    are fnmatch patterns over "<part>.<tensor key>" (for example "voice_lm.*"): every tensor of `parts` that no pattern
    matches must have the same hash after the stage as before. `frozen_parts` names further parts that must not change
    while it runs ("*" = every one); parents may be trained side by side, so theirs is empty. What a trainer holds in
    memory it asserts itself (freeze.only_trainable).
    `settings` are the trainer's own numbers (learning rate, steps, batch ...).
    `restores_on_failure`: parts that an earlier stage made come back if a gate fails (what failed is kept in the
    stage's folder).
    """

    name: str
    title: str
    module: str
    parts: tuple[str, ...]
    trainable: tuple[str, ...]
    needs: tuple[str, ...] = ()
    budget_s: float = 600.0
    seed: int = 0
    frozen_parts: tuple[str, ...] = ()
    restores_on_failure: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()

    def is_trainable(self, tensor_name: str) -> bool:
        """`tensor_name` is "<part>.<tensor key>"."""
        return any(fnmatch.fnmatchcase(tensor_name, pattern) for pattern in self.trainable)

    def folder(self, work_dir: Path) -> Path:
        """The stage's own folder, made if needed."""
        path = work_dir / "stages" / self.name
        path.mkdir(parents=True, exist_ok=True)
        return path


def part_file(work_dir: Path, part: str) -> Path:
    """Where the current weights of one part lie."""
    return work_dir / "ship" / f"{part}.safetensors"


def parse_stage(table: Mapping[str, Any]) -> StageConfig:
    """Build from a parsed TOML table; an unknown key is refused by name."""
    table = dict(table)
    gates = tuple(Gate(**gate) for gate in table.pop("gate", []))
    known = {item.name for item in dataclasses.fields(StageConfig)} - {"gates"}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(
            f"stage {table.get('name', '?')}: unknown key {', '.join(unknown)}; "
            f"allowed: {', '.join(sorted(known))}, gate"
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return StageConfig(gates=gates, **values)


def load_stage(name: str, stages_dir: Path = STAGES_DIR) -> StageConfig:
    """Read `<stages_dir>/<name>.toml`."""
    path = stages_dir / f"{name}.toml"
    if not path.exists():
        known = ", ".join(sorted(item.stem for item in stages_dir.glob("*.toml")))
        raise ValueError(f"no training stage {name!r}; there are: {known}")
    stage = parse_stage(tomllib.loads(path.read_text()))
    if stage.name != name:
        raise ValueError(f"{path.name}: name = {stage.name!r} must be {name!r}")
    return stage
