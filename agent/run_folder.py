"""The private folder that our processes share: sockets, and the settings of this start. Mode 0700, gone with the
parent.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from agent.checkpoint import SHIPPED_CHECKPOINT as SHIPPED_CHECKPOINT
from agent.config import DERIVED, Config, ConfigError, build_config

ENGINE_SOCKET, MEDIA_SOCKET, SETTINGS_FILE = "engine.sock", "media.sock", "settings.json"
MONITOR_SOCKET = "monitor.sock"
DIAL_SOCKET = "dial.sock"
AUDIOSOCKET_SOCKET = "audiosocket.sock"  # where the agent meets the worker for AudioSocket
AUDIOSOCKET_CHECK = "audiosocket-check.sock"  # where that worker is asked whether it is there
_WHERE_FILE = "run-folder"  # in the storage folder: where the running agent's sockets are


def media_socket(index: int) -> str:
    """Where the agent meets the SIP worker of this number; the first is MEDIA_SOCKET."""
    return f"media-{index}.sock" if index else MEDIA_SOCKET


def browser_socket(index: int) -> str:
    """Where the agent meets the browser worker of this number."""
    return f"browser-{index}.sock"


def offer_socket(index: int) -> str:
    """Where the page brings that worker its offers."""
    return f"offers-{index}.sock"


def make_run_folder(wanted: str) -> Path:
    """A fresh folder, or the wanted one, which must be ours alone."""
    if not wanted:
        return Path(tempfile.mkdtemp(prefix="minmo-run-"))  # mkdtemp makes it 0700
    folder = Path(wanted)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"agent.run_folder = {wanted!r}: must belong to this user with mode 0700")
    return folder


def note_run_folder(storage_folder: Path, run_folder: Path) -> None:
    """For `minmo dial`, another program of this user."""
    storage_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(storage_folder / _WHERE_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(str(run_folder.absolute()))


def find_run_folder(config: Config) -> Path | None:
    """Of the agent that runs with these settings, None when it never ran; it may have ended since."""
    if config.agent.run_folder:
        return Path(config.agent.run_folder)
    where = config.storage.folder / _WHERE_FILE
    return Path(where.read_text(encoding="utf-8")) if where.is_file() else None


def write_settings(config: Config, folder: Path) -> Path:
    """All settings as the children read them; only this user can."""
    path = folder / SETTINGS_FILE
    table = {name: _plain(dataclasses.asdict(getattr(config, name))) for name in _sections(config)}
    for section, key in DERIVED:
        table[section].pop(key, None)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(table, file)
    return path


def read_settings(path: Path) -> Config:
    return build_config(json.loads(path.read_text(encoding="utf-8")))


def _sections(config: Config) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in table.items()}
