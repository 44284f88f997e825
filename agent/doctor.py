"""`minmo doctor`: what is installed, loaded and free, which bridges stand and why, each with what to do about it.

It starts nothing and changes nothing. A finding that stops `minmo serve` is a fault; one that narrows it is a warning.
The model is imported inside a function, so that a machine without torch is told so.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from agent.checkpoint import checkpoint_facts, checkpoint_folder
from agent.config import Config
from agent.prompts.lines import LineBook
from minmo_runtime.models import state_of
from minmo_runtime.profiles import Files, models_folder, sources_of
from policies.engine import PolicyEngine
from policies.facts import CheckpointFacts
from telephony import speexdsp

if TYPE_CHECKING:
    from minmo_runtime.weights import Checkpoint

BRIDGE_REASONS = {
    "in": "no trained input projector: the encoder's CTC text becomes the caller's turn",
    "out": "no trained output projector: the voice LM reads the text through its own table",
    "duplex": "no trained predictor: an endpointer over voice activity and words decides",
}
TEST_PEERS = ("baresip", "sipp", "sipsak", "chromium")
MIN_FREE_BYTES = 1 << 30


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    text: str


def examine(config: Config) -> list[Finding]:
    """Every finding, in the order in which a start would need the thing."""
    checks: tuple[Callable[[Config], Iterator[Finding]], ...] = (
        _machine,
        _sip,
        _echo,
        _model,
        _campaigns,
        _storage,
        _ports,
        _handoff,
        _peers,
    )
    return [finding for check in checks for finding in check(config)]


def facts_or_fault(config: Config) -> CheckpointFacts:
    """What the checkpoint was trained on; ValueError says why it cannot be read."""
    folder = checkpoint_folder(config)
    try:
        return checkpoint_facts(folder)
    except OSError as error:
        raise ValueError(f"{folder / 'checkpoint.toml'}: {error.strerror}") from None
    except KeyError as error:
        raise ValueError(f"{folder / 'checkpoint.toml'}: {error} is missing") from None


def load_policies(config: Config, facts: CheckpointFacts) -> PolicyEngine:
    """The policy engine as the agent loads it; refused campaigns are in `.problems`."""
    return PolicyEngine.load(
        config.policies,
        facts,
        handoff_uri=config.handoff.uri,
        recording=config.storage.recording_policy,
        line_keys=LineBook.load().keys,
    )


# ------------------------------------------------------------------ the checks


def _machine(_: Config) -> Iterator[Finding]:
    is_known = platform.system() == "Linux" and platform.machine() == "x86_64"
    library, version = platform.libc_ver()
    text = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {library} {version}"
    yield Finding("machine", State.OK if is_known else State.WARNING, f"{text}, {os.cpu_count()} CPUs")


def _sip(_: Config) -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("pjsua2-python")
    except importlib.metadata.PackageNotFoundError:
        version = "own build" if importlib.util.find_spec("pjsua2") else ""
    if version:
        yield Finding("sip", State.OK, f"pjsua2 {version}")
        return
    wheels = "" if sys.version_info < (3, 13) else " (wheels exist for Python 3.11 and 3.12 only)"
    yield Finding("sip", State.FAULT, f"pjsua2 is not installed{wheels}: make venv")


def _echo(config: Config) -> Iterator[Finding]:
    if config.telephony.echo_canceller == "off":
        yield Finding("echo", State.WARNING, "canceller off (telephony.echo_canceller): only the gate works")
        return
    try:
        speexdsp.load()
    except speexdsp.SpeexMissing as error:
        state = State.FAULT if config.telephony.echo_canceller == "speexdsp" else State.WARNING
        yield Finding("echo", state, f"{error}; only the gate works")
    else:
        yield Finding("echo", State.OK, "libspeexdsp removes the line's echo of our voice")


def _model(config: Config) -> Iterator[Finding]:
    if not importlib.util.find_spec("torch"):
        yield Finding("model", State.FAULT, "torch is not installed: make venv")
        return
    from minmo_runtime import checkpoint_contents as tables
    from minmo_runtime import memory, weights

    yield Finding("torch", State.OK, importlib.metadata.version("torch"))
    try:
        folder = checkpoint_folder(config)
        contents = tables.read_contents(folder)
    except (ValueError, tables.CheckpointError) as error:
        yield Finding("checkpoint", State.FAULT, str(error))
        return
    files = Files(folder, models_folder(config.runtime.models_folder))
    there = tuple(
        part for part in tables.parts() if part in contents and tables.part_path(files, contents, part).is_file()
    )
    needed = memory.weight_bytes(contents, config.runtime, (*tables.NEEDED, *there))
    yield from _sources(contents, files)
    yield _memory(
        needed,
        memory.call_bytes(contents, config.runtime, "projector" in there),
        memory.free_bytes(config.runtime.device),
        config,
    )
    bridges = [bridge for part, bridge in tables.CONNECTORS.items() if part not in there]
    yield Finding("bridges", State.OK, f"bridges=[{', '.join(bridges)}]")
    for bridge in bridges:
        yield Finding(f"bridge {bridge}", State.WARNING, BRIDGE_REASONS[bridge])
    yield from _prompt_voice(contents, files)
    if missing := [part for part in tables.NEEDED if part not in there]:
        advice = f"sizes only: `minmo bench engine --profile {contents['name']} --random-weights`"
        if sources_of(contents):
            advice = "run `minmo models fetch` as above"
        text = f"{contents['name']}: no weights of {', '.join(missing)}: {advice}"
        yield Finding("checkpoint", State.FAULT, text)
        return
    try:
        checkpoint = weights.load_checkpoint(folder, models=config.runtime.models_folder)
    except tables.CheckpointError as error:
        yield Finding("checkpoint", State.FAULT, str(error))
        return
    size_mib = sum(needed.values()) / 2**20
    state = State.FAULT if "UNTRAINED" in checkpoint.label else State.OK
    parts = ", ".join(part for part, module in vars(checkpoint.modules).items() if module is not None)
    yield Finding("checkpoint", state, f"{checkpoint.label} ({size_mib:.1f} MiB in memory): {parts}")
    for warning in checkpoint.warnings:
        yield Finding("checkpoint note", State.WARNING, warning)
    yield _capacity(checkpoint, config)


def _capacity(checkpoint: Checkpoint, config: Config) -> Finding:
    """What the engine will let in; measured now, if it never was on this device."""
    from minmo_runtime.capacity import capacity_of  # here: torch
    from minmo_runtime.engine import Engine

    device = config.runtime.device
    if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
        return Finding("calls", State.FAULT, "runtime.device = 'cuda': there is none here")
    found = capacity_of(Engine(checkpoint, config.runtime))
    is_held = found.costs is None or found.costs.calls_held(1) == 1
    text = f"{found}; runtime.max_streams = {config.runtime.max_streams}"
    return Finding("calls", State.OK if is_held else State.WARNING, text if is_held else f"not in real time: {text}")


def _sources(contents: dict[str, Any], files: Files) -> Iterator[Finding]:
    """Each public checkpoint that the profile names: whole, or what brings it."""
    for source in sources_of(contents):
        found = state_of(source, files.models)
        text = f"{found.text} in {found.folder}; {source.licence}"
        if found.missing:
            text += f": minmo models fetch {contents['name']} --accept-licence"
        yield Finding(f"files {source.name}", State.FAULT if found.missing else State.OK, text)


def _prompt_voice(contents: dict[str, Any], files: Files) -> Iterator[Finding]:
    """CosyVoice 2 continues a voice; without one it speaks as nobody in particular."""
    entry = contents.get("files", {}).get("prompt_voice")
    if entry is None:
        return
    path = files.path(entry["path"])
    if path.is_file():
        yield Finding("prompt voice", State.OK, str(path))
    else:
        text = "not there: minmo models voice SPEECH.wav --text '...' --speaker-consents"
        yield Finding("prompt voice", State.WARNING, f"{path}: {text}")


def _memory(needed: dict[str, int], per_call: int, free: int, config: Config) -> Finding:
    calls = config.runtime.max_streams
    total = sum(needed.values()) + calls * per_call
    largest = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in needed.items() if size > 0.05 * total)
    text = (
        f"needs {total / 2**30:.2f} GiB ({largest}; {calls} calls of {per_call / 2**20:.0f} MiB), "
        f"{free / 2**30:.2f} GiB free on {config.runtime.device}, {config.runtime.dtype}"
    )
    return Finding("memory", State.OK if total < free else State.FAULT, text)


def _campaigns(config: Config) -> Iterator[Finding]:
    try:
        engine = load_policies(config, facts_or_fault(config))
    except ValueError as error:
        yield Finding("campaigns", State.FAULT, str(error))
        return
    for campaign in engine.campaigns:
        yield Finding(f"campaign {campaign.name}", State.OK, f"answers {', '.join(campaign.dids)}")
    if config.audiosocket.port and not engine.campaign_for(config.audiosocket.did):
        numbers = ", ".join(sorted(did for campaign in engine.campaigns for did in campaign.dids))
        text = f"audiosocket.did = {config.audiosocket.did!r}: must be one of {numbers}; its calls are refused"
        yield Finding("audiosocket", State.WARNING, text)
    for problem in engine.problems:
        yield Finding(f"campaign {problem.name}", State.WARNING, f"refused: {problem.reason}")
    if not engine.campaigns:
        yield Finding("campaigns", State.FAULT, "none is valid, so no call can be answered")


def _storage(config: Config) -> Iterator[Finding]:
    folder = config.storage.folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        yield Finding("storage", State.FAULT, f"{existing} is not writable")
        return
    free = shutil.disk_usage(existing).free
    state = State.OK if free >= MIN_FREE_BYTES else State.WARNING
    yield Finding(
        "storage", state, f"{folder}, {free / 2**30:.1f} GiB free, recording {config.storage.recording_policy}"
    )


def _ports(config: Config) -> Iterator[Finding]:
    ports = [
        ("sip", socket.SOCK_DGRAM, config.telephony.sip_bind, config.telephony.sip_port),
        ("web", socket.SOCK_STREAM, config.web.host, config.web.port),
    ]
    if config.audiosocket.port:
        ports.append(("audiosocket", socket.SOCK_STREAM, config.audiosocket.bind, config.audiosocket.port))
    for name, kind, address, port in ports:
        protocol = "udp" if kind == socket.SOCK_DGRAM else "tcp"
        error = _bind_error(kind, address, port)
        text = f"{address}:{port}/{protocol} " + (f"can not be bound: {error}" if error else "is free")
        yield Finding(f"port {name}", State.WARNING if error else State.OK, text)


def _bind_error(kind: socket.SocketKind, address: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, kind) as probe:
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _handoff(config: Config) -> Iterator[Finding]:
    if config.handoff.uri:
        yield Finding("handoff", State.OK, config.handoff.uri)
    else:
        yield Finding("handoff", State.WARNING, "handoff.uri is not set: who asks for a person gets a callback request")


def _peers(_: Config) -> Iterator[Finding]:
    missing = [name for name in TEST_PEERS if not shutil.which(name)]
    if missing:
        yield Finding("test peers", State.WARNING, f"missing {', '.join(missing)} (tests only): sudo make peers")
    else:
        yield Finding("test peers", State.OK, ", ".join(TEST_PEERS))
