"""One `[[telephony.trunks]]` of config.toml: a SIP relation with a carrier or a PBX.

Checked once, at construction. A password is never here: `password_env` names the environment variable that holds it.
Knows no pjsip. Registration: RFC 3261 §10; digest: §22, RFC 8760; asserted identity: RFC 3325.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, fields
from typing import Any

TRANSPORTS = ("udp", "tcp", "tls")
TRANSFER_FROM = ("ours", "caller")
INBAND_DTMF = ("", "auto", "on", "off")
DID_HEADERS = ("request_uri", "to", "p-called-party-id")
_HOST = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+)(:\d{1,5})?")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """A carrier or PBX we exchange calls with."""

    name: str
    """Unique; stands in the call record and in outbound requests."""

    hosts: tuple[str, ...]
    """Where its calls go, `host` or `host:port`, best first: the next one is tried when one answers 408, 5xx or nothing
    within `failover_s`. Without a port: 5060, with tls 5061."""

    transport: str = "udp"
    """udp, tcp or tls."""

    sources: tuple[str, ...] = ()
    """Networks (CIDR) its calls come from; empty = the addresses that `hosts` have, as DNS says now."""

    registers: bool = False
    """REGISTER at the first host (RFC 3261 §10); one worker does it, however many there are."""

    register_expires_s: int = 300
    """Wished lifetime of a registration, 60-86400; it is renewed in time."""

    username: str = ""
    """Digest user, and user part of the address of record; empty = the trunk is authenticated by IP."""

    password_env: str = ""
    """Environment variable that holds the digest password."""

    realm: str = "*"
    """Digest realm the password is given to; `*` = any that the trunk's own hosts ask with."""

    domain: str = ""
    """Host part of From and of the address of record; empty = the first host."""

    caller_id: str = ""
    """Number in From of outbound calls that name none."""

    did_from: str = "request_uri"
    """Where the dialled number stands: request_uri, to (usual with REGISTER) or p-called-party-id (RFC 7315 §4.2)."""

    is_identity_trusted: bool = False
    """Its P-Asserted-Identity is believed (RFC 3325 §9) and ours is sent; else the header means nothing."""

    refer_hosts: tuple[str, ...] = ()
    """Hosts (`host` or `host:port`) that a REFER in one of its calls may send us to (RFC 3515); empty = 603."""

    transfer_from: str = "ours"
    """Whose number stands in From when we call the target of a transfer by this trunk: ours (`caller_id`; the caller's
    goes into P-Asserted-Identity where `is_identity_trusted`) or caller. A Diversion (RFC 5806) names the number that
    was dialled."""

    inband_dtmf: str = ""
    """Keys as tones in its calls: auto, on or off, as telephony.inband_dtmf; empty = as there."""

    options_s: int = 0
    """An OPTIONS so often tells whether a host answers; one that does not is tried last. 0 = never; else 5-3600."""

    failover_s: float = 4.0
    """No answer at all from a host for so long: the next is tried, 1-30."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise self.refusal("name", "must be 1 to 32 letters, digits, - or _")
        for key in ("hosts", "sources", "refer_hosts"):
            value = getattr(self, key)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise self.refusal(key, "must be a list of strings")
            object.__setattr__(self, key, tuple(value))
        if not self.hosts or not all(_HOST.fullmatch(host) for host in self.hosts):
            raise self.refusal("hosts", "must be one or more of host or host:port")
        if not all(_HOST.fullmatch(host) for host in self.refer_hosts):
            raise self.refusal("refer_hosts", "must be host or host:port")
        for source in self.sources:
            try:
                ipaddress.ip_network(source)
            except ValueError:
                raise self.refusal("sources", "must be networks such as 192.0.2.0/24") from None
        self._check_words()
        self._check_ranges()

    def _check_words(self) -> None:
        words = {
            "transport": TRANSPORTS, "did_from": DID_HEADERS, "transfer_from": TRANSFER_FROM, "inband_dtmf": INBAND_DTMF
        }  # fmt: skip
        for key, allowed in words.items():
            if getattr(self, key) not in allowed:
                raise self.refusal(key, f"must be one of {', '.join(word or 'empty' for word in allowed)}")
        for key in ("username", "password_env", "realm", "domain", "caller_id"):
            value = getattr(self, key)
            if not isinstance(value, str) or any(not char.isprintable() or char in ' "<>' for char in value):
                raise self.refusal(key, "must be text without blanks, quotes and brackets")
        if bool(self.username) != bool(self.password_env):
            raise self.refusal("password_env", "must be set exactly when username is")
        if self.registers and not self.username:
            raise self.refusal("registers", "must be false unless username and password_env are set")

    def _check_ranges(self) -> None:
        if not 60 <= self.register_expires_s <= 86400:
            raise self.refusal("register_expires_s", "must be 60 to 86400")
        if self.options_s and not 5 <= self.options_s <= 3600:
            raise self.refusal("options_s", "must be 0 or 5 to 3600")
        if not 1 <= self.failover_s <= 30:
            raise self.refusal("failover_s", "must be 1 to 30")

    def refusal(self, key: str, allowed: str) -> ValueError:
        return ValueError(f"telephony.trunks[{self.name!r}].{key} = {getattr(self, key)!r}: {allowed}")

    @property
    def aor_host(self) -> str:
        """Host part of the address of record (RFC 3261 §10)."""
        return self.domain or self.hosts[0]

    @property
    def default_port(self) -> int:
        """RFC 3261 §19.1.2."""
        return 5061 if self.transport == "tls" else 5060

    def uri_of(self, user: str, host: str) -> str:
        """Request-URI of a call to `user` by way of `host`."""
        suffix = "" if self.transport == "udp" else f";transport={self.transport}"
        return f"sip:{user}@{host}{suffix}" if user else f"sip:{host}{suffix}"


def trunks_of(values: Any) -> tuple[TrunkConfig, ...]:
    """What TOML and JSON give, as checked trunks."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"telephony.trunks = {values!r}: must be a list of tables")
    known = {field.name for field in fields(TrunkConfig)}
    trunks = []
    for value in values:
        if isinstance(value, TrunkConfig):
            trunks.append(value)
            continue
        if not isinstance(value, dict) or not {"name", "hosts"} <= set(value):
            raise ValueError(f"telephony.trunks = {value!r}: must be tables with name and hosts")
        for key in value:
            if key not in known:
                raise ValueError(
                    f"telephony.trunks[{value['name']!r}].{key}: unknown key; known: {', '.join(sorted(known))}"
                )
        trunks.append(TrunkConfig(**value))
    names = [trunk.name for trunk in trunks]
    if len(set(names)) != len(names):
        raise ValueError(f"telephony.trunks = {names!r}: must have different names")
    return tuple(trunks)
