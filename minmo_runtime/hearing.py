"""Jobs of the listening side: the caller's speech through the encoder, and our own (what was heard of a cut turn).

Several calls share one pass; each keeps its segment's encoder state and CTC reading. Which job runs is decided in
scheduler.py; what a segment is, in ear.py. Walk: step 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minmo_runtime import features
from minmo_runtime.conversation import AudioVector
from minmo_runtime.ctc import align_prefix, heard_words
from minmo_runtime.full_context import MAX_SEGMENT_S, Heard, SettledText, SettledVoice, hear, joined, query_rows
from minmo_runtime.model.encoder import EncoderState
from minmo_runtime.model.projector import ProjectorState
from minmo_runtime.rows import StreamFailure, check, each
from minmo_runtime.segment import Segment
from minmo_runtime.stream import Stream, Truncation
from minmo_runtime.text import speak_digits
from minmo_runtime.weights import Checkpoint

_PCM_SCALE = 32768.0
_CHUNKS_PER_ALIGN_JOB = 2
_ALIGN_BEYOND_CUT_S = 0.5  # of our own audio behind the cut: it shows whether the last word was complete
# RMS 8 of 32768 (-72 dBFS): 3 to 30 recognised equally well, 0 clearly worse (nano, 9 sentences).
_DITHER = np.random.default_rng(0).normal(0.0, 8.0, 1 << 16).astype(np.float32)


class Hearing:
    """Owns nothing but references: all state is in the segments and truncations."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.rates = checkpoint.rates
        self.encoder, self.projector = checkpoint.modules.encoder, checkpoint.modules.projector
        self.device, self.dtype = device, dtype

    @property
    def is_full_context(self) -> bool:
        return self.encoder.dims.chunk_frames == 0

    @property
    def chunk_fbank_frames(self) -> int:
        """New fbank frames with which a segment is worth a job."""
        if self.is_full_context:
            return self.rates.encoder_chunk_frames * self.encoder.dims.lfr_n
        return self.encoder.fbank_frames_per_chunk

    def encode(self, streams: list[Stream], now: float) -> dict[str, str]:
        """One encoder chunk of each call's oldest segment; a full-context encoder runs over all of it again."""
        if self.is_full_context:
            return self._encode_whole(streams, now)
        failed = each([s for s in streams if s.ear.segments[0].is_spent], lambda _, stream: self._finish(stream))
        streams = [stream for stream in streams if stream.ear.segments and not stream.ear.segments[0].is_final]
        if not streams:
            return failed
        segments = [stream.ear.segments[0] for stream in streams]
        for segment in segments:
            self._gather(segment)
        chunks = torch.stack([self._next_chunk(segment) for segment in segments])
        states = EncoderState.stack([segment.encoder_state or self.encoder.init_state() for segment in segments])
        hidden, states = self.encoder.forward_chunk(chunks.to(self.device, self.dtype), states)
        scores = self.encoder.ctc_log_probs(hidden)
        log_probs = scores.float().cpu()
        vectors, memories = self._project(segments, hidden, scores)

        def take(row: int, stream: Stream) -> None:
            check(log_probs[row], "the encoder")
            segment = segments[row]
            self._chunk_done(segment)
            segment.encoder_state = states.row(row)
            stream.ear.num_chunks_encoded += 1
            if stream.predicts_itself and not stream.listening.feeds_predictor:
                stream.new_frames.append(hidden[row])
            grown = segment.ctc.push(log_probs[row].numpy())
            text = self._ctc_text(segment.ctc.tokens) if grown else segment.text
            if vectors:
                check(vectors[row], "the input projector")
                segment.audio += [AudioVector(vector) for vector in vectors[row]]
                segment.projector_state = memories[row]
            if caption := stream.ear.take_text(segment, text):
                stream.emit(caption)
            if self.projector is not None and not segment.is_discarded:
                stream.listen(now)

        return failed | each(streams, take)

    def _project(
        self, segments: list[Segment], hidden: Tensor, scores: Tensor
    ) -> tuple[list[Tensor], list[ProjectorState]]:
        """The chunk of each segment as the LLM reads it, where a projector is trained."""
        if self.projector is None:
            return [], []
        states = [segment.projector_state or self.projector.init_state() for segment in segments]
        return self.projector.forward_rows(hidden, states, scores.exp())

    def _finish(self, stream: Stream) -> None:
        """A segment that ended exactly with a chunk that was encoded before: nothing is left to run."""
        segment = stream.ear.segments[0]
        segment.is_final = True
        if caption := stream.ear.take_text(segment, segment.text):
            stream.emit(caption)

    def _encode_whole(self, streams: list[Stream], now: float) -> dict[str, str]:
        """All of each segment so far; its text may change with every run, what two runs agree on goes ahead."""
        segments = [stream.ear.segments[0] for stream in streams]
        for segment in segments:
            self._gather(segment)
        listening = self.checkpoint.listening
        running = [segment for segment in segments if len(segment.pending_features)]
        fbanks = [segment.pending_features.to(self.device, self.dtype) for segment in running]
        rows = query_rows(listening.language, listening.has_itn)
        made = hear(self.encoder, fbanks, rows) if running else []
        heard = {id(segment): one for segment, one in zip(running, made, strict=True)}

        def take(row: int, stream: Stream) -> None:
            self._take_whole(stream, segments[row], heard.get(id(segments[row])))
            if self.projector is not None and not segments[row].is_discarded:
                stream.listen(now)

        return each(streams, take)

    def _take_whole(self, stream: Stream, segment: Segment, heard: Heard | None) -> None:
        if segment.settled is None:
            segment.settled = SettledText()
        text = segment.settled.kept
        if heard is not None:
            check(torch.from_numpy(heard.log_probs), "the encoder")
            segment.ctc = self.checkpoint.captions.new()
            segment.ctc.push(heard.log_probs)
            tokens = segment.ctc.tokens
            ahead = segment.settled.push(tokens)
            if self.projector is not None:
                self._project_whole(segment, heard)
            elif not segment.is_overlap and not segment.is_discarded:
                stream.expect_user_turn(joined(text, self._ctc_text(tokens if segment.is_closed else ahead)))
            text = joined(text, self._ctc_text(tokens))
            if self._is_too_long(segment):
                segment.settled = SettledText(kept=text)
                segment.pending_features = segment.pending_features[:0]
        segment.is_final = segment.is_closed
        before, whole = segment.num_frames_encoded, self.chunk_fbank_frames
        segment.num_frames_encoded = features.num_frames(segment.num_samples)
        after = segment.num_frames_encoded + (whole - 1 if segment.is_closed else 0)
        stream.ear.num_chunks_encoded += after // whole - before // whole
        if caption := stream.ear.take_text(segment, text):
            stream.emit(caption)

    def _project_whole(self, segment: Segment, heard: Heard) -> None:
        """A run over all of it changes every frame: the LLM reads what two runs agree on."""
        assert self.projector is not None
        posteriors = torch.from_numpy(heard.log_probs).to(heard.hidden).exp()
        vectors = self.projector(heard.hidden[None], posteriors[None])[0]
        check(vectors, "the input projector")
        if segment.settled_voice is None:
            segment.settled_voice = SettledVoice()
        is_last = segment.is_closed or self._is_too_long(segment)
        segment.audio = segment.settled_voice.push(vectors, is_last)
        if is_last:
            segment.settled_voice = SettledVoice(kept=segment.audio)

    @staticmethod
    def _is_too_long(segment: Segment) -> bool:
        return len(segment.pending_features) > MAX_SEGMENT_S * features.FRAMES_PER_S

    def _gather(self, segment: Segment) -> None:
        """Everything that waits as samples becomes features that wait."""
        if segment.fbank is None:
            segment.ctc = self.checkpoint.captions.new()
            segment.fbank = features.FbankStream(self.encoder.dims.num_mel_bins)
            segment.pending_features = torch.zeros(0, self.encoder.dims.num_mel_bins)
        pcm = segment.take_pcm()
        waveform = to_waveform(pcm, segment.num_samples - len(pcm))
        segment.pending_features = torch.cat([segment.pending_features, segment.fbank.push(waveform)])

    def _next_chunk(self, segment: Segment) -> Tensor:
        """[chunk frames, M]; the end of a closed segment is filled with its last frame."""
        wanted = self.chunk_fbank_frames
        chunk: Tensor = segment.pending_features[:wanted]
        if len(chunk) < wanted:
            last = chunk[-1:] if len(chunk) else torch.zeros(1, chunk.shape[1])
            chunk = torch.cat([chunk, last.expand(wanted - len(chunk), -1)])
        return chunk

    def _chunk_done(self, segment: Segment) -> None:
        wanted = self.chunk_fbank_frames
        segment.num_frames_encoded += min(wanted, len(segment.pending_features))
        segment.pending_features = segment.pending_features[wanted:]
        if segment.is_closed and not len(segment.pending_features):
            segment.is_final = True

    def _ctc_text(self, tokens: Sequence[int]) -> str:
        return " ".join(self.checkpoint.ctc_tokenizer.decode(list(tokens)).split())

    # ---------------------------------------------------------- what was heard

    def align(self, streams: list[Stream]) -> dict[str, str]:
        """Encode some more of each cut reply's own audio; at its end, find the words that lie before the cut."""
        return each(streams, lambda _, stream: self._align(stream))

    def _align(self, stream: Stream) -> None:
        truncation = stream.truncations[0]
        if self.is_full_context:
            rows = query_rows(self.checkpoint.listening.language)  # words as they are spoken
            fbank = self._own_features(truncation).to(self.device, self.dtype)
            truncation.log_probs.append(hear(self.encoder, [fbank], rows)[0].log_probs)
            stream.finish_truncation(truncation, self.heard_text(truncation))
            return
        if truncation.audio is None:
            truncation.audio = self._own_features(truncation)
            truncation.encoder_state = self.encoder.init_state()
        wanted = self.chunk_fbank_frames
        for _ in range(_CHUNKS_PER_ALIGN_JOB):
            if len(truncation.audio) < wanted:
                break
            chunk = truncation.audio[:wanted].to(self.device, self.dtype)
            hidden, truncation.encoder_state = self.encoder.forward_chunk(chunk[None], truncation.encoder_state)
            truncation.audio = truncation.audio[wanted:]
            truncation.log_probs.append(self.encoder.ctc_log_probs(hidden)[0].float().cpu().numpy())
        if len(truncation.audio) < wanted:
            stream.finish_truncation(truncation, self.heard_text(truncation))

    def _own_features(self, truncation: Truncation) -> Tensor:
        """Features of the played audio and a little beyond, at the encoder's rate; whole chunks (silence fills the
        last)."""
        rate = self.rates.output_sample_rate_hz
        beyond = round(_ALIGN_BEYOND_CUT_S * rate)
        pcm = np.concatenate(truncation.reply.pcm)[: truncation.played_samples + beyond]
        narrow = resample(torch.from_numpy(pcm.astype(np.float32)), rate, features.SAMPLE_RATE_HZ).numpy()
        waveform = to_waveform(narrow)
        frames = features.fbank(
            torch.nn.functional.pad(waveform, (0, features.WINDOW_SAMPLES)), self.encoder.dims.num_mel_bins
        )
        missing = -len(frames) % self.chunk_fbank_frames
        return torch.cat([frames, frames[-1:].expand(missing, -1)])

    def heard_text(self, truncation: Truncation) -> str:
        """The whole words of the reply that end before the cut."""
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
