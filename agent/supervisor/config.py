"""Settings of the supervisors' page. Closed by default: loopback only, and a public bind needs TLS or a declared proxy.

`agent/config.py` loads the `[web]` section of config.toml into this.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path


class WebConfigError(ValueError):
    """A setting that is wrong; names key, value and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class WebConfig:
    """See the docstring under each field."""

    host: str = "127.0.0.1"
    """Address the page listens on."""
    port: int = 8080
    """TCP port; 0 = any free one (printed at start)."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names under which browsers reach the page (the Host header, without port); anything else is refused."""
    tls_cert_file: str = ""
    """PEM certificate chain; with `tls_key_file` the page speaks HTTPS itself."""
    tls_key_file: str = ""
    """PEM key."""
    is_behind_proxy: bool = False
    """A reverse proxy in front ends TLS; its name must be in `allowed_hosts`. Allows a bind that is not loopback."""
    session_hours: float = 12.0
    """After this long a supervisor signs in again."""
    poll_ms: int = 200
    """How often a live view looks for new journal rows."""
    max_live_views: int = 32
    """Live streams open at once; one more is refused with 503."""

    metrics_token_file: str = ""
    """File with the token that opens /metrics (Prometheus: authorization credentials_file), at least 16 characters.
    Empty = only programs on this machine may read it, and nobody behind a proxy."""

    def __post_init__(self) -> None:
        for key, low, high in (
            ("port", 0, 65_535),
            ("session_hours", 0.1, 168.0),
            ("poll_ms", 50, 5_000),
            ("max_live_views", 1, 1_000),
        ):
            value = getattr(self, key)
            if not low <= value <= high:
                raise WebConfigError(f"web.{key} = {value}: must be between {low} and {high}")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise WebConfigError("web.tls_cert_file and web.tls_key_file: give both or none")
        for key in ("tls_cert_file", "tls_key_file"):
            if getattr(self, key) and not Path(getattr(self, key)).is_file():
                raise WebConfigError(f"web.{key} = {getattr(self, key)!r}: must be a readable file")
        self.read_metrics_token()
        if self.is_behind_proxy and not self.allowed_hosts:
            raise WebConfigError("web.is_behind_proxy = true: web.allowed_hosts must name what browsers ask for")
        if not (is_loopback(self.host) or self.tls_cert_file or self.is_behind_proxy):
            raise WebConfigError(
                f"web.host = {self.host!r}: a public bind needs web.tls_cert_file and web.tls_key_file, or "
                "web.is_behind_proxy = true; loopback (127.0.0.1) needs neither"
            )

    def read_metrics_token(self) -> str:
        """Empty when there is none."""
        path = self.metrics_token_file
        if not path:
            return ""
        try:
            token = Path(path).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            raise WebConfigError(f"web.metrics_token_file = {path!r}: must be a readable file of ASCII") from None
        if len(token) < 16 or not token.isprintable() or " " in token:
            raise WebConfigError(f"web.metrics_token_file = {path!r}: must hold one word of at least 16 characters")
        return token

    @property
    def is_https(self) -> bool:
        """What browsers see."""
        return bool(self.tls_cert_file) or self.is_behind_proxy

    @property
    def host_names(self) -> frozenset[str]:
        """Every accepted Host, lower case, without port."""
        own = {"127.0.0.1", "localhost", "[::1]"} if is_loopback(self.host) else {self.host}
        return frozenset(name.lower() for name in own | set(self.allowed_hosts))


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
