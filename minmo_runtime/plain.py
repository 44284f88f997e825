"""The plain twin of the engine: one turn of one call, each module in its offline form, one after the other.

No cache, no batch, no slots, no chunks, no clock: every step reads everything again. It is what the engine must give,
token for token and sample for sample, whoever shares its batches (tests/minmo_runtime/test_engine_plain.py), and it is
read before runner.py. Tools are left out: a turn ends where it would call one. Walk: steps 8 and 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minmo_runtime import features
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.conversation import AudioVector, Conversation, Message, Position
from minmo_runtime.hearing import to_waveform
from minmo_runtime.model.interleave import Row, VoiceTurn
from minmo_runtime.model.vocoder import push_rows
from minmo_runtime.prefill import input_vectors
from minmo_runtime.reply import Reply, ReplyPhase
from minmo_runtime.runner import make_bans
from minmo_runtime.sampling import draw_with, ras_sample
from minmo_runtime.sound import to_pcm, voice_seed
from minmo_runtime.stream import TOOL_CALL, TURN_END, plain
from minmo_runtime.weights import Checkpoint


@dataclass(frozen=True)
class PlainReply:
    text: str
    voice_tokens: list[int]
    pcm: NDArray[np.int16]


@torch.inference_mode()
def answer(
    checkpoint: Checkpoint, messages: Sequence[tuple[str, str] | Message], seed: int, config: RuntimeConfig
) -> PlainReply:
    """What the agent says after these messages, the last one the caller's."""
    conversation = _conversation(checkpoint, messages, config)
    ids = list(conversation.target_ids)
    tokenizer, llm = checkpoint.text_tokenizer, checkpoint.modules.llm
    bans = make_bans(checkpoint)[0]
    ends = (tokenizer.special(TURN_END), tokenizer.special(TOOL_CALL))
    hidden = llm(embeds=input_vectors(llm, [ids]))[0]
    first, last = conversation.user_span
    query = _query(checkpoint, hidden[first:last], ids[first:last])
    spoken: list[int] = []
    vectors: list[Tensor] = []
    while len(spoken) < config.max_reply_tokens:
        token = int((llm.logits(hidden[-1]) + bans).argmax())
        if token in ends:
            break
        spoken.append(token)
        vectors.append(_semantic(checkpoint, hidden[-1], token))
        ids.append(token)
        hidden = llm(embeds=input_vectors(llm, [ids]))[0]
    return _speak(checkpoint, tokenizer.decode(spoken), vectors, query, seed, config)


@torch.inference_mode()
def say(
    checkpoint: Checkpoint, messages: Sequence[tuple[str, str] | Message], text: str, config: RuntimeConfig
) -> PlainReply:
    """A fixed sentence behind these messages."""
    forced = checkpoint.text_tokenizer.encode(plain(text))
    ids = list(_conversation(checkpoint, messages, config).target_ids)
    llm = checkpoint.modules.llm
    hidden = llm(embeds=input_vectors(llm, [[*ids, *forced]]))[0]
    vectors = [_semantic(checkpoint, hidden[len(ids) - 1 + i], token) for i, token in enumerate(forced)]
    seed = voice_seed(0, Reply("", ReplyPhase.DECODING, forced_text=text, is_forced=True))
    return _speak(checkpoint, text, vectors, None, seed, config)


@torch.inference_mode()
def hear(checkpoint: Checkpoint, pcm: NDArray[np.int16]) -> str:
    """The words of one segment of caller speech, 16 kHz."""
    reading = checkpoint.captions.new()
    reading.push(checkpoint.modules.encoder.ctc_log_probs(_frames(checkpoint, pcm))[0].numpy())
    return " ".join(checkpoint.ctc_tokenizer.decode(list(reading.tokens)).split())


@torch.inference_mode()
def hear_audio(checkpoint: Checkpoint, pcm: NDArray[np.int16]) -> list[AudioVector]:
    """The same segment as a trained projector gives it to the LLM."""
    encoder, projector = checkpoint.modules.encoder, checkpoint.modules.projector
    assert projector is not None, "no input projector in this checkpoint"
    frames = _frames(checkpoint, pcm)
    return [AudioVector(vector) for vector in projector(frames, encoder.ctc_log_probs(frames).exp())[0]]


def _frames(checkpoint: Checkpoint, pcm: NDArray[np.int16]) -> Tensor:
    """[1, T, D]: the whole segment through the encoder, its last chunk filled with its last frame."""
    encoder = checkpoint.modules.encoder
    frames = features.fbank(to_waveform(pcm), encoder.dims.num_mel_bins)
    missing = -len(frames) % encoder.fbank_frames_per_chunk
    return encoder(torch.cat([frames, frames[-1:].expand(missing, -1)])[None])


def _conversation(
    checkpoint: Checkpoint, messages: Sequence[tuple[str, str] | Message], config: RuntimeConfig
) -> Conversation:
    conversation = Conversation(checkpoint.text_tokenizer, config.max_context_tokens)
    for given in messages:
        message = given if isinstance(given, Message) else Message(*given)
        conversation.add(message.role, plain(message.text), message.audio)
    conversation.retarget("assistant")
    return conversation


def _semantic(checkpoint: Checkpoint, hidden: Tensor, token: int) -> Tensor:
    """[D] for the voice LM: the token, and the hidden state that sampled it."""
    ids, modules = torch.tensor([token]), checkpoint.modules
    rows = modules.voice_lm.text_vectors(ids)
    if modules.output_projector is None:
        return rows[0]
    return modules.output_projector(hidden[None], modules.llm.embed(ids), rows)[0]


def _query(checkpoint: Checkpoint, hidden: Tensor, ids: list[Position]) -> Tensor | None:
    """The caller's turn in front of the reply."""
    projector = checkpoint.modules.output_projector
    if projector is None or not ids:
        return None
    return projector.query(hidden, input_vectors(checkpoint.modules.llm, [ids])[0])


def _speak(
    checkpoint: Checkpoint,
    text: str,
    vectors: list[Tensor],
    query: Tensor | None,
    seed: int,
    config: RuntimeConfig,
) -> PlainReply:
    """Semantic vectors → voice tokens → mel → samples."""
    modules = checkpoint.modules
    if not vectors:
        return PlainReply(text, [], np.zeros(0, np.int16))
    tokens = _voice_tokens(checkpoint, vectors, query, seed, config)
    if not tokens:
        return PlainReply(text, [], np.zeros(0, np.int16))
    mel = modules.flow(torch.tensor([tokens]), checkpoint.default_voice())
    (waveform,) = push_rows(modules.vocoder, [mel], [modules.vocoder.new_state()], [True])
    if isinstance(waveform, Exception):
        raise waveform
    return PlainReply(text, tokens, to_pcm(waveform).numpy())


def _voice_tokens(
    checkpoint: Checkpoint, vectors: list[Tensor], query: Tensor | None, seed: int, config: RuntimeConfig
) -> list[int]:
    voice_lm = checkpoint.modules.voice_lm
    draw, sampling = draw_with(np.random.default_rng(seed)), voice_lm.dims.sampling()
    turn = VoiceTurn(voice_lm.dims.rules(), num_query=0 if query is None else len(query))
    turn.push_text(len(vectors))
    turn.finish_text()
    rows: list[Row] = []
    while len(turn.voice_tokens) < config.max_voice_tokens and (new := turn.next_rows()):
        rows += new
        scores = voice_lm(voice_lm.embed_rows(rows, vectors, query)[None])[0, -1].numpy()
        turn.accept(ras_sample(scores, turn.decoded, sampling, draw, turn.banned))
    return turn.voice_tokens
