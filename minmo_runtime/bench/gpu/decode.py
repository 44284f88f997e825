"""The LLM's decode step against the time to read its weights at the copy bandwidth measured in the same run.

A step cannot be faster than its weights are read; design §7 wants at most 1.2 times that alone and 1.5 times for 64
rows. Measured in fixed shapes (one CUDA graph each) and eagerly, behind `CONTEXT` positions; random weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from minmo_runtime.decode_step import DecodeStep
from minmo_runtime.model.backbone import Backbone
from minmo_runtime.model.linear_forms import Fp8Linear

REPEATS = 5
STEPS = 20
CONTEXT = 512


def milliseconds(job: Callable[[], object], device: torch.device) -> float:
    """Median wall time of one `job`, the device's queue emptied before and after."""
    times = []
    for _ in range(REPEATS + 1):
        _wait(device)
        begin = time.perf_counter()
        job()
        _wait(device)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth_gb_s(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written per second by a plain copy."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / milliseconds(lambda: target.copy_(source), device) / 1e6


@torch.inference_mode()
def measure(
    model: Backbone, device: torch.device, batches: tuple[int, ...], make: type[Fp8Linear] | None = None
) -> dict[str, Any]:
    """`model` on `device`; fused here, in the form `make`."""
    num_parameters = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(
        p.numel() * (1 if make is not None and ".layers." in name and p.dim() > 1 else p.element_size())
        for name, p in model.named_parameters()
        if "embed_tokens" not in name or model.lm_head is None
    )
    model.fuse(make)
    bandwidth = copy_bandwidth_gb_s(device, min(weight_bytes, 2 << 30))
    floor_ms = weight_bytes / bandwidth / 1e6
    result: dict[str, Any] = {
        "parameters": num_parameters,
        "copy_gb_s": round(bandwidth, 1),
        "weights_read_ms": round(floor_ms, 3),
        "decode": {},
    }
    for rows in batches:
        cache = model.new_cache(rows + 1, CONTEXT + 2 * STEPS)
        step = DecodeStep(model, cache, has_graphs=device.type == "cuda")
        ids = torch.ones(rows, dtype=torch.long, device=device)
        slots = list(range(rows))

        def fixed(cache: Any = cache, step: DecodeStep = step, ids: torch.Tensor = ids, slots: Any = slots) -> None:
            cache.lengths = [CONTEXT] * len(cache.lengths)
            for _ in range(STEPS):
                model.logits(step.run(model.embed(ids), slots)).argmax(dim=-1)

        def eager(cache: Any = cache, ids: torch.Tensor = ids, slots: Any = slots) -> None:
            cache.lengths = [CONTEXT] * len(cache.lengths)
            for _ in range(STEPS):
                model.logits(model(ids[:, None], cache=cache, slots=slots)[:, 0]).argmax(dim=-1)

        step_ms, eager_ms = (milliseconds(job, device) / STEPS for job in (fixed, eager))
        result["decode"][str(rows)] = {
            "step_ms": round(step_ms, 3),
            "over_floor": round(step_ms / floor_ms, 2),
            "eager_ms": round(eager_ms, 3),
        }
        del cache, step
    cache = model.new_cache(1, CONTEXT)
    turn = torch.ones(1, 48, dtype=torch.long, device=device)

    def prefill() -> None:
        cache.truncate(0, 0)
        model(turn, cache=cache)

    result["prefill_48_tokens_ms"] = round(milliseconds(prefill, device), 3)
    return result
