"""The `[telephony]` section of config.toml: every setting of the island, with unit, meaning and range.

Checked once, at construction; nothing else in the island reads a file or an environment variable. Errors have one form:
`telephony.ptime_ms = 25: must be 10, 20, 30 or 40`.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields, replace
from typing import Any

from telephony.trunk_config import TrunkConfig, trunks_of

SECTION = "telephony"
PTIMES_MS = (10, 20, 30, 40)
CODECS = ("PCMU/8000", "PCMA/8000")
WIDEBAND_CODECS = ("G722/16000", "opus/48000")
_NOISE_IS_BELOW_VOICE_DB = 6.0  # 10 ms of noise are up to 1.5 dB louder than all of it


@dataclass(frozen=True, kw_only=True)
class TelephonyConfig:
    """One media worker and the agent's side of it."""

    sip_bind: str = "127.0.0.1"
    """Address that SIP and RTP bind to. Anything but loopback needs `allowed_sources`."""

    sip_port: int = 5060
    """UDP port of SIP; 0 = any free one (the worker says which in `Hello`)."""

    public_address: str = ""
    """Address written into Contact and SDP when it is not `sip_bind` (behind 1:1 NAT); empty = `sip_bind`."""

    rtp_port_first: int = 0
    """First UDP port of RTP, an even one. A worker uses it and the 2 * max_calls + 1 ports after it, the next worker
    of a pool the ports after those. 0 = a free range chosen at start."""

    max_calls: int = 3
    """Calls at once in one worker. The pjsua2 wheel holds 4 and refuses by itself with 486, so stay below it: then it
    is we who answer 503 with Retry-After."""

    pool_calls: int = 0
    """Calls at once on this machine: as many workers are started as that needs, at sip_port, sip_port + 1, and so on,
    with a SIP proxy in front (deploy/kamailio). 0 = one worker."""

    retry_after_s: int = 5
    """Retry-After of our 503 (RFC 3261 §20.33)."""

    codecs: tuple[str, ...] = CODECS
    """Codecs offered and accepted, best first: PCMU/8000, PCMA/8000, G722/16000, opus/48000 (not in the wheel). A
    wideband one makes every leg 16 kHz. No common codec = 488."""

    ptime_ms: int = 20
    """Length of one RTP packet."""

    allowed_sources: tuple[str, ...] = ()
    """Networks (CIDR) that may send us anything; empty = loopback, or the trunks' sources. Others get no answer."""

    trusted_proxies: tuple[str, ...] = ()
    """Networks (CIDR) of our own SIP proxies: their X-Minmo-Source header says where a call came from."""

    outbound_hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    """Hosts an outbound INVITE may go to: `host` or `host:port`. Everything else is refused before a packet leaves."""

    transports: tuple[str, ...] = ("udp",)
    """Transports SIP listens on: udp, tcp (both at `sip_port`), tls (at `tls_port`)."""

    tls_port: int = 5061
    """TCP port of SIP over TLS."""

    tls_cert_file: str = ""
    """PEM certificate chain for tls."""

    tls_key_file: str = ""
    """PEM key for tls."""

    tls_ca_file: str = ""
    """PEM file of the authorities, at most 50, that a tls trunk's certificate may be from; a tls trunk needs it. (The
    wheel cannot take all of a system's: docs/telephony.md.)"""

    accepts_old_openssl: bool = False
    """The wheel's pjsua2 bundles OpenSSL 1.0.2 of 2017: with tls in `transports` it does not start unless this is true.
    Better: a TLS proxy in front (docs/telephony.md)."""

    srtp: str = "off"
    """SDES-SRTP (RFC 4568): off | optional (offered and accepted) | mandatory (a call without it gets 488, ours too).
    The keys stand in SDP: only worth something over tls or a private network."""

    trunks: tuple[TrunkConfig, ...] = ()
    """Carriers and PBXs, each a table [[telephony.trunks]]: name, hosts, transport, sources, registers,
    register_expires_s, username, password_env, realm, domain, caller_id, did_from, is_identity_trusted,
    refer_hosts, transfer_from, inband_dtmf, options_s, failover_s. See docs/telephony.md."""

    dns_refresh_s: float = 60.0
    """The host names of trunks and outbound_hosts are looked up again so often, s, 1-86400; the last good answer stays
    when DNS fails."""

    is_registrar: bool = True
    """Does this worker REGISTER for the trunks that want it? Set by the pool: exactly one does."""

    contact_address: str = ""
    """host:port of the SIP proxy in front of the workers; stands in the Contact of REGISTER. Empty = the worker's
    own."""

    user_agent: str = "MinMo"
    """User-Agent and Server header."""

    from_user: str = "minmo"
    """User part of From in outbound calls."""

    answer_timeout_s: float = 20.0
    """An INVITE the agent neither answers nor rejects for so long gets 503."""

    no_answer_timeout_s: float = 45.0
    """An outbound INVITE not answered for so long is cancelled (cause no_answer)."""

    bridges_refused_transfers: bool = False
    """A transfer whose REFER the party refuses is carried out by us: the target (in `outbound_hosts`, or a tel: number
    by the trunks) is called and joined with the caller. Takes a second call of the worker."""

    refer_timeout_s: float = 30.0
    """No final NOTIFY after a REFER for so long counts as 408."""

    is_rtp_locked: bool = True
    """A call's RTP comes from one source only: its SDP's, or a listed one that sends instead (kernel filter, Linux)."""

    invites_per_s: int = 20
    """More new INVITEs than this to one worker, of all sources together, are dropped unanswered; their senders try
    again (RFC 3261 §17.1.1.2)."""

    source_invites_per_s: int = 10
    """The same for one source address, so that none can use up the share of the others; of a trusted proxy, for the
    address it names. At most `invites_per_s` are of use. Calls by AudioSocket beyond it are hung up on."""

    source_requests_per_s: int = 200
    """More requests of any kind than this from one address are dropped unread; a second's worth may come at once."""

    inband_dtmf: str = "auto"
    """Are keys heard as tones? auto = where the party negotiated no RFC 4733; on = always; off = never."""

    health_after_s: float = 2.0
    """So long after the answer the media's health is judged and written to the call record (one-way audio)."""

    rtp_timeout_s: float = 30.0
    """A confirmed call whose party sends no RTP for so long (and is not on hold) is ended, cause media_timeout; 0 =
    never."""

    apology_wav: str = ""
    """16-bit mono WAV played to callers whose agent died or stalled; read at start. Empty = silence."""

    agent_lost_hold_s: float = 10.0
    """How long a call is held for a new agent after the old one is gone."""

    agent_stall_s: float = 4.0
    """An agent that is connected but shows no sign of life for so long: the apology is played once."""

    handoff_uri: str = ""
    """Where a call goes (blind REFER) when no agent came back in time; empty = BYE."""

    drain_s: float = 30.0
    """After SIGTERM: how long calls may still last before BYE."""

    max_unplayed_s: float = 30.0
    """Agent audio a leg keeps unplayed; `Play` beyond it is refused."""

    progress_ms: int = 100
    """Longest time between two `PlayoutProgress` of a playing item."""

    comfort_noise_dbov: float = -65.0
    """Level of the noise that is sent where nothing is played, -70 to -62; 0 = digital silence. It is never voiced."""

    duck_ramp_ms: int = 10
    """Length of the gain ramp of `Duck` and of `Resume` (a step would click)."""

    local_duck_db: float = -18.0
    """How much quieter the media worker makes the agent at the caller's onset, before the agent has decided anything;
    0 = it waits for the agent."""

    vad_mode: int = 2
    """WebRTC voice activity mode, 0 (lets most through) to 3 (strictest)."""

    vad_min_dbov: float = -50.0
    """Caller audio below this level is never voiced."""

    vad_onset_ms: int = 40
    """Voiced audio needed within `vad_onset_window_ms` to say that speech began."""

    vad_onset_window_ms: int = 80
    """Window of the onset decision."""

    vad_hangover_ms: int = 160
    """How long `voiced` stays true after the last voiced frame (gaps inside words)."""

    echo_max_delay_ms: int = 400
    """Longest delay of a line echo of our voice; 0 = no echo is looked for."""

    echo_canceller: str = "auto"
    """auto = libspeexdsp removes the echo where it is installed, else only the echo gate works; speexdsp = do not start
    without it; off = gate only."""

    wire_voiced_dbov: float = -45.0
    """Level above which 10 ms count as voiced in the wire metrics."""

    wire_onset_ms: int = 30
    """Voiced audio in a row that makes an onset in the wire metrics (its first sample is reported)."""

    wire_hangover_ms: int = 200
    """Unvoiced audio that makes an offset in the wire metrics (the last voiced sample is reported)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trunks", trunks_of(self.trunks))
        for name in (
            "codecs",
            "allowed_sources",
            "outbound_hosts",
            "transports",
            "trusted_proxies",
        ):  # TOML gives lists
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise refusal(name, value, "must be a list of strings")
            object.__setattr__(self, name, tuple(value))
        self._check_types()
        self._check_ranges()
        self._check_codecs()
        self._check_binding()

    def _check_types(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            if isinstance(default, tuple):
                continue
            allowed = (int, float) if isinstance(default, float) else (type(default),)
            if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(default, bool):
                raise refusal(field.name, value, f"must be a {type(default).__name__}")

    def _check_ranges(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "tls_port": (1, 65535),
            "sip_port": (0, 65535), "rtp_port_first": (0, 65000), "max_calls": (1, 512), "retry_after_s": (0, 3600),
            "health_after_s": (0.5, 30), "invites_per_s": (1, 1000),
            "source_invites_per_s": (1, 1000), "source_requests_per_s": (10, 100000), "pool_calls": (0, 10000),
            "answer_timeout_s": (0.1, 180),
            "no_answer_timeout_s": (1, 600), "refer_timeout_s": (0.1, 180),
            "dns_refresh_s": (1, 86400),
            "rtp_timeout_s": (0, 3600), "agent_lost_hold_s": (0, 120), "agent_stall_s": (0.5, 120),
            "drain_s": (0, 3600),
            "max_unplayed_s": (1, 120), "progress_ms": (10, 100), "duck_ramp_ms": (0, 200), "vad_mode": (0, 3),
            "local_duck_db": (-60, 0), "vad_min_dbov": (-90, 0), "vad_onset_ms": (10, 500),
            "vad_onset_window_ms": (10, 1000), "vad_hangover_ms": (0, 2000), "echo_max_delay_ms": (0, 1000),
            "wire_voiced_dbov": (-90, 0), "wire_onset_ms": (10, 500), "wire_hangover_ms": (10, 2000),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise refusal(name, value, f"must be {low} to {high}")
        # G.711 does not carry what is quieter: the steps of mu-law and A-law around zero are 8 and 16 of 32768, and the
        # noise is 10 at -70 dBov, 18 at -65. Louder, it would be sound to the echo gate (telephony/echo.py).
        if self.comfort_noise_dbov and not -70 <= self.comfort_noise_dbov <= -62:
            raise refusal("comfort_noise_dbov", self.comfort_noise_dbov, "must be -70 to -62, or 0")
        if self.comfort_noise_dbov and self.comfort_noise_dbov > self.wire_voiced_dbov - _NOISE_IS_BELOW_VOICE_DB:
            allowed = f"must be {_NOISE_IS_BELOW_VOICE_DB:.0f} dB below wire_voiced_dbov ({self.wire_voiced_dbov})"
            raise refusal("comfort_noise_dbov", self.comfort_noise_dbov, allowed)
        if self.ptime_ms not in PTIMES_MS:
            raise refusal("ptime_ms", self.ptime_ms, "must be 10, 20, 30 or 40")
        if self.rtp_port_first % 2 or self.rtp_port_first + self.num_rtp_ports > 65536:
            allowed = f"must be 0, or even with {self.num_rtp_ports} ports (2 * (max_calls + 1)) from there to 65535"
            raise refusal("rtp_port_first", self.rtp_port_first, allowed)
        if self.inband_dtmf not in ("auto", "on", "off"):
            raise refusal("inband_dtmf", self.inband_dtmf, "must be auto, on or off")
        if self.echo_canceller not in ("auto", "speexdsp", "off"):
            raise refusal("echo_canceller", self.echo_canceller, "must be auto, speexdsp or off")
        if self.vad_onset_window_ms < self.vad_onset_ms:
            raise refusal(
                "vad_onset_window_ms", self.vad_onset_window_ms, f"must be at least vad_onset_ms ({self.vad_onset_ms})"
            )

    def _check_codecs(self) -> None:
        known = (*CODECS, *WIDEBAND_CODECS)
        if not self.codecs or any(codec not in known for codec in self.codecs):
            raise refusal("codecs", list(self.codecs), f"must be one or more of {', '.join(known)}")
        if not self.transports or any(transport not in ("udp", "tcp", "tls") for transport in self.transports):
            raise refusal("transports", list(self.transports), "must be one or more of udp, tcp, tls")
        if "tls" in self.transports and not (self.tls_cert_file and self.tls_key_file):
            raise refusal("tls_cert_file", self.tls_cert_file, "must be set, and tls_key_file, with tls in transports")
        if self.srtp not in ("off", "optional", "mandatory"):
            raise refusal("srtp", self.srtp, "must be off, optional or mandatory")
        for trunk in self.trunks:
            if trunk.transport not in self.transports:
                raise trunk.refusal("transport", "must be in telephony.transports")
            if trunk.transport == "tls" and not self.tls_ca_file:
                raise trunk.refusal("transport", "tls needs telephony.tls_ca_file, the authority of its certificate")

    def _check_binding(self) -> None:
        """Closed by default: a public bind without an allow-list of sources does not start."""
        try:
            bind = ipaddress.ip_address(self.sip_bind)
        except ValueError:
            raise refusal("sip_bind", self.sip_bind, "must be an IP address") from None
        for name in ("allowed_sources", "trusted_proxies"):
            for source in getattr(self, name):
                try:
                    ipaddress.ip_network(source)
                except ValueError:
                    raise refusal(name, source, "must be networks such as 192.0.2.0/24") from None
        if not bind.is_loopback and not (self.allowed_sources or self.trunks or self.trusted_proxies):
            raise refusal(
                "sip_bind",
                self.sip_bind,
                "must be a loopback address unless telephony.allowed_sources or telephony.trunks is set",
            )
        if self.handoff_uri and not self.handoff_uri.startswith(("sip:", "sips:", "tel:")):
            raise refusal("handoff_uri", self.handoff_uri, "must start with sip:, sips: or tel:")

    @property
    def sample_rate_hz(self) -> int:
        """The leg's rate: G.711 is 8 kHz, and 16 kHz as soon as a wideband codec may be negotiated."""
        return 16000 if any(codec in WIDEBAND_CODECS for codec in self.codecs) else 8000

    @property
    def total_calls(self) -> int:
        """Calls at once of all workers together."""
        return self.pool_calls or self.max_calls

    @property
    def called_hosts(self) -> tuple[str, ...]:
        """Every host that we may call, as `host` or `host:port`."""
        of_trunks = (host for trunk in self.trunks for host in (*trunk.hosts, *trunk.refer_hosts))
        return (*self.outbound_hosts, *of_trunks)

    @property
    def num_rtp_ports(self) -> int:
        """UDP ports of one worker: RTP and RTCP of its calls, and of one more that is being refused."""
        return 2 * (self.max_calls + 1)

    def of_worker(self, index: int) -> TelephonyConfig:
        """The settings of one worker of a pool: ports of its own, and exactly one registers (RFC 3261 §10)."""
        return replace(
            self, sip_port=self.sip_port and self.sip_port + index, tls_port=self.tls_port + index,
            is_registrar=self.is_registrar and index == 0,
            rtp_port_first=self.rtp_port_first and self.rtp_port_first + index * self.num_rtp_ports,
        )  # fmt: skip

    @property
    def samples_per_frame(self) -> int:
        return self.sample_rate_hz * self.ptime_ms // 1000


def refusal(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{SECTION}.{key} = {value!r}: {allowed}")
