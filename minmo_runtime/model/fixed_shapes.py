"""Passes in a few fixed shapes: on a GPU each is one CUDA graph, on a CPU the same padded pass runs eagerly (tests).

A graph replays a whole pass as one launch; it reads and writes the same memory each time, so its inputs are copied into
tensors of its own and its result is valid until the next pass of that shape. A graph is captured at the first use of
its shape. Knows nothing of what the passes compute. Steps 8 and 9 of the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A name of the shapes, a function of tensors, and the tensors → what it gives
FixedCall = Callable[[tuple[Any, ...], Callable[..., Any], Sequence[Tensor]], Any]
ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def bucket(value: int, buckets: Sequence[int]) -> int:
    """The smallest that holds `value`. Example: 5 of (1, 2, 4, 8) is 8."""
    return next(size for size in buckets if size >= value)


@dataclass
class _Shape:
    inputs: list[Tensor]
    graph: torch.cuda.CUDAGraph | None
    made: Any
    function: Callable[..., Any]


class FixedCalls:
    """`call(key, function, tensors)`: function(*tensors), one tensor or several, with one graph per key.

    Tensors of one key always have the same shapes, and its first function serves all later calls.
    """

    def __init__(self, has_graphs: bool) -> None:
        self.has_graphs = has_graphs
        self.shapes: dict[tuple[Any, ...], _Shape] = {}

    @torch.inference_mode()
    def __call__(self, key: tuple[Any, ...], function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        if key not in self.shapes:
            self.shapes[key] = _Shape([tensor.clone() for tensor in tensors], None, None, function)
        shape = self.shapes[key]
        for own, tensor in zip(shape.inputs, tensors, strict=True):
            if own.shape != tensor.shape:
                raise ValueError(f"fixed shapes: {key} takes {list(own.shape)}, not {list(tensor.shape)}")
            own.copy_(tensor)
        if not self.has_graphs:
            return shape.function(*shape.inputs)
        if shape.graph is None:
            shape.graph, shape.made = captured(lambda: shape.function(*shape.inputs))
        shape.graph.replay()
        return shape.made


def captured(forward: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `forward` and what each replay fills. Run twice before, on a stream of its own: libraries
    choose their kernels and make their buffers then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = forward()
    return graph, made
