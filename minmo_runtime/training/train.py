"""`minmo train`: run training stages in order, resumable, with gates and frozen weights checked by hash.

A chain stops at the first failed gate and names it. A stage that already passed with the same settings is not run
again; one that was killed goes on where it was. Everything specific to a stage is in its TOML and its trainer module.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minmo_runtime.training.freeze import FrozenTensorChanged, changed_frozen, shipped_hashes
from minmo_runtime.training.stage import (
    CONNECTORS,
    PARENTS,
    STAGE_ORDER,
    STAGES_DIR,
    GateResult,
    StageConfig,
    load_stage,
    part_file,
)

GROUPS = {"parents": PARENTS, "connectors": CONNECTORS, "all": STAGE_ORDER}
Log = Callable[[str], None]


@dataclass(frozen=True)
class StageOutcome:
    stage: str
    metrics: dict[str, float]
    gates: tuple[GateResult, ...]
    seconds: float

    @property
    def failed(self) -> list[GateResult]:
        return [gate for gate in self.gates if not gate.passed]


class GateFailed(Exception):
    """A stage did not reach its bar; the chain stops here."""

    def __init__(self, outcome: StageOutcome) -> None:
        self.outcome = outcome
        details = "; ".join(f"{gate.metric}: {gate.detail}" for gate in outcome.failed)
        super().__init__(f"stage {outcome.stage}: gate not passed: {details}")


def expand(names: Sequence[str]) -> list[str]:
    """Stage names and groups -> stage names, in the given order."""
    return [stage for name in names for stage in GROUPS.get(name, (name,))]


def config_hash(stage: StageConfig) -> str:
    """Changes with anything in the TOML."""
    return hashlib.sha256(repr(stage).encode()).hexdigest()


def has_passed(stage: StageConfig, work_dir: Path) -> bool:
    """The stored result is of these settings and all its gates passed."""
    path = stage.folder(work_dir) / "result.json"
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    return bool(result["config"] == config_hash(stage) and all(gate["passed"] for gate in result["gates"]))


def run_stage(stage: StageConfig, work_dir: Path, budget_s: float, log: Log = print) -> StageOutcome:
    """One stage: hashes, trainer, hashes, gates. Raises FrozenTensorChanged; a failed gate is in the outcome."""
    trainer = importlib.import_module(f"minmo_runtime.training.{stage.module}")
    log(f"stage {stage.name}: {stage.title}; trains {', '.join(stage.trainable)}; {budget_s:.0f} s")
    before = shipped_hashes(work_dir)
    _keep_parts(stage, work_dir)
    started = time.monotonic()
    metrics = {name: float(value) for name, value in trainer.run(stage, work_dir, budget_s).items()}
    seconds = time.monotonic() - started
    for name, value in metrics.items():  # first of all: they cost hours
        log(f"  {name} = {value:.4f}")
    after = shipped_hashes(work_dir)
    changed = changed_frozen(before, after, stage)
    if changed:
        raise FrozenTensorChanged(f"stage {stage.name} changed frozen tensors: {', '.join(changed[:5])}")
    outcome = StageOutcome(stage.name, metrics, tuple(gate.check(metrics) for gate in stage.gates), seconds)
    _write_result(stage, work_dir, outcome, after)
    for gate in outcome.gates:
        log(f"  gate {gate}")
    if outcome.failed and stage.restores_on_failure:
        _restore_parts(stage, work_dir)
        log(f"  {', '.join(stage.parts)}: back to what was there before stage {stage.name}")
    return outcome


def train(
    names: Sequence[str],
    work_dir: Path,
    budget_s: float | None = None,
    again: bool = False,
    stages_dir: Path = STAGES_DIR,
    log: Log = print,
) -> list[StageOutcome]:
    """Run the chain; `budget_s` replaces each stage's own, `again` runs passed stages too. Raises GateFailed."""
    outcomes = []
    for name in expand(names):
        stage = load_stage(name, stages_dir)
        if not again and has_passed(stage, work_dir):
            log(f"stage {name}: already passed")
            continue
        missing = [need for need in stage.needs if not (work_dir / "stages" / need / "result.json").exists()]
        if missing:
            log(f"stage {name}: no result of {', '.join(missing)} here; going on with the weights in ship/")
        outcome = run_stage(stage, work_dir, budget_s or stage.budget_s, log)
        outcomes.append(outcome)
        if outcome.failed:
            raise GateFailed(outcome)
    return outcomes


def main(names: Sequence[str], work_dir: Path, budget_s: float | None = None, again: bool = False) -> int:
    """For the command line: 0 = all gates passed, 1 = a gate failed (named)."""
    try:
        train(names or ["all"], work_dir, budget_s, again)
    except GateFailed as failure:
        print(failure)
        return 1
    return 0


def _keep_parts(stage: StageConfig, work_dir: Path) -> None:
    """Copy the stage's parts as they were before its first run; a resumed run keeps that copy."""
    kept = stage.folder(work_dir) / "before"
    if not stage.restores_on_failure or kept.exists():
        return
    kept.mkdir()
    for part in stage.parts:
        if part_file(work_dir, part).exists():
            shutil.copy2(part_file(work_dir, part), kept)


def _restore_parts(stage: StageConfig, work_dir: Path) -> None:
    failed = stage.folder(work_dir) / "failed"
    failed.mkdir(exist_ok=True)
    for part in stage.parts:
        path = part_file(work_dir, part)
        path.replace(failed / path.name)
        before = stage.folder(work_dir) / "before" / path.name
        if before.exists():
            shutil.copy2(before, path)


def _write_result(stage: StageConfig, work_dir: Path, outcome: StageOutcome, hashes: dict[str, str]) -> None:
    own = {name: value for name, value in hashes.items() if name.split(".", 1)[0] in stage.parts}
    result = {
        "stage": stage.name,
        "config": config_hash(stage),
        "metrics": outcome.metrics,
        "gates": [{"metric": gate.metric, "passed": gate.passed, "detail": gate.detail} for gate in outcome.gates],
        "seconds": outcome.seconds,
        "hashes": own,
    }
    path = stage.folder(work_dir) / "result.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)
