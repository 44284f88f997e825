"""Runs jobs on the modules: the only place of serving that touches tensors. One method per kind of job, each well
under 25 ms.

A job takes what a stream has waiting, changes that stream, and leaves events in its outbox. Rows of one batch never
see each other: each has its own cache slot, state and dice, and a row that gives NaN ends its own stream only
(`StreamFailure`). Which job runs is not decided here. Walk: steps 8 and 9.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minmo_runtime import features
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.ctc import align_prefix, heard_words
from minmo_runtime.ear import Segment
from minmo_runtime.kv_cache import SlotPool
from minmo_runtime.model.encoder import EncoderState
from minmo_runtime.model.interleave import Phase
from minmo_runtime.number_guide import NumberGuide
from minmo_runtime.reply import Reply, ReplyPhase
from minmo_runtime.scheduler import Job, JobKind
from minmo_runtime.stream import TOOL_CALL, TOOL_CALL_END, TURN_END, Stream, Truncation
from minmo_runtime.text import TextStream, parse_tool_line, speak_digits
from minmo_runtime.weights import Checkpoint

_PCM_SCALE = 32768.0
_CHUNKS_PER_ALIGN_JOB = 2
_ALIGN_BEYOND_CUT_S = 0.5  # of our own audio behind the cut: it shows whether the last word was complete
# RMS 8 of 32768 (-72 dBFS): 3 to 30 recognised equally well, 0 clearly worse (nano, 9 sentences).
_DITHER = np.random.default_rng(0).normal(0.0, 8.0, 1 << 16).astype(np.float32)


class StreamFailure(Exception):
    """This stream cannot go on; the others can."""


class Runner:
    """Owns the modules and both caches. `pool` hands out slots: one number is a stream's row in both caches."""

    def __init__(self, checkpoint: Checkpoint, config: RuntimeConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.rates = checkpoint.rates
        modules = checkpoint.modules
        self.encoder, self.llm, self.voice_lm = modules.encoder, modules.llm, modules.voice_lm
        self.flow, self.vocoder = modules.flow, modules.vocoder
        self.output_projector = modules.output_projector
        self.llm.fuse()
        self.voice_lm.trunk.fuse()
        tokenizer = checkpoint.text_tokenizer
        self.number_guide = NumberGuide(tokenizer)
        self.turn_end = tokenizer.special(TURN_END)
        self.tool_call, self.tool_call_end = tokenizer.special(TOOL_CALL), tokenizer.special(TOOL_CALL_END)
        length = config.max_context_tokens + 2 * config.max_reply_tokens
        self.llm_cache = self.llm.new_cache(config.max_streams, length)
        voice_length = config.max_voice_tokens + 2 * config.max_reply_tokens + config.max_context_tokens
        self.voice_cache = self.voice_lm.new_cache(config.max_streams, voice_length)
        self.pool = SlotPool(self.llm_cache)
        self.voice = checkpoint.default_voice()
        self._bans = self._make_bans()

    @property
    def chunk_fbank_frames(self) -> int:
        return self.encoder.fbank_frames_per_chunk

    def _make_bans(self) -> dict[bool, Tensor]:
        """What may never be drawn, outside (False) and inside (True) of a tool call: special tokens but the ones that
        fit."""
        bans = {}
        for is_inside in (False, True):
            mask = torch.zeros(self.llm.dims.vocab_size)
            mask[list(self.checkpoint.text_tokenizer.special_ids)] = -torch.inf
            mask[self.checkpoint.text_tokenizer.vocab_size :] = -torch.inf
            mask[[self.tool_call_end] if is_inside else [self.turn_end, self.tool_call]] = 0.0
            bans[is_inside] = mask
        return bans

    @torch.inference_mode()
    def run(self, job: Job, now: float) -> dict[str, str]:
        """Run one job. Returns call id → reason for each stream that failed in it."""
        streams = list(job.streams)
        try:
            match job.kind:
                case JobKind.ENCODE:
                    return self._encode(streams)
                case JobKind.DECODE:
                    return self._decode(streams)
                case JobKind.VOICE:
                    return self._voice(streams)
                case JobKind.PREFILL:
                    self._prefill(streams[0])
                case JobKind.FLOW:
                    self._flow(streams[0])
                case JobKind.VOCODE:
                    self._vocode(streams[0], now)
                case JobKind.REPLAY:
                    self._replay(streams[0], now)
                case JobKind.ALIGN:
                    self._align(streams[0])
                case JobKind.FINISH:
                    streams[0].finish_reply(streams[0].replies[0])
        except StreamFailure as failure:
            return {streams[0].call_id: str(failure)}
        return {}

    # ---------------------------------------------------------------- listening

    def _encode(self, streams: list[Stream]) -> dict[str, str]:
        """One encoder chunk of each call's oldest segment."""
        segments = [stream.ear.segments[0] for stream in streams]
        chunks = torch.stack([self._next_features(segment) for segment in segments])
        states = EncoderState.stack([segment.encoder_state or self.encoder.init_state() for segment in segments])
        hidden, states = self.encoder.forward_chunk(chunks, states)
        log_probs = self.encoder.ctc_log_probs(hidden)
        is_good = torch.isfinite(log_probs).flatten(1).all(dim=1).tolist()
        scores = log_probs.numpy()
        failed = {}
        for row, (stream, segment) in enumerate(zip(streams, segments, strict=True)):
            if not is_good[row]:
                failed[stream.call_id] = "the encoder gave NaN"
                continue
            segment.encoder_state = states.row(row)
            grown = segment.ctc.push(scores[row])
            text = self._ctc_text(segment.ctc.tokens) if grown else segment.text
            if caption := stream.ear.take_text(segment, text):
                stream.emit(caption)
        return failed

    def _next_features(self, segment: Segment) -> Tensor:
        """[chunk frames, M]; the end of a closed segment is filled with its last frame."""
        if segment.fbank is None:
            segment.ctc = self.checkpoint.captions.new()
            segment.fbank = features.FbankStream(self.encoder.dims.num_mel_bins)
            segment.pending_features = torch.zeros(0, self.encoder.dims.num_mel_bins)
        pcm = segment.take_pcm()
        waveform = to_waveform(pcm, segment.num_samples - len(pcm))
        waiting = torch.cat([segment.pending_features, segment.fbank.push(waveform)])
        wanted = self.chunk_fbank_frames
        chunk, segment.pending_features = waiting[:wanted], waiting[wanted:]
        segment.num_frames_encoded += len(chunk)
        if segment.is_closed and not len(segment.pending_features):
            segment.is_final = True
        if len(chunk) < wanted:
            last = chunk[-1:] if len(chunk) else torch.zeros(1, chunk.shape[1])
            chunk = torch.cat([chunk, last.expand(wanted - len(chunk), -1)])
        return chunk

    def _ctc_text(self, tokens: Sequence[int]) -> str:
        return " ".join(self.checkpoint.ctc_tokenizer.decode(list(tokens)).split())

    # --------------------------------------------------------------------- text

    def _prefill(self, stream: Stream) -> None:
        """The next positions of the context, at most `prefill_chunk_tokens`."""
        conversation, reply = stream.conversation, stream.head
        if reply is not None and not conversation.opening:
            conversation.retarget("assistant")
        keep = conversation.common_prefix()
        if reply is not None and reply.wants_query:
            keep = min(keep, conversation.user_span[0])
            reply.wants_query = False
        self.llm_cache.truncate(stream.slot, keep)
        conversation.cut(keep)
        ids = list(conversation.waiting_ids())[: self.config.prefill_chunk_tokens]
        hidden = self.llm(torch.tensor([ids]), cache=self.llm_cache, slots=[stream.slot], num_new=[len(ids)])[0]
        _check(hidden, "the LLM's prefill")
        if reply is not None and self.output_projector is not None and not reply.is_forced and reply.voice is None:
            begin, end = (position - keep for position in conversation.user_span)
            inside = slice(max(0, begin), max(0, min(len(ids), end)))
            reply.query_hidden += list(hidden[inside])
            reply.query_embedding += list(self.llm.embed(torch.tensor(ids[inside], dtype=torch.long)))
        conversation.cached_ids += ids
        if reply is not None and conversation.is_current():
            reply.hidden = hidden[-1]
            reply.become(ReplyPhase.DECODING)

    def _decode(self, streams: list[Stream]) -> dict[str, str]:
        """Draw (or, for a Say, take) one text token per call and, unless it ends the text, feed it back."""
        replies = [stream.replies[0] for stream in streams]
        tokens = self._draw(replies)
        feeding: list[tuple[Stream, int]] = []
        failed = {}
        for stream, reply, token in zip(streams, replies, tokens, strict=True):
            if token is None:
                failed[stream.call_id] = "the LLM gave NaN"
                continue
            self._take_token(stream, reply, token)
            if reply.phase is ReplyPhase.DECODING and reply.hidden is not None:
                feeding.append((stream, token))
        if feeding:
            slots = [stream.slot for stream, _ in feeding]
            ids = torch.tensor([[token] for _, token in feeding])
            hidden = self.llm(ids, cache=self.llm_cache, slots=slots)[:, 0]
            for row, (stream, token) in enumerate(feeding):
                stream.conversation.cached_ids.append(token)
                stream.replies[0].hidden = hidden[row]
        return failed

    def _draw(self, replies: list[Reply]) -> list[int | None]:
        """The most likely allowed token of each row; None where the scores are not numbers."""
        tokens: list[int | None] = []
        drawing = [reply for reply in replies if not reply.is_forced]
        scores = self.llm.logits(torch.stack([reply.hidden for reply in drawing])) if drawing else None
        for reply in replies:
            if reply.is_forced:
                is_over = reply.num_drawn >= len(reply.forced_ids)
                tokens.append(self.turn_end if is_over else reply.forced_ids[reply.num_drawn])
                continue
            assert scores is not None
            row = scores[drawing.index(reply)]
            if not bool(torch.isfinite(row).all()):
                tokens.append(None)
            elif reply.num_drawn >= self.config.max_reply_tokens:
                tokens.append(self.turn_end if reply.tool_ids is None else self.tool_call_end)
            else:
                row = row + self._bans[reply.tool_ids is not None]
                if reply.tool_ids is not None:
                    row = self.number_guide.close(row, reply.tool_ids, reply.known_numbers)
                tokens.append(int(row.argmax()))
        return tokens

    def _take_token(self, stream: Stream, reply: Reply, token: int) -> None:
        if reply.is_forced and reply.num_drawn == 0:
            stream.send_text(reply, reply.forced_text)
        reply.num_drawn += 1
        if token == self.turn_end:
            self._end_text(stream, reply)
        elif token == self.tool_call:
            reply.tool_ids = []
            reply.known_numbers = self.number_guide.numbers(stream.conversation.target_ids)
        elif token == self.tool_call_end:
            self._end_tool_call(stream, reply)
        elif reply.tool_ids is not None:
            reply.tool_ids.append(token)
        else:
            self._speak_token(stream, reply, token)

    def _speak_token(self, stream: Stream, reply: Reply, token: int) -> None:
        """A spoken token: its text goes out, its semantic vector to the voice LM."""
        if not reply.is_forced:
            if reply.text_stream is None:
                reply.text_stream = TextStream(self.checkpoint.text_tokenizer)
            stream.send_text(reply, reply.text_stream.push(token))
        if reply.voice is None:
            self._begin_voice(stream, reply)
        ids = torch.tensor([token])
        vector = self.voice_lm.text_vectors(ids)
        if self.output_projector is not None:
            vector = self.output_projector(reply.hidden[None], self.llm.embed(ids), vector)
        reply.voice.push(vector)
        reply.is_voice_waiting = False

    def _end_text(self, stream: Stream, reply: Reply) -> None:
        if reply.text_stream is not None:
            stream.send_text(reply, reply.text_stream.finish())
        if reply.voice is not None:
            reply.voice.finish()
            reply.is_voice_waiting = False
        reply.become(ReplyPhase.SPEAKING)

    def _end_tool_call(self, stream: Stream, reply: Reply) -> None:
        """Ask for the tool. Behind spoken text it is the turn's last word (a goodbye, then hang_up): nothing
        follows."""
        line = " ".join(self.checkpoint.text_tokenizer.decode(reply.tool_ids or []).split())
        reply.tool_ids = None
        try:
            name, arguments = parse_tool_line(line)
        except ValueError:
            name, arguments = line, {}  # the agent knows no such tool and says so to the model
        body = f"{TOOL_CALL}{line}{TOOL_CALL_END}"
        if reply.text:
            reply.tool_line = body
            stream.request_tool(reply, name, arguments)
            self._end_text(stream, reply)
        else:
            stream.conversation.add("assistant", body)
            stream.request_tool(reply, name, arguments)
            reply.become(ReplyPhase.TOOL)

    # -------------------------------------------------------------------- sound

    def _begin_voice(self, stream: Stream, reply: Reply) -> None:
        self.voice_cache.reset(stream.slot)
        query = None
        if self.output_projector is not None and reply.query_hidden:
            last = slice(-self.output_projector.dims.max_query, None)  # 0 = all of it
            hidden, embedding = torch.stack(reply.query_hidden[last]), torch.stack(reply.query_embedding[last])
            query = self.output_projector.query(hidden, embedding)
        # A fixed sentence always gets the same dice, so that it sounds the same in each call.
        seed = zlib.crc32(f"{reply.forced_text}/{reply.style}".encode()) if reply.is_forced else stream.seed
        dims = self.voice_lm.dims
        reply.voice = self.voice_lm.new_stream(stream.slot, seed, dims.rules(), dims.sampling(), query)
        reply.flow = self.flow.new_state(self.voice)
        reply.vocoder_state = self.vocoder.new_state()

    def _voice(self, streams: list[Stream]) -> dict[str, str]:
        """One voice token per call."""
        replies = [stream.replies[0] for stream in streams]
        tokens = self.voice_lm.decode_step([reply.voice for reply in replies], self.voice_cache)
        failed = {}
        for stream, reply, token in zip(streams, replies, tokens, strict=True):
            if reply.voice.is_failed:
                failed[stream.call_id] = "the voice LM gave NaN"
                continue
            if len(reply.voice.turn.voice_tokens) >= self.config.max_voice_tokens:
                reply.voice.turn.abandon()
            reply.is_voice_done = reply.voice.turn.phase is Phase.DONE
            reply.is_voice_waiting = token is None and not reply.is_voice_done
            self.flow.push(reply.flow, [] if token is None else [token], is_final=reply.is_voice_done)
            self._look_at_flow(reply)
        return failed

    def _look_at_flow(self, reply: Reply) -> None:
        reply.can_flow = self.flow.can_step(reply.flow)
        reply.is_mel_complete = reply.is_voice_done and not reply.can_flow

    def _flow(self, stream: Stream) -> None:
        """One job of the flow: encode a chunk, or one Euler step of it."""
        reply = stream.replies[0]
        mel = self.flow.step(reply.flow)
        if mel is not None and mel.shape[-1]:
            _check(mel, "the flow")
            reply.mels.append(mel)
        self._look_at_flow(reply)

    def _vocode(self, stream: Stream, now: float) -> None:
        reply = stream.replies[0]
        if reply.mels:
            mel = reply.mels.pop(0)
        else:
            mel = torch.zeros(1, self.flow.dims.num_mel_bins, 0)
        is_final = reply.is_mel_complete and not reply.mels
        samples = self.vocoder.push(mel, reply.vocoder_state, is_final)[0]
        _check(samples, "the vocoder")
        pcm = (samples * _PCM_SCALE).round().clamp(-_PCM_SCALE, _PCM_SCALE - 1).to(torch.int16).numpy()
        stream.send_audio(reply, pcm, now)
        reply.is_vocoded = is_final

    def _replay(self, stream: Stream, now: float) -> None:
        """The next piece of a sentence that was spoken before."""
        reply = stream.replies[0]
        if not reply.sequence:
            stream.send_text(reply, reply.forced_text)
        if reply.replay:
            stream.send_audio(reply, reply.replay.pop(0), now)
        if not reply.replay:
            stream.finish_reply(reply)

    # ---------------------------------------------------------- what was heard

    def _align(self, stream: Stream) -> None:
        """Encode some more of the cut reply's own audio; at its end, find the words that lie before the cut."""
        truncation = stream.truncations[0]
        if truncation.audio is None:
            truncation.audio = self._own_features(truncation)
            truncation.encoder_state = self.encoder.init_state()
        wanted = self.chunk_fbank_frames
        for _ in range(_CHUNKS_PER_ALIGN_JOB):
            if len(truncation.audio) < wanted:
                break
            chunk, truncation.audio = truncation.audio[:wanted], truncation.audio[wanted:]
            hidden, truncation.encoder_state = self.encoder.forward_chunk(chunk[None], truncation.encoder_state)
            truncation.log_probs.append(self.encoder.ctc_log_probs(hidden)[0].numpy())
        if len(truncation.audio) < wanted:
            stream.finish_truncation(truncation, self._heard_text(truncation))

    def _own_features(self, truncation: Truncation) -> Tensor:
        """Features of the played audio and a little beyond, at the encoder's rate; whole chunks (silence fills the
        last)."""
        rate = self.rates.output_sample_rate_hz
        beyond = round(_ALIGN_BEYOND_CUT_S * rate)
        pcm = np.concatenate(truncation.reply.pcm)[: truncation.played_samples + beyond]
        waveform = resample(torch.from_numpy(pcm.astype(np.float32)), rate, features.SAMPLE_RATE_HZ).numpy()
        waveform = to_waveform(waveform)
        frames = features.fbank(
            torch.nn.functional.pad(waveform, (0, features.WINDOW_SAMPLES)), self.encoder.dims.num_mel_bins
        )
        missing = -len(frames) % self.chunk_fbank_frames
        return torch.cat([frames, frames[-1:].expand(missing, -1)])

    def _heard_text(self, truncation: Truncation) -> str:
        reply = truncation.reply
        words = reply.text.split()
        encode = self.checkpoint.ctc_tokenizer.encode
        tokens = [encode(_letters(speak_digits(word.lower()))).ids if _letters(word) else [] for word in words]
        log_probs = np.concatenate(truncation.log_probs) if truncation.log_probs else np.zeros((0, 1))
        if not np.isfinite(log_probs).all():
            raise StreamFailure("the encoder gave NaN on our own audio")
        ends = align_prefix(log_probs, [token for word in tokens for token in word])
        seconds = truncation.played_samples / self.rates.output_sample_rate_hz
        played_frames = seconds * features.SAMPLE_RATE_HZ / self.rates.encoder_frame_samples
        return first_words(reply.text, heard_words(tokens, ends, played_frames, len(log_probs)))


def first_words(text: str, count: int) -> str:
    """The first `count` words, as they stand in `text`."""
    words = text.split()[:count]
    end = 0
    for word in words:
        end = text.index(word, end) + len(word)
    return text[:end].strip()


def to_waveform(pcm: NDArray[np.number], first_sample: int = 0) -> Tensor:
    """16 kHz samples on the int16 scale → waveform for the encoder, with dither (Kaldi's word for a little noise).

    Digital silence, which no training clip and no real line has, would stand at the floor of the log: with it the
    encoder loses and doubles words at the edges of speech. The noise is read from a table by sample index: the same
    for any chunks.
    """
    index = np.arange(first_sample, first_sample + len(pcm)) % len(_DITHER)
    return torch.from_numpy((pcm + _DITHER[index]).astype(np.float32) / np.float32(_PCM_SCALE))


def resample(waveform: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """A whole waveform [S] at another rate, by its spectrum (offline; the two ends are faded into each other
    slightly)."""
    if from_hz == to_hz:
        return waveform
    length = len(waveform) * to_hz // from_hz
    spectrum = torch.fft.rfft(waveform)
    return torch.fft.irfft(spectrum[: length // 2 + 1], n=length) * (length / len(waveform))


def _letters(text: str) -> str:
    """Without punctuation: the CTC pieces have none."""
    return " ".join("".join(c if c.isalnum() or c in "' " else " " for c in text).split())


def _check(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise StreamFailure(f"{what} gave NaN")
