"""What packet loss does to speech at our receiver: pjsip's jitter buffer and concealment, without any agent.

Two media workers, one calling the other through the relay; the caller plays a committed clip, the receiver's tap is
what an agent would hear. Judged against the same clip over the same codec without loss: log-spectral distance (dB, over
the frames where the clip is voiced) and the share of voiced frames that came out as silence. PESQ (ITU-T P.862, narrow
band, MOS-LQO) beside them where the package `pesq` can be imported: it comes as source and needs a C compiler, and the
reference code in it has a licence of its own, so nothing here depends on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
from typing import Any

import numpy as np

from agent.lab import rtp
from agent.lab.line import LineProfile
from agent.lab.relay import Relay
from agent.lab.scenarios import clip
from telephony.client import WorkerClient
from telephony.config import TelephonyConfig
from telephony.leg import Answer, Hangup, LegState, LegStateChanged, Play, PlayoutProgress
from telephony.process import WorkerProcess

RATE_HZ = 8_000
LOSSES = (0.0, 0.01, 0.03, 0.05)
_FRAME, _HOP = 256, 80
_VOICED_DB = -35.0  # below the clip's loudest frame
_SILENT_DB = -30.0  # below the clip's own level in that frame: nothing was made up for the loss
_GAP_S = 0.3


def speech() -> np.ndarray:
    """About 12 s of the committed voices."""
    gap = np.zeros(round(_GAP_S * RATE_HZ), np.int16)
    names = ("order_status", "number_prefix", "hours_day", "what_can_you_do", "goodbye", "hours_day", "order_status")
    return np.concatenate([part for name in names for part in (np.frombuffer(clip(name), "<i2"), gap)])


def _log_spectra(samples: np.ndarray) -> np.ndarray:
    starts = np.arange(0, len(samples) - _FRAME, _HOP)
    frames = samples.astype(float)[starts[:, None] + np.arange(_FRAME)] * np.hanning(_FRAME)
    return 10 * np.log10(np.abs(np.fft.rfft(frames, axis=1)) ** 2 + 1e3)  # [frames, bins]


def aligned(heard: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The part of `heard` that is `wanted`, by its highest cross-correlation."""
    size = 1 << (len(heard) + len(wanted)).bit_length()
    product = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(wanted, size)), size)
    lag = int(np.argmax(product[: max(1, len(heard))]))
    part = heard[lag : lag + len(wanted)]
    return np.concatenate([part, np.zeros(len(wanted) - len(part))])


def pesq_of(heard: np.ndarray, wanted: np.ndarray) -> float | None:
    """MOS-LQO, or None without the package."""
    if importlib.util.find_spec("pesq") is None:
        return None
    pesq = importlib.import_module("pesq").pesq
    return round(float(pesq(RATE_HZ, wanted.astype(np.int16), aligned(heard, wanted).astype(np.int16), "nb")), 3)


def distance(heard: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Frame by frame, each against the nearest of the frames around it: a jitter buffer may shift by some ms."""
    theirs, ours = _log_spectra(aligned(heard, wanted)), _log_spectra(wanted)
    level = ours.max(axis=1)
    voiced = level > level.max() + _VOICED_DB
    shifts = [np.sqrt(np.mean((np.roll(theirs, shift, axis=0) - ours) ** 2, axis=1)) for shift in range(-8, 9)]
    best = np.min(np.stack(shifts), axis=0)[voiced]
    silent = np.mean(theirs.max(axis=1)[voiced] < level[voiced] + _SILENT_DB)
    return {
        "log_spectral_distance_db": round(float(np.mean(best)), 2), "p95_db": round(float(np.percentile(best, 95)), 2),
        "silent_share": round(float(silent), 4),
    }  # fmt: skip


async def heard_over(line: LineProfile, seed: int) -> tuple[np.ndarray, dict[str, int]]:
    """What the receiving worker's tap got, and what the relay did."""
    wanted = speech()
    with contextlib.ExitStack() as stack:
        config = TelephonyConfig(sip_port=0, echo_canceller="off")
        near, far = (stack.enter_context(WorkerProcess(config)) for _ in range(2))
        receiver, caller = await WorkerClient.connect(near.socket_path), await WorkerClient.connect(far.socket_path)
        heard = bytearray()
        async with Relay(near.address, line, seed) as relay:
            placed = await caller.place_call(f"sip:100@{relay.address}")
            leg = await asyncio.wait_for(anext(receiver.legs()), 10)
            leg.set_tap(lambda _start, received, _sent: heard.extend(received))
            reading = asyncio.create_task(_read(leg), name="concealment/receiver")
            await leg.send(Answer(leg_id=leg.leg_id))
            await asyncio.wait_for(_play(placed, wanted), 60)
            reading.cancel()
            counts = next(iter(relay.calls.values())).to_agent.counts.as_dict()
        await receiver.close()
        await caller.close()
    return np.frombuffer(bytes(heard), "<i2").astype(float), counts


async def _read(leg: Any) -> None:
    async for _ in leg.events():
        pass


async def _play(leg: Any, samples: np.ndarray) -> None:
    async for event in leg.events():
        if isinstance(event, LegStateChanged) and event.state is LegState.CONFIRMED:
            await asyncio.sleep(0.5)  # the jitter buffer settles
            pcm = samples.astype("<i2").tobytes()
            await leg.send(Play(leg_id=leg.leg_id, item_id="speech", pcm=pcm, sample_rate_hz=RATE_HZ, is_final=True))
        elif isinstance(event, PlayoutProgress) and event.is_finished:
            await asyncio.sleep(0.5)
            await leg.send(Hangup(leg_id=leg.leg_id))


async def measure_concealment(seed: int, repeat: int = 1) -> list[dict[str, Any]]:
    """The codec alone, then one row per loss rate, means over `repeat` seeds; what the row of loss 0 has over the codec
    is the machine's doing. `pesq_drop`: against the codec alone."""
    wanted = speech().astype(float)
    table = rtp.DECODE[rtp.PCMU]
    coded = table[np.frombuffer(rtp.encode(rtp.PCMU, wanted), np.uint8)].astype(float)
    best = pesq_of(coded, wanted)
    rows = [{"loss": None, "packets": 0, "lost": 0, **distance(coded, wanted), **_pesq_figures(best, best)}]
    for loss in LOSSES:
        runs = []
        for each in range(seed, seed + repeat):
            heard, counts = await heard_over(LineProfile(name=f"loss {loss:g}", loss=loss), each)
            runs.append({
                "packets": counts["packets"], "lost": counts["lost"], **distance(heard, wanted),
                **_pesq_figures(pesq_of(heard, wanted), best),
            })  # fmt: skip
        rows.append({"loss": loss, **{key: _mean([run[key] for run in runs]) for key in runs[0]}})
        print(rows[-1], flush=True)
    return rows


def _pesq_figures(mos: float | None, best: float | None) -> dict[str, float]:
    return {} if mos is None or best is None else {"pesq": mos, "pesq_drop": round(best - mos, 3)}


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 4)
