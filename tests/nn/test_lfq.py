"""LFQ: the peer's results, entropies against float64, and safety."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nn.peer import U, assert_same, assert_same_step, pair
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn

from fastvq import LFQ
from fastvq.nn import binary_entropy

CASES = [
    ({"codebook_size": 256}, (2, 9, 8)),
    ({"codebook_size": 1024, "dim": 16, "commitment_loss_weight": 0.25}, (2, 9, 16)),
    ({"codebook_size": 16, "num_codebooks": 3, "dim": 7}, (2, 9, 7)),
    ({"dim": 5, "spherical": True, "codebook_scale": 0.7}, (2, 9, 5)),
    ({"dim": 5, "frac_per_sample_entropy": 0.4}, (2, 9, 5)),
    ({"dim": 4, "orthogonal_rotation": True, "diversity_gamma": 0.5}, (2, 9, 4)),
    ({"dim": 4, "soft_clamp_input_value": 2.0, "entropy_loss_weight": 1.0}, (2, 9, 4)),
    ({"dim": 4, "channel_first": True}, (2, 4, 9)),
    ({"dim": 4}, (2, 4, 3, 4)),
    (
        {"codebook_size": 8, "num_codebooks": 2, "dim": 5, "cosine_sim_project_in": True},
        (2, 5, 2, 3),
    ),
    ({"dim": 4, "channel_first": False, "force_quantization_f32": False}, (2, 3, 4)),
    (
        {"dim": 4, "keep_num_codebooks_dim": True, "experimental_softplus_entropy_loss": True},
        (2, 3, 4),
    ),
    ({"dim": 4, "straight_through_activation": nn.Tanh(), "projection_has_bias": False}, (2, 3, 4)),
    ({"dim": 1, "has_projections": True}, (2, 3, 1)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("options", "shape"), CASES)
def test_same_as_the_peer(options: dict, shape: tuple[int, ...], training: bool) -> None:
    ours, theirs = pair("LFQ", **options)
    ours.train(training)
    theirs.train(training)
    x = 0.5 * torch.randn(shape)
    inv_temperature = 10.0
    # Longest sums: over the codes. A gradient adds terms as large as 2τ·ln 1e5, over the vectors.
    terms = 2 * ours.codebook_size
    magnitude = 2 * inv_temperature * math.log(1e5)
    out = assert_same_step(ours, theirs, x, terms, magnitude, inv_temperature=inv_temperature)
    assert out[2].requires_grad == training
    codes = theirs.indices_to_codes(out[1])
    assert_same(ours.indices_to_codes(out[1]), codes, terms=32)
    bare = theirs.indices_to_codes(out[1], project_out=False)
    assert_same(ours.indices_to_codes(out[1], project_out=False), bare, terms=8)
    assert torch.equal(ours.codebook, theirs.codebook)


def test_breakdown_and_names_of_the_peer() -> None:
    ours, theirs = pair("LFQ", dim=6, commitment_loss_weight=0.5)
    x = torch.randn(2, 5, 6)
    (mine, my_terms), (yours, your_terms) = ours(x, 1.0, True), theirs(x, 1.0, True)
    assert mine._fields == yours._fields
    assert my_terms._fields == your_terms._fields
    for one, other in zip(my_terms, your_terms):
        assert_same(one.detach(), other.detach(), terms=128)


def test_masked_rows_count_in_no_loss() -> None:
    ours, theirs = pair("LFQ", dim=6, commitment_loss_weight=0.5)
    x = torch.randn(2, 5, 6)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    quantized, _, loss = ours(x, mask=mask)
    # The peer's own mask leaves the batch mean out; its loss of the counted rows alone does not.
    assert_same(loss, theirs(x[mask][None])[2], terms=128, magnitude=math.log(64))
    assert torch.equal(quantized, theirs.eval()(x)[0])


def _entropies(x: Tensor, counts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """By the definition, over all codes, in float64."""
    codes = binary_entropy.sign_codes(x.shape[-1], x.device).double()
    p = (scale * x.double() @ codes.t()).softmax(dim=-1)

    def h(p: Tensor) -> Tensor:
        return -(p * p.clamp(min=1e-5).log()).sum(dim=-1)

    share = counts.double() / counts.sum()
    mean = torch.einsum("n,nck->ck", share, p)
    return (h(p).mean(dim=1) * share).sum(), h(mean).mean()


@pytest.mark.parametrize("bits", [1, 2, 5, 11])
@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0, 200.0])
@pytest.mark.parametrize("by_halves", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropies(
    dtype: torch.dtype, by_halves: bool, bits: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binary_entropy, "_BLOCK_TERMS", 3 * 2**bits)  # several blocks, one ragged
    x = 0.3 * torch.randn(7, 2, bits)
    counts = torch.tensor([1, 0, 1, 1, 1, 0, 1]).to(dtype)
    results = []
    signs = (binary_entropy.sign_codes(bits, x.device),)
    if by_halves:
        signs = binary_entropy.half_signs(bits, x.device)
    signs = tuple(half.to(dtype) for half in signs)
    ours = functools.partial(binary_entropy.binary_entropies, signs=signs)
    for function, inputs in (
        (ours, x.to(dtype, copy=True).requires_grad_()),
        (_entropies, x.to(torch.float64, copy=True).requires_grad_()),
    ):
        per_sample, batch = function(inputs, counts, scale)
        (per_sample - 0.5 * batch).backward()
        results.append((per_sample.detach(), batch.detach(), inputs.grad))
    (per_sample, batch, grad), (true_per_sample, true_batch, true_grad) = results
    # A logit of size l errs by bits·u·l, and so does its probability, relatively; then sums over
    # the codes, first of one half of the bits, then of the other, of entropies below ln K + ln 1e5.
    logit = scale * x.abs().sum(dim=-1).max().item()
    codes = 2 * 2 ** -(-bits // 2) if by_halves else 2**bits
    relative = (codes + 2 * bits * logit + 8) * (
        UNIT_ROUNDOFF[dtype] + UNIT_ROUNDOFF[torch.float64]
    )
    for one, true in ((per_sample, true_per_sample), (batch, true_batch)):
        assert abs(one.item() - true.item()) <= relative * (bits + math.log(1e5))
    bound = relative * 2 * scale * (bits + math.log(1e5)) / counts.sum()
    assert (grad - true_grad).abs().max() <= bound


def _batch_entropy_on(rank: int, folder: str) -> None:
    """One of two processes, with 5 and 7 rows; the loss has rank + 1 batch entropies."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    x = _rows_of_two_processes()[rank].requires_grad_()
    signs = binary_entropy.half_signs(3, x.device)
    per_sample, batch = binary_entropy.binary_entropies(x, torch.ones(len(x)), 2.0, signs)
    (per_sample + (rank + 1) * batch).backward()
    torch.save((per_sample.detach(), batch.detach(), x.grad), f"{folder}/{rank}")
    dist.destroy_process_group()


def _rows_of_two_processes() -> tuple[Tensor, Tensor]:
    rows = 0.5 * torch.randn(12, 1, 3, generator=torch.Generator().manual_seed(0))
    return rows[:5], rows[5:]


def test_the_batch_mean_is_over_all_processes(tmp_path: Path) -> None:
    mp.spawn(_batch_entropy_on, args=(str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    parts = [part.double().requires_grad_() for part in _rows_of_two_processes()]
    per_sample = [_entropies(part, torch.ones(len(part)), 2.0)[0] for part in parts]
    _, batch = _entropies(torch.cat(parts), torch.ones(12), 2.0)
    # Each process asks for the gradient of its own loss: together that of the sum of both.
    (sum(per_sample) + 3 * batch).backward()
    for (mine, mean, grad), part, true in zip(found, parts, per_sample):
        # Sums of at most 12 rows × 8 codes, of terms below ln 1e5, times 3 in the gradient.
        bound = 2 * 96 * U * 3 * math.log(1e5)
        assert abs(mine - true).item() <= bound
        assert abs(mean - batch).item() <= bound
        assert (grad - part.grad).abs().max().item() <= bound


def test_no_step_allocates_rows_times_codes() -> None:
    torch.manual_seed(0)
    module = LFQ(dim=14)
    x = torch.randn(1, 512, 14, requires_grad=True)
    largest = 0

    def look(saved: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(look, lambda saved: saved):
        module(x)[2].backward()
    assert 0 < largest <= 512 * 2**7


def test_a_row_that_is_not_finite_costs_that_row_only() -> None:
    torch.manual_seed(0)
    module = LFQ(dim=4, commitment_loss_weight=1.0, num_codebooks=2, codebook_size=4)
    x = torch.randn(1, 6, 4)
    kept = torch.tensor([0, 1, 3, 5])
    expected = module(x[:, kept])
    x[0, 2, 1], x[0, 4, 3] = torch.nan, torch.inf
    x.requires_grad_()
    quantized, indices, loss = module(x)
    assert torch.equal(quantized[0, kept], expected.quantized[0])
    assert torch.equal(indices[0, kept], expected.indices[0])
    assert indices[0, 2].tolist()[0] == -1
    assert indices[0, 4].tolist()[1] == -1
    assert quantized[0, 2, :2].isnan().all()
    assert_same(loss, expected.entropy_aux_loss, terms=64)
    (quantized[0, kept].sum() + loss).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    quantized, indices, loss = LFQ(dim=4, commitment_loss_weight=1.0)(torch.zeros(shape))
    assert (quantized.shape, indices.shape, loss.item()) == (shape, shape[:-1], 0.0)


def test_an_all_masked_batch_has_zero_loss() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    loss = LFQ(dim=4, commitment_loss_weight=1.0)(x, mask=torch.zeros(2, 3, dtype=torch.bool))[2]
    assert loss.item() == 0.0
    loss.backward()
    assert x.grad.abs().max() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_float32_losses(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = LFQ(dim=6)
    x = (0.1 * torch.randn(2, 50, 6)).to(dtype)
    expected = module(x.float())
    for result in (copy.deepcopy(module).to(dtype)(x), module(x)):
        assert result.quantized.dtype == dtype
        assert torch.equal(result.indices, expected.indices)
        assert torch.equal(result.entropy_aux_loss, expected.entropy_aux_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x.float()).entropy_aux_loss, expected.entropy_aux_loss)


def test_compiled_exported_copied_and_pickled() -> None:
    torch.manual_seed(0)
    module = LFQ(dim=6, codebook_size=16, commitment_loss_weight=0.5)
    x = torch.randn(2, 9, 6)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for other in (compiled, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        result = other(x)
        assert torch.equal(result[1], expected[1])
        assert_same(result[0].detach(), expected[0].detach(), terms=16)
        assert_same(result[2].detach(), expected[2].detach(), terms=64, magnitude=10.0)
    module.eval()
    exported = torch.export.export(copy.deepcopy(module), (x,)).module()
    assert torch.equal(exported(x)[1], expected[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "dim or codebook_size"),
        ({"codebook_size": 100}, "power of 2, at least 2; got 100. The next is 128"),
        ({"dim": 4, "frac_per_sample_entropy": 0.0}, r"in \(0, 1\]"),
        ({"dim": 4, "soft_clamp_input_value": 0.5}, "at least codebook_scale"),
        ({"codebook_size": 4, "num_codebooks": 2, "keep_num_codebooks_dim": False}, "got 2"),
    ],
)
def test_refusals(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LFQ(**options)
    with pytest.raises(ValueError, match="must have 2 channels"):
        LFQ(dim=2)(torch.zeros(1, 4, 3))
