"""What a call keeps of its stream in the engine."""

from __future__ import annotations

from agent.call_context import CallContext
from agent.events import Keep
from agent.runtime_side import RuntimeSide
from minmo_runtime.api import StreamOpened
from telephony.resample import StreamResampler


def kept_after(memory_bytes: int) -> list[Keep]:
    context = CallContext("c", "l")
    side = RuntimeSide(context, seed=1, slot_digits=0, output_rate_hz=24_000, to_16k=StreamResampler(8_000, 16_000))
    side.opened(StreamOpened(call_id="c", output_sample_rate_hz=24_000, checkpoint="nano", memory_bytes=memory_bytes))
    return [action for action in context.actions if isinstance(action, Keep) and action.method == "add_metric"]


def test_memory_of_a_call_is_a_figure_of_it_where_the_engine_tells() -> None:
    figure = {"turn_id": "", "name": "engine_memory_kib", "value": 1536.0, "source": "runtime"}
    assert kept_after(1536 * 1024) == [Keep("add_metric", figure)]
    assert kept_after(0) == []
