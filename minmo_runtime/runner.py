"""Runs jobs on the modules: the LLM's here, the caller's voice in hearing.py, ours in sound.py.

A job takes what each stream of it has waiting, changes those streams, and leaves events in their outboxes. Rows of one
batch never see each other: each has its own cache slot, state and dice, and a row that fails ends its own stream only
(rows.py). Which job runs is not decided here. Walk: steps 8 and 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minmo_runtime.config import RuntimeConfig
from minmo_runtime.device_streams import DeviceStreams
from minmo_runtime.hearing import Hearing
from minmo_runtime.kv_cache import SlotPool
from minmo_runtime.number_guide import NumberGuide
from minmo_runtime.predictor import Predictor
from minmo_runtime.prefill import Prefill
from minmo_runtime.reply import Reply, ReplyPhase
from minmo_runtime.rows import RunRows, StreamFailure, each, isolated
from minmo_runtime.scheduler import Job, JobKind
from minmo_runtime.serving_form import to_serving_form
from minmo_runtime.sound import Sound, step_of
from minmo_runtime.stream import TOOL_CALL, TOOL_CALL_END, TURN_END, Stream
from minmo_runtime.text import TextStream, parse_tool_line
from minmo_runtime.weights import Checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Runner:
    """Owns the modules and the caches. `pool` hands out slots: one number is a stream's row in all of them."""

    def __init__(self, checkpoint: Checkpoint, config: RuntimeConfig) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.device = torch.device(config.device)
        self.device_streams = DeviceStreams(config.device)
        modules = checkpoint.modules
        for part in modules:  # the vocoder's Fourier transforms want float32
            dtype = torch.float32 if part == "vocoder" else _DTYPES[config.dtype]
            to_serving_form(part, getattr(modules, part).to(self.device, dtype), config.weights)
        self.llm, self.voice_lm, self.output_projector = modules.llm, modules.voice_lm, modules.output_projector
        tokenizer = checkpoint.text_tokenizer
        self.number_guide = NumberGuide(tokenizer)
        self.turn_end = tokenizer.special(TURN_END)
        self.tool_call, self.tool_call_end = tokenizer.special(TOOL_CALL), tokenizer.special(TOOL_CALL_END)
        length = config.max_context_tokens + 2 * config.max_reply_tokens
        # A row per call, behind them their listening branches where the LLM hears voices; the last is the step's spare.
        slots_per_call = 1 if modules.projector is None else 2
        self.llm_cache = self.llm.new_cache(slots_per_call * config.max_streams + 1, length)
        self.pool = SlotPool(self.llm_cache, config.max_streams)
        self.prefill = Prefill(self.llm, self.llm_cache, config, keeps_rows=self.output_projector is not None)
        self._one_row = step_of(self.llm, self.llm_cache, config)
        self.hearing = Hearing(checkpoint, self.device, _DTYPES[config.dtype])
        self.predictor = Predictor(checkpoint, self.device, _DTYPES[config.dtype])
        self.sound = Sound(checkpoint, config, self.device)
        self._bans = make_bans(checkpoint).to(self.device)

    @property
    def chunk_fbank_frames(self) -> int:
        return self.hearing.chunk_fbank_frames

    @property
    def num_cache_bytes(self) -> int:
        """Of all calls together, as allocated: both language models' keys and values, and the flow's window, which is
        made with the first chunk. A call's share is the same whatever it says: nothing is allocated per turn."""
        return self.llm_cache.num_bytes + self.sound.voice_cache.num_bytes + self.sound.flow_cache.num_bytes

    def free(self, slot: int) -> None:
        """The slot's stream has ended."""
        self.pool.give_back(slot)
        self.prefill.free(slot)
        self.sound.free(slot)

    @torch.inference_mode()
    def run(self, job: Job, now: float) -> dict[str, str]:
        """Run one job. Returns call id → reason for each stream that failed in it."""
        hearing, sound = self.hearing, self.sound
        jobs: dict[JobKind, RunRows] = {
            JobKind.ENCODE: lambda streams: hearing.encode(streams, now),
            JobKind.BRANCH: self.prefill.run_branches,
            JobKind.PREDICT: lambda streams: self.predictor.predict(streams, now),
            JobKind.PREFILL: self.prefill.run,
            JobKind.DECODE: self._decode,
            JobKind.VOICE: sound.voice_tokens,
            JobKind.FLOW: sound.mel,
            JobKind.VOCODE: lambda streams: sound.samples(streams, now),
            JobKind.REPLAY: lambda streams: sound.replay(streams, now),
            JobKind.ALIGN: hearing.align,
            JobKind.FINISH: lambda streams: each(streams, lambda _, stream: stream.finish_reply(stream.replies[0])),
        }
        with self.device_streams.of(job.kind):
            return isolated(jobs[job.kind], list(job.streams))

    # --------------------------------------------------------------------- text

    def _decode(self, streams: list[Stream]) -> dict[str, str]:
        """Draw (or, for a Say, take) one text token per call and, unless it ends the text, feed it."""
        replies = [stream.head for stream in streams if stream.head is not None]  # a reply, or a draft of one
        assert len(replies) == len(streams), "decoding without a reply"
        tokens = self._draw(replies)
        ends = (None, self.turn_end, self.tool_call_end)
        feeding = [row for row, token in enumerate(tokens) if token not in ends and replies[row].hidden is not None]
        next_hidden: dict[int, Tensor] = {}
        if feeding:
            ids = torch.tensor([tokens[row] for row in feeding], device=self.device)
            hidden = self.next_hidden(ids, [streams[row].slot for row in feeding])
            next_hidden = dict(zip(feeding, hidden, strict=True))

        def take(row: int, stream: Stream) -> None:
            token = tokens[row]
            if token is None:
                raise StreamFailure("the LLM gave NaN")
            self._take_token(stream, replies[row], token)  # the hidden state that sampled it goes to the voice
            if row in next_hidden:
                stream.conversation.cached_ids.append(token)
                replies[row].hidden = next_hidden[row]

        return each(streams, take)

    def next_hidden(self, ids: Tensor, slots: list[int]) -> Tensor:
        """One more position of each slot: ids [n] → hidden [n, D]."""
        if self._one_row is None:
            return self.llm(ids[:, None], cache=self.llm_cache, slots=slots)[:, 0]
        return self._one_row(self.llm.embed(ids), slots).clone()  # the next step writes over it

    def _draw(self, replies: list[Reply]) -> list[int | None]:
        """The most likely allowed token of each row; None where the scores are not numbers."""
        drawing = [reply for reply in replies if not reply.is_forced]
        best: dict[int, int | None] = {}
        if drawing:
            scores = self.llm.logits(torch.stack([reply.hidden for reply in drawing])).float()
            inside = torch.tensor([int(reply.tool_ids is not None) for reply in drawing], device=self.device)
            is_good = torch.isfinite(scores).all(dim=1).tolist()
            scores = scores + self._bans[inside]
            for row, reply in enumerate(drawing):
                if reply.tool_ids is not None:
                    closed = self.number_guide.close(scores[row].cpu(), reply.tool_ids, reply.known_numbers)
                    scores[row] = closed.to(self.device)
            likely = scores.argmax(dim=1).tolist()
            best = {id(r): token if good else None for r, token, good in zip(drawing, likely, is_good, strict=True)}
        return [self._next_token(reply, best.get(id(reply))) for reply in replies]

    def _next_token(self, reply: Reply, likely: int | None) -> int | None:
        if reply.is_forced:
            return self.turn_end if reply.num_drawn >= len(reply.forced_ids) else reply.forced_ids[reply.num_drawn]
        if likely is not None and reply.num_drawn >= self.config.max_reply_tokens:
            return self.turn_end if reply.tool_ids is None else self.tool_call_end
        return likely

    def _take_token(self, stream: Stream, reply: Reply, token: int) -> None:
        if reply.is_forced and reply.num_drawn == 0:
            stream.send_text(reply, reply.forced_text)
        reply.num_drawn += 1
        if token == self.turn_end:
            self._end_text(stream, reply)
        elif token == self.tool_call:
            reply.tool_ids = []
            reply.known_numbers = self.number_guide.numbers(stream.conversation.text_ids())
        elif token == self.tool_call_end:
            self._end_tool_call(stream, reply)
        elif reply.tool_ids is not None:
            reply.tool_ids.append(token)
        else:
            self._speak_token(stream, reply, token)

    def _speak_token(self, stream: Stream, reply: Reply, token: int) -> None:
        """A spoken token: its text goes out, its semantic vector to the voice LM."""
        written = reply.forced_text if reply.is_forced and reply.num_drawn == 1 else ""
        if not reply.is_forced:
            if reply.text_stream is None:
                reply.text_stream = TextStream(self.checkpoint.text_tokenizer)
            written = reply.text_stream.push(token)
            stream.send_text(reply, written)
        if self.sound.voice_text is not None:
            self.sound.speak_text(stream, reply, written)
            return
        if reply.voice is None:
            self.sound.begin(stream, reply)
        ids = torch.tensor([token], device=self.device)
        vector = self.voice_lm.text_vectors(ids)
        if self.output_projector is not None:
            vector = self.output_projector(reply.hidden[None], self.llm.embed(ids), vector)
        reply.voice.push(vector)
        reply.is_voice_waiting = False

    def _end_text(self, stream: Stream, reply: Reply) -> None:
        rest = reply.text_stream.finish() if reply.text_stream is not None else ""
        stream.send_text(reply, rest)
        if self.sound.voice_text is not None:
            self.sound.speak_text(stream, reply, rest, is_last=True)
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


def make_bans(checkpoint: Checkpoint) -> Tensor:
    """[2, V], added to the scores: what may never be drawn outside (row 0) and inside (row 1) of a tool call, which is
    every special token but the ones that fit there."""
    tokenizer = checkpoint.text_tokenizer
    bans = torch.zeros(2, checkpoint.modules.llm.dims.vocab_size)
    bans[:, list(tokenizer.special_ids)] = -torch.inf
    bans[:, tokenizer.vocab_size :] = -torch.inf
    for row, allowed in enumerate(((TURN_END, TOOL_CALL), (TOOL_CALL_END,))):
        bans[row, [tokenizer.special(name) for name in allowed]] = 0.0
    return bans
