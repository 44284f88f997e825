"""Our own SIP caller: places a call, plays a clip or walks through a script, records both directions, reports timings.

    minmo call sip:100@127.0.0.1:5060 --play FILE.wav --record OUT.wav [--dtmf 123#]
    python -m agent.caller sip:… --play FILE.wav --record OUT.wav          (the same; the last line is JSON)

    script = CallerScript(steps=(WaitForAgent(), Say(read_clip("a.wav")), BargeIn(read_clip("b.wav"), after_ms=800),
    Hangup())) report = asyncio.run(run_caller("sip:100@127.0.0.1:5060", script, record=Path("out.wav")))

SIP and media run in a media worker of its own, a separate process that shares nothing with the agent it calls. All
timings are voiced energy on the caller's side of the wire, in milliseconds since the answer. Recording: left = caller,
right = agent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import sys
import time
import wave
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agent.caller_script import (
    Action,
    BargeIn,
    CallerScript,
    Dtmf,
    Hangup,
    Say,
    ScriptPlayer,
    Segment,
    Step,
    Wait,
    WaitForAgent,
)
from telephony import leg as contract
from telephony.client import CallRefused, WorkerClient, WorkerLeg
from telephony.clips import read_clip
from telephony.config import TelephonyConfig
from telephony.dtmf import KEYS
from telephony.leg import LegDisconnected, LegEvent, LegState, LegStateChanged
from telephony.process import WorkerProcess
from telephony.sip.trunk import split_uri

__all__ = [
    "BargeIn", "CallerReport", "CallerScript", "Dtmf", "Hangup", "Say", "Wait", "WaitForAgent", "play_script",
    "read_clip", "call_once", "run_caller",
]  # fmt: skip

RATE_HZ = 8000
SILENT_MS = 2_500  # longer than a pause between the notice and the greeting, or between a filler and its answer
EventObserver = Callable[[LegEvent, ScriptPlayer], None]


@dataclass
class CallerReport:
    """What the caller experienced. Times in ms since the answer; -1 = did not happen."""

    uri: str
    answered: bool = False
    answer_ms: int = -1  # INVITE to 200 OK
    codec: str = ""
    cause: str = ""
    sip_status: int = 0
    ended_by: str = ""  # "us", "agent" or "network"
    duration_ms: int = 0
    first_agent_onset_ms: int = -1
    agent_speech_ms: list[tuple[int, int]] = field(default_factory=list)
    own_speech_ms: list[tuple[int, int]] = field(default_factory=list)
    said: list[dict[str, Any]] = field(default_factory=list)
    voice_to_voice_ms: list[int] = field(default_factory=list)  # end of each of our words to the agent's next onset
    timed_out_steps: list[int] = field(default_factory=list)
    recording: str = ""

    @property
    def voice_to_voice_p50_ms(self) -> int:
        return int(statistics.median(self.voice_to_voice_ms)) if self.voice_to_voice_ms else -1


def play_script(clip: bytes, dtmf: str = "") -> CallerScript:
    """Greeting, the clip if any and its answer, keys if any and their answer, goodbye."""
    steps: tuple[Step, ...] = (WaitForAgent(SILENT_MS),)
    if clip:
        steps += (Say(clip, "clip"), WaitForAgent(SILENT_MS, timeout_ms=20000))
    if dtmf:
        if not KEYS.fullmatch(dtmf):
            raise ValueError(f"keys {dtmf!r}: must be 1 to 64 of 0-9, *, # and A-D")
        steps += (Dtmf(dtmf), WaitForAgent(SILENT_MS, timeout_ms=20000))
    return CallerScript((*steps, Hangup()))


async def run_caller(
    uri: str, script: CallerScript, record: Path | None = None, from_user: str = "caller", display_name: str = "",
    max_duration_s: float = 300.0, on_event: EventObserver | None = None, headers: dict[str, str] | None = None,
) -> CallerReport:  # fmt: skip
    """One call from INVITE to BYE. `on_event` only looks on."""
    config = _caller_config(uri, from_user)
    worker = await asyncio.to_thread(WorkerProcess, config)
    try:
        client = await WorkerClient.connect(worker.socket_path, config=config)
        try:
            return await _call(client, uri, script, record, from_user, display_name, max_duration_s, on_event, headers)
        finally:
            await client.close()
    finally:
        await asyncio.to_thread(worker.stop)


async def _call(
    client: WorkerClient, uri: str, script: CallerScript, record: Path | None, from_user: str, display_name: str,
    max_duration_s: float, on_event: EventObserver | None, headers: dict[str, str] | None,
) -> CallerReport:  # fmt: skip
    report = CallerReport(uri=uri)
    player = ScriptPlayer(script, RATE_HZ)
    recording = _Recording(record)
    placed_at_s = time.monotonic()
    try:
        leg = await client.place_call(uri, from_user=from_user, display_name=display_name, headers=headers)
    except CallRefused as error:
        report.cause = str(error)
        return report
    leg.set_tap(recording.add)
    deadline = asyncio.get_running_loop().call_later(max_duration_s, leg.hang_up)
    async for event in leg.events():
        _note(report, event, placed_at_s)
        for action in player.on_event(event):
            with contextlib.suppress(contract.LegError):  # the agent hung up a moment ago; the next event says so
                await _carry_out(leg, player, action)
        if on_event is not None:
            on_event(event, player)
    deadline.cancel()
    report.recording = recording.close()
    _summarise(report, player)
    return report


async def _carry_out(leg: WorkerLeg, player: ScriptPlayer, action: Action) -> None:
    match action:
        case Say(pcm=pcm):
            play = contract.Play(
                leg_id=leg.leg_id, item_id=player.say_item, pcm=pcm, sample_rate_hz=RATE_HZ, is_final=True
            )
            await leg.send(play)
        case Dtmf(digits=digits):
            await leg.send_dtmf(digits)
        case Hangup():
            leg.hang_up()


def _note(report: CallerReport, event: LegEvent, placed_at_s: float) -> None:
    match event:
        case LegStateChanged(state=LegState.CONFIRMED, codec=codec):
            report.answered, report.codec = True, codec
            report.answer_ms = round((time.monotonic() - placed_at_s) * 1000)
        case LegDisconnected(cause=cause, sip_status=sip_status, by=by):
            report.cause, report.sip_status = cause, sip_status
            report.ended_by = {"agent": "us", "caller": "agent"}.get(by, by)  # from here, "agent" is the far end


def _summarise(report: CallerReport, player: ScriptPlayer) -> None:
    report.duration_ms = _ms(player.sample)
    report.agent_speech_ms = [_ms_of(segment) for segment in player.agent_segments]
    report.own_speech_ms = [_ms_of(segment) for segment in player.own_segments]
    report.timed_out_steps = player.timed_out_steps
    if player.agent_segments:
        report.first_agent_onset_ms = _ms(player.agent_segments[0].onset_sample)
    for said in player.said:
        own = [
            s
            for s in player.own_segments
            if said.start_sample <= s.offset_sample <= max(said.end_sample, 0) + RATE_HZ // 10
        ]
        spoken_until = own[-1].offset_sample if own else said.end_sample
        answer = next((s.onset_sample for s in player.agent_segments if s.onset_sample > spoken_until), None)
        voice_to_voice = _ms(answer - spoken_until) if answer is not None and spoken_until >= 0 else -1
        report.said.append({
            "step": said.step, "label": said.label, "start_ms": _ms(said.start_sample), "end_ms": _ms(spoken_until),
            "voice_to_voice_ms": voice_to_voice,
        })  # fmt: skip
        if voice_to_voice >= 0:
            report.voice_to_voice_ms.append(voice_to_voice)


def _ms(samples: int) -> int:
    return round(samples * 1000 / RATE_HZ)


def _ms_of(segment: Segment) -> tuple[int, int]:
    return _ms(segment.onset_sample), _ms(segment.offset_sample)


class _Recording:
    """Two channels straight to disk: left what we said, right what we heard."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: wave.Wave_write | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = wave.open(str(path), "wb")
            self._file.setnchannels(2)
            self._file.setsampwidth(2)
            self._file.setframerate(RATE_HZ)

    def add(self, _start_sample: int, heard: bytes, said: bytes) -> None:
        if self._file is not None:
            both = np.stack([np.frombuffer(said, "<i2"), np.frombuffer(heard, "<i2")], axis=1)
            self._file.writeframes(both.tobytes())

    def close(self) -> str:
        if self._file is None:
            return ""
        self._file.close()
        return str(self._path)


def _caller_config(uri: str, from_user: str) -> TelephonyConfig:
    """A worker that may call this one host and takes no call from anywhere but this machine."""
    _, host, port = split_uri(uri)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port or 5060))  # sends nothing; tells which of our addresses leads there
        except OSError as error:
            raise ValueError(f"{host}: {error.strerror}") from None
        bind = probe.getsockname()[0]
    return TelephonyConfig(
        sip_bind=bind, sip_port=0, max_calls=1, outbound_hosts=(host,), from_user=from_user or "caller",
        allowed_sources=("127.0.0.0/8",), user_agent="MinMo-caller", drain_s=0.0,
        comfort_noise_dbov=0,  # what it plays is all there is to hear: figures are taken from it
    )  # fmt: skip


def call_once(
    uri: str, play: Path | None = None, record: Path | None = None, dtmf: str = "", from_user: str = "caller",
    max_duration_s: float = 300.0,
) -> dict[str, Any]:  # fmt: skip
    """`minmo call`: greeting, clip, answer, keys, goodbye; the report as plain data. ValueError for a bad address, a
    host that is not there, a key that is none."""
    script = play_script(read_clip(play) if play is not None else b"", dtmf)
    report = asyncio.run(run_caller(uri, script, record, from_user, max_duration_s=max_duration_s))
    return asdict(report) | {"voice_to_voice_p50_ms": report.voice_to_voice_p50_ms}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="agent.caller", description="Place one call, play a file, record both directions."
    )
    parser.add_argument("uri")
    parser.add_argument("--play", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--dtmf", default="")
    parser.add_argument("--from-user", default="caller")
    parser.add_argument("--max-duration-s", type=float, default=300.0)
    options = parser.parse_args(arguments)
    report = call_once(
        options.uri, options.play, options.record, options.dtmf, options.from_user, options.max_duration_s
    )
    print(json.dumps(report))
    return 0 if report["answered"] else 1


if __name__ == "__main__":
    sys.exit(main())
