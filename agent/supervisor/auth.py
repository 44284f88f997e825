"""Who may see the page: one token from the first start, then a signed cookie.

The token is shown once, in the terminal; on disk only its hash is kept, in a file of mode 0600 beside the key that
signs cookies. A cookie is `expiry.nonce.signature`; signing out raises the generation, which ends every session there
is. Wrong tokens are counted per source address. Source: OWASP ASVS 5.0 V6 (throttling), V7 (sessions). Knows no HTTP;
time is an argument.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import msgspec

MAX_FAILURES, WINDOW_S = 5, 60.0
MAX_SOURCES = 1_024  # oldest forgotten first; bounds memory under a flood


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
class _State:
    token_sha256: str
    signing_key: str
    generation: int = 0


class Door:
    """Checks tokens and cookies. One per web process."""

    def __init__(self, path: Path, state: _State, *, session_s: float) -> None:
        self._path = path
        self._state = state
        self._session_s = session_s
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    @classmethod
    def open(cls, path: Path, *, session_s: float, is_new_token_wanted: bool = False) -> tuple[Door, str | None]:
        """The door, and the token when it was just made: show it once, it cannot be read back."""
        if path.exists() and not is_new_token_wanted:
            mode = path.stat().st_mode & 0o777
            if mode & 0o077:
                raise UnsafeStateFile(f"{path} has mode {mode:04o}: must be 0600 (chmod 600 {path})")
            return cls(path, msgspec.json.decode(path.read_bytes(), type=_State), session_s=session_s), None
        token = secrets.token_urlsafe(24)
        door = cls(path, _State(_sha256(token), secrets.token_hex(32)), session_s=session_s)
        door._save()
        return door, token

    def login(self, token: str, source: str, now_s: float) -> str:
        """The cookie's value; raises WrongToken or TooManyAttempts. `source` is the peer's address."""
        failures = [at for at in self._failures.get(source, []) if now_s - at < WINDOW_S]
        if len(failures) >= MAX_FAILURES:
            raise TooManyAttempts(max(1, int(WINDOW_S - (now_s - failures[0])) + 1))
        if not hmac.compare_digest(_sha256(token), self._state.token_sha256):
            self._failures[source] = [*failures, now_s]
            self._failures.move_to_end(source)
            while len(self._failures) > MAX_SOURCES:
                self._failures.popitem(last=False)
            raise WrongToken
        self._failures.pop(source, None)
        text = f"{int(now_s + self._session_s)}.{secrets.token_hex(8)}"
        return f"{text}.{self._sign(text)}"

    def is_signed_in(self, cookie: str, now_s: float) -> bool:
        text, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(self._sign(text).encode(), signature.encode()):
            return False
        return now_s < int(text.partition(".")[0])

    def sign_out_everywhere(self) -> None:
        self._state.generation += 1
        self._save()

    def _sign(self, text: str) -> str:
        key = bytes.fromhex(self._state.signing_key)
        return hmac.new(key, f"{self._state.generation}.{text}".encode(), hashlib.sha256).hexdigest()

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


def _sha256(token: str) -> str:
    # The token has 192 random bits, so a plain hash cannot be searched; no slow password hash is needed.
    return hashlib.sha256(token.encode()).hexdigest()
