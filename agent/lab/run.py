"""`minmo lab`: real calls over a line that is spoiled on purpose; timings from the RTP, as JSON and pictures.

    minmo lab                                       every scenario on a clean line, against the agent of this tree
    minmo lab --line mobile --line worst --calls 5  named lines, five calls of each scenario
    minmo lab --calls 20 --at-once 2 --out lab/     the figures at their n: 20 calls of each scenario, two side by side
    minmo lab --loss 0.03 --burst-ms 80             a line of your own (flags go over the named one)
    minmo lab --target 192.0.2.7:5060 --number 100  any SIP agent or trunk, measured from here
    minmo lab --fake                                the agent with the fake runtime: no model, telephony only
    minmo lab --concealment                         what loss does to speech: our receiver against the codec alone

What is measured and how: docs/lab.md. The last line is JSON; --out DIR keeps it with one SVG per call.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agent.app import Stack, StartError
from agent.caller import run_caller
from agent.config import load_config
from agent.lab import plot
from agent.lab.concealment import measure_concealment
from agent.lab.line import LINE_RANGES, PROFILES, LineProfile
from agent.lab.measure import measure, summary, values_ms
from agent.lab.relay import Relay
from agent.lab.scenarios import SCENARIOS, script
from agent.run_folder import SHIPPED_CHECKPOINT

MAX_CALL_S = 90.0
_FAKE_CHECKPOINT = """
name = "fake"
[facts]
languages = ["en"]
dialects = ["us", "general"]
emotions = ["neutral", "calm", "brisk"]
rates = ["slow", "normal", "fast"]
voices = ["nano"]
"""


async def one_call(target: str, number: str, line: LineProfile, scenario: str, seed: int) -> dict[str, Any]:
    """Dial through a relay, walk through the scenario, measure. A call that was refused has no stimuli."""
    async with Relay(target, line, seed) as relay:
        report = await run_caller(
            f"sip:{number}@{relay.address}", script(scenario, seed), from_user="lab", max_duration_s=MAX_CALL_S
        )
        result: dict[str, Any] = {
            "scenario": scenario, "line": line.name, "seed": seed, "answered": report.answered, "cause": report.cause,
            "codec": report.codec, "timed_out_steps": report.timed_out_steps,
        }  # fmt: skip
        media = next(iter(relay.calls.values()), None)
        if media is None or not media.from_agent.packets:
            return result | {"first_word_ms": None, "stimuli": [], "caller_s": [], "agent_s": [], "rtp": {}}
        done = {"to_agent": media.to_agent.counts.as_dict(), "to_caller": media.to_caller.counts.as_dict()}
        return result | measure(report.said, media.from_caller, media.from_agent) | {"relay": done}


def write_fake_checkpoint(folder: Path) -> Path:
    """What a stack with the fake runtime needs of a checkpoint."""
    checkpoint = folder / "fake"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "checkpoint.toml").write_text(_FAKE_CHECKPOINT, encoding="utf-8")
    return checkpoint


@asynccontextmanager
async def own_agent(folder: Path, is_fake: bool, scenario: str, checkpoint: Path) -> AsyncIterator[str]:
    """The whole stack on a free port: host:port."""
    command: tuple[str, ...] = ("-m", "minmo_runtime.server")
    if is_fake:
        checkpoint, command = write_fake_checkpoint(folder), ("-m", "agent.lab.fake_engine", "--scenario", scenario)
    config = load_config(None, {
        "agent": {"checkpoint": str(checkpoint), "log_level": "warning"}, "telephony": {"sip_port": 0},
        "storage": {"folder": str(folder / f"var-{scenario or 'all'}")},
    })  # fmt: skip
    async with Stack(config, has_web=False, engine_command=command) as stack:
        yield stack.sip_address


async def run_lab(options: argparse.Namespace, lines: list[LineProfile], folder: Path) -> list[dict[str, Any]]:
    async def calls(target: str, scenarios: list[str]) -> list[dict[str, Any]]:
        room = asyncio.Semaphore(options.at_once)

        async def placed(line: LineProfile, scenario: str, seed: int) -> dict[str, Any]:
            async with room:
                call = await one_call(target, options.number, line, scenario, seed)
            print(f"{line.name:12} {scenario:12} {_in_words(call)}", flush=True)
            return call

        return await asyncio.gather(*(
            placed(line, scenario, options.seed + index)
            for line in lines for scenario in scenarios for index in range(options.calls)
        ))  # fmt: skip

    scenarios = options.scenario or list(SCENARIOS)
    if options.target:
        return await calls(options.target, scenarios)
    if not options.fake:
        async with own_agent(folder, False, "", options.checkpoint) as target:
            return await calls(target, scenarios)
    found = []
    for scenario in scenarios:  # the fake's ears are a script: one stack for each
        async with own_agent(folder, True, scenario, options.checkpoint) as target:
            found += await calls(target, [scenario])
    return found


def _in_words(call: dict[str, Any]) -> str:
    if not call["answered"]:
        return f"not answered: {call['cause']}"
    words = [f"first word {call['first_word_ms']} ms"]
    for stimulus in call["stimuli"]:
        figures = [f"{k} {v}" for k, v in stimulus.items() if k not in ("label", "at_s")]
        words.append(f"{stimulus['label']}: {', '.join(figures)}")
    return "; ".join(words)


def keep(result: dict[str, Any], folder: Path) -> None:
    """result.json, one SVG per line with all its figures, and one per call."""
    folder.mkdir(parents=True, exist_ok=True)
    for line in result.get("lines", []):
        (folder / f"summary-{line['line']}.svg").write_text(plot.figures(line), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    for index, call in enumerate(result.get("calls", [])):
        name = f"{index:03d}-{call['line']}-{call['scenario']}.svg"
        (folder / name).write_text(plot.timeline(call), encoding="utf-8")


def by_line(calls: list[dict[str, Any]], lines: list[LineProfile]) -> list[dict[str, Any]]:
    return [
        {"line": line.name, "profile": dataclasses.asdict(line), "summary": summary(own), "values_ms": values_ms(own)}
        for line in lines
        for own in [[call for call in calls if call["line"] == line.name]]
    ]  # fmt: skip


def chosen_lines(options: argparse.Namespace) -> list[LineProfile]:
    """The named lines, each with the values given by flags over it. ValueError for a value out of range."""
    own = {key: getattr(options, key) for key in LINE_RANGES if getattr(options, key) is not None}
    lines = [PROFILES[name] for name in options.line or ["clean"]]
    if not own:
        return lines
    return [dataclasses.replace(line, **own, name="own" if line.name == "clean" else f"{line.name}+own")
            for line in lines]  # fmt: skip


def listing() -> str:
    """Every named line and scenario, one a row."""
    rows = []
    for name, profile in PROFILES.items():
        spoilt = [
            f"{k} {getattr(profile, k):g}" for k in LINE_RANGES if getattr(profile, k) != getattr(LineProfile(), k)
        ]
        rows.append(f"line      {name:12} {', '.join(spoilt) or 'nothing is spoilt'}")
    for name, scenario in SCENARIOS.items():
        rows.append(f"scenario  {name:12} {(scenario.__doc__ or '').strip().splitlines()[0]}")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    try:
        lines = chosen_lines(options)
    except ValueError as error:
        parser.error(str(error))
    result: dict[str, Any]
    with tempfile.TemporaryDirectory(prefix="minmo-lab-") as name:
        if options.concealment:
            result = {"concealment": asyncio.run(measure_concealment(options.seed, options.calls))}
            if "pesq" not in result["concealment"][0]:
                print("no PESQ: `pip install pesq` needs a C compiler; the other figures stand without it")
        else:
            try:
                calls = asyncio.run(run_lab(options, lines, Path(name)))
            except StartError as error:
                print(f"minmo lab: our own agent does not start: {error}", file=sys.stderr)
                return 2
            result = {"lines": by_line(calls, lines), "calls": calls}
    if options.out is not None:
        keep(result, options.out)
        print(f"kept in {options.out}")
    for line in result.get("lines", []):
        print(f"{line['line']}: {json.dumps(line['summary'])}")
    print(json.dumps({key: value for key, value in result.items() if key != "calls"}), flush=True)
    return 0 if all(call["answered"] for call in result.get("calls", [])) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minmo lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the named lines and scenarios, and nothing else")
    parser.add_argument("--line", action="append", choices=list(PROFILES), help="a named line (again for more)")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="default: all")
    parser.add_argument("--calls", type=int, default=1, help="calls of each scenario on each line")
    parser.add_argument(
        "--at-once", type=int, default=1, choices=(1, 2), help="calls side by side; one more is still ending"
    )
    parser.add_argument("--seed", type=int, default=1, help="the same seed: the same numbers, losses and noise")
    parser.add_argument("--target", default="", metavar="HOST:PORT", help="another agent than our own")
    parser.add_argument("--number", default="100", help="dialled number")
    parser.add_argument("--fake", action="store_true", help="our own agent with the fake runtime")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument(
        "--concealment",
        action="store_true",
        help="no agent: what loss does to speech, mean of --calls",
    )
    parser.add_argument("--out", type=Path, help="folder for result.json and the SVGs")
    group = parser.add_argument_group("a line of your own")
    for key, (low, high) in LINE_RANGES.items():
        group.add_argument(f"--{key.replace('_', '-')}", type=float, help=f"{low:g} to {high:g}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
