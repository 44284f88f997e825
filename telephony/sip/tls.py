"""TLS of the SIP transport (RFC 3261 §26.3.1): our certificate towards callers, and whose certificates we believe.

A tls trunk's certificate must come from a known authority and bear the name of the trunk's host (RFC 5922 §7.2).
"""

from __future__ import annotations

import ssl

import pjsua2 as pj

from telephony.config import TelephonyConfig, refusal
from telephony.sip.shed import openssl_version

_MAX_AUTHORITIES = 50  # pjsip names them all to everybody who connects, in 8,000 bytes: 60 fit, with 80 TLS hangs


def secure(transport: pj.TransportConfig, config: TelephonyConfig) -> None:
    """ValueError when the settings do not allow it."""
    version = openssl_version()
    if version.startswith(("0.", "1.0")) and not config.accepts_old_openssl:
        raise ValueError(
            f"telephony.transports has tls, but this pjsua2 holds OpenSSL {version}: put a TLS proxy in front "
            "(docs/telephony.md), or set telephony.accepts_old_openssl"
        )
    transport.port = config.tls_port
    settings = transport.tlsConfig
    settings.certFile, settings.privKeyFile = config.tls_cert_file, config.tls_key_file
    settings.proto = pj.PJ_SSL_SOCK_PROTO_TLS1_2
    settings.verifyServer = True
    settings.CaListFile = config.tls_ca_file
    if config.tls_ca_file:
        _check_authorities(config.tls_ca_file)


def _check_authorities(path: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        raise refusal("tls_ca_file", path, f"must be a readable PEM file ({error.strerror or error})") from None
    if (number := len(context.get_ca_certs())) > _MAX_AUTHORITIES:
        raise refusal("tls_ca_file", path, f"must hold at most {_MAX_AUTHORITIES} authorities, it has {number}")
