"""A whole call in virtual time: the call's core between a loopback leg and a fake runtime's stream. No clock, no
task.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from array import array
from collections import deque
from functools import cache
from typing import Any

from agent.call import Call
from agent.call_setup import CallSetup
from agent.events import (
    CallEvent,
    CommitTool,
    EndCall,
    Keep,
    ReopenRuntime,
    RuntimeReady,
    RunTool,
    Start,
    Tick,
    ToolFinished,
)  # fmt: skip
from agent.floor import TurnTakingConfig
from agent.prompts.lines import LineBook
from minmo_runtime import api
from minmo_runtime.fake import FakeLine, FakeRule, FakeScript, FakeStream
from policies.campaign import Campaign
from policies.config import PoliciesConfig
from policies.duplex_manner import DuplexManner
from policies.engine import PolicyEngine
from policies.facts import CallFacts
from policies.outbound import OutboundRules
from policies.persona import Persona
from policies.speaking_style import StyleRules
from telephony import leg as tel
from telephony.loopback import LoopbackLeg

TICK_S = 0.02
RATE_HZ = 8000
TOOLS = (
    "look_up_order", "opening_hours", "change_delivery", "transfer", "hang_up", "request_callback", "pause_recording",
    "go_on_recording", "send_keys",
)  # fmt: skip
RULES = (
    FakeRule(
        pattern=r"order number is (?P<number>\d+)",
        tool="look_up_order",
        arguments={"order_number": "{number}"},
        text="order {number} was {status} it will arrive on {day}",
    ),
    FakeRule(pattern="person", tool="transfer", text="i am connecting you now"),
    FakeRule(pattern="bye", tool="hang_up", text="thank you for calling goodbye"),
    FakeRule(
        pattern="move", tool="change_delivery", arguments={"order_number": "12345", "day": "friday"},
        text="okay it will arrive on friday and that is all there is to say about it",
    ),
    FakeRule(pattern="press", tool="send_keys", arguments={"keys": "1 2#"}, text="i am pressing it for you now"),
    FakeRule(pattern="card", tool="pause_recording", text="please say the card number now"),
    FakeRule(pattern="paid", tool="go_on_recording", text="thank you that is paid"),
    FakeRule(pattern="wrong", tool="look_up_order", arguments={"order_number": "4x"}, text="i can not find it"),
    FakeRule(pattern="story", text=" ".join(f"word{i}" for i in range(30))),
)  # fmt: skip


@cache
def tone(seconds: float, hz: float = 220.0) -> bytes:
    """Voice enough for the loopback's voice activity detector: harmonics that swell and fade."""
    count = int(seconds * RATE_HZ)
    return array(
        "h",
        (
            int(5000 * (0.6 + 0.4 * math.sin(12 * i / RATE_HZ)) * sum(
                math.sin(2 * math.pi * hz * k * i / RATE_HZ) / k for k in range(1, 8)
            ))
            for i in range(count)
        ),
    ).tobytes()  # fmt: skip


def policy(
    handoff_uri: str = "", manner: DuplexManner | None = None, outbound: OutboundRules | None = None,
    **campaign_keys: Any,
) -> PolicyEngine:  # fmt: skip
    style = StyleRules(languages=("en",), dialect="us", emotion="calm", rate="normal")
    campaign = Campaign(
        dids=("100",), shop="acme", persona=Persona(name="anna"), style=style, tools=TOOLS, order_digits=5, name="acme",
        duplex=manner or DuplexManner(), outbound=outbound, **campaign_keys,
    )  # fmt: skip
    return PolicyEngine(PoliciesConfig(), (campaign,), (), handoff_uri)


class Scene:
    """`scene.caller("...", 1.5)` speaks; `scene.run(seconds)`; then look at `scene.kept`, `.sent`, `.asked`,
    `.transcript`.
    """

    def __init__(
        self,
        *lines: FakeLine,
        handoff_uri: str = "",
        config: TurnTakingConfig | None = None,
        manner: DuplexManner | None = None,
        is_rendered: bool = True,
        outbound: OutboundRules | None = None,
        campaign_keys: dict[str, Any] | None = None,
        **script: Any,
    ) -> None:
        """`outbound`: a call that we place, by these rules; its callee answers as soon as we dial."""
        self.script = FakeScript(lines=lines, rules=RULES, **script)
        book = LineBook.load()
        every = [text for texts in (*book.protected.values(), *book.lines.values()) for text in texts]
        rendered = {text: _speech(len(text.split()) * 0.3) for text in every} if is_rendered else {}
        direction = "outbound" if outbound else "inbound"
        started_at = dt.datetime(2026, 1, 5, tzinfo=dt.UTC)
        facts = CallFacts(call_id="c1", did="100", direction=direction, started_at=started_at)
        setup = CallSetup(
            call_id="c1", leg_id="l1", sample_rate_hz=RATE_HZ, facts=facts,
            policy=policy(handoff_uri, manner, outbound, **(campaign_keys or {})),
            lines=book.for_call({}), order_digits=5, tools=TOOLS,
            turn_taking=config or TurnTakingConfig(),
            rendered=rendered,
        )  # fmt: skip
        self.call = Call(setup)
        self.leg = LoopbackLeg("l1", direction=direction)
        self.stream: FakeStream | None = None
        self.is_engine_up = True
        self.engine_back_in: float | None = None
        self.now = 100.0
        self.kept: list[tuple[float, Keep]] = []
        self.sent: list[tuple[float, tel.LegCommand]] = []
        self.asked: list[tuple[float, api.RuntimeRequest]] = []
        self.committed: list[CommitTool] = []
        self.is_over = False
        self.orders = {"45612": "status shipped day wednesday"}
        self._inbox: deque[CallEvent] = deque([Start()])

    # ------------------------------------------------------------------- driving

    def answer(self) -> Scene:
        """Ring, and run until the greeting is over."""
        self.leg.ring()
        self.run(0.1)
        self.run_until(lambda: self.state == "listening" and len(self.heard_turns) >= 2, 20)
        return self

    def caller(self, seconds: float, and_silence: float = 0.0) -> Scene:
        self.leg.speak(tone(seconds))
        self.run(seconds + and_silence)
        return self

    def run(self, seconds: float) -> Scene:
        for _ in range(round(seconds / TICK_S)):
            self._tick()
        return self

    def run_until(self, condition: Any, at_most_s: float = 10.0) -> float:
        """Seconds it took; fails the test when it does not come true."""
        for number in range(round(at_most_s / TICK_S)):
            if condition():
                return number * TICK_S
            self._tick()
        raise AssertionError(f"not within {at_most_s} s; state {self.state}, transcript {self.transcript}")

    def _tick(self) -> None:
        self.now += TICK_S
        self.leg.advance(round(TICK_S * RATE_HZ))
        self._inbox += self.leg.drain()
        if self.engine_back_in is not None:
            self.engine_back_in -= TICK_S
            if self.engine_back_in <= 0:
                self.engine_back_in, self.is_engine_up = None, True
                self._inbox.append(RuntimeReady())
        self._inbox.append(Tick())
        while self._inbox:
            for action in self.call.step(self._inbox.popleft(), self.now):
                self._carry_out(action)

    def _carry_out(self, action: Any) -> None:
        match action:
            case Keep():
                self.kept.append((self.now, action))
            case RunTool():
                self._inbox.append(self._tool(action))
            case CommitTool():
                self.committed.append(action)
            case EndCall():
                self.is_over = True
            case ReopenRuntime():
                pass
            case api.OpenStream() if self.is_engine_up:
                self.asked.append((self.now, action))
                self.stream = FakeStream(action, self.script)
                self._inbox.append(api.StreamOpened(call_id="c1", output_sample_rate_hz=24_000, checkpoint="fake"))
            case _ if isinstance(action, api.Message):
                if not isinstance(action, api.PushAudio):
                    self.asked.append((self.now, action))
                if self.stream is not None and self.is_engine_up:
                    self._inbox += self.stream.receive(action)
            case tel.Answer() if self.leg.direction == "outbound":  # the INVITE goes out (agent/outbound.py)
                self.leg.pick_up()
            case _:
                self.sent.append((self.now, action))
                self.leg.send_now(action)

    def _tool(self, action: RunTool) -> ToolFinished:
        if action.name == "look_up_order":
            return ToolFinished(
                action.tool_call_id, self.orders.get(action.arguments["order_number"], "status not_found")
            )
        return ToolFinished(action.tool_call_id, "result changed")

    # ------------------------------------------------------------------- looking

    @property
    def state(self) -> str:
        return self.call.turns.state.value

    def keeps(self, method: str, **wanted: Any) -> list[dict[str, Any]]:
        found = [keep.arguments for _, keep in self.kept if keep.method == method]
        return [a for a in found if all(a.get(key) == value for key, value in wanted.items())]

    def commands(self, kind: type) -> list[Any]:
        return [command for _, command in self.sent if isinstance(command, kind)]

    def requests(self, kind: type) -> list[Any]:
        return [request for _, request in self.asked if isinstance(request, kind)]

    @property
    def heard_turns(self) -> list[str]:
        return [row["heard_text"] for row in self.transcript if row["role"] == "agent" and row.get("heard_text")]

    @property
    def transcript(self) -> list[dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        for _, keep in self.kept:
            if keep.method in ("append_turn", "update_turn"):
                rows.setdefault(keep.arguments["turn_id"], {}).update(keep.arguments)
        return list(rows.values())

    def with_config(self, **settings: Any) -> TurnTakingConfig:
        return dataclasses.replace(TurnTakingConfig(), **settings)


@cache
def _speech(seconds: float) -> bytes:
    """Rendered audio at the runtime's rate."""
    return array(
        "h", (int(6000 * math.sin(2 * math.pi * 180 * i / 24_000)) for i in range(int(seconds * 24_000)))
    ).tobytes()
