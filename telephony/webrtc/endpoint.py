"""The browser calls of one worker process: offers in, legs on the loop and clock of telephony/loop_worker.py."""

from __future__ import annotations

import asyncio
import secrets
import time

from telephony.config import TelephonyConfig
from telephony.leg import LegIncoming
from telephony.loop_worker import LoopEndpoint
from telephony.media_worker import Admission, Sink
from telephony.webrtc.config import WebRtcConfig, read_secret
from telephony.webrtc.leg import WebRtcLeg
from telephony.webrtc.signaling import Offer, Refused, Reply
from telephony.webrtc.tickets import ice_servers

_MAX_TEXT = 200


class WebRtcEndpoint(LoopEndpoint):
    """`sink` hears every leg; `admission` is asked for every offer."""

    def __init__(self, config: TelephonyConfig, settings: WebRtcConfig, sink: Sink, admission: Admission) -> None:
        super().__init__(config, settings.max_calls, sink, admission)
        self.settings = settings
        self._turn_secret = (
            read_secret("turn_secret_file", settings.turn_secret_file) if settings.turn_secret_file else b""
        )

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
        leg = WebRtcLeg(incoming, offer.sdp, self.config, self.settings, self._sink, servers)
        self.take(leg)
        return leg.reply

    def _turn_expiry_s(self) -> int:
        return int(time.time()) + self.settings.turn_credential_s


def _clean(text: str) -> str:
    """Printable, and not endless: it is a stranger's text."""
    return "".join(char for char in text if char.isprintable())[:_MAX_TEXT]
