"""SIP over TLS for the tests: certificates made on the spot, and a raw peer on one TLS connection, either end of it."""

from __future__ import annotations

import datetime
import ipaddress
import re
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from agent.raw_sip_peer import RawPeer

WITHIN_S = 10


@dataclass(frozen=True)
class Certificate:
    """PEM files."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority of one test."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._name = folder, _name(name)
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        made = _builder(self._name, self._name, self._key).add_extension(x509.BasicConstraints(True, None), True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def certificate(self, host: str) -> Certificate:
        """For a name or an address."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        made = _builder(_name(host), self._name, key).add_extension(x509.SubjectAlternativeName([name]), False)
        files = Certificate(self._folder / f"{host}.cert.pem", self._folder / f"{host}.key.pem")
        files.cert.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        ))  # fmt: skip
        return files


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))
    )  # fmt: skip


class TlsPeer(RawPeer):
    """`socket` is the TLS connection; everything else as over UDP."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        super().__init__("127.0.0.1:9")
        self.socket.close()
        self.socket = connection
        self.host, self.port = connection.getsockname()[:2]
        self._received = b""

    def _send(self, head: str, body: str) -> None:
        contact = f"<sip:raw@127.0.0.1:{self.port}>"
        own = f"<sip:raw@{self.host}:{self.port};transport=tls>"  # on this same connection
        head = head.replace("SIP/2.0/UDP", "SIP/2.0/TLS").replace(contact, own)
        kind = "Content-Type: application/sdp\r\n" if body else ""
        self.socket.sendall(f"{head}{kind}Content-Length: {len(body)}\r\n\r\n{body}".encode())

    def respond(self, request: str, status: str, body: str = "") -> None:
        """With the request's own Vias and Record-Routes, whatever their transport."""
        copied = [row for row in request.splitlines() if re.match(r"(Via|From|To|Call-ID|CSeq|Record-Route):", row)]
        tagged = [f"{row};tag={self.tag}" if row.startswith("To:") and "tag=" not in row else row for row in copied]
        head = f"SIP/2.0 {status}\r\n" + "\r\n".join(tagged)
        self._send(f"{head}\r\nContact: <sip:raw@127.0.0.1:{self.port}>\r\n", body)

    def receive(self, start: str) -> str:
        deadline_s = time.monotonic() + WITHIN_S  # others may come all the time
        while not (message := self._next_message()).startswith(start):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no {start}")
        return message

    def _next_message(self) -> str:
        """Framed by Content-Length (RFC 3261 §18.3)."""
        while b"\r\n\r\n" not in self._received.lstrip(b"\r\n"):
            self._read()
        head, _, rest = self._received.lstrip(b"\r\n").partition(b"\r\n\r\n")
        found = re.search(rb"^(?:Content-Length|l)\s*:\s*(\d+)", head, re.MULTILINE | re.IGNORECASE)
        length = int(found.group(1)) if found else 0
        while len(rest) < length:
            before = len(self._received)
            self._read()
            rest += self._received[before:]
        self._received = rest[length:]
        return (head + b"\r\n\r\n" + rest[:length]).decode()

    def _read(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the other end has closed")
        self._received += data


class TlsDoor:
    """Listens; `accept` is one connection as a peer. ssl.SSLError when the other end does not believe us."""

    def __init__(self, certificate: Certificate, address: str = "127.0.0.1", port: int = 0) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate.cert, certificate.key)
        self._listener = socket.create_server((address, port))
        self._listener.settimeout(WITHIN_S)
        self.port = int(self._listener.getsockname()[1])

    def accept(self) -> TlsPeer:
        connection, _ = self._listener.accept()
        connection.settimeout(WITHIN_S)
        try:
            return TlsPeer(self._context.wrap_socket(connection, server_side=True))
        except OSError:
            connection.close()
            raise

    def close(self) -> None:
        self._listener.close()


def connect(port: int, authority: Authority, host: str = "localhost") -> TlsPeer:
    """A peer that has come in by TLS, and believes this authority only."""
    context = ssl.create_default_context(cafile=str(authority.file))
    plain = socket.create_connection(("127.0.0.1", port), WITHIN_S)
    return TlsPeer(context.wrap_socket(plain, server_hostname=host))
