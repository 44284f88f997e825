"""The `[audiosocket]` section of config.toml: calls that an Asterisk sends by its dialplan. What a leg needs besides
(voice activity, echo, play-out, deadlines) is `[telephony]`'s.

Checked once, at construction. Errors have one form: `audiosocket.max_calls = 0: must be 1 to 50`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass
from typing import Any

from telephony.config import TelephonyConfig

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_LOOPBACK = ("127.0.0.0/8", "::1/128")


@dataclass(frozen=True, kw_only=True)
class AudioSocketConfig:
    """Calls from an Asterisk that gives no SIP trunk, by its AudioSocket (docs/telephony.md). They are in the clear:
    keep them on this machine or a private network."""

    port: int = 0
    """TCP port, 0-65535; 0 = off."""

    bind: str = "127.0.0.1"
    """Address that it listens on. Anything but loopback needs `allowed_sources`."""

    allowed_sources: tuple[str, ...] = ()
    """Networks (CIDR) that may send calls; empty = loopback. Others' connections are closed without an answer."""

    did: str = ""
    """Dialled number that its calls have, it chooses the campaign (AudioSocket tells none). Needed with `port`."""

    max_calls: int = 8
    """Calls at once, 1-50. One more is hung up on, and its dialplan goes on."""

    uuid_timeout_s: float = 5.0
    """A connection that has not said its UUID, or has left a message half said, for so long is closed, 0.5-60."""

    jitter_ms: int = 40
    """Caller audio kept in hand against what comes late, 20-200."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_sources", tuple(self.allowed_sources))
        ranges: dict[str, tuple[float, float]] = {
            "port": (0, 65535), "max_calls": (1, 50), "uuid_timeout_s": (0.5, 60), "jitter_ms": (20, 200),
        }  # fmt: skip
        for key, (low, high) in ranges.items():
            if not low <= getattr(self, key) <= high:
                raise _refusal(key, getattr(self, key), f"must be {low:g} to {high:g}")
        try:
            is_loopback = ipaddress.ip_address(self.bind).is_loopback
        except ValueError:
            raise _refusal("bind", self.bind, "must be an IP address") from None
        for source in self.allowed_sources:
            try:
                ipaddress.ip_network(source)
            except ValueError:
                raise _refusal("allowed_sources", source, "must be networks such as 192.0.2.0/24") from None
        if self.port and not is_loopback and not self.allowed_sources:
            raise _refusal("bind", self.bind, "must be a loopback address unless audiosocket.allowed_sources is set")
        if self.port and not self.did:
            raise _refusal("did", self.did, "must be a number that a campaign answers (audiosocket.port is set)")

    @property
    def networks(self) -> tuple[Network, ...]:
        """Who may send calls."""
        return tuple(ipaddress.ip_network(source) for source in self.allowed_sources or _LOOPBACK)


def media_config(telephony: TelephonyConfig) -> TelephonyConfig:
    """`[telephony]` without what is SIP's own; the leg's rate stays that of the other legs."""
    return dataclasses.replace(
        telephony, ptime_ms=20, sip_bind="127.0.0.1", allowed_sources=(), trunks=(), handoff_uri=""
    )


def _refusal(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"audiosocket.{key} = {value!r}: {allowed}")
