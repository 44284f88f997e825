"""`make demo`: the whole stack and a real SIP caller on this machine, read along live, then checked without mercy.

Starts parent, worker, engine, agent and page on free loopback ports with a database of its own, draws an order at
random, lets the caller's process dial, prints the conversation as it is stored, and exits 0 only if everything that
is claimed was true: what was understood, what the tool got, what was answered, that the barge-in stopped the agent,
and that our own encoder can understand the agent's recorded voice.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.app import Stack, StartError
from agent.config import Config, load_config
from agent.demo_script import Verdict, exchanges, judge_exchanges
from agent.demo_view import LiveView
from agent.engine_link import EngineLink
from agent.processes import REPOSITORY
from agent.recognise import recognise, word_error_rate
from agent.run_folder import ENGINE_SOCKET
from minmo_runtime import api
from minmo_runtime.text import time_words
from storage.database import create_tables, open_database
from storage.orders import Order, list_orders, look_up_hours, seed_demo_shop
from storage.search import CallReader

MAX_AGENT_WER = 0.30
MAX_STOP_MS = 1_000.0  # floor of design §7
CALL_WITHIN_S = 200.0
DEMO_FOLDER = Path("var") / "demo"  # a database of its own, beside the one of `minmo serve`


@dataclass
class Outcome:
    """Everything the demo found; `faults` empty = it worked."""

    order: Order
    report: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    wer: float = 1.0
    recognised: str = ""
    recording: str = ""
    database: str = ""
    faults: list[str] = field(default_factory=list)

    @property
    def barge_in(self) -> dict[str, Any]:
        metrics = self.call.get("metrics", [])
        cut = [t["turn_id"] for t in self.call.get("turns", []) if t["was_interrupted"]]

        def first(name: str) -> float | None:
            return next((m["value"] for m in metrics if m["name"] == name and m["turn_id"] in cut), None)

        return {"ducked_ms": first("duck_ms"), "stopped": bool(cut), "stop_ms": first("stop_ms")}

    def metric(self, name: str) -> list[float]:
        return sorted(m["value"] for m in self.call.get("metrics", []) if m["name"] == name)

    def as_line(self) -> dict[str, Any]:
        """The last line of `minmo demo --json`."""
        voice_to_voice = self.metric("voice_to_voice_ms")
        return {
            "answered": bool(self.report.get("answered")),
            "exchanges": [{"expected": v.exchange.expected, "got": v.got} for v in self.verdicts],
            "tool_calls": [
                {"name": t["name"], "arguments": t["arguments"], "state": t["state"], "result": t["result"]}
                for t in self.call.get("tool_calls", [])
            ],
            "agent_intelligibility_wer": round(self.wer, 4),
            "barge_in": self.barge_in,
            "voice_to_voice_ms": {
                "p50": statistics.median(voice_to_voice) if voice_to_voice else None,
                "p95": voice_to_voice[int(0.95 * (len(voice_to_voice) - 1) + 0.5)] if voice_to_voice else None,
                "n": len(voice_to_voice),
            },
            "first_word_ms": next(iter(self.metric("first_word_ms")), None),
            "call_id": self.call.get("call_id", ""),
            "database": self.database,
            "recording": self.recording,
        }  # fmt: skip


def run_demo(*, as_json: bool = False, checkpoint: str = "", seed: int | None = None) -> int:
    """`minmo demo`: exit status. `checkpoint`: another folder of weights; `seed`: draw the same order again."""
    say = (
        (lambda text="": print(text, file=sys.stderr, flush=True))
        if as_json
        else (lambda text="": print(text, flush=True))
    )
    config = demo_config(checkpoint)
    order = _draw_order(config, random.Random(seed))
    outcome = Outcome(order, database=str(_database(config)))
    try:
        asyncio.run(_run(config, outcome, say))
    except StartError as error:
        outcome.faults.append(str(error))
    _print_summary(outcome, say)
    if as_json:
        print(json.dumps(outcome.as_line()), flush=True)
    return 1 if outcome.faults else 0


def demo_config(checkpoint: str) -> Config:
    """Free ports and a database of its own; `checkpoint` as typed, "" = the shipped one."""
    return load_config(
        None,
        {
            "agent": {"checkpoint": str(Path(checkpoint).absolute()) if checkpoint else "", "log_level": "warning"},
            "telephony": {"sip_port": 0},
            "web": {"port": 0},
            "storage": {"folder": str(DEMO_FOLDER.absolute())},
        },
    )


def _database(config: Config) -> Path:
    return config.storage.folder / "minmo.sqlite3"


def _draw_order(config: Config, chooser: random.Random) -> Order:
    """Fifty new orders with numbers nobody has seen, and one of them."""
    engine = open_database(config.storage)
    create_tables(engine)
    known = {order.order_number for order in _all_orders(engine)}
    seed_demo_shop(engine, seed=chooser.randrange(1 << 30), num_orders=50)
    new = [order for order in _all_orders(engine) if order.order_number not in known]
    engine.dispose()
    return chooser.choice(new)


def _all_orders(engine: Any) -> list[Order]:
    with engine.connect() as connection:
        return list_orders(connection, limit=100_000)


# ------------------------------------------------------------------------------ run


async def _run(config: Config, outcome: Outcome, say: Any) -> None:
    began_s = time.monotonic()
    say("starting media worker, engine, agent and page ...")
    async with Stack(config) as stack:
        say(f"ready after {time.monotonic() - began_s:.1f} s: sip:100@{stack.sip_address}, page {stack.web_url}\n")
        label = await _checkpoint_label(stack)
        if "UNTRAINED" in label:
            say("UNTRAINED")
            outcome.faults.append(f"UNTRAINED: the checkpoint {label!r} has parts without trained weights")
            return
        reader = CallReader.open(stack.config.storage)
        try:
            view = LiveView(reader, say)
            following = asyncio.create_task(view.follow(), name="demo/view")
            outcome.report = await _call(stack, outcome.order, outcome)
            await asyncio.sleep(0.5)  # the last rows
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            view.print_new()
            if view.call_id:
                outcome.call = reader.get_call(view.call_id)
                await _examine(stack, reader, outcome)
            else:
                outcome.faults.append("no call was stored")
        finally:
            reader.close()


async def _checkpoint_label(stack: Stack) -> str:
    link = EngineLink(stack.run_folder / ENGINE_SOCKET)
    try:
        runtime = await link.runtime()
        await runtime.send(api.OpenStream(call_id="label", system_prompt=""))
        async for event in runtime.events("label"):
            if isinstance(event, api.StreamOpened):
                await runtime.send(api.CloseStream(call_id="label"))
                return event.checkpoint
        return ""
    finally:
        await link.close()


async def _call(stack: Stack, order: Order, outcome: Outcome) -> dict[str, Any]:
    """The caller's process, from start to its report."""
    recording = stack.config.storage.folder / "caller.wav"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent.demo_caller",
        "--uri", f"sip:100@{stack.sip_address}", "--order", order.order_number, "--record", str(recording),
        stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), CALL_WITHIN_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        outcome.faults.append(f"the call was not over within {CALL_WITHIN_S:.0f} s")
        return {}
    lines = output.decode().splitlines()
    if process.returncode or not lines:
        outcome.faults.append(f"the caller's process ended with status {process.returncode}")
        return {}
    report: dict[str, Any] = json.loads(lines[-1])
    return report


async def _examine(stack: Stack, reader: CallReader, outcome: Outcome) -> None:
    """Every claim of the demo, against what was stored and measured."""
    call, faults = outcome.call, outcome.faults
    if not outcome.report.get("answered"):
        faults.append(f"the call was not answered: {outcome.report.get('cause')}")
        return
    hours = _saturday(reader)
    wanted = exchanges(outcome.order.order_number, outcome.order.status, outcome.order.day, *hours)
    outcome.verdicts = judge_exchanges(wanted, outcome.report["said"], call)
    faults += [verdict.fault for verdict in outcome.verdicts if verdict.fault]
    _check_tool(outcome)
    _check_barge_in(outcome)
    _check_duplex(reader, outcome)
    recording = reader.open_recording(call["call_id"])
    if recording is None:
        faults.append("there is no recording")
        return
    path = stack.config.storage.folder / f"{call['call_id']}.wav"
    recording.write_wav(path)
    outcome.recording = str(path)
    await _check_intelligibility(stack, recording.samples()[:, 1].tobytes(), recording.sample_rate_hz, outcome)


def _saturday(reader: CallReader) -> tuple[str, str]:
    with reader.engine.connect() as connection:
        hours = look_up_hours(connection, "saturday")
    assert hours is not None and hours.is_open, "the demo shop is open on saturday"
    return _words(hours.opens), _words(hours.closes)


def _words(time_of_day: str) -> str:
    hour, minute = (int(part) for part in time_of_day.split(":"))
    return time_words(hour, minute)


def _check_tool(outcome: Outcome) -> None:
    number = outcome.order.order_number
    asked = [t["arguments"].get("order_number") for t in outcome.call["tool_calls"] if t["name"] == "look_up_order"]
    if number not in asked:
        outcome.faults.append(f"look_up_order was asked for {asked or 'nothing'}, the caller said {number}")


def _check_barge_in(outcome: Outcome) -> None:
    barge_in = outcome.barge_in
    if not barge_in["stopped"]:
        outcome.faults.append("the barge-in did not stop the agent")
    elif barge_in["ducked_ms"] is None or barge_in["stop_ms"] is None:
        outcome.faults.append(f"the barge-in was not measured on the wire: {barge_in}")
    elif barge_in["stop_ms"] > MAX_STOP_MS:
        outcome.faults.append(
            f"the agent stopped {barge_in['stop_ms']:.0f} ms after the caller began, more than {MAX_STOP_MS:.0f}"
        )


def _check_duplex(reader: CallReader, outcome: Outcome) -> None:
    """That ends of turns were predicted, not only waited out: a predictor without weights must not pass unseen."""
    ends = [e["payload"] for e in reader.get_events(outcome.call["call_id"]) if e["kind"] == "end_of_turn"]
    if not any(end.get("how") == "predicted" for end in ends):
        outcome.faults.append("no end of a caller's turn was predicted; all were waited out")


async def _check_intelligibility(stack: Stack, agent_pcm: bytes, rate_hz: int, outcome: Outcome) -> None:
    """The agent's channel, recognised by our own encoder, against what the record says was heard."""
    start = outcome.call.get("notice_end_sample") or 0
    rows = [t for t in outcome.call["turns"] if t["role"] == "agent" and t["heard_text"]]
    heard = " ".join(t["heard_text"] for t in rows if (t["end_sample"] or 0) > start)
    link = EngineLink(stack.run_folder / ENGINE_SOCKET)
    try:
        outcome.recognised = await recognise(await link.runtime(), agent_pcm, rate_hz)
    except api.StreamLost as error:
        outcome.faults.append(f"the agent's voice could not be recognised: {error}")
        return
    finally:
        await link.close()
    outcome.wer = word_error_rate(heard, outcome.recognised)
    if outcome.wer > MAX_AGENT_WER:
        outcome.faults.append(
            f"the agent is not intelligible: word error rate {outcome.wer:.0%}, at most {MAX_AGENT_WER:.0%}; "
            f"said {heard!r}, recognised {outcome.recognised!r}"
        )


# -------------------------------------------------------------------------- printing


def _print_summary(outcome: Outcome, say: Any) -> None:
    line = outcome.as_line()
    if outcome.call:
        say(f"\norder {outcome.order.order_number}: {outcome.order.status}, {outcome.order.day}")
        say(f"voice to voice  p50 {line['voice_to_voice_ms']['p50']} ms, p95 {line['voice_to_voice_ms']['p95']} ms, "
            f"n {line['voice_to_voice_ms']['n']}")  # fmt: skip
        say(f"first word      {line['first_word_ms']} ms after the answer")
        barge_in = line["barge_in"]
        say(f"barge-in        ducked after {barge_in['ducked_ms']} ms, stopped after {barge_in['stop_ms']} ms")
        say(f"intelligibility {outcome.wer:.0%} word error rate of our own encoder on the agent's voice")
        say(f"recording       {outcome.recording}")
        say(f"database        {outcome.database} (minmo db show {line['call_id']})")
    if outcome.faults:
        say("\nFAILED:")
        for fault in outcome.faults:
            say(f"  - {fault}")
    else:
        say("\nall of it was checked: OK")
