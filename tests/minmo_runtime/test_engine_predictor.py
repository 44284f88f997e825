"""A trained duplex predictor in the engine: its steps are those of training, whoever shares the engine and however late
it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minmo_runtime.api import DuplexPrediction, OpenStream, PushAudio, StreamOpened
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.duplex_steps import NUM_FACTS
from minmo_runtime.engine import Engine
from minmo_runtime.model.duplex import CLASSES, StepInputs
from minmo_runtime.random_checkpoint import TINY, write_random_checkpoint
from minmo_runtime.training.duplex_inputs import encode, packets, steps_of
from minmo_runtime.training.duplex_scenes import LABEL, Scene
from minmo_runtime.weights import Checkpoint, load_checkpoint

CONFIG = RuntimeConfig(max_streams=2, draft_probability=1.0)  # no drafts: random weights make long ones
DUPLEX = {
    "input_size": 64, "input": "encoder", "hidden_size": 32, "num_heads": 2, "ffn_size": 32, "left_context": 30,
    "num_facts": NUM_FACTS, "num_pieces": 500, "piece_window": 4, "piece_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    return load_checkpoint(write_random_checkpoint(folder, dims={**TINY, "duplex": DUPLEX}))


def a_scene(seed: int = 0) -> Scene:
    """Loud noise with pauses, long and short: the gate opens twice. Nobody but the caller speaks."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(5.5 * 16_000)) / 16_000
    buzz = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 12))
    speaks = ((time > 0.6) & (time < 1.5)) | ((time > 1.9) & (time < 2.63)) | ((time > 4.0) & (time < 4.7))
    wave = (0.1 * buzz * speaks + rng.normal(0, 0.002, len(time))).astype(np.float32)
    return Scene(wave, [(len(wave), LABEL["user_continues"], False)], [], [], 5)


def predictions(checkpoint: Checkpoint, scene: Scene, steps_per_packet: int) -> np.ndarray:
    """[T, 6] as the engine sends them; with few steps per packet the engine is late."""
    engine = Engine(checkpoint, CONFIG)
    events = engine.receive(OpenStream(call_id="a", system_prompt="test", slot_digits=scene.slot_digits), 0.0)
    engine.receive(OpenStream(call_id="b", system_prompt="neighbour"), 0.0)
    now = 0.0
    for start, pcm, voiced, _, _ in packets(scene):
        events += engine.receive(PushAudio(call_id="a", pcm=pcm, start_sample=start, voiced=voiced), now)
        events += engine.receive(
            PushAudio(call_id="b", pcm=pcm[::-1], start_sample=start, voiced=start % 640 == 0), now
        )
        now += 0.02
        for _ in range(steps_per_packet):
            events += engine.step(now)
    while engine.has_work(now):
        events += engine.step(now)
    assert [e.bridges for e in events if isinstance(e, StreamOpened)][0] == ("in",)
    found = [e for e in events if isinstance(e, DuplexPrediction) and e.call_id == "a"]
    assert [e.sample for e in found] == [1280 * (i + 1) for i in range(len(found))]
    return np.array([[getattr(e, name) for name in CLASSES] for e in found])


def test_the_engine_takes_the_same_steps_as_training(checkpoint: Checkpoint) -> None:
    scene = a_scene()
    modules, captions = checkpoint.modules, checkpoint.captions
    (steps,) = steps_of([scene], modules.encoder, checkpoint.ctc_tokenizer, captions, modules.duplex.dims, CONFIG)
    served = predictions(checkpoint, scene, steps_per_packet=50)
    with torch.no_grad():
        trained = modules.duplex(
            StepInputs(
                torch.from_numpy(steps.vectors.astype(np.float32))[None],
                torch.from_numpy(steps.speaks)[None],
                torch.from_numpy(steps.facts)[None],
                torch.from_numpy(steps.pieces.astype(np.int64))[None],
            )
        )[0].exp()
    assert len(served) == len(trained) > 60
    assert np.abs(steps.vectors).sum(1).astype(bool).sum() > 10  # frames were heard
    np.testing.assert_allclose(served, trained.numpy(), atol=2e-3)  # training keeps its vectors in float16


def test_a_late_engine_gives_the_same_predictions(checkpoint: Checkpoint) -> None:
    scene = a_scene(1)
    prompt, late = predictions(checkpoint, scene, 50), predictions(checkpoint, scene, 1)
    np.testing.assert_allclose(late, prompt, atol=1e-5)


def test_predictions_are_masked_and_sum_to_one(checkpoint: Checkpoint) -> None:
    found = predictions(checkpoint, a_scene(2), 50)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-5)
    assert (found[:, [LABEL["interrupt"], LABEL["backchannel"]]] == 0).all()


def test_a_segment_too_short_for_one_window_is_encoded_as_nothing(checkpoint: Checkpoint) -> None:
    too_short, whole = encode(checkpoint.modules.encoder, [np.zeros(320, np.int16), np.zeros(3200, np.int16)])
    assert len(too_short.frames) == 0 and len(whole.frames) == 8
