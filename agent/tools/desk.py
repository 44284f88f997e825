"""Tools in two phases, for one call: a request is checked and answered at once, its side effect waits until it was
heard.

Phase one validates, looks up, and lets the reply go on. Phase two happens only when the reply that asked was heard to
its end and not cancelled; a cut reply takes its pending side effects with it (users.md P8: a cancelled reply must not
hang up). Pure: it names what to run, the shell runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.events import CommitTool, Keep, RunTool, ToolFinished
from agent.tools.catalogue import TOOLS, BadArguments, CallFrame, refusal_line, validate
from minmo_runtime.api import ToolCallRequested, ToolResult

DeskAction = Keep | RunTool | CommitTool | ToolResult


@dataclass
class PendingTool:
    turn_id: str
    tool_call_id: str
    name: str
    arguments: dict[str, str]
    is_checked: bool = False  # phase one went well: the side effect may follow
    content: str = ""


@dataclass
class ToolDesk:
    call_id: str
    allowed: tuple[str, ...]
    frame: CallFrame
    pending: dict[str, PendingTool] = field(default_factory=dict)

    def request(self, asked: ToolCallRequested, refused_because: str = "") -> list[DeskAction]:
        """Phase one begins, or the model hears at once why not."""
        try:
            if refused_because:
                raise BadArguments("", refused_because)
            arguments = validate(asked.name, asked.arguments, self.allowed, self.frame)
        except BadArguments as error:
            content = refusal_line(asked.name, error)
            kept = self._keep(
                asked.turn_id, asked.tool_call_id, asked.name, asked.arguments, "refused", {"reason": str(error)}
            )
            return [kept, self._answer(asked.turn_id, asked.tool_call_id, content)]
        tool = PendingTool(asked.turn_id, asked.tool_call_id, asked.name, arguments)
        self.pending[asked.tool_call_id] = tool
        return [
            self._keep(tool.turn_id, tool.tool_call_id, tool.name, arguments, "requested"),
            RunTool(tool.turn_id, tool.tool_call_id, tool.name, arguments),
        ]

    def finished(self, done: ToolFinished) -> list[DeskAction]:
        """Phase one is over. A result for a reply that was cut meanwhile goes nowhere."""
        tool = self.pending.get(done.tool_call_id)
        if tool is None:
            return []
        actions: list[DeskAction] = [self._answer(tool.turn_id, tool.tool_call_id, done.content)]
        if TOOLS[tool.name].has_side_effect and done.is_ok:
            tool.is_checked, tool.content = True, done.content
            return actions
        del self.pending[done.tool_call_id]
        state = "done" if done.is_ok else "failed"
        return [self._keep(tool.turn_id, tool.tool_call_id, tool.name, tool.arguments, state, done.result), *actions]

    def is_waiting_for(self, turn_id: str) -> bool:
        """Something that this reply asked for is not done yet."""
        return any(tool.turn_id == turn_id for tool in self.pending.values())

    def heard(self, turn_id: str) -> list[CommitTool]:
        """The reply was heard to its end: phase two of what it asked for."""
        ready = [tool for tool in self.pending.values() if tool.turn_id == turn_id and tool.is_checked]
        for tool in ready:
            del self.pending[tool.tool_call_id]
        return [CommitTool(tool.turn_id, tool.tool_call_id, tool.name, tool.arguments) for tool in ready]

    def cut(self, turn_id: str) -> list[Keep]:
        """The reply was cut: nothing that it asked for and that is not done yet will be."""
        dropped = [tool for tool in self.pending.values() if tool.turn_id == turn_id]
        for tool in dropped:
            del self.pending[tool.tool_call_id]
        return [self._keep(t.turn_id, t.tool_call_id, t.name, t.arguments, "cancelled") for t in dropped]

    def committed(self, done: CommitTool, state: str, result: dict[str, object] | None = None) -> Keep:
        return self._keep(done.turn_id, done.tool_call_id, done.name, done.arguments, state, result)

    def _answer(self, turn_id: str, tool_call_id: str, content: str) -> ToolResult:
        return ToolResult(call_id=self.call_id, turn_id=turn_id, tool_call_id=tool_call_id, content=content)

    def _keep(
        self, turn_id: str, tool_call_id: str, name: str, arguments: dict[str, str], state: str,
        result: dict[str, object] | None = None,
    ) -> Keep:  # fmt: skip
        fields = {"turn_id": turn_id, "name": name, "arguments": dict(arguments), "state": state, "result": result}
        return Keep("record_tool_call", {"tool_call_id": tool_call_id, **fields})
