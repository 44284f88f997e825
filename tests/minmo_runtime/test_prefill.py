"""What the LLM reads is read once: beginnings that calls share, turns fed ahead of their end, rollbacks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from minmo_runtime import plain
from minmo_runtime.api import (
    CancelReply,
    CloseStream,
    ContextReused,
    OpenStream,
    PushText,
    ReplyFinished,
    Say,
    StartReply,
)
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.kv_cache import PrefixStore
from minmo_runtime.model.backbone import KvCache
from minmo_runtime.model.dims import BackboneDims
from minmo_runtime.prefill import Prefill
from minmo_runtime.random_checkpoint import write_random_checkpoint
from minmo_runtime.reply import ReplyPhase
from minmo_runtime.weights import Checkpoint, load_checkpoint
from tests.minmo_runtime.test_engine_plain import Room

CONFIG = RuntimeConfig(max_streams=3, max_reply_tokens=8, max_voice_tokens=50, sound_rows=3)
SYSTEM = "you are mia at north star. you speak calmly."
GREETING = "hello. you speak with a machine."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


def prefill_of(room: Room) -> Prefill:
    return room.engine.runner.prefill


def call(room: Room, call_id: str, system: str = SYSTEM, question: str = "hello", seed: int = 1) -> int:
    """One call with the greeting and one question; returns how many positions the LLM was fed for it."""
    before = prefill_of(room).num_positions
    room.send(OpenStream(call_id=call_id, system_prompt=system, seed=seed))
    room.send(Say(call_id=call_id, turn_id="g", text=GREETING))
    room.run()
    room.send(PushText(call_id=call_id, text=question), StartReply(call_id=call_id, turn_id="r"))
    room.run()
    return prefill_of(room).num_positions - before


def until_decoding(room: Room) -> None:
    stream = room.engine.streams["c"]
    while not stream.replies or stream.replies[0].phase in (ReplyPhase.LISTENING, ReplyPhase.PREFILL):
        assert room.step()


def length(checkpoint: Checkpoint, text: str) -> int:
    return len(checkpoint.text_tokenizer.encode(text))


def test_a_second_call_of_the_campaign_is_not_fed_its_beginning_and_speaks_as_its_plain_twin(
    checkpoint: Checkpoint,
) -> None:
    alone, room = Room(checkpoint, dataclasses.replace(CONFIG, max_shared_prefixes=0)), Room(checkpoint, CONFIG)
    for one in (alone, room):
        call(one, "a")
    assert not prefill_of(alone).prefixes.prefixes and prefill_of(room).prefixes.num_hits == 0
    fed_alone, fed = (call(one, "b", question="good morning", seed=2) for one in (alone, room))
    shared = max(len(prefix.ids) for prefix in prefill_of(room).prefixes.prefixes)
    assert shared > length(checkpoint, SYSTEM) + length(checkpoint, GREETING)
    assert fed_alone - fed == shared == prefill_of(room).prefixes.num_positions_saved
    told = room.of(ContextReused, "b")
    assert {event.source for event in told} == {"prefix"} and sum(event.num_positions for event in told) == shared
    assert not room.of(ContextReused, "a")
    messages = [("system", SYSTEM), ("assistant", GREETING), ("user", "good morning")]
    room.events = [e for e in room.events if not (isinstance(e, ReplyFinished) and e.turn_id == "g")]
    wanted = plain.answer(checkpoint, messages, 2, CONFIG)
    (finished,) = room.of(ReplyFinished, "b")
    assert finished.text == wanted.text and room.voice_tokens["b"] == wanted.voice_tokens


def test_a_greeting_that_was_said_before_costs_the_llm_nothing(checkpoint: Checkpoint) -> None:
    room = Room(checkpoint, CONFIG)
    call(room, "a")
    before = prefill_of(room).num_positions
    room.send(OpenStream(call_id="b", system_prompt=SYSTEM), Say(call_id="b", turn_id="g", text=GREETING))
    room.run()
    stream = room.engine.streams["b"]
    assert stream.conversation.is_current() and stream.conversation.messages[-1].text == GREETING
    assert prefill_of(room).num_positions == before
    assert room.engine.runner.llm_cache.lengths[stream.slot] == len(stream.conversation.cached_ids)


def test_another_campaign_shares_nothing_with_the_first(checkpoint: Checkpoint) -> None:
    room = Room(checkpoint, CONFIG)
    call(room, "a")
    other = "you are bob at south moon."
    call(room, "b", system=other, question="good morning", seed=2)
    wanted = plain.answer(checkpoint, [("system", other), ("assistant", GREETING), ("user", "good morning")], 2, CONFIG)
    assert room.of(ReplyFinished, "b")[-1].text == wanted.text
    assert prefill_of(room).prefixes.num_hits == 0


def test_the_store_is_bounded_keeps_what_open_calls_use_and_drops_the_longest_unused() -> None:
    cache = KvCache(BackboneDims(16, 1, 2, 1, 24, vocab_size=9, head_dim=8), 4, 12)
    for layer in (*cache.keys, *cache.values):
        layer.copy_(torch.randn(layer.shape))
    store = PrefixStore(cache, 2)
    store.keep(0, [1, 2, 3])
    store.keep(1, [4, 5])
    store.keep(2, [6, 7])  # no room: both are used
    assert [prefix.ids for prefix in store.prefixes] == [[1, 2, 3], [4, 5]]
    size = store.num_bytes
    store.release(0)
    store.keep(2, [6, 7])
    assert [prefix.ids for prefix in store.prefixes] == [[4, 5], [6, 7]] and store.num_bytes < size
    assert store.longest([4, 5, 6], beyond=2, limit=3) is None and store.longest([4], beyond=0, limit=1) is None
    found = store.longest([4, 5, 6], beyond=0, limit=3)
    assert found is not None
    store.copy_into(3, found, start=0)
    assert cache.lengths[3] == 2 and torch.equal(cache.keys[0][3, :, :2], cache.keys[0][1, :, :2])
    cache.reset(1)
    assert found.keys[0].any()  # a copy: the first call may end


def test_a_failed_calls_numbers_do_not_stay_in_a_shared_beginning(checkpoint: Checkpoint) -> None:
    room = Room(checkpoint, CONFIG)
    room.send(OpenStream(call_id="bad", system_prompt=SYSTEM))
    room.engine.runner.llm_cache.values[0][room.engine.streams["bad"].slot] = torch.nan
    room.step()
    room.engine.runner.llm_cache.values[0][:] = 0  # what a freed slot is
    room.send(CloseStream(call_id="bad"))
    assert all(torch.isfinite(t).all() for prefix in prefill_of(room).prefixes.prefixes for t in prefix.values)


@pytest.mark.parametrize("words", [("1 2 3", "1 2 3 4 5"), ("where is it", "where is my order")])
def test_a_turn_taken_back_feeds_only_what_is_new(checkpoint: Checkpoint, words: tuple[str, str]) -> None:
    room = Room(checkpoint, dataclasses.replace(CONFIG, draft_probability=1.0))
    room.send(OpenStream(call_id="c", system_prompt=SYSTEM, seed=1), PushText(call_id="c", text=words[0]))
    room.send(StartReply(call_id="c", turn_id="r"))
    until_decoding(room)
    room.send(CancelReply(call_id="c", turn_id="r", played_samples=0, reason="false_end"))
    fed = prefill_of(room).num_positions
    while room.engine.has_work(room.now):
        room.step()
    room.send(PushText(call_id="c", text=words[1]), StartReply(call_id="c", turn_id="r2"))
    until_decoding(room)
    ending = length(checkpoint, "<|im_end|><|im_start|>assistant\n")
    common = len(words[0]) if words[1].startswith(words[0]) else len("where is ")
    assert prefill_of(room).num_positions - fed <= len(words[1]) - common + ending + 1
    stream = room.engine.streams["c"]
    again = room.engine.runner.llm.new_cache(1, 400)
    with torch.inference_mode():
        hidden = room.engine.runner.llm(torch.tensor([stream.conversation.target_ids]), cache=again)[0, -1]
    torch.testing.assert_close(stream.replies[0].hidden, hidden, atol=1e-4, rtol=1e-4)
