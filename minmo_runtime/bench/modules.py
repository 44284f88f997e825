"""What one second of a call costs in each module, alone and in batches: CPU time of this thread over audio time.

Thread CPU time is what the machine must give, whatever else runs on it; wall time is printed beside it by engine.py.
Medians of `REPEATS` runs. Each module does exactly the jobs that the runner gives it for `SECONDS` of audio, through
its streaming form.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from minmo_runtime import features
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.model.encoder import EncoderState
from minmo_runtime.model.interleave import Phase
from minmo_runtime.model.vocoder import push_rows
from minmo_runtime.runner import Runner
from minmo_runtime.weights import Checkpoint

REPEATS = 5
SECONDS = 3.0
CONTEXT_TOKENS = 256  # in the LLM's cache while it decodes


def real_time_factors(
    checkpoint: Checkpoint, rows: int, device: str = "cpu", dtype: str = "float32"
) -> dict[str, float]:
    """Part → seconds per second of audio for `rows` calls at once, all listening and all speaking: of this thread on a
    CPU, of the device on a GPU."""
    is_gpu = device == "cuda"
    config = RuntimeConfig(
        max_streams=max(rows, 1), max_context_tokens=512, device=device, dtype=dtype, has_fixed_shapes=is_gpu
    )
    runner = Runner(checkpoint, config)
    clock = _device_time if is_gpu else time.thread_time
    jobs: dict[str, Callable[[], None]] = {
        "features": lambda: _features(rows),
        "encoder": lambda: (_encoder if runner.hearing.encoder.dims.chunk_frames else _whole_encoder)(runner, rows),
        "llm": lambda: _llm(runner, rows),
        "voice_lm": lambda: _voice_lm(runner, rows),
        "flow": lambda: _flow(runner, rows),
        "vocoder": lambda: _vocoder(runner, rows),
    }
    measured = {}
    with torch.inference_mode():
        for part, job in jobs.items():
            job()  # warm: caches, tables, allocator
            times = []
            for _ in range(REPEATS):
                begin = clock()
                job()
                times.append(clock() - begin)
            measured[part] = statistics.median(times) / SECONDS
    measured["sum"] = sum(measured.values())
    return measured


def _device_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def prefill_ms(checkpoint: Checkpoint, tokens: int) -> float:
    """CPU milliseconds to put `tokens` text positions into the LLM."""
    runner = Runner(checkpoint, RuntimeConfig(max_streams=1))
    ids = torch.ones(1, tokens, dtype=torch.long)
    times = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            runner.llm_cache.reset(0)
            begin = time.thread_time()
            runner.llm(ids, cache=runner.llm_cache, slots=[0])
            times.append(time.thread_time() - begin)
    return 1000 * statistics.median(times[1:])


def _features(rows: int) -> None:
    for _ in range(rows):
        stream = features.FbankStream()
        for _ in range(round(SECONDS / 0.16)):
            stream.push(torch.zeros(2560))


def _encoder(runner: Runner, rows: int) -> None:
    encoder, rates = runner.hearing.encoder, runner.checkpoint.rates
    states = [encoder.init_state() for _ in range(rows)]
    like = runner.hearing
    chunk = torch.zeros(
        rows, runner.chunk_fbank_frames, encoder.dims.num_mel_bins, device=like.device, dtype=like.dtype
    )
    for _ in range(round(SECONDS / rates.encoder_chunk_s)):
        hidden, state = encoder.forward_chunk(chunk, EncoderState.stack(states))
        encoder.ctc_log_probs(hidden)
        states = [state.row(row) for row in range(rows)]


def _whole_encoder(runner: Runner, rows: int) -> None:
    """A full-context encoder: all of the segment again every time it has grown by as much as serving waits for."""
    hearing, dims = runner.hearing, runner.hearing.encoder.dims
    step = runner.checkpoint.rates.encoder_chunk_frames
    num_frames = round(SECONDS * features.SAMPLE_RATE_HZ / runner.checkpoint.rates.encoder_frame_samples)
    frames = torch.zeros(rows, num_frames, dims.num_mel_bins * dims.lfr_m, device=hearing.device, dtype=hearing.dtype)
    queries = torch.zeros(rows, 4, dtype=torch.long)
    for end in range(step, num_frames + 1, step):
        hearing.encoder.ctc_log_probs(hearing.encoder(frames[:, :end], queries=queries))


def _llm(runner: Runner, rows: int) -> None:
    """As many text tokens as the voice consumes: 5 per 15 voice tokens."""
    rates = runner.checkpoint.rates
    slots = list(range(rows))
    runner.llm_cache.lengths[:rows] = [CONTEXT_TOKENS] * rows
    per_second = rates.text_per_block / (rates.voice_per_block * rates.voice_token_s)
    ids = torch.ones(rows, dtype=torch.long, device=runner.device)
    for _ in range(round(SECONDS * per_second)):
        hidden = runner.next_hidden(ids, slots)
        runner.llm.logits(hidden).argmax(dim=-1)


def _voice_lm(runner: Runner, rows: int) -> None:
    rates, voice_lm = runner.checkpoint.rates, runner.voice_lm
    num_tokens = round(SECONDS / rates.voice_token_s)
    num_text = (num_tokens // rates.voice_per_block + 1) * rates.text_per_block
    streams = []
    for row in range(rows):
        runner.sound.voice_cache.reset(row)
        stream = voice_lm.new_stream(row, row, voice_lm.dims.rules(), voice_lm.dims.sampling())
        weight = voice_lm.llm_decoder.weight
        stream.push(torch.zeros(num_text, voice_lm.dims.hidden_size, device=weight.device, dtype=weight.dtype))
        streams.append(stream)
    while any(s.turn.phase is not Phase.DONE and len(s.turn.voice_tokens) < num_tokens for s in streams):
        voice_lm.decode_step(streams, runner.sound.voice_cache, runner.sound.one_row)


def _flow(runner: Runner, rows: int) -> None:
    """All rows in one pass on a GPU, one after the other on a CPU, as the runner does."""
    sound = runner.sound
    num_tokens = round(SECONDS / runner.checkpoint.rates.voice_token_s)
    states = [sound.flow.new_state(sound.voice, slot=slot) for slot in range(rows)]
    for state in states:
        sound.flow.push(state, [1] * num_tokens, is_final=True)
    for group in [states] if runner.device.type == "cuda" else [[state] for state in states]:
        while sound.flow.can_step(group[0]):
            sound.flow.step_rows(group, sound.flow_cache)


def _vocoder(runner: Runner, rows: int) -> None:
    sound, flow = runner.sound, runner.sound.flow.dims
    frames = round(SECONDS / runner.checkpoint.rates.voice_token_s) * flow.frames_per_token
    chunk = flow.chunk_size * flow.frames_per_token
    mel = torch.from_numpy(np.random.default_rng(0).normal(-5, 1, (1, flow.num_mel_bins, frames)).astype(np.float32))
    mel = mel.to(runner.device)
    states = [sound.vocoder.new_state() for _ in range(rows)]
    for begin in range(0, frames, chunk):
        pieces = [mel[..., begin : begin + chunk]] * rows
        push_rows(sound.vocoder, pieces, states, [begin + chunk >= frames] * rows, sound.fixed)
