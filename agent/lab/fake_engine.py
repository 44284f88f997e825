"""The engine process without a model, for the lab: the fake runtime (minmo_runtime/fake.py) behind the engine's socket.

    python -m agent.lab.fake_engine --socket PATH [--scenario NAME]

Its ears are a script per scenario of agent/lab/scenarios.py; its voice is a tone. What is measured with it is the
telephony, the echo removal and the turn taking, never the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from minmo_runtime.fake import FakeLine, FakeRule, FakeRuntime, FakeScript
from minmo_runtime.server import serve_until_stopped

_STORY = " ".join(["and so on"] * 9)
RULES = (
    FakeRule(pattern="what can you do", text=_STORY),
    FakeRule(pattern="where", text="sure what is your order number"),
    FakeRule(pattern=r"\d", text="order one two three was shipped on friday"),
    FakeRule(pattern="bye", tool="hang_up", text="thank you for calling goodbye"),
)
WHERE, LONG = FakeLine(text="where is my order"), FakeLine(text="what can you do")
LINES: dict[str, tuple[FakeLine, ...]] = {
    "order": (WHERE, FakeLine(text="my order number is 1 2 3 4 5"), FakeLine(text="thanks bye")),
    "pauses": (WHERE, FakeLine(text="my order number is 1 2", is_complete=False), FakeLine(text="3 4 5")),
    "interrupt": (LONG, WHERE),
    "backchannel": (LONG, FakeLine(text="mm hm", kind="backchannel")),
    "keypad": (WHERE,),
    "listen": (LONG,),
    "cough": (LONG, FakeLine(text="", kind="noise")),
    "television": (LONG, FakeLine(text="", kind="noise")),
    "many": (WHERE, LONG) * 100,
}


def script(scenario: str) -> FakeScript:
    return FakeScript(lines=LINES.get(scenario, (WHERE,)), rules=RULES)


def main() -> None:
    parser = argparse.ArgumentParser(prog="agent.lab.fake_engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--scenario", default="", choices=["", *LINES])
    parser.add_argument("--config", default="{}", help="[runtime] as JSON; only max_streams counts")
    options, _ = parser.parse_known_args()
    runtime = FakeRuntime(script(options.scenario), max_streams=json.loads(options.config).get("max_streams", 8))
    asyncio.run(serve_until_stopped(runtime, options.socket))


if __name__ == "__main__":
    main()
