"""Jobs of the speaking side behind the text: voice tokens, mel, samples, and fixed sentences sent again.

Several calls share one pass of the voice LM, of the flow (each at its own Euler step) and of the vocoder; a row's slot
is its place in both caches here. Which job runs is decided in scheduler.py. Walk: step 9.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from minmo_runtime.config import RuntimeConfig
from minmo_runtime.decode_step import DecodeStep
from minmo_runtime.model.backbone import Backbone, KvCache
from minmo_runtime.model.fixed_shapes import FixedCalls
from minmo_runtime.model.flow_prompt import FlowPrompt
from minmo_runtime.model.interleave import Phase
from minmo_runtime.model.vocoder import push_rows
from minmo_runtime.model.voice_lm import OneRow
from minmo_runtime.reply import Reply
from minmo_runtime.rows import StreamFailure, check, each
from minmo_runtime.spoken_form import SpokenStream
from minmo_runtime.stream import Stream
from minmo_runtime.weights import Checkpoint

_PCM_SCALE = 32768.0


class Sound:
    """Owns the voice LM's and the flow's caches."""

    def __init__(self, checkpoint: Checkpoint, config: RuntimeConfig, device: torch.device) -> None:
        modules = checkpoint.modules
        self.config = config
        self.lexicon = checkpoint.lexicon
        self.language = checkpoint.facts.languages[0] if checkpoint.facts.languages else "en"
        self.voice_lm, self.flow, self.vocoder = modules.voice_lm, modules.flow, modules.vocoder
        self.output_projector = modules.output_projector
        length = config.max_voice_tokens + 2 * config.max_reply_tokens + config.max_context_tokens
        self.voice_cache = self.voice_lm.new_cache(config.max_streams + 1, length)  # the last one is the step's spare
        self.one_row = step_of(self.voice_lm.trunk, self.voice_cache, config)
        weight = self.flow.encoder_proj.weight
        self.voice = checkpoint.default_voice().to(device, weight.dtype)
        self.voice_text = checkpoint.voice_text if "out" in checkpoint.bridges else None
        self._take_prompt(checkpoint)
        window = self.flow.dims.window_chunks(config.flow_window_s)
        num_slots = config.max_streams + config.has_fixed_shapes  # the last one is the fixed shapes' spare
        self.flow_cache = self.flow.new_cache(num_slots, window, len(self.prompt_tokens))
        self.fixed = FixedCalls(has_graphs=config.device == "cuda") if config.has_fixed_shapes else None
        self.flow_cache.fixed = self.fixed

    def _take_prompt(self, checkpoint: Checkpoint) -> None:
        """What every reply continues: the prompt's words, its voice tokens and its mel."""
        prompt = checkpoint.prompt_voice
        self.prompt_tokens: tuple[int, ...] = ()
        self.prompt_vectors: Tensor | None = None
        self.flow_prompt: FlowPrompt | None = None
        if prompt is None or self.voice_text is None:
            return
        self.voice = prompt.speaker.to(self.voice)
        self.prompt_tokens = prompt.tokens
        self.flow_prompt = FlowPrompt(self.flow, prompt.tokens, prompt.mel.to(self.voice), self.voice)
        ids = self.voice_text.encode(prompt.text)
        self.prompt_vectors = self.voice_lm.text_vectors(torch.tensor(ids, device=self.voice.device))

    def speak_text(self, stream: Stream, reply: Reply, text: str, *, is_last: bool = False) -> None:
        """The bridge `out`: what the LLM wrote, as it is said, by the voice LM's own tokenizer and text table."""
        assert self.voice_text is not None, "the voice LM reads the LLM's own ids"
        if reply.spoken is None:
            reply.spoken = SpokenStream(self.language, self.lexicon)
        ready = reply.spoken.push(text) + (reply.spoken.finish() if is_last else "")
        if ids := self.voice_text.encode(ready):
            if reply.voice is None:
                self.begin(stream, reply)
            reply.voice.push(self.voice_lm.text_vectors(torch.tensor(ids, device=self.voice.device)))
            reply.is_voice_waiting = False

    def free(self, slot: int) -> None:
        """Nothing of the slot's last owner stays: a NaN would reach the next one."""
        self.voice_cache.reset(slot)
        self.flow_cache.reset(slot)

    def begin(self, stream: Stream, reply: Reply) -> None:
        """The reply's first spoken token is known."""
        self.voice_cache.reset(stream.slot)
        query = None
        if self.output_projector is not None and reply.query_hidden:
            last = slice(-self.output_projector.dims.max_query, None)  # 0 = all of it
            hidden, embedding = torch.stack(reply.query_hidden[last]), torch.stack(reply.query_embedding[last])
            query = self.output_projector.query(hidden, embedding)
        dims = self.voice_lm.dims
        seed = voice_seed(stream.seed, reply)
        tokens, said = self.prompt_tokens, self.prompt_vectors
        reply.voice = self.voice_lm.new_stream(
            stream.slot, seed, dims.rules(), dims.sampling(), query, tokens, 0 if said is None else len(said)
        )
        if said is not None:
            reply.voice.push(said)
        if self.flow_prompt is None:
            reply.flow = self.flow.new_state(self.voice, slot=stream.slot)
        else:
            reply.flow = self.flow_prompt.new_state(self.flow_cache, stream.slot)
        reply.vocoder_state = self.vocoder.new_state()

    def voice_tokens(self, streams: list[Stream]) -> dict[str, str]:
        """One voice token per call."""
        replies = [stream.replies[0] for stream in streams]
        tokens = self.voice_lm.decode_step([reply.voice for reply in replies], self.voice_cache, self.one_row)

        def take(row: int, _: Stream) -> None:
            reply, token = replies[row], tokens[row]
            if reply.voice.is_failed:
                raise StreamFailure("the voice LM gave NaN")
            if len(reply.voice.turn.voice_tokens) >= self.config.max_voice_tokens:
                reply.voice.turn.abandon()
            reply.is_voice_done = reply.voice.turn.phase is Phase.DONE
            reply.is_voice_waiting = token is None and not reply.is_voice_done
            self.flow.push(reply.flow, [] if token is None else [token], is_final=reply.is_voice_done)
            self._look_at_flow(reply)

        return each(streams, take)

    def _look_at_flow(self, reply: Reply) -> None:
        reply.can_flow = self.flow.can_step(reply.flow)
        reply.is_in_chunk = reply.flow.chunk is not None
        reply.is_mel_complete = reply.is_voice_done and not reply.can_flow

    def mel(self, streams: list[Stream]) -> dict[str, str]:
        """One job of the flow for each: encode a chunk, or one Euler step of it."""
        replies = [stream.replies[0] for stream in streams]
        mels = self.flow.step_rows([reply.flow for reply in replies], self.flow_cache)

        def take(row: int, _: Stream) -> None:
            reply, mel = replies[row], mels[row]
            if self.flow_prompt is not None:
                self.flow_prompt.look_at(reply.flow, self.flow_cache)
            if mel is not None and mel.shape[-1]:
                check(mel, "the flow")
                reply.mels.append(mel)
            self._look_at_flow(reply)

        return each(streams, take)

    def samples(self, streams: list[Stream], now: float) -> dict[str, str]:
        """The oldest waiting mel of each becomes sound."""
        replies = [stream.replies[0] for stream in streams]
        nothing = torch.zeros(1, self.flow.dims.num_mel_bins, 0, device=self.voice.device)
        mels = [reply.mels[0].float() if reply.mels else nothing for reply in replies]
        finals = [reply.is_mel_complete and len(reply.mels) <= 1 for reply in replies]
        made = push_rows(self.vocoder, mels, [reply.vocoder_state for reply in replies], finals, self.fixed)

        def take(row: int, stream: Stream) -> None:
            reply, waveform = replies[row], made[row]
            if isinstance(waveform, Exception):
                raise waveform
            del reply.mels[:1]
            check(waveform, "the vocoder")
            stream.send_audio(reply, to_pcm(waveform).numpy(), now)
            reply.is_vocoded = finals[row]

        return each(streams, take)

    def replay(self, streams: list[Stream], now: float) -> dict[str, str]:
        """The next piece of sentences that were spoken before."""
        return each(streams, lambda _, stream: self._replay(stream, now))

    @staticmethod
    def _replay(stream: Stream, now: float) -> None:
        reply = stream.replies[0]
        if not reply.sequence:
            stream.send_text(reply, reply.forced_text)
        if reply.replay:
            stream.send_audio(reply, reply.replay.pop(0), now)
        if not reply.replay:
            stream.finish_reply(reply)


def step_of(trunk: Backbone, cache: KvCache, config: RuntimeConfig) -> OneRow | None:
    """Decoding in fixed shapes, where that is wanted."""
    if not config.has_fixed_shapes:
        return None
    return DecodeStep(trunk, cache, has_graphs=config.device == "cuda").run


def voice_seed(stream_seed: int, reply: Reply) -> int:
    """A fixed sentence always gets the same dice, so that it sounds the same in each call."""
    return zlib.crc32(f"{reply.forced_text}/{reply.style}".encode()) if reply.is_forced else stream_seed


def to_pcm(waveform: Tensor) -> Tensor:
    """[S] in [-1, 1] → int16, on the CPU."""
    return (waveform.float() * _PCM_SCALE).round().clamp(-_PCM_SCALE, _PCM_SCALE - 1).to(torch.int16).cpu()
