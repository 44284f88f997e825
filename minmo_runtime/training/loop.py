"""The step loop that stages share: two optimisers, one schedule, a moving average, a time budget, resuming.

A stage gives a model (its trainable parameters are those with `requires_grad`) and a function from the step number to a
loss. What a step trains on must depend on its number alone: then a run that was killed and resumed equals one that was
not. Knows nothing of any module. Muon for matrices, AdamW for the rest (facts/recipes part 2 §A); lr: warm-up, flat,
linear to zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minmo_runtime.training.resume import load_state, save_state

MUON_MOMENTUM = 0.95


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of one run; the stage's TOML `settings` hold them beside its own."""

    max_steps: int = 1_000_000
    warmup_steps: int = 30
    flat_share: float = 0.4  # of the run, then linear to zero
    lr_matrix: float = 0.02
    lr_other: float = 2e-3
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    average_decay: float = 0.998
    save_every_s: float = 150.0
    log_every_steps: int = 20
    autocast_bf16: bool = True

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> LoopSettings:
        """Take what is ours; the rest belongs to the stage."""
        return cls(**{item.name: table[item.name] for item in fields(cls) if item.name in table})


@dataclass
class LoopResult:
    steps: int
    spent_s: float
    loss: float


def schedule(progress: float, step: int, settings: LoopSettings) -> float:
    """Factor on the learning rates; `progress` in [0, 1] is the larger of time and steps used up."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    flat = settings.flat_share
    return warm * (1.0 if progress < flat else max(0.0, (1.0 - progress) / (1.0 - flat)))


def make_optimisers(
    model: nn.Module, settings: LoopSettings, is_matrix: Callable[[str, Tensor], bool]
) -> list[torch.optim.Optimizer]:
    """Muon where `is_matrix(name, parameter)`, AdamW elsewhere; tables and vectors have no weight decay."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if p.dim() == 2 and is_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in trainable if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = []
    if matrices:
        optimisers.append(
            torch.optim.Muon(
                matrices, lr=settings.lr_matrix, weight_decay=settings.weight_decay, momentum=MUON_MOMENTUM
            )
        )
    if others:
        decayed = [p for p in others if p.dim() > 1]
        plain = [p for p in others if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimisers.append(torch.optim.AdamW(groups, lr=settings.lr_other, betas=(0.9, 0.98), eps=1e-8))
    return optimisers


class StepLoop:
    """One run; owns the optimisers, the moving average and the clock."""

    def __init__(
        self,
        model: nn.Module,
        settings: LoopSettings,
        folder: Path,
        budget_s: float,
        is_matrix: Callable[[str, Tensor], bool],
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        """`clock` counts seconds of work (CPU time: a shared core makes a run longer, not worse)."""
        self.model, self.settings, self.budget_s, self._clock = model, settings, budget_s, clock
        self.state_file = folder / "state.safetensors"
        self.optimisers = make_optimisers(model, settings, is_matrix)
        self._base_lr = [[group["lr"] for group in optimiser.param_groups] for optimiser in self.optimisers]
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.steps, self.spent_s, self.loss = 0, 0.0, float("nan")
        if self.state_file.exists():
            progress = load_state(self.state_file, model, self.average, self.optimisers)
            self.steps, self.spent_s, self.loss = progress["steps"], progress["spent_s"], progress["loss"]

    @property
    def progress(self) -> float:
        return max(self.spent_s / self.budget_s, self.steps / self.settings.max_steps)

    def run(
        self, loss_of: Callable[[int], Tensor], on_save: Callable[[], None], log: Callable[[str], None]
    ) -> LoopResult:
        """Step until time or steps are used up; `on_save` is called at every save (ship the average there)."""
        settings, saved_at, recent = self.settings, self.spent_s, []
        while self.progress < 1.0:
            started = self._clock()
            recent.append(self._step(loss_of))
            self.spent_s += self._clock() - started
            if self.steps % settings.log_every_steps == 0:
                self.loss = sum(recent) / len(recent)
                log(f"step {self.steps} {self.spent_s:.0f} s loss {self.loss:.4f} lr x{self._factor():.3f}")
                recent = []
            if self.spent_s - saved_at >= settings.save_every_s:
                saved_at = self.spent_s
                self.save()
                on_save()
        self.save()
        on_save()
        return LoopResult(self.steps, self.spent_s, self.loss)

    def save(self) -> None:
        progress = {"steps": self.steps, "spent_s": self.spent_s, "loss": self.loss}
        save_state(self.state_file, self.model, self.average, self.optimisers, progress)

    def averaged_state(self) -> dict[str, Tensor]:
        """The model's state dict with the moving average in place of what was trained."""
        return {name: self.average.get(name, tensor) for name, tensor in self.model.state_dict().items()}

    def _factor(self) -> float:
        return schedule(self.progress, self.steps, self.settings)

    def _step(self, loss_of: Callable[[int], Tensor]) -> float:
        settings, factor = self.settings, self._factor()
        for optimiser, rates in zip(self.optimisers, self._base_lr, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast_bf16):
            loss = loss_of(self.steps)
        loss.backward()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        self.steps += 1
        # Young runs average over little, so that the start is forgotten.
        decay = min(settings.average_decay, self.steps / (self.steps + 9.0))
        with torch.no_grad():
            torch._foreach_lerp_([self.average[name] for name in trained], list(trained.values()), 1.0 - decay)
        return float(loss.detach())


def freeze_except(model: nn.Module, names: Iterable[str]) -> None:
    """`requires_grad` for exactly these parameters."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
