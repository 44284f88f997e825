"""With whom we exchange INVITEs: sources that may call us, hosts we may call, and reading the headers of either.

Pure text and address arithmetic, no pjsip. Closed by default: loopback only, both ways. Everything read here is the
peer's claim (RFC 3261 §7.3), but for P-Asserted-Identity of a trunk that is trusted (RFC 3325); values are cut, and
control characters never pass.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from telephony.config import TelephonyConfig
from telephony.sip.names import literal_of
from telephony.trunk_config import TrunkConfig

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
AddressesOf = Callable[[str], Iterable[str]]
"""What `host` or `host:port` is known to have, perhaps nothing."""

_URI = re.compile(r"^(sips?|tel):(?:([^@;?]*)@)?(\[[0-9A-Fa-f:.]+\]|[^:;?>@\s]+)(?::(\d{1,5}))?", re.IGNORECASE)
_QUOTED = re.compile(r'^\s*"((?:[^"\\]|\\.)*)"')  # RFC 3261 §25.1 quoted-string
PROXY_HEADER = "X-Minmo-Source"
_MAX_HEADERS, _MAX_VALUE_CHARS = 48, 512
_SAFE_URI = re.compile(r"^[\x21-\x7e]{1,512}$")
_NUMBER = re.compile(r"^[+0-9A-Za-z*#._-]{1,64}$")


class TrunkRefused(Exception):
    """An address that configuration does not allow; no packet was sent."""


def split_uri(uri: str) -> tuple[str, str, int]:
    """(user, host, port) of a SIP or tel URI; port 0 when it names none. ValueError when it is not one."""
    match = _URI.match(uri.strip().strip("<>"))
    if match is None:
        raise ValueError(f"not a SIP URI: {uri[:80]!r}")
    scheme, user, host, port = match.groups()
    if scheme.lower() == "tel":  # RFC 3966: the number is all there is
        return host, "", 0
    return (user or "").split(":")[0], host.strip("[]").lower(), int(port or 0)


def check_outbound(uri: str, config: TelephonyConfig) -> None:
    """TrunkRefused unless host (and port, when configured) is in `outbound_hosts`. Also stops header injection."""
    if not _SAFE_URI.match(uri) or any(mark in uri for mark in '<>"?'):
        raise TrunkRefused("the URI has characters or headers that are not allowed")
    if not uri.lower().startswith("sip:"):
        raise TrunkRefused("only sip: URIs can be called")
    try:
        _, host, port = split_uri(uri)
    except ValueError as error:
        raise TrunkRefused(str(error)) from error
    allowed = {entry.lower() for entry in config.outbound_hosts}
    if host not in allowed and f"{host}:{port or 5060}" not in allowed:
        raise TrunkRefused(f"host {host}:{port or 5060} is not in telephony.outbound_hosts")


class Neighbours:
    """The networks SIP may come from. `refresh` when host names have other addresses (sip/names.py)."""

    def __init__(self, config: TelephonyConfig, addresses_of: AddressesOf = literal_of) -> None:
        self._config, self._addresses_of = config, addresses_of
        self._listed = [ipaddress.ip_network(source) for source in config.allowed_sources]
        self._proxies = [ipaddress.ip_network(source) for source in config.trusted_proxies]
        self._of_trunk: dict[str, list[Network]] = {}
        self._answering: list[Network] = []
        self.refresh()

    def refresh(self) -> None:
        for trunk in self._config.trunks:
            networks = [ipaddress.ip_network(source) for source in trunk.sources]
            self._of_trunk[trunk.name] = networks or self._networks_of(trunk.hosts)
        called = [*self._config.outbound_hosts, *(host for trunk in self._config.trunks for host in trunk.hosts)]
        self._answering = self._networks_of(called)

    def _networks_of(self, hosts: Iterable[str]) -> list[Network]:
        """A name that has no address yet has no network."""
        return [ipaddress.ip_network(address) for host in hosts for address in self._addresses_of(host)]

    def trunk_of(self, source_address: str) -> TrunkConfig | None:
        """Whose call this is: the first trunk that has the source."""
        address = _address(source_address)
        for trunk in self._config.trunks:
            if address is not None and _is_in(address, self._of_trunk[trunk.name]):
                return trunk
        return None

    def origin_of(self, source_address: str, headers: dict[str, str]) -> str:
        """Where a call really came from: of a trusted proxy, what it says."""
        address = _address(source_address)
        if address is None or not _is_in(address, self._proxies):
            return source_address
        told = {name.lower(): value for name, value in headers.items()}.get(PROXY_HEADER.lower(), "")
        return told if _address(told) is not None else source_address

    def may_call_us(self, source_address: str) -> bool:
        """May this "ip:port" send us an INVITE? Without any list: loopback only."""
        address = _address(source_address)
        if address is None:
            return False
        if not self._listed and not self._config.trunks:
            return address.is_loopback or _is_in(address, self._proxies)
        own = [*self._listed, *self._proxies]  # a proxy of ours has its own list
        return _is_in(address, own) or self.trunk_of(source_address) is not None

    def may_send_rtp(self, address: str) -> bool:
        """May RTP come from this IP address where no SDP says so (symmetric RTP, RFC 4961)?"""
        parsed = _address(f"[{address}]:0" if ":" in address else f"{address}:0")
        return parsed is not None and _is_in(parsed, self.networks())

    def networks(self) -> list[Network]:
        """Everything a packet may come from: who may call us, and who answers when we call."""
        listed = self._listed
        if not listed and not self._config.trunks:
            listed = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
        own = [network for networks in self._of_trunk.values() for network in networks]
        own.append(ipaddress.ip_network(reachable(self._config.sip_bind)))  # our heartbeat (options.py) is heard
        return sorted({*listed, *own, *self._proxies, *self._answering}, key=lambda network: (network.version, network))


def reachable(bind: str) -> str:
    """Where this machine itself reaches what is bound to this address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)


def _address(source_address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(source_address.rsplit(":", 1)[0].strip("[]"))
    except ValueError:
        return None


def _is_in(address: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


@dataclass(frozen=True)
class Route:
    """One way to place a call."""

    uri: str
    trunk: TrunkConfig | None = None


def routes_of(uri: str, number: str, trunk_names: tuple[str, ...], config: TelephonyConfig) -> list[Route]:
    """The ways to place this call, best first: the URI itself, or the number by way of the named trunks' hosts.
    TrunkRefused when configuration does not allow it."""
    if uri:
        check_outbound(uri, config)
        return [Route(uri)]
    if not _NUMBER.match(number):
        raise TrunkRefused("the number must be 1 to 64 of digits, letters and + * # - _ .")
    known = {trunk.name: trunk for trunk in config.trunks}
    for name in trunk_names:
        if name not in known:
            raise TrunkRefused(f"trunk {name!r} is not in telephony.trunks")
    chosen = [known[name] for name in trunk_names] or list(config.trunks)
    if not chosen:
        raise TrunkRefused("there is no trunk to call a number with; telephony.trunks is empty")
    escaped = number.replace("#", "%23")  # RFC 3261 §25.1: not allowed in a user part as it is
    return [Route(trunk.uri_of(escaped, host), trunk) for trunk in chosen for host in trunk.hosts]


def is_for_next_host(sip_status: int) -> bool:
    """Does this final answer to an INVITE say something about the host, not about the called party? RFC 3263 §4.3."""
    return sip_status == 408 or 500 <= sip_status < 600


@dataclass(frozen=True)
class InboundIdentity:
    """Who calls whom."""

    did: str
    ani: str
    display_name: str
    asserted_identity: str = ""  # of a trusted trunk only
    is_withheld: bool = False  # the caller asked that the number be kept from us (RFC 3323, RFC 3325 §7)


def identify(request_uri: str, headers: dict[str, str], trunk: TrunkConfig | None) -> InboundIdentity:
    """Read an INVITE as its trunk writes it."""
    by_name = {name.lower(): value for name, value in headers.items()}
    sources = {
        "request_uri": request_uri,
        "to": by_name.get("to", by_name.get("t", "")),
        "p-called-party-id": by_name.get("p-called-party-id", request_uri),
    }
    did = _user_of(sources[trunk.did_from if trunk else "request_uri"])
    ani, display_name = caller_of(by_name.get("from", by_name.get("f", "")))
    asserted = ""
    if trunk is not None and trunk.is_identity_trusted and "p-asserted-identity" in by_name:
        asserted, asserted_name = caller_of(by_name["p-asserted-identity"].split(">,")[0])
        ani, display_name = asserted or ani, asserted_name or display_name
    privacy = {word.strip().lower() for word in by_name.get("privacy", "").split(";")}
    is_withheld = bool(privacy & {"id", "user", "header"}) or ani.lower() == "anonymous"
    return InboundIdentity(clean(did), clean(ani), clean(display_name), clean(asserted), is_withheld)


def _user_of(value: str) -> str:
    """User part of a bare URI or of a name-addr."""
    try:
        return split_uri(value)[0]
    except ValueError:
        return caller_of(value)[0]


def read_invite(message: str) -> tuple[str, dict[str, str]]:
    """(Request-URI, headers) of an INVITE as it came. First value of a repeated header; long values are cut."""
    lines = re.sub(r"\r?\n[ \t]+", " ", message.split("\r\n\r\n", 1)[0]).splitlines()
    request_uri = lines[0].split(" ")[1] if lines and lines[0].count(" ") >= 2 else ""
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon and name.strip() and len(headers) < _MAX_HEADERS:
            headers.setdefault(clean(name.strip())[:64], clean(value.strip()))
    return request_uri, headers


def caller_of(from_header: str) -> tuple[str, str]:
    """(ani, display name) of a From header; both are the caller's claim."""
    quoted = _QUOTED.match(from_header)  # a quoted name may itself hold brackets
    name = quoted.group(1) if quoted else from_header.partition("<")[0] if "<" in from_header else ""
    rest = from_header[quoted.end() :] if quoted else from_header
    uri = rest.partition("<")[2].partition(">")[0] if "<" in rest else rest.split(";")[0]
    try:
        user = split_uri(uri)[0]
    except ValueError:
        user = ""
    return user, re.sub(r"\\(.)", r"\1", name.strip())


def clean(value: str) -> str:
    """Printable and bounded; whoever shows it still has to escape it."""
    readable = value.encode("utf-8", "replace").decode("utf-8", "replace")
    return "".join(char for char in readable if char.isprintable())[:_MAX_VALUE_CHARS]
