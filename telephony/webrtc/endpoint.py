"""The browser calls of one worker process: offers in, one clock for all legs.

The clock ticks every 20 ms by the monotonic time; a loop that was late makes up for it, so that a leg's samples stay
true to real time. Everything runs on the worker's event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
import traceback

from telephony.config import TelephonyConfig
from telephony.leg import LegEvent, LegIncoming, LegState, LegStateChanged
from telephony.media_worker import Admission, CannotDo, Sink
from telephony.sip.causes import Cause
from telephony.webrtc.config import WebRtcConfig, read_secret
from telephony.webrtc.leg import WebRtcLeg
from telephony.webrtc.signaling import Offer, Refused, Reply
from telephony.webrtc.tickets import ice_servers
from telephony.wire import PlaceCall

_MAX_TICKS_AT_ONCE = 10  # 200 ms; what is beyond was lost anyway
_MAX_TEXT = 200


class WebRtcEndpoint:
    """Implements `media_worker.Endpoint`. `sink` hears every leg; `admission` is asked for every offer."""

    sip_port = 0

    def __init__(self, config: TelephonyConfig, settings: WebRtcConfig, sink: Sink, admission: Admission) -> None:
        self.config, self.settings = config, settings
        self.max_calls = settings.max_calls
        self.legs: dict[str, WebRtcLeg] = {}
        self._sink, self._admission = sink, admission
        self._turn_secret = (
            read_secret("turn_secret_file", settings.turn_secret_file) if settings.turn_secret_file else b""
        )
        self._closing: set[asyncio.Task[None]] = set()
        self.num_late_ticks = 0

    # ------------------------------------------------------------------- calls

    def on_offer(self, offer: Offer) -> asyncio.Future[Reply]:
        """A browser wants to call; the future is the answer it waits for."""
        if status := self._admission():
            refused: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            refused.set_result(
                Refused(
                    status=status,
                    reason="all lines are busy",
                    retry_after_s=self.config.retry_after_s,
                    is_worker_full=True,
                )  # fmt: skip
            )
            return refused
        leg_id = "b" + secrets.token_hex(8)
        incoming = LegIncoming(
            leg_id=leg_id, did=_clean(offer.did), ani=_clean(offer.ani), display_name=_clean(offer.display_name),
            source_address=_clean(offer.source_address), sample_rate_hz=self.config.sample_rate_hz,
        )  # fmt: skip
        servers = ice_servers(self.settings.ice_urls, self._turn_secret, leg_id, self._turn_expiry_s())
        leg = WebRtcLeg(incoming, offer.sdp, self.config, self.settings, self._on_leg, servers)
        self.legs[leg_id] = leg
        self._sink(leg, incoming)
        self._sink(leg, LegStateChanged(leg_id=leg_id, state=LegState.INCOMING))
        return leg.reply

    def _turn_expiry_s(self) -> int:
        return int(time.time()) + self.settings.turn_credential_s

    def _on_leg(self, leg: WebRtcLeg, event: LegEvent) -> None:
        self._sink(leg, event)

    def place_call(self, request: PlaceCall) -> WebRtcLeg:
        raise CannotDo("a browser cannot be called")

    def join(self, leg: WebRtcLeg, other: WebRtcLeg | None) -> None:
        raise CannotDo("browsers cannot be joined with another call")

    def forget(self, leg: WebRtcLeg) -> None:
        """The agent has been told of the end."""
        if self.legs.pop(leg.leg_id, None) is not None:
            task = asyncio.get_running_loop().create_task(leg.closed(), name=f"leg-{leg.leg_id}/closed")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def check_deadlines(self, now_s: float) -> None:
        for leg in list(self.legs.values()):
            leg.on_time(now_s)

    def end_all(self, cause: Cause) -> None:
        for leg in list(self.legs.values()):
            leg.end(cause)

    def reason_of(self, error: Exception) -> str | None:
        return None

    async def closed(self) -> None:
        """Every connection has said its goodbye (DTLS close_notify)."""
        await asyncio.gather(*self._closing, return_exceptions=True)

    # ------------------------------------------------------------------- clock

    async def run_clock(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        period_s = self.config.ptime_ms / 1000
        due_s = loop.time() + period_s
        while True:
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            num_due = 1 + int((loop.time() - due_s) / period_s)
            due_s += num_due * period_s
            self.num_late_ticks += num_due - 1
            for _ in range(min(num_due, _MAX_TICKS_AT_ONCE)):
                self._tick()

    def _tick(self) -> None:
        for leg in list(self.legs.values()):
            if leg.state is LegState.CONFIRMED:
                try:
                    leg.tick()
                except Exception:  # noqa: BLE001 - one call's trouble must not stop the others' clock
                    traceback.print_exc(file=sys.stderr)
                    leg.end(Cause.NETWORK_ERROR)


def _clean(text: str) -> str:
    """Printable, and not endless: it is a stranger's text."""
    return "".join(char for char in text if char.isprintable())[:_MAX_TEXT]
