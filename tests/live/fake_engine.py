"""An engine process without a model: the fake runtime behind the engine's socket, for tests of everything around it."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from minmo_runtime.fake import FakeLine, FakeRule, FakeRuntime, FakeScript
from minmo_runtime.server import serve_until_stopped

SCRIPT = FakeScript(
    lines=tuple(FakeLine(text="where is my order") for _ in range(20)),
    rules=(
        FakeRule(
            pattern=r"order number is (?P<number>\d+)",
            tool="look_up_order",
            arguments={"order_number": "{number}"},
            text="order {number} was {status}",
        ),
        FakeRule(pattern="where", text="sure what is your order number"),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    arguments, _ = parser.parse_known_args()
    asyncio.run(serve_until_stopped(FakeRuntime(SCRIPT), arguments.socket))


if __name__ == "__main__":
    main()
