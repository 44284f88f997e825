"""With whom we exchange INVITEs: sources that may call us, hosts we may call, and reading the headers of either.

Pure text and address arithmetic, no pjsip. Closed by default: loopback only, both ways. Everything read here is the
peer's claim (RFC 3261 §7.3); values are cut, and control characters never pass.
"""

from __future__ import annotations

import ipaddress
import re

from telephony.config import TelephonyConfig

_URI = re.compile(r"^(sips?|tel):(?:([^@;?]*)@)?(\[[0-9A-Fa-f:.]+\]|[^:;?>@\s]+)(?::(\d{1,5}))?", re.IGNORECASE)
_QUOTED = re.compile(r'^\s*"((?:[^"\\]|\\.)*)"')  # RFC 3261 §25.1 quoted-string
_MAX_HEADERS, _MAX_VALUE_CHARS = 48, 512
_SAFE_URI = re.compile(r"^[\x21-\x7e]{1,512}$")


class TrunkRefused(Exception):
    """An address that configuration does not allow; no packet was sent."""


def split_uri(uri: str) -> tuple[str, str, int]:
    """(user, host, port) of a SIP URI; port 0 when it names none. ValueError when it is not one."""
    match = _URI.match(uri.strip().strip("<>"))
    if match is None:
        raise ValueError(f"not a SIP URI: {uri[:80]!r}")
    _, user, host, port = match.groups()
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


def is_allowed_source(source_address: str, config: TelephonyConfig) -> bool:
    """May this "ip:port" send us an INVITE? Without an allow-list: loopback only."""
    host = source_address.rsplit(":", 1)[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if not config.allowed_sources:
        return address.is_loopback
    return any(address in ipaddress.ip_network(network) for network in config.allowed_sources)


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
