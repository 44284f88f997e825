"""An engine process without a model: the fake runtime behind the engine's socket, for tests of everything around it."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from minmo_runtime.fake import FakeLine, FakeRule, FakeRuntime, FakeScript
from minmo_runtime.server import serve_until_stopped

RULES = (
    FakeRule(
        pattern=r"order number is (?P<number>\d+)",
        tool="look_up_order",
        arguments={"order_number": "{number}"},
        text="order {number} was {status}",
    ),
    FakeRule(pattern="person", tool="transfer", text="everybody is {status} we will call you back"),
    FakeRule(pattern="where", text="sure what is your order number"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--line", default="where is my order", help="what every caller says, each time")
    arguments, _ = parser.parse_known_args()
    script = FakeScript(lines=tuple(FakeLine(text=arguments.line) for _ in range(20)), rules=RULES)
    asyncio.run(serve_until_stopped(FakeRuntime(script), arguments.socket))


if __name__ == "__main__":
    main()
