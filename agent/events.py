"""What the call's core is told and asks for, beside the messages of the leg and of the runtime.

`Call.step(event, now)` takes a leg event, a runtime event or one of the events below, and returns leg commands, runtime
requests or the actions below, in the order in which they must be carried out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minmo_runtime.api import RuntimeEvent, RuntimeRequest
from telephony.leg import LegCommand, LegEvent

# ------------------------------------------------------------------------- events


@dataclass(frozen=True)
class Start:
    """A call that was let in: prepare to answer it."""


@dataclass(frozen=True)
class Resumed:
    """The leg outlived an agent process: go on with what the record says."""

    history: tuple[tuple[str, str], ...]
    is_notice_heard: bool = True


@dataclass(frozen=True)
class ToolFinished:
    """The first phase of a tool is done. `content` is what the model is told; `is_ok`: its side effect may follow."""

    tool_call_id: str
    content: str
    is_ok: bool = True
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RuntimeLost:
    """The stream is gone (engine death, NaN, out of memory)."""

    reason: str


@dataclass(frozen=True)
class RuntimeReady:
    """An engine is there again: the stream may be opened anew."""


@dataclass(frozen=True)
class PersonRinging:
    """The person who shall take over is still being called: the caller must not wait in silence."""


@dataclass(frozen=True)
class Tick:
    """Time has passed (at least ten times a second)."""


@dataclass(frozen=True)
class ShutDown:
    """The process is told to end: say goodbye and close."""

    cause: str = "shutdown"


@dataclass(frozen=True)
class RecordingWanted:
    """From outside: keep the sound from now on, or do not (a card number is about to be spoken)."""

    is_kept: bool
    by: str  # supervisor:<name>


OwnEvent = (
    Start | Resumed | ToolFinished | RuntimeLost | RuntimeReady | PersonRinging | Tick | RecordingWanted | ShutDown
)  # fmt: skip
CallEvent = LegEvent | RuntimeEvent | OwnEvent

# ------------------------------------------------------------------------ actions


@dataclass(frozen=True)
class RunTool:
    """Phase one: look up, check; no side effect. Answered by `ToolFinished`."""

    turn_id: str
    tool_call_id: str
    name: str
    arguments: dict[str, str]


@dataclass(frozen=True)
class CommitTool:
    """Phase two: the reply that asked for it was heard; carry out the side effect."""

    turn_id: str
    tool_call_id: str
    name: str
    arguments: dict[str, str]


@dataclass(frozen=True)
class Keep:
    """Write to the call's record: `method` of storage.calls.CallStore with these arguments, plus call id and time."""

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReopenRuntime:
    """Find an engine; answered by `RuntimeReady`."""


@dataclass(frozen=True)
class CallPerson:
    """Warm hand-off: call this target, tell what was said, connect. Answered by `telephony.leg.ReferResult`."""

    target: str


@dataclass(frozen=True)
class EndCall:
    """Nothing more will come of this call."""


OwnAction = RunTool | CommitTool | Keep | ReopenRuntime | CallPerson | EndCall
CallAction = LegCommand | RuntimeRequest | OwnAction
