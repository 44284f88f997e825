"""Projector, output projector, duplex predictor, speaker encoder: streaming equals offline, rows do not touch each
other.
"""

import pytest
import torch

from minmo_runtime.model.duplex import CLASSES, WHILE_SILENT, WHILE_SPEAKING, DuplexDims, DuplexPredictor, StepInputs
from minmo_runtime.model.output_projector import OutputProjector, OutputProjectorDims
from minmo_runtime.model.projector import InputProjector, ProjectorDims
from minmo_runtime.model.speaker import SpeakerDims, SpeakerEncoder

TOLERANCE = {"atol": 1e-5, "rtol": 0}


def random_chunks(total, generator, longest=9):
    """Sizes that add up to `total`, zero included."""
    sizes = []
    while sum(sizes) < total:
        size = int(torch.randint(0, longest, (1,), generator=generator))
        sizes.append(min(size, total - sum(sizes)))
    return sizes


def small_projector(num_pieces, kernel_size):
    torch.manual_seed(3)
    dims = ProjectorDims(
        16, 24, num_heads=2, ffn_size=32, left_context=7, kernel_size=kernel_size, num_pieces=num_pieces
    )
    projector = InputProjector(dims).eval()
    if num_pieces:
        torch.nn.init.normal_(projector.piece_table)
    return projector


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_pieces", "kernel_size"), [(0, 4), (11, 4), (0, 2), (0, 3)])
@torch.no_grad()
def test_projector_streaming_is_offline(seed, num_pieces, kernel_size):
    generator = torch.Generator().manual_seed(seed)
    projector = small_projector(num_pieces, kernel_size)
    total = 41
    frames = torch.randn(total, 16, generator=generator)
    posteriors = torch.rand(total, num_pieces, generator=generator) if num_pieces else None
    offline = projector(frames[None], None if posteriors is None else posteriors[None])[0]
    assert offline.shape == (total // 2, 24)
    state, start, parts = projector.init_state(), 0, []
    for size in random_chunks(total, generator):
        piece = None if posteriors is None else posteriors[start : start + size]
        parts.append(projector.forward_chunk(frames[start : start + size], state, piece))
        start += size
        assert sum(map(len, parts)) == start // 2  # given out as soon as its last frame is there
    torch.testing.assert_close(torch.cat(parts), offline, **TOLERANCE)


@pytest.mark.parametrize("num_pieces", [0, 11])
@torch.no_grad()
def test_projector_rows_of_any_age_in_one_batch_are_what_each_is_alone(num_pieces):
    generator = torch.Generator().manual_seed(5)
    projector = small_projector(num_pieces, 4)
    ages = (0, 4, 5, 12)  # frames heard before: young, old, in the middle of a stride
    before = [torch.randn(age, 16, generator=generator) for age in ages]
    chunks = [torch.randn(len(ages), 4, 16, generator=generator) for _ in range(3)]
    said = torch.rand(len(ages), 24, num_pieces, generator=generator)
    states = [projector.init_state() for _ in ages]
    for row, frames in enumerate(before):
        projector.forward_chunk(frames, states[row], said[row, : len(frames)])
    alone = [projector.init_state() for _ in ages]
    for row, frames in enumerate(before):
        projector.forward_chunk(frames, alone[row], said[row, : len(frames)])
    for chunk in chunks:
        untouched = [state.layers[0].position for state in states]
        together, after = projector.forward_rows(chunk, states, said[:, :4])
        assert [state.layers[0].position for state in states] == untouched  # a failed batch can be run again
        states = after
        for row, state in enumerate(alone):
            wanted = projector.forward_chunk(chunk[row], state, said[row, :4])
            torch.testing.assert_close(together[row], wanted, **TOLERANCE)


@torch.no_grad()
def test_connectors_run_in_bfloat16_where_their_weights_are():
    """Every device but the CPU would refuse a tensor made elsewhere; "meta" does too, and needs no GPU."""
    with torch.device("meta"):
        projector = InputProjector(ProjectorDims(16, 24, num_heads=2, ffn_size=32, num_pieces=11)).to(torch.bfloat16)
        duplex = DuplexPredictor(DuplexDims(96, hidden_size=16, num_heads=2, ffn_size=32)).to(torch.bfloat16)

    def zeros(*shape):
        return torch.zeros(*shape, device="meta", dtype=torch.bfloat16)

    states = [projector.init_state(), projector.init_state()]
    for _ in range(2):
        vectors, states = projector.forward_rows(zeros(2, 4, 16), states, zeros(2, 4, 11))
    assert vectors[0].is_meta and vectors[0].dtype is torch.bfloat16
    speaks = torch.zeros(1, dtype=torch.bool, device="meta")
    assert duplex.forward_chunk(StepInputs(zeros(1, 96), speaks), duplex.init_state()).is_meta


@torch.no_grad()
def test_projector_forgets_beyond_its_memory():
    projector = small_projector(0, 4)
    state = projector.init_state()
    projector.forward_chunk(torch.randn(100, 16), state)
    assert all(layer.keys.shape[2] == 6 for layer in state.layers)


@torch.no_grad()
def test_projector_right_padding_changes_nothing():
    projector = small_projector(0, 4)
    frames = torch.randn(2, 20, 16)
    torch.testing.assert_close(projector(frames)[:, :6], projector(frames[:, :12]), **TOLERANCE)


def test_untrained_residual_projector_speaks_as_the_text_table():
    projector = OutputProjector(OutputProjectorDims(32, 24))
    hidden, embedding, text = torch.randn(5, 32), torch.randn(5, 32), torch.randn(5, 24)
    assert torch.equal(projector(hidden, embedding, text), text)
    assert not projector.query(hidden, embedding).any()


def test_paper_form_is_the_linear_alone():
    projector = OutputProjector(OutputProjectorDims(32, 24, form="paper"))
    hidden, embedding = torch.randn(5, 32), torch.randn(5, 32)
    assert torch.equal(projector(hidden, embedding), projector.linear(torch.cat([hidden, embedding], 1)))
    assert projector.linear.weight.abs().sum() > 0


def test_unknown_output_projector_form_is_refused():
    with pytest.raises(ValueError, match="must be one of paper, residual"):
        OutputProjectorDims(32, 24, form="sum")


def some(steps: StepInputs, span: slice | None) -> StepInputs:
    """A span of the steps; None puts a batch in front."""
    return StepInputs(*(values[span] for values in (steps.vectors, steps.agent_speaks, steps.facts, steps.pieces)))


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_duplex_streaming_is_offline(seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    extras = {"num_facts": 3, "num_pieces": 9, "piece_window": 2, "piece_size": 4}
    dims = DuplexDims(20, hidden_size=16, num_heads=2, ffn_size=32, left_context=9, **extras)
    duplex = DuplexPredictor(dims).eval()
    torch.nn.init.normal_(duplex.agent_speaks)
    speaks = torch.rand(50) < 0.5
    steps = StepInputs(torch.randn(50, 20), speaks, torch.randn(50, 3), torch.randint(0, 9, (50, 2)))
    offline = duplex(some(steps, None))[0]
    state, start, parts = duplex.init_state(), 0, []
    for size in random_chunks(50, generator):
        parts.append(duplex.forward_chunk(some(steps, slice(start, start + size)), state))
        start += size
    torch.testing.assert_close(torch.cat(parts), offline, **TOLERANCE)


@pytest.mark.parametrize(("speaks", "allowed"), [(False, WHILE_SILENT), (True, WHILE_SPEAKING)])
@torch.no_grad()
def test_duplex_classes_are_masked_by_who_speaks(speaks, allowed):
    duplex = DuplexPredictor(DuplexDims(20, hidden_size=16, num_heads=2, ffn_size=32))
    probabilities = duplex(StepInputs(torch.randn(1, 6, 20), torch.full((1, 6), speaks))).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 6))
    for index, name in enumerate(CLASSES):
        assert bool((probabilities[..., index] > 0).all()) == (name in allowed)


@torch.no_grad()
def test_speaker_vector_is_of_unit_length_for_any_length_and_blind_to_padding():
    torch.manual_seed(0)
    encoder = SpeakerEncoder(SpeakerDims(channels=16, pooled_channels=24)).eval()
    fbank = torch.randn(3, 40, 80)
    lengths = torch.tensor([40, 17, 1])
    batch = encoder(fbank, lengths)
    assert batch.shape == (3, 192)
    torch.testing.assert_close(batch.norm(dim=1), torch.ones(3))
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(encoder(fbank[row : row + 1, :length])[0], batch[row], **TOLERANCE)
