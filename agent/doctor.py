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

from agent.checkpoint import checkpoint_facts, checkpoint_folder
from agent.config import Config
from agent.prompts.lines import LineBook
from policies.engine import PolicyEngine
from policies.facts import CheckpointFacts
from telephony import speexdsp

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
    from minmo_runtime import weights

    yield Finding("torch", State.OK, importlib.metadata.version("torch"))
    try:
        checkpoint = weights.load_checkpoint(checkpoint_folder(config))
    except weights.CheckpointError as error:
        yield Finding("checkpoint", State.FAULT, str(error))
        return
    size_mib = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors")) / 2**20
    state = State.FAULT if "UNTRAINED" in checkpoint.label else State.OK
    parts = ", ".join(part for part, module in vars(checkpoint.modules).items() if module is not None)
    yield Finding("checkpoint", state, f"{checkpoint.label} ({size_mib:.1f} MiB): {parts}")
    yield Finding("bridges", State.OK, f"bridges=[{', '.join(checkpoint.bridges)}]")
    for bridge in checkpoint.bridges:
        yield Finding(f"bridge {bridge}", State.WARNING, BRIDGE_REASONS[bridge])
    for warning in checkpoint.warnings:
        yield Finding("checkpoint", State.WARNING, warning)


def _campaigns(config: Config) -> Iterator[Finding]:
    try:
        engine = load_policies(config, facts_or_fault(config))
    except ValueError as error:
        yield Finding("campaigns", State.FAULT, str(error))
        return
    for campaign in engine.campaigns:
        yield Finding(f"campaign {campaign.name}", State.OK, f"answers {', '.join(campaign.dids)}")
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
    for name, kind, address, port in (
        ("sip", socket.SOCK_DGRAM, config.telephony.sip_bind, config.telephony.sip_port),
        ("web", socket.SOCK_STREAM, config.web.host, config.web.port),
    ):
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
