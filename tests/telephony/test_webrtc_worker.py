"""A browser's call through the worker process: same contract, same events, same rings as a SIP call. The browser is
aiortc's client here; a real one calls in tests/live/test_webrtc_browser.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
import pytest

pytest.importorskip("aiortc")

from telephony.leg import (  # noqa: E402
    Answer,
    AudioFrame,
    DtmfReceived,
    Flush,
    Flushed,
    Hangup,
    LegDisconnected,
    LegEvent,
    LegIncoming,
    LegState,
    LegStateChanged,
    Play,
    Refer,
    ReferResult,
    Reject,
    WireMetric,
)
from telephony.webrtc.ice import gather_only_on  # noqa: E402
from telephony.webrtc.signaling import Answered, Refused  # noqa: E402
from telephony.wire_metrics import dbov  # noqa: E402
from tests.telephony.webrtc_peer import RATE, Browser, RunningWorker, browser_worker  # noqa: E402

pytestmark = pytest.mark.slow
LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import aioice.ice

    monkeypatch.setattr(aioice.ice, "get_host_addresses", aioice.ice.get_host_addresses)
    gather_only_on("127.0.0.1")


class Agent:
    """The agent's side of one call: answers (or not) and remembers."""

    def __init__(self, client) -> None:
        self.client = client
        self.events: list[LegEvent] = []
        self.heard = bytearray()
        self.leg = None
        self._task = None

    async def take(self, answer: bool = True):
        self.leg = await asyncio.wait_for(anext(self.client.legs()), LIMIT_S)
        self.leg.set_tap(lambda _start, received, _sent: self.heard.extend(received))
        self._task = asyncio.create_task(self._collect(), name="agent/collect")
        if answer:
            await self.leg.send(Answer(leg_id=self.leg.leg_id))
        return self.leg

    async def _collect(self) -> None:
        async for event in self.leg.events():
            self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, condition):
        async with asyncio.timeout(LIMIT_S):
            while not (found := condition()):  # noqa: ASYNC110 - another process changes it
                await asyncio.sleep(0.05)
            return found

    async def confirmed(self):
        await self.until(lambda: [e for e in self.of(LegStateChanged) if e.state is LegState.CONFIRMED])


@contextlib.asynccontextmanager
async def call_up(**settings) -> AsyncIterator[tuple[RunningWorker, Agent, Browser]]:
    """A browser's call that was answered and is connected."""
    async with browser_worker(**settings) as worker:
        agent, browser = Agent(await worker.agent()), Browser()
        calling = asyncio.create_task(browser.call(worker.offers), name="browser/call")
        await agent.take()
        assert isinstance(await calling, Answered)
        await agent.confirmed()
        try:
            yield worker, agent, browser
        finally:
            await browser.close()
            await agent.client.close()


def warble(seconds: float, low_hz: float) -> np.ndarray:
    """Its pitch rises by an octave over every half second, so it cannot be mistaken."""
    time_s = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * low_hz * np.cumsum(1 + (time_s * 2) % 1) / RATE
    return (np.sin(phase) * 9000).astype("<i2")


def similarity(heard: np.ndarray, source: np.ndarray) -> float:
    """Highest normalised correlation of half a second of the source anywhere in what was heard."""
    piece = source[RATE // 2 : RATE].astype(float)
    if len(heard) < len(piece):
        return 0.0
    size = 1 << (len(heard) + len(piece)).bit_length()
    spectrum = np.fft.rfft(heard.astype(float), size) * np.conj(np.fft.rfft(piece, size))
    products = np.fft.irfft(spectrum, size)[: len(heard) - len(piece) + 1]
    energy = np.concatenate([[0.0], np.cumsum(heard.astype(float) ** 2)])
    window = energy[len(piece) :] - energy[: -len(piece)]
    return float(np.max(products / (np.sqrt(np.maximum(window, window.max() * 1e-3) * np.sum(piece**2)) + 1e-9)))


async def test_browser_and_agent_hear_each_other_and_the_record_says_who_called():
    async with call_up() as (_, agent, browser):
        incoming = agent.of(LegIncoming)[0]
        assert (incoming.did, incoming.ani, incoming.sample_rate_hz) == ("100", "browser", RATE)
        states = [event.state for event in agent.of(LegStateChanged)]
        assert states == [LegState.INCOMING, LegState.CONNECTING, LegState.CONFIRMED]
        assert agent.of(LegStateChanged)[-1].codec == "opus/48000"
        voice, speech = warble(1.5, 300), warble(1.5, 500)
        browser.microphone.pcm = speech
        leg = agent.leg
        await leg.send(
            Play(leg_id=leg.leg_id, item_id="voice", pcm=voice.tobytes(), sample_rate_hz=RATE, is_final=True)
        )
        await agent.until(lambda: similarity(browser.heard, voice) > 0.8)
        await agent.until(lambda: similarity(np.frombuffer(bytes(agent.heard), "<i2"), speech) > 0.8)
        kinds = {event.kind for event in agent.of(WireMetric)}
        assert {"agent_onset", "caller_onset"} <= kinds
        starts = [event.start_sample for event in agent.of(AudioFrame)]
        assert np.diff(starts).tolist() == [320] * (len(starts) - 1)  # the leg's clock has no hole
        assert any(event.voiced for event in agent.of(AudioFrame))


async def test_keys_arrive_and_what_is_no_key_is_ignored():
    async with call_up() as (_, agent, browser):
        await agent.until(lambda: browser.control.readyState == "open")
        for message in ('{"digit":"4"}', '{"digit":"x"}', "not json", '{"digit":"#"}', "9" * 5_000):
            browser.control.send(message)
        browser.control.send('{"digit":"2"}')
        await agent.until(lambda: len(agent.of(DtmfReceived)) >= 3)
        assert [event.digit for event in agent.of(DtmfReceived)] == ["4", "#", "2"]


async def test_flush_says_what_was_played_and_a_transfer_is_refused_in_words():
    async with call_up() as (_, agent, browser):
        leg = agent.leg
        await leg.send(
            Play(leg_id=leg.leg_id, item_id="long", pcm=bytes(2 * RATE * 5), sample_rate_hz=RATE, is_final=True)
        )
        await asyncio.sleep(0.5)
        await leg.send(Flush(leg_id=leg.leg_id, item_id="long"))
        flushed = await agent.until(lambda: agent.of(Flushed))
        assert 0 < flushed[0].played_samples < RATE * 5
        await leg.send(Refer(leg_id=leg.leg_id, refer_to="sip:desk@127.0.0.1"))
        refused = await agent.until(lambda: agent.of(ReferResult))
        assert refused[0].sip_status >= 400
        assert "browser" in refused[0].reason


@pytest.mark.parametrize("how", ["says so", "goes away"])
async def test_browser_that_hangs_up_ends_the_call_normally(how):
    async with call_up() as (_, agent, browser):
        if how == "says so":
            await agent.until(lambda: browser.control.readyState == "open")
            browser.control.send('{"hangup":true}')
        else:
            await browser.connection.close()
        ended = await agent.until(lambda: agent.of(LegDisconnected))
        assert (ended[0].cause, ended[0].by) == ("normal", "caller")


async def test_agent_that_hangs_up_closes_the_browsers_connection():
    async with call_up() as (_, agent, browser):
        await agent.leg.send(Hangup(leg_id=agent.leg.leg_id))
        ended = await agent.until(lambda: agent.of(LegDisconnected))
        assert (ended[0].cause, ended[0].by) == ("normal", "agent")
        await agent.until(lambda: browser.connection.connectionState == "closed")


async def test_a_connection_that_is_lost_for_a_while_does_not_end_the_call_one_that_stays_lost_does():
    async with call_up(media_timeout_s=8.0) as (_, agent, browser):
        line = browser.connection.getTransceivers()[0].sender.transport.transport
        send = line._send

        async def lost(_packet: bytes) -> None:
            pass

        line._send = lost
        await asyncio.sleep(3.0)
        assert not agent.of(LegDisconnected)
        line._send = send
        song, begin = warble(2.0, 300.0), len(agent.heard)
        browser.microphone.pcm = song
        await agent.until(lambda: len(agent.heard) - begin > 2 * RATE * 4)
        assert similarity(np.frombuffer(bytes(agent.heard[begin:]), "<i2"), song) > 0.7
        assert not agent.of(LegDisconnected)
        line._send = lost
        (ended,) = await agent.until(lambda: agent.of(LegDisconnected))
        assert (ended.cause, ended.by) == ("media_timeout", "network")


async def test_a_full_worker_an_absent_agent_and_a_refusing_agent_are_each_a_clear_503():
    async with browser_worker(max_calls=1) as worker:
        absent, first, second = Browser(), Browser(), Browser()
        reply = await absent.call(worker.offers)
        assert isinstance(reply, Refused) and reply.status == 503
        agent = Agent(await worker.agent())
        calling = asyncio.create_task(first.call(worker.offers), name="browser/first")
        await agent.take(answer=False)
        reply = await second.call(worker.offers)
        assert isinstance(reply, Refused) and (reply.status, reply.is_worker_full) == (503, True)
        assert reply.retry_after_s > 0
        await agent.leg.send(Reject(leg_id=agent.leg.leg_id, sip_status=503, retry_after_s=7))
        reply = await calling
        assert isinstance(reply, Refused) and (reply.status, reply.retry_after_s) == (503, 7)
        assert not reply.is_worker_full
        for browser in (absent, first, second):
            await browser.close()
        await agent.client.close()


async def test_unusable_offers_get_their_status_and_the_next_call_is_unharmed():
    async with browser_worker() as worker:
        agent = Agent(await worker.agent())
        expected = {"": 488, "v=0\r\n": 488, "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n": 400, "m=video 9 X 96\r\n": 488}
        for sdp, status in expected.items():
            browser = Browser()
            await browser.connection.close()
            offer_of = browser.offer
            browser.offer = lambda sdp=sdp: asyncio.sleep(0, sdp)
            calling = asyncio.create_task(browser.call(worker.offers), name="browser/bad")
            await agent.take()
            reply = await calling
            assert isinstance(reply, Refused), (sdp, reply)
            assert reply.status == status, (sdp, reply)
            assert offer_of is not None
        good = Browser()
        calling = asyncio.create_task(good.call(worker.offers), name="browser/good")
        await agent.take()
        assert isinstance(await calling, Answered)
        await good.close()
        await agent.client.close()


async def test_page_that_goes_away_before_the_answer_cancels_the_call():
    async with browser_worker() as worker:
        agent, browser = Agent(await worker.agent()), Browser()
        calling = asyncio.create_task(browser.call(worker.offers), name="browser/call")
        await agent.take(answer=False)
        calling.cancel()
        ended = await agent.until(lambda: agent.of(LegDisconnected))
        assert (ended[0].cause, ended[0].by) == ("cancelled", "caller")
        await browser.close()
        await agent.client.close()


async def test_call_outlives_its_agent_and_the_next_one_gets_it():
    async with call_up() as (worker, agent, browser):
        leg_id = agent.leg.leg_id
        await agent.client.close()
        heir = Agent(await worker.agent())
        leg = await heir.take(answer=False)
        assert (leg.leg_id, leg.is_resumed, leg.state) == (leg_id, True, LegState.CONFIRMED)
        await heir.until(lambda: heir.of(AudioFrame))
        assert browser.connection.connectionState == "connected"
        await heir.client.close()


async def test_browser_hears_comfort_noise_until_the_agent_speaks():
    async with call_up() as (worker, agent, browser):
        await agent.until(lambda: len(browser.heard) > 2 * RATE)
        heard = browser.heard[RATE : 2 * RATE].astype(float)  # the first second holds what comes before the call is up
        # Opus carries less of a noise than of a voice: -68 dBov are left of -65.
        assert dbov(float(np.mean(heard**2))) == pytest.approx(worker.config.comfort_noise_dbov - 3, abs=4)
        assert not [event for event in agent.of(WireMetric) if event.kind.startswith("agent_")]
