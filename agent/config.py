"""Settings: config.toml into one frozen dataclass per section, checked once at start and read nowhere else.

Each island owns the dataclass of its section, because it may not import agent/; the agent's own sections stand here.
An unknown section or key, a wrong type and a value out of range stop the start with the key, the value and what is
allowed: `telephony.ptime_ms = 25: must be 10, 20, 30 or 40`. No secret is ever in the file: keys that need one name
an environment variable (`*_env`) or a file (`*_file`).

`python -m agent.config_file` prints config.toml with every default, from the docstrings under the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from agent.floor import TurnTakingConfig
from agent.supervisor.config import WebConfig
from minmo_runtime.config import RuntimeConfig
from policies.campaign import HANDOFF_MANNERS
from policies.config import PoliciesConfig
from storage.config import StorageConfig
from telephony.audiosocket.config import AudioSocketConfig
from telephony.config import TelephonyConfig
from telephony.webrtc.config import WebRtcConfig

_PASSWORD_IN_URL = re.compile(r"://[^/@\s:]*:[^/@\s]+@")
_REFER_TARGET = re.compile(r"(sips?:[^\s<>\"]+@[^\s<>\"]+|tel:\+?[0-9]+)")


class ConfigError(ValueError):
    """A setting that is wrong; the message names the key, the value and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The agent process and what it starts."""

    checkpoint: str = ""
    """Folder of the model's checkpoint; empty = minmo_runtime/checkpoints/nano."""

    run_folder: str = ""
    """Private folder of the sockets between our processes; empty = a fresh one (mode 0700) at each start."""

    digit_timeout_s: float = 4.0
    """Pause between two keys that closes a number typed on the keypad, 1-20 s."""

    send_keys_cooldown_s: float = 3.0
    """After a row of keys that the tool send_keys has pressed, none is pressed for so long, 0-60 s."""

    log_level: str = "info"
    """debug | info | warning | error."""

    loop_stall_s: float = 0.5
    """Every call waits while one function holds the agent's event loop: after this long it is named in the log,
    0.1-60."""

    def __post_init__(self) -> None:
        _in_range(
            "agent", self, digit_timeout_s=(1.0, 20.0), send_keys_cooldown_s=(0.0, 60.0), loop_stall_s=(0.1, 60.0)
        )
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"agent.log_level = {self.log_level!r}: must be debug, info, warning or error")


@dataclass(frozen=True, kw_only=True)
class HandoffConfig:
    """Where a caller who wants a person goes."""

    uri: str = ""
    """Who is called, verbatim: sip:user@host, sips:user@host or tel:+390...; empty = a callback request is stored
    instead. A campaign may name its own."""

    manner: str = "blind"
    """blind: the caller is sent there by REFER. warm: the agent calls the person (telephony.outbound_hosts, or a tel:
    number by the trunks), sums up what was said, and connects the two when the person takes the call; it stays with
    the caller if nobody does. A campaign may choose its own."""

    accept_digit: str = "1"
    """Key by which the person takes a warm hand-off, 0-9, * or #."""

    ring_s: float = 25.0
    """How long the person's telephone rings, 5-120."""

    accept_s: float = 10.0
    """How long after the summary the person may still press the key, 2-60."""

    def __post_init__(self) -> None:
        _in_range("handoff", self, ring_s=(5.0, 120.0), accept_s=(2.0, 60.0))
        if self.manner not in HANDOFF_MANNERS:
            raise ConfigError(f"handoff.manner = {self.manner!r}: must be {' or '.join(HANDOFF_MANNERS)}")
        if not re.fullmatch(r"[0-9*#]", self.accept_digit):
            raise ConfigError(f"handoff.accept_digit = {self.accept_digit!r}: must be one of 0-9, * and #")
        if self.uri and not _REFER_TARGET.fullmatch(self.uri):
            raise ConfigError(f"handoff.uri = {self.uri!r}: must be sip:user@host, sips:user@host or tel:number")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole file; a process takes the sections it needs and passes each island its own."""

    agent: AgentConfig = field(default_factory=AgentConfig)
    turn_taking: TurnTakingConfig = field(default_factory=TurnTakingConfig)
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    web: WebConfig = field(default_factory=WebConfig)
    telephony: TelephonyConfig = field(default_factory=TelephonyConfig)
    webrtc: WebRtcConfig = field(default_factory=WebRtcConfig)
    audiosocket: AudioSocketConfig = field(default_factory=AudioSocketConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    policies: PoliciesConfig = field(default_factory=PoliciesConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def __post_init__(self) -> None:
        if self.runtime.max_streams < self.telephony.total_calls:
            raise ConfigError(
                f"runtime.max_streams = {self.runtime.max_streams}: "
                f"must be at least the calls at once of telephony ({self.telephony.total_calls})"
            )


# Fields that config.toml does not list, because another section decides them: here is which one.
DERIVED = {("telephony", "handoff_uri"): "handoff.uri"}


def load_config(path: Path | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Config:
    """Read `path` (None = all defaults), lay `overrides` ({"telephony": {"sip_port": 0}}) over it, check everything."""
    table: dict[str, dict[str, Any]] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
    for section, values in (overrides or {}).items():
        table[section] = {**table.get(section, {}), **values}
    return build_config(table)


def build_config(table: Mapping[str, Mapping[str, Any]]) -> Config:
    sections = get_type_hints(Config)
    for name, values in table.items():
        if name not in sections:
            raise ConfigError(f"[{name}]: unknown section{_did_you_mean(name, sections)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} = {values!r}: must be a section, [{name}]")
    built = {name: _build_section(name, kind, table.get(name, {})) for name, kind in sections.items()}
    built["telephony"] = dataclasses.replace(built["telephony"], handoff_uri=built["handoff"].uri)
    return Config(**built)


def _build_section(section: str, kind: type, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if (section, key) in DERIVED:
            raise ConfigError(f"{section}.{key} = {value!r}: must be left out, set {DERIVED[section, key]}")
        if key not in hints:
            raise ConfigError(f"{section}.{key} = {value!r}: unknown key{_did_you_mean(key, hints)}")
        arguments[key] = _convert(f"{section}.{key}", value, hints[key])
    try:
        return kind(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(f"{section}.") else f"{section}.{text}") from None


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` from TOML as the field's type: an int does as a float, a bool is no number, a list becomes a tuple."""
    if isinstance(value, str) and _PASSWORD_IN_URL.search(value):
        raise ConfigError(f"{name}: must not hold a password; give it by environment (PGPASSWORD) or file (PGPASSFILE)")
    if get_origin(hint) is tuple:
        item_hint = get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} = {value!r}: must be a list of {item_hint.__name__}")
        return tuple(_convert(name, item, item_hint) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):  # a table in a list: its island checks it
        return dict(value)
    if isinstance(hint, types.UnionType) or not isinstance(hint, type):
        raise TypeError(f"{name}: the loader knows bool, int, float, str, Path and tuple, not {hint}")
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} = {value!r}: must be {_TYPE_WORDS.get(hint, hint.__name__)}")
    return value


_TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes", Path: "a path"}


def _in_range(section: str, config: Any, **ranges: tuple[float, float]) -> None:
    for key, (low, high) in ranges.items():
        value = getattr(config, key)
        if not low <= value <= high:
            raise ConfigError(f"{section}.{key} = {value!r}: must be {low:g} to {high:g}")


def _did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
