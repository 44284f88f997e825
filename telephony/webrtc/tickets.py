"""What opens a browser call: a token that ends by itself and counts once, and TURN credentials of the same kind.

A token says what the call may be (dialled number, who calls) and is signed with HMAC-SHA256, so the page that starts a
call needs no session: `v1.<claims>.<signature>`, both base64url. None may last longer than tokens of ours do, whoever
signed it: what was used has to be remembered only until then. Where, the caller says (`spend`): it must outlive the
process, or a restart would make used tokens new. TURN: username `<expiry>:<name>`, password base64(HMAC-SHA1(secret,
username)), the form that coturn calls use-auth-secret (draft-uberti-behave-turn-rest-00). Time is an argument.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Any

import msgspec

MAX_TOKEN_CHARS = 1_000
CLOCK_SKEW_S = 30  # another server's clock may be ahead of ours by so much
Spend = Callable[[str, float, float], bool]
"""spend(nonce, expires_at_s, now_s): remember until then that this was used; False when it was used before."""


class TokenRefused(Exception):
    """Not a token of ours, too late, or used before; the text says which."""


class CallTicket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one call may be."""

    did: str
    ani: str
    display_name: str
    expires_at_s: int
    nonce: str


class TicketOffice:
    """Makes and takes call tokens; with one `spend` for all offices of a secret, each token counts once."""

    def __init__(self, secret: bytes, valid_s: int, spend: Spend) -> None:
        self._secret, self._valid_s, self._spend = secret, valid_s, spend

    def sell(self, did: str, ani: str, display_name: str, now_s: float) -> str:
        ticket = CallTicket(did, ani, display_name, int(now_s) + self._valid_s, secrets.token_hex(12))
        text = "v1." + _to_text(msgspec.json.encode(ticket))
        return f"{text}.{self._signature(text)}"

    def take(self, token: str, now_s: float) -> CallTicket:
        """The ticket, once; raises TokenRefused."""
        text, _, signature = token[:MAX_TOKEN_CHARS].rpartition(".")
        if not hmac.compare_digest(self._signature(text).encode(), signature.encode(errors="replace")):
            raise TokenRefused("this is not a token for a call")
        try:
            ticket = msgspec.json.decode(_to_bytes(text.removeprefix("v1.")), type=CallTicket)
        except (msgspec.DecodeError, binascii.Error) as error:
            raise TokenRefused("this is not a token for a call") from error
        if now_s >= ticket.expires_at_s:
            raise TokenRefused("the token has expired")
        if ticket.expires_at_s > now_s + self._valid_s + CLOCK_SKEW_S:
            raise TokenRefused(f"the token lasts too long: at most {self._valid_s} s (webrtc.start_within_s)")
        if not self._spend(ticket.nonce, ticket.expires_at_s, now_s):
            raise TokenRefused("the token was used before")
        return ticket

    def _signature(self, text: str) -> str:
        return _to_text(hmac.digest(self._secret, text.encode(errors="replace"), hashlib.sha256))


def ice_servers(urls: tuple[str, ...], turn_secret: bytes, name: str, expires_at_s: int) -> list[dict[str, Any]]:
    """RTCIceServer dictionaries (W3C webrtc-pc §4.2.4) for one call."""
    stun = [url for url in urls if url.startswith("stun")]
    turn = [url for url in urls if url.startswith("turn")]
    servers: list[dict[str, Any]] = [{"urls": stun}] if stun else []
    if turn:
        username = f"{expires_at_s}:{name}"
        password = base64.b64encode(hmac.digest(turn_secret, username.encode(), hashlib.sha1)).decode()
        servers.append({"urls": turn, "username": username, "credential": password})
    return servers


def _to_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _to_bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
