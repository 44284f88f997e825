"""The flow for many turns at once: each row equals its own offline form, whatever its neighbours do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minmo_runtime.model.fixed_shapes import FixedCalls
from minmo_runtime.model.flow import Flow
from minmo_runtime.model.flow_cache import FlowCache
from minmo_runtime.model.flow_dims import FlowDims
from minmo_runtime.model.flow_prompt import FlowPrompt
from minmo_runtime.model.flow_state import FlowState

FLOW = FlowDims.from_dict(
    {
        "vocab_size": 50,
        "n_timesteps": 2,
        "inference_cfg_rate": 0.0,
        "mean_weight": 1.0,
        "noise_scale": 0.5,
        "left_context_s": 0.4,
        "encoder": {
            "output_size": 32,
            "attention_heads": 2,
            "linear_units": 64,
            "num_blocks": 2,
            "num_up_blocks": 2,
            "static_chunk_size": 5,
        },
        "estimator": {"channels": 32, "attention_head_dim": 8, "num_heads": 2, "n_blocks": 1, "num_mid_blocks": 1},
    }
)
NUM_SLOTS = 4


@pytest.fixture(scope="module")
def flow() -> Flow:
    torch.manual_seed(0)
    return Flow(FLOW).eval()


def turn_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, FLOW.vocab_size, count).tolist()


class Crowd:
    """Turns in one cache; which of the ready ones share a job is drawn at random."""

    def __init__(self, flow: Flow, cache: FlowCache, rng: np.random.Generator) -> None:
        self.flow, self.cache, self.rng = flow, cache, rng
        self.mels: dict[int, list[Tensor]] = {}
        self.states: dict[int, FlowState] = {}
        self.sizes: list[int] = []

    def join(self, slot: int, embedding: Tensor, prompt: list[int] | None = None, mel: Tensor | None = None) -> None:
        self.states[slot] = self.flow.new_state(embedding, prompt, mel, slot=slot)
        self.mels[slot] = []

    def job(self) -> bool:
        ready = [state for state in self.states.values() if self.flow.can_step(state)]
        if not ready:
            return False
        first = ready[int(self.rng.integers(len(ready)))]
        mates = [state for state in ready if (state.chunk is None) == (first.chunk is None) and self.rng.random() < 0.7]
        rows = mates if first in mates else [first, *mates]
        self.sizes.append(len(rows))
        for state, mel in zip(rows, self.flow.step_rows(rows, self.cache), strict=True):
            self.mels[state.slot] += [] if mel is None else [mel]
        return True

    def mel(self, slot: int) -> Tensor:
        return torch.cat(self.mels[slot], dim=-1)


VARIANTS = {
    "two_steps": {},
    "mean_only": {"n_timesteps": 0},
    "guided": {"inference_cfg_rate": 0.7, "mean_weight": 0.0, "noise_scale": 1.0},
    "no_left_context": {"left_context_s": 0.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_join_leave_and_stall_equal_their_offline_form(flow: Flow, variant: str) -> None:
    rng = np.random.default_rng(3)
    flow.dims = replace(FLOW, **VARIANTS[variant])
    try:
        crowd = Crowd(flow, flow.new_cache(NUM_SLOTS, flow.dims.window_chunks(2.0)), rng)
        turns = [(0, 23), (2, 41), (1, 8), (0, 17), (3, 30)]  # slot 0 is used by a second turn when the first has ended
        made, wanted = {}, {}
        for index, (slot, count) in enumerate(turns):
            if slot in crowd.states:
                while crowd.flow.can_step(crowd.states[slot]):
                    crowd.job()
                made[slot, 0] = crowd.mel(slot)
            embedding = torch.from_numpy(rng.standard_normal((1, FLOW.spk_embed_dim)).astype(np.float32))
            tokens = turn_tokens(rng, count)
            wanted[slot, sum(turn[0] == slot for turn in turns[:index])] = flow(torch.tensor([tokens]), embedding)
            crowd.join(slot, embedding)
            for at in range(0, count, 4):
                flow.push(crowd.states[slot], tokens[at : at + 4])
                crowd.job()
            flow.push(crowd.states[slot], [], is_final=True)
        while crowd.job():
            pass
    finally:
        flow.dims = FLOW
    made |= {(slot, int(slot == 0)): crowd.mel(slot) for slot in crowd.states}
    assert max(crowd.sizes) > 1
    assert made.keys() == wanted.keys()
    for key, mel in wanted.items():
        assert made[key].shape == mel.shape and float((made[key] - mel).abs().max()) < 1e-5, key


def test_a_row_with_a_prompt_in_company_equals_its_offline_form(flow: Flow) -> None:
    rng = np.random.default_rng(4)
    prompt, tokens = turn_tokens(rng, 7), turn_tokens(rng, 18)
    prompt_mel, embedding = torch.randn(1, 80, 14), torch.randn(1, FLOW.spk_embed_dim)
    crowd = Crowd(flow, flow.new_cache(NUM_SLOTS, 2, len(prompt)), rng)
    crowd.join(1, embedding, prompt, prompt_mel)
    crowd.join(0, torch.randn(1, FLOW.spk_embed_dim))
    for state, given in ((crowd.states[1], tokens), (crowd.states[0], turn_tokens(rng, 12))):
        flow.push(state, given, is_final=True)
    while crowd.job():
        pass
    whole = flow(torch.tensor([tokens]), embedding, torch.tensor([prompt]), prompt_mel)
    assert float((crowd.mel(1) - whole).abs().max()) < 1e-5


def with_prompt(flow: Flow, cache: FlowCache, num_tokens: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A turn that continues a prompt, one among others: its mel as streamed and as the offline form gives it."""
    prompt, tokens = turn_tokens(rng, 12), turn_tokens(rng, num_tokens)
    prompt_mel, embedding = torch.randn(1, 80, 24), torch.randn(1, FLOW.spk_embed_dim)
    crowd = Crowd(flow, cache, rng)
    crowd.join(1, embedding, prompt, prompt_mel)
    crowd.join(0, torch.randn(1, FLOW.spk_embed_dim))
    for slot, given in ((1, tokens), (0, turn_tokens(rng, 33))):
        flow.push(crowd.states[slot], given, is_final=True)
    while crowd.job():
        pass
    return crowd.mel(1), flow(torch.tensor([tokens]), embedding, torch.tensor([prompt]), prompt_mel)


@pytest.mark.parametrize("variant", ["two_steps", "guided", "no_left_context"])
@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_prompt_stays_in_reach_however_long_the_turn(flow: Flow, variant: str, is_fixed: bool) -> None:
    flow.dims = replace(FLOW, **VARIANTS[variant])
    try:
        cache = flow.new_cache(NUM_SLOTS, flow.dims.window_chunks(2.0), 12)
        assert cache.num_pinned == 3, "12 tokens in chunks of 5"
        cache.fixed = FixedCalls(has_graphs=False) if is_fixed else None
        torch.manual_seed(7)
        made, wanted = with_prompt(flow, cache, 64, np.random.default_rng(7))
        flow.dims = replace(flow.dims, prompt_context_s=0.0)
        torch.manual_seed(7)
        without, _ = with_prompt(
            flow, flow.new_cache(NUM_SLOTS, flow.dims.num_left_chunks), 64, np.random.default_rng(7)
        )
    finally:
        flow.dims = FLOW
    assert float((made - wanted).abs().max()) < 1e-5
    assert float((made - without)[..., -40:].abs().max()) > 1e-3, "the prompt is heard to the end"


def test_a_window_behind_a_prompt_is_exact_for_as_long_as_it_holds_all(flow: Flow) -> None:
    flow.dims = replace(FLOW, left_context_s=-1.0)
    try:
        window = flow.dims.window_chunks(0.4)
        made, wanted = with_prompt(flow, flow.new_cache(NUM_SLOTS, window, 12), 64, np.random.default_rng(8))
    finally:
        flow.dims = FLOW
    error = (made - wanted).abs()
    inside = ((3 + window) * FLOW.chunk_size - 12) * FLOW.frames_per_token  # pinned chunks, the window, less the prompt
    assert float(error[..., :inside].max()) < 1e-5 < float(error[..., inside:].mean())


@pytest.mark.parametrize("num_prompt", [2, 12, 34])
def test_a_prompt_is_run_once_and_later_turns_begin_behind_it(flow: Flow, num_prompt: int) -> None:
    """34 tokens are more than stays in reach; 2 are less than a chunk, and nothing can be kept of them."""
    rng = np.random.default_rng(11)
    flow.dims = replace(FLOW, prompt_context_s=1.0)
    try:
        mel, embedding = torch.randn(1, 80, 2 * num_prompt), torch.randn(1, FLOW.spk_embed_dim)
        prompt = FlowPrompt(flow, turn_tokens(rng, num_prompt), mel, embedding)
        cache = flow.new_cache(NUM_SLOTS, 2, num_prompt)
        num_jobs = []
        for slot in (0, 2, 0):
            tokens = turn_tokens(rng, 31)
            state, mels = prompt.new_state(cache, slot), []
            flow.push(state, tokens, is_final=True)
            num_jobs.append(0)
            while flow.can_step(state):
                mels += [mel for mel in flow.step_rows([state], cache) if mel is not None]
                prompt.look_at(state, cache)
                num_jobs[-1] += 1
            wanted = flow(torch.tensor([tokens]), embedding, torch.tensor([prompt.tokens]), mel)
            assert float((torch.cat(mels, dim=-1) - wanted).abs().max()) < 1e-5
            cache.reset(slot)
    finally:
        flow.dims = FLOW
    saved = (num_prompt - 3) // FLOW.chunk_size * 3 if num_prompt > 3 else 0  # three jobs a chunk
    assert num_jobs[1] == num_jobs[2] == num_jobs[0] - saved


def test_a_prompt_that_gave_nan_is_not_kept(flow: Flow) -> None:
    prompt = FlowPrompt(flow, [1] * 12, torch.full((1, 80, 24), torch.nan), torch.ones(1, FLOW.spk_embed_dim))
    cache = flow.new_cache(NUM_SLOTS, 2, 12)
    state = prompt.new_state(cache, 0)
    flow.push(state, [1] * 20, is_final=True)
    while flow.can_step(state):
        flow.step_rows([state], cache)
        prompt.look_at(state, cache)
    assert prompt.kept is None


def test_a_prompt_that_has_no_places_is_refused(flow: Flow) -> None:
    state = flow.new_state(torch.ones(1, FLOW.spk_embed_dim), [1] * 12, torch.randn(1, 80, 24), slot=0)
    flow.push(state, [1] * 20)
    with pytest.raises(ValueError, match="a prompt of 3 chunks, but places for 0"):
        flow.step_rows([state], flow.new_cache(1, 2))


@pytest.mark.parametrize("variant", ["two_steps", "guided"])
def test_euler_steps_in_fixed_shapes_give_what_the_plain_ones_give(flow: Flow, variant: str) -> None:
    made = {}
    for is_fixed in (False, True):
        rng = np.random.default_rng(9)
        flow.dims = replace(FLOW, **VARIANTS[variant])
        try:
            cache = flow.new_cache(NUM_SLOTS + 1, 2)  # the last one is the spare
            calls = FixedCalls(has_graphs=False)
            cache.fixed = calls if is_fixed else None
            crowd = Crowd(flow, cache, rng)
            for slot, count in enumerate((23, 41, 8)):
                crowd.join(slot, torch.from_numpy(rng.standard_normal((1, FLOW.spk_embed_dim)).astype(np.float32)))
                flow.push(crowd.states[slot], turn_tokens(rng, count), is_final=True)
            while crowd.job():
                pass
        finally:
            flow.dims = FLOW
        made[is_fixed] = [crowd.mel(slot) for slot in range(3)]
        assert 3 in crowd.sizes
    assert {key[1] for key in calls.shapes} == {1, 2, 4}, "three rows are filled up to four"
    for plain, fixed in zip(made[False], made[True], strict=True):
        assert float((plain - fixed).abs().max()) < 1e-5


def test_an_unlimited_flow_in_a_window_is_exact_inside_it_and_close_beyond(flow: Flow) -> None:
    rng = np.random.default_rng(5)
    flow.dims = replace(FLOW, left_context_s=-1.0)
    try:
        window = flow.dims.window_chunks(0.8)
        assert window == 4
        embedding, tokens = torch.randn(1, FLOW.spk_embed_dim), turn_tokens(rng, 60)
        whole = flow(torch.tensor([tokens]), embedding)
        crowd = Crowd(flow, flow.new_cache(1, window), rng)
        crowd.join(0, embedding)
        flow.push(crowd.states[0], tokens, is_final=True)
        while crowd.job():
            pass
    finally:
        flow.dims = FLOW
    error = (crowd.mel(0) - whole).abs()
    inside = (window + 1) * FLOW.chunk_size * FLOW.frames_per_token
    assert float(error[..., :inside].max()) < 1e-5
    assert 1e-5 < float(error[..., inside:].mean()) < 0.5


def test_a_failed_pass_can_be_run_again(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    embedding, tokens = torch.randn(1, FLOW.spk_embed_dim), turn_tokens(rng, 25)
    crowd = Crowd(flow, flow.new_cache(1, 2), rng)
    crowd.join(0, embedding)
    flow.push(crowd.states[0], tokens, is_final=True)
    last = flow.decoder.estimator.final_proj
    num_failures = 0
    while flow.can_step(crowd.states[0]):
        with monkeypatch.context() as patch:
            patch.setattr(last, "forward", _out_of_memory)
            try:
                crowd.job()
            except torch.OutOfMemoryError:
                num_failures += 1
        crowd.job()
    assert num_failures >= 5
    assert float((crowd.mel(0) - flow(torch.tensor([tokens]), embedding)).abs().max()) < 1e-5


def _out_of_memory(*_: object) -> Tensor:
    raise torch.OutOfMemoryError("no memory left")


def test_a_slot_poisoned_by_one_turn_is_clean_after_reset(flow: Flow) -> None:
    cache = flow.new_cache(2, 2)
    bad = flow.new_state(torch.full((1, FLOW.spk_embed_dim), torch.nan), slot=0)
    good = flow.new_state(torch.ones(1, FLOW.spk_embed_dim), slot=1)
    tokens = list(range(30))
    pieces: dict[int, list[Tensor]] = {0: [], 1: []}
    for state in (bad, good):
        flow.push(state, tokens, is_final=True)
    while flow.can_step(good):
        for state, mel in zip((bad, good), flow.step_rows((bad, good), cache), strict=True):
            pieces[state.slot] += [] if mel is None else [mel]
    assert not torch.isfinite(torch.cat(pieces[0], dim=-1)).any()
    wanted = flow(torch.tensor([tokens]), torch.ones(1, FLOW.spk_embed_dim))
    assert float((torch.cat(pieces[1], dim=-1) - wanted).abs().max()) < 1e-5
    cache.reset(0)
    again = flow.new_state(torch.ones(1, FLOW.spk_embed_dim), slot=0)
    flow.push(again, tokens, is_final=True)
    mels = []
    while flow.can_step(again):
        mels += [mel for mel in flow.step_rows((again,), cache) if mel is not None]
    assert float((torch.cat(mels, dim=-1) - wanted).abs().max()) < 1e-5
