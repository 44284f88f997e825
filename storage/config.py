"""Settings of the storage island: where things are kept and how safely.

`agent/config.py` loads the `[storage]` section of config.toml into this; nothing here reads a file or the environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECORDING_POLICIES = ("off", "after_notice", "always")


class StorageConfigError(ValueError):
    """A setting that is wrong; names key, value and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Everything the store needs to know; see the docstring under each field."""

    folder: Path = Path("var")
    """Holds the SQLite file, `journal/` and `recordings/`. Created with mode 0700."""
    database_url: str = ""
    """SQLAlchemy URL; "" = SQLite at `folder`/minmo.sqlite3. PostgreSQL: postgresql+psycopg://..."""
    busy_timeout_ms: int = 5_000
    """How long a SQLite writer waits for another one."""
    group_commit_ms: int = 40
    """Entries that arrive within this time share one SQL commit and one fsync (reliability.md §5.1: at most 50)."""
    is_synced: bool = True
    """fsync the journal before a turn is acknowledged.

    False only in tests: a killed process still loses nothing, a power cut may.
    """
    journal_reserve_mib: int = 64
    """New calls are refused when less than this is free on the journal's disk; running calls go on."""
    recording_policy: str = "after_notice"
    """off | after_notice (from the end of the spoken notice) | always; a campaign may narrow it."""
    recording_segment_s: float = 5.0
    """Length of a recording file; at most this much (plus 1 s) of sound is lost when a process is killed."""

    def __post_init__(self) -> None:
        if self.recording_policy not in RECORDING_POLICIES:
            raise StorageConfigError(
                f"storage.recording_policy = {self.recording_policy!r}: must be one of {', '.join(RECORDING_POLICIES)}"
            )
        for key, low, high in (
            ("busy_timeout_ms", 0, 60_000),
            ("group_commit_ms", 0, 50),
            ("journal_reserve_mib", 0, 1_000_000),
            ("recording_segment_s", 1.0, 60.0),
        ):
            value = getattr(self, key)
            if not low <= value <= high:
                raise StorageConfigError(f"storage.{key} = {value}: must be between {low} and {high}")

    @property
    def url(self) -> str:
        return self.database_url or f"sqlite:///{self.folder.absolute() / 'minmo.sqlite3'}"

    @property
    def journal_folder(self) -> Path:
        return self.folder / "journal"

    @property
    def recording_folder(self) -> Path:
        return self.folder / "recordings"
