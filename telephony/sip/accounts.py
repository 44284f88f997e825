"""pjsua2's accounts: one of our own, and one for each trunk, with its credentials, registration and OPTIONS.

Exactly one worker of a pool registers (`is_registrar`); the Contact it gives may be the proxy's in front of the pool.
Registration: RFC 3261 §10, renewed by pjsip itself; when a registrar fails, the trunk's next host is asked. Digest:
RFC 3261 §22, answered by pjsip only for the configured realm. OPTIONS as keep-alive: RFC 3261 §11.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import pjsua2 as pj

from telephony.config import TelephonyConfig
from telephony.sip.names import split_host
from telephony.sip.trunk import AddressesOf, Route
from telephony.trunk_config import TrunkConfig
from telephony.wire import TrunkChanged

OnInvite = Callable[[pj.Account, pj.OnIncomingCallParam], None]
Notify = Callable[[TrunkChanged], None]

_REGISTER_RETRY_S = 30
_GIVE_UP_STATUSES = {401, 403, 404, 407}  # the registrar knows us and says no: the next host would say the same


class Account(pj.Account):
    """The workers' own account, for calls that belong to no trunk."""

    def __init__(self, on_invite: OnInvite) -> None:
        super().__init__()
        self._on_invite = on_invite

    def onIncomingCall(self, prm: pj.OnIncomingCallParam) -> None:
        try:
            self._on_invite(self, prm)
        except Exception:  # noqa: BLE001 - must not unwind into pjsip's C stack; the INVITE then times out
            traceback.print_exc(file=sys.stderr)


class TrunkAccount(Account):
    """One trunk. `on_time` is called a few times a second."""

    def __init__(
        self, trunk: TrunkConfig, config: TelephonyConfig, on_invite: OnInvite, notify: Notify,
        addresses_of: AddressesOf,
    ) -> None:  # fmt: skip
        super().__init__(on_invite)
        self.trunk = trunk
        self._config, self._notify, self._addresses_of = config, notify, addresses_of
        self._settings: pj.AccountConfig | None = None
        self._registrar = 0  # index of the host that is asked
        self._is_registrar_changed = False
        self._is_registration_due = False
        self._addresses: dict[str, set[str]] = {}  # host -> what it had when last looked at
        self._options_at_s = 0.0
        self._asked_at_s: dict[str, float] = {}  # host -> when OPTIONS went out that is not answered yet
        self._is_up: dict[str, bool] = {}

    def start(self, settings: pj.AccountConfig, transport_id: int) -> None:
        """Create the account on top of what every account has in common."""
        trunk = self.trunk
        # Contact is this transport's own address. Else pjsip would look up the host and connect to it, while SIP waits.
        settings.sipConfig.transportId = transport_id
        settings.natConfig.contactUseSrcPort = 0
        user = trunk.username or trunk.caller_id or self._config.from_user
        settings.idUri = f"sip:{user}@{trunk.aor_host}"
        if trunk.username:
            password = os.environ.get(trunk.password_env, "")
            if not password:
                raise trunk.refusal("password_env", "that environment variable is not set")
            settings.sipConfig.authCreds.append(pj.AuthCredInfo("digest", trunk.realm, trunk.username, 0, password))
        if trunk.registers and self._config.is_registrar:
            settings.regConfig.registrarUri = trunk.uri_of("", trunk.hosts[0])
            settings.regConfig.timeoutSec = trunk.register_expires_s
            settings.regConfig.retryIntervalSec = settings.regConfig.firstRetryIntervalSec = _REGISTER_RETRY_S
            settings.regConfig.dropCallsOnFail = False
            settings.regConfig.registerOnAdd = True
            if self._config.contact_address:
                suffix = "" if trunk.transport == "udp" else f";transport={trunk.transport}"
                settings.sipConfig.contactForced = f"<sip:{user}@{self._config.contact_address}{suffix}>"
        self._settings = settings
        self.create(settings)
        self.names_changed()
        self._is_registration_due = False  # pjsip sends the first one by itself

    def names_changed(self) -> None:
        """Host names may have other addresses now: one that has none is down, one that has come up is asked again."""
        for host in self.trunk.hosts:
            before, now = self._addresses.get(host), set(self._addresses_of(host))
            self._addresses[host] = now
            if not now:
                self._set_up(host, False, 0, "its name has no address")
            elif now != before:
                self._options_at_s = 0.0
                self._is_registration_due = self.trunk.registers and self._config.is_registrar
                if before is not None and not self.trunk.options_s:
                    self._set_up(host, True, 0, "")

    def routes(self, routes: list[Route]) -> list[Route]:
        """The same routes, those to hosts that do not answer OPTIONS last."""
        return sorted(routes, key=lambda route: not self._is_up.get(host_of(route.uri), True))

    # -------------------------------------------------------------------- time

    def on_time(self, now_s: float) -> None:
        if self._is_registrar_changed and self._settings is not None:
            self._is_registrar_changed = False
            self._settings.regConfig.registrarUri = self.trunk.uri_of("", self.trunk.hosts[self._registrar])
            self.modify(self._settings)
        if self._is_registration_due:  # a registrar at another address does not know us yet
            self._is_registration_due = False
            self.setRegistration(True)
        if not self.trunk.options_s:
            return
        for host, asked_at_s in list(self._asked_at_s.items()):
            if now_s - asked_at_s > self.trunk.failover_s:
                del self._asked_at_s[host]
                self._set_up(host, False, 408, "no answer to OPTIONS")
        if now_s >= self._options_at_s:
            self._options_at_s = now_s + self.trunk.options_s
            for host in filter(self._addresses.get, self.trunk.hosts):
                param = pj.SendRequestParam()
                param.method = "OPTIONS"
                param.txOption.targetUri = self.trunk.uri_of("", host)
                self._asked_at_s[host] = now_s
                self.sendRequest(param)

    def onSendRequest(self, prm: pj.OnSendRequestParam) -> None:
        """An answer to OPTIONS is known by where it comes from; any final answer means that somebody is there."""
        try:
            if prm.e.type != pj.PJSIP_EVENT_TSX_STATE or prm.e.body.tsxState.type != pj.PJSIP_EVENT_RX_MSG:
                return
            source = prm.e.body.tsxState.src.rdata.srcAddress
            status = prm.e.body.tsxState.tsx.statusCode
            for host in self.trunk.hosts:
                if status >= 200 and self._is_host(source, host):
                    self._asked_at_s.pop(host, None)
                    self._set_up(host, True, status, "")
        except Exception:  # noqa: BLE001 - as above
            traceback.print_exc(file=sys.stderr)

    def onRegState(self, prm: pj.OnRegStateParam) -> None:
        try:
            host = self.trunk.hosts[self._registrar]
            state = "refused" if prm.code >= 300 else "registered" if prm.expiration else "unregistered"
            self._notify(TrunkChanged(
                trunk=self.trunk.name, state=state, host=host, sip_status=prm.code, reason=prm.reason[:120]
            ))  # fmt: skip
            if state == "refused" and prm.code not in _GIVE_UP_STATUSES and len(self.trunk.hosts) > 1:
                self._registrar = (self._registrar + 1) % len(self.trunk.hosts)
                self._is_registrar_changed = True  # not from within pjsip's own callback
        except Exception:  # noqa: BLE001 - as above
            traceback.print_exc(file=sys.stderr)

    def _is_host(self, source_address: str, host: str) -> bool:
        """Does "ip:port" belong to `host` or `host:port`?"""
        address, _, port = source_address.rpartition(":")
        wanted_port = split_host(host)[1] or self.trunk.default_port
        return port == str(wanted_port) and address.strip("[]") in self._addresses_of(host)

    def _set_up(self, host: str, is_up: bool, sip_status: int, reason: str) -> None:
        if self._is_up.get(host) is not is_up:
            self._is_up[host] = is_up
            state = "up" if is_up else "down"
            self._notify(TrunkChanged(
                trunk=self.trunk.name, state=state, host=host, sip_status=sip_status, reason=reason
            ))  # fmt: skip


def host_of(uri: str) -> str:
    """`host` or `host:port` of a SIP URI of ours."""
    return uri.split("@")[-1].removeprefix("sip:").split(";")[0]
