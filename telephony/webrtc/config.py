"""The `[webrtc]` section of config.toml: calls from browsers. What a leg needs besides (voice activity, echo, play-out,
deadlines) is `[telephony]`'s.

Checked once, at construction. Errors have one form: `webrtc.max_calls = 0: must be 1 to 50`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telephony.config import TelephonyConfig

_ICE_URL = re.compile(r"(stun|turn|turns):[^\s?:]+(:\d{1,5})?(\?transport=(udp|tcp))?")


@dataclass(frozen=True, kw_only=True)
class WebRtcConfig:
    """Calls from browsers. Each worker process holds a few; beyond about 50 browsers put a gateway to SIP in front
    (docs/webrtc.md)."""

    num_workers: int = 1
    """Worker processes, 0-16; 0 = browsers cannot call. Without the optional packages (extra `webrtc`) none starts."""

    max_calls: int = 8
    """Calls at once in one worker process, 1-50. One more is refused with 503 and Retry-After."""

    bind: str = "127.0.0.1"
    """Address that media (ICE, DTLS, SRTP over UDP) binds to; it is our host candidate. Others than loopback are for
    browsers on other machines."""

    public_address: str = ""
    """Address written into our host candidate when it is not `bind` (behind 1:1 NAT); empty = `bind`."""

    port_first: int = 0
    """First UDP port of media; 0 = any free one."""

    port_last: int = 0
    """Last UDP port of media; at least as many as calls at once over all workers."""

    ice_urls: tuple[str, ...] = ()
    """STUN and TURN servers for browsers and for us: stun:host:port, turn:host:port?transport=udp, turns:..."""

    turn_secret_file: str = ""
    """File with the secret shared with the TURN server (coturn: use-auth-secret); TURN gets credentials from it that
    end by themselves."""

    turn_credential_s: int = 600
    """How long a TURN credential lets a browser open an allocation, 60-86400."""

    is_relay_only: bool = False
    """Browsers reach us through the TURN server only (RTCIceTransportPolicy relay): their own addresses stay unknown to
    the line, and one address and port of ours is enough for a firewall."""

    start_within_s: int = 60
    """How long after a call token was made it can start its call, 5-3600."""

    call_token_secret_file: str = ""
    """File with the secret that signs call tokens, for a site of your own that makes them (docs/webrtc.md); empty = a
    fresh secret at each start."""

    did: str = ""
    """Dialled number that calls from the page have, it chooses the campaign; empty = the page asks."""

    connect_timeout_s: float = 15.0
    """Time from our answer until ICE and DTLS must be done, 1-60."""

    media_timeout_s: float = 10.0
    """A call whose browser sends nothing for so long is ended, cause media_timeout, 2-25; the page says "reconnecting"
    meanwhile. WebRTC itself gives up after 30 s (RFC 7675)."""

    jitter_ms: int = 40
    """Caller audio kept in hand against late packets, 20-200; what is late is concealed."""

    def __post_init__(self) -> None:
        self._check_ranges()
        for key in ("bind", "public_address"):
            value = getattr(self, key)
            try:
                is_wrong = bool(value or key == "bind") and ipaddress.ip_address(value).is_unspecified
            except ValueError:
                is_wrong = True
            if is_wrong:
                raise refusal(key, value, "must be the IP address of one network interface")
        if bool(self.port_first) != bool(self.port_last) or self.port_last < self.port_first:
            raise refusal("port_last", self.port_last, f"must be at least port_first ({self.port_first}), or both 0")
        num_calls = self.num_workers * self.max_calls
        if self.port_first and self.port_last - self.port_first + 1 < num_calls:
            raise refusal("port_last", self.port_last, f"must leave a port for each of {num_calls} calls")
        object.__setattr__(self, "ice_urls", tuple(self.ice_urls))
        for url in self.ice_urls:
            if not _ICE_URL.fullmatch(url):
                raise refusal("ice_urls", url, "must be like stun:host:3478, turn:host:3478?transport=udp, turns:host")
        if any(url.startswith("turn") for url in self.ice_urls) and not self.turn_secret_file:
            raise refusal("turn_secret_file", "", "must name the file of the TURN server's shared secret")
        if self.is_relay_only and not any(url.startswith("turn") for url in self.ice_urls):
            raise refusal("is_relay_only", True, "must be false without a TURN server in ice_urls")
        for key in ("turn_secret_file", "call_token_secret_file"):
            if getattr(self, key):
                read_secret(key, getattr(self, key))

    def _check_ranges(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "num_workers": (0, 16), "max_calls": (1, 50), "port_first": (0, 65535), "port_last": (0, 65535),
            "turn_credential_s": (60, 86400), "start_within_s": (5, 3600), "connect_timeout_s": (1, 60),
            "media_timeout_s": (2, 25), "jitter_ms": (20, 200),
        }  # fmt: skip
        for key, (low, high) in ranges.items():
            if not low <= getattr(self, key) <= high:
                raise refusal(key, getattr(self, key), f"must be {low} to {high}")


def read_secret(key: str, path: str) -> bytes:
    """At least 16 bytes, or it could be guessed."""
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise refusal(key, path, f"must be a readable file ({error.strerror})") from None
    if len(secret) < 16:
        raise refusal(key, path, "must hold at least 16 characters")
    return secret


@dataclass(frozen=True, kw_only=True)
class BrowserMediaConfig(TelephonyConfig):
    """What a browser's leg takes from `[telephony]`."""

    @property
    def sample_rate_hz(self) -> int:
        """Opus is wideband; 16 kHz is what the model hears."""
        return 16_000


def media_config(telephony: TelephonyConfig) -> BrowserMediaConfig:
    """`[telephony]` without what is SIP's own."""
    values = {field.name: getattr(telephony, field.name) for field in dataclasses.fields(telephony)}
    own = {"ptime_ms": 20, "sip_bind": "127.0.0.1", "allowed_sources": (), "trunks": ()}
    return BrowserMediaConfig(**(values | {key: value for key, value in own.items() if key in values}))


def refusal(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"webrtc.{key} = {value!r}: {allowed}")
