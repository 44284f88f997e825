"""What happens to a row that fails: it ends alone. Every job of the runner goes through `isolated`.

A job has two parts. Its forward pass changes nothing that it would read again, so a batch that raises (out of memory,
a full cache slot, a defect) is run again in halves, until what still fails stands alone. Behind the pass each row takes
its own result (`each`): a NaN or an error there ends that row only. Knows nothing of models. Walk: steps 8 and 9.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minmo_runtime.stream import Stream

# Runs one job for these streams; returns call id → reason for each that failed in its own part.
RunRows = Callable[[list[Stream]], dict[str, str]]


class StreamFailure(Exception):
    """This stream cannot go on; the others can."""


def isolated(run_rows: RunRows, streams: list[Stream]) -> dict[str, str]:
    """Run a job; call id → reason for each stream that failed in it."""
    try:
        return run_rows(streams)
    except Exception as error:  # whatever it is, it must not end the neighbours
        if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(streams) == 1:
            return {streams[0].call_id: _reason(error)}
    half = len(streams) // 2
    return {**isolated(run_rows, streams[:half]), **isolated(run_rows, streams[half:])}


def each(streams: list[Stream], take: Callable[[int, Stream], None]) -> dict[str, str]:
    """`take(row, stream)` for every row; what one raises ends that one."""
    failed = {}
    for row, stream in enumerate(streams):
        try:
            take(row, stream)
        except Exception as error:
            failed[stream.call_id] = _reason(error)
    return failed


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, StreamFailure) else f"{type(error).__name__}: {error}"


def check(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise StreamFailure(f"{what} gave NaN")
