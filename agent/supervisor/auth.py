"""Who may see the page, and what each may do there: a token for each person, then a signed cookie.

The first start makes the token of `supervisor`, who has every right; `minmo access add NAME` makes more, with the
rights named. Seeing calls and transcripts needs none; hearing one, running or recorded, ending it, reading in bulk and
calling from the page do.

The token is shown once, in the terminal; on disk only its hash is kept, in a file of mode 0600 beside the key that
signs cookies. A cookie is `expiry.nonce.signature`; signing out raises the generation, which ends every session there
is. Wrong tokens are counted per source address. Source: OWASP ASVS 5.0 V6 (throttling), V7 (sessions). Knows no HTTP;
time is an argument.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)
MAX_FAILURES, WINDOW_S = 5, 60.0
MAX_SOURCES = 1_024  # oldest forgotten first; bounds memory under a flood


FIRST_PERSON = "supervisor"
_NAME = re.compile(r"[a-z0-9_]{1,32}")


class Right(StrEnum):
    LISTEN = "listen"  # hear a running call
    PLAYBACK = "playback"  # hear the recordings of calls
    HANG_UP = "hang_up"  # end a running call
    PAUSE_RECORDING = "pause_recording"  # pause the recording of a running call, and let it go on
    EXPORT = "export"  # take lists of calls away, and read more than a page of them at once
    CALL = "call"  # call the agent from the page
    DIAL = "dial"  # let the agent call somebody for a campaign


ALL_RIGHTS = frozenset(Right)


@dataclass(frozen=True)
class Person:
    """Who is signed in. The name stands in the audit."""

    name: str
    rights: frozenset[Right]


class AuthError(Exception):
    """Parent of both refusals."""


class WrongToken(AuthError):
    """Not the token."""


class TooManyAttempts(AuthError):
    """This source has to wait, even with the right token."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many attempts, wait {retry_after_s} s")
        self.retry_after_s = retry_after_s


class UnsafeStateFile(Exception):
    """The state file can be read by others; refused at start."""


@dataclass
class _Entry:
    token_sha256: str
    rights: list[Right]


@dataclass
class _State:
    token_sha256: str  # of the first person
    signing_key: str
    generation: int = 0
    people: dict[str, _Entry] = field(default_factory=dict)
    version: int = 2


@dataclass
class _OldEntry:
    token_sha256: str
    rights: list[str]


@dataclass
class _OldState:
    """Version 1: `recording` was the right to pause, and hearing what was recorded needed none."""

    token_sha256: str
    signing_key: str
    generation: int = 0
    people: dict[str, _OldEntry] = field(default_factory=dict)


class _Version(msgspec.Struct):
    version: int = 1


class Door:
    """Checks tokens and cookies. One per web process."""

    def __init__(self, path: Path, state: _State, *, session_s: float) -> None:
        self._path = path
        self._state = state
        self._session_s = session_s
        self._read_at_ns = _changed_at_ns(path)
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    @classmethod
    def open(cls, path: Path, *, session_s: float, is_new_token_wanted: bool = False) -> tuple[Door, str | None]:
        """The door, and the token when it was just made: show it once, it cannot be read back."""
        people: dict[str, _Entry] = {}
        if path.exists():
            mode = path.stat().st_mode & 0o777
            if mode & 0o077:
                raise UnsafeStateFile(f"{path} has mode {mode:04o}: must be 0600 (chmod 600 {path})")
            state = _read(path)
            if not is_new_token_wanted:
                return cls(path, state, session_s=session_s), None
            people = state.people  # a new token for the first person takes nobody else's
        token = secrets.token_urlsafe(24)
        door = cls(path, _State(_sha256(token), secrets.token_hex(32), people=people), session_s=session_s)
        door._save()
        return door, token

    def login(self, token: str, source: str, now_s: float) -> str:
        """The cookie's value; raises WrongToken or TooManyAttempts. `source` is the peer's address."""
        failures = [at for at in self._failures.get(source, []) if now_s - at < WINDOW_S]
        if len(failures) >= MAX_FAILURES:
            raise TooManyAttempts(max(1, int(WINDOW_S - (now_s - failures[0])) + 1))
        name = self._name_of(token)
        if not name:
            self._failures[source] = [*failures, now_s]
            self._failures.move_to_end(source)
            while len(self._failures) > MAX_SOURCES:
                self._failures.popitem(last=False)
            raise WrongToken
        self._failures.pop(source, None)
        text = f"{int(now_s + self._session_s)}.{name}~{secrets.token_hex(8)}"
        return f"{text}.{self._sign(text, name)}"

    def is_signed_in(self, cookie: str, now_s: float) -> bool:
        return self.who(cookie, now_s) is not None

    def who(self, cookie: str, now_s: float) -> Person | None:
        """Whose cookie it is, with the rights of this moment; None = nobody's, or it has ended."""
        self._read_again()
        text, _, signature = cookie.rpartition(".")
        expiry, _, rest = text.partition(".")
        name = rest.partition("~")[0]
        if not hmac.compare_digest(self._sign(text, name).encode(), signature.encode()):
            return None
        if now_s >= int(expiry):
            return None
        if name == FIRST_PERSON:
            return Person(name, ALL_RIGHTS)
        entry = self._state.people.get(name)
        return None if entry is None else Person(name, frozenset(entry.rights))

    def add_person(self, name: str, rights: frozenset[Right]) -> str:
        """A new token for a new person, or for one who is there (the old token and its sessions end); show it once."""
        if not _NAME.fullmatch(name) or name == FIRST_PERSON:
            raise ValueError(f"name {name!r}: must be 1 to 32 of a-z, 0-9 and _, and not {FIRST_PERSON!r}")
        self._read_again()
        token = secrets.token_urlsafe(24)
        self._state.people[name] = _Entry(_sha256(token), sorted(rights))
        self._save()
        return token

    def change_rights(self, name: str, rights: frozenset[Right]) -> bool:
        """From now on these and no others; token and sessions stay. False when there is no such person."""
        self._read_again()
        if (entry := self._state.people.get(name)) is None:
            return False
        entry.rights = sorted(rights)
        self._save()
        return True

    def remove_person(self, name: str) -> bool:
        """Ends the token and every session of this person; False when there is none."""
        self._read_again()
        if self._state.people.pop(name, None) is None:
            return False
        self._save()
        return True

    def people(self) -> list[Person]:
        self._read_again()
        others = [Person(name, frozenset(entry.rights)) for name, entry in self._state.people.items()]
        return [Person(FIRST_PERSON, ALL_RIGHTS), *others]

    def _name_of(self, token: str) -> str:
        self._read_again()
        given, name = _sha256(token), ""
        everybody = {FIRST_PERSON: self._state.token_sha256}
        everybody |= {name: entry.token_sha256 for name, entry in self._state.people.items()}
        for candidate, expected in everybody.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(given, expected):
                name = candidate
        return name

    def _read_again(self) -> None:
        """`minmo access` in another process may have changed the file."""
        changed_at_ns = _changed_at_ns(self._path)
        if changed_at_ns not in (0, self._read_at_ns):
            self._state = _read(self._path)
            self._read_at_ns = changed_at_ns

    def sign_out_everywhere(self) -> None:
        self._state.generation += 1
        self._save()

    def _sign(self, text: str, name: str) -> str:
        """The person's token is in it: a new one, or none any more, ends that person's sessions."""
        entry = self._state.people.get(name)
        token_sha256 = self._state.token_sha256 if name == FIRST_PERSON else entry.token_sha256 if entry else ""
        signed = f"{self._state.generation}.{token_sha256}.{text}"
        return hmac.new(bytes.fromhex(self._state.signing_key), signed.encode(), hashlib.sha256).hexdigest()

    def _save(self) -> None:
        """A new file is put in the old one's place, so it is never half written nor readable by others."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(self._state))
            file.flush()
            os.fsync(file.fileno())
        part.rename(self._path)
        self._read_at_ns = _changed_at_ns(self._path)


def _read(path: Path) -> _State:
    """The state; of version 1 as what it means today. Who could hear running calls may go on to hear recorded ones,
    nobody else: that is said aloud, until the file is next written."""
    content = path.read_bytes()
    if msgspec.json.decode(content, type=_Version).version > 1:
        return msgspec.json.decode(content, type=_State)
    old = msgspec.json.decode(content, type=_OldState)
    people = {}
    for name, entry in old.people.items():
        rights = {Right.PAUSE_RECORDING if right == "recording" else Right(right) for right in entry.rights}
        if Right.LISTEN in rights:
            rights.add(Right.PLAYBACK)
        else:
            log.warning("%s can no longer hear recordings; with the right playback: minmo access change", name)
        people[name] = _Entry(entry.token_sha256, sorted(rights))
    return _State(old.token_sha256, old.signing_key, old.generation, people)


def _changed_at_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _sha256(token: str) -> str:
    # The token has 192 random bits, so a plain hash cannot be searched; no slow password hash is needed.
    return hashlib.sha256(token.encode()).hexdigest()
