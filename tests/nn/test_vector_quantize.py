"""The drop-in VectorQuantize: layouts, keys, returns, EMA, masks, and refusals by name."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from fastvq.nn.vector_quantize import VectorQuantize

LAYOUTS = [
    ({}, (2, 9, 8), (2, 9)),
    ({}, (6, 8), (6,)),
    ({"channel_last": False}, (2, 8, 9), (2, 9)),
    ({"accept_image_fmap": True}, (2, 8, 3, 4), (2, 3, 4)),
    ({"accept_3d_fmap": True}, (2, 8, 2, 3, 4), (2, 2, 3, 4)),
    ({"heads": 2}, (2, 9, 8), (2, 9, 2)),
    ({"heads": 2, "codebook_dim": 4}, (2, 9, 8), (2, 9, 2)),
    ({"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True}, (2, 9, 8), (2, 9, 2)),
    ({"heads": 2, "accept_image_fmap": True}, (2, 8, 3, 4), (2, 3, 4, 2)),
    ({"codebook_dim": 5, "accept_image_fmap": True}, (2, 8, 3, 4), (2, 3, 4)),
    ({"learnable_codebook": True}, (2, 9, 8), (2, 9)),
]


def _x(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("options", "shape", "index_shape"), LAYOUTS)
def test_layouts(options: dict, shape: tuple[int, ...], index_shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, **options)
    x = _x(*shape).requires_grad_()
    quantize, indices, loss = module(x)
    assert quantize.shape == x.shape
    assert indices.shape == index_shape
    assert indices.dtype == torch.int64
    assert loss.shape == ()
    (quantize.sum() + loss).backward()
    assert x.grad.abs().sum() > 0
    module.eval()
    quantize, indices, loss = module(x)
    assert loss.item() == 0.0
    if len(index_shape) > 1:
        torch.testing.assert_close(module.get_output_from_indices(indices), quantize)


def test_output_is_the_nearest_code_of_the_projection() -> None:
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, codebook_dim=3, heads=2, separate_codebook_per_head=True).eval()
    x = _x(2, 9, 8)
    quantize, indices, _ = module(x)
    z = module.project_in(x).detach().unflatten(-1, (2, 3)).double()
    for head in range(2):
        distance = torch.cdist(z[:, :, head], module.codebook[head].double().expand(2, -1, -1))
        assert torch.equal(indices[..., head], distance.argmin(dim=-1))
    chosen = torch.cat([module.codebook[h][indices[..., h]] for h in range(2)], dim=-1)
    torch.testing.assert_close(quantize, module.project_out(chosen))
    assert torch.equal(module.get_codes_from_indices(indices), chosen)


def test_argument_order_and_defaults() -> None:
    parameters = list(inspect.signature(VectorQuantize).parameters.values())
    assert [p.name for p in parameters[:9]] == [
        "dim", "codebook_size", "codebook_dim", "heads", "separate_codebook_per_head", "decay",
        "eps", "freeze_codebook", "kmeans_init",
    ]  # fmt: skip
    assert len(parameters) == 44
    assert parameters[5].default == 0.8
    assert list(inspect.signature(VectorQuantize.forward).parameters) == [
        "self", "x", "indices", "mask", "lens", "topk", "sample_codebook_temp", "freeze_codebook",
        "return_loss_breakdown", "codebook_transform_fn", "ema_update_weight", "accum_ema_update",
        "ema_update",
    ]  # fmt: skip


@pytest.mark.parametrize("learnable", [False, True])
def test_state_dict_keys(learnable: bool) -> None:
    module = VectorQuantize(
        8, 16, 3, heads=2, separate_codebook_per_head=True, learnable_codebook=learnable
    )
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes == {
        "_codebook.initted": (),
        "_codebook.cluster_size": (2, 16),
        "_codebook.embed_avg": (2, 16, 3),
        "_codebook.embed": (2, 16, 3),
        "project_in.weight": (6, 8),
        "project_in.bias": (6,),
        "project_out.weight": (8, 6),
        "project_out.bias": (8,),
    }
    assert isinstance(module._codebook.embed, torch.nn.Parameter) == learnable


def test_ema_step() -> None:
    module = VectorQuantize(2, 3, decay=0.8)
    codes = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    module.codebook = codes
    module._codebook.embed_avg.copy_(module._codebook.embed)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 1.0]])
    quantize, indices, loss = module(x)
    assert indices.tolist() == [0, 0, 1]
    assert torch.equal(quantize.detach(), codes[[0, 0, 1]])
    assert loss.item() == 0.5  # three unit squares over six elements
    expected_size = torch.tensor([[0.8 + 0.4, 0.8 + 0.2, 0.8]])
    expected_avg = torch.tensor([[[0.2, 0.2], [3.2 + 0.8, 0.2], [0.0, 3.2]]])
    torch.testing.assert_close(module._codebook.cluster_size, expected_size)
    torch.testing.assert_close(module._codebook.embed_avg, expected_avg)
    smoothed = (expected_size + 1e-5) / (3.0 + 3e-5) * 3.0
    torch.testing.assert_close(module._codebook.embed, expected_avg / smoothed[..., None])


def test_learnable_codes_follow_the_loss_only() -> None:
    torch.manual_seed(0)
    module = VectorQuantize(3, 5, learnable_codebook=True, commitment_weight=0.5)
    x = _x(20, 3).requires_grad_()
    before = module.codebook.detach().clone()
    _, indices, loss = module(x)
    assert torch.equal(module.codebook, before)
    residual = x.detach() - before[indices]
    torch.testing.assert_close(loss.detach(), 0.5 * residual.square().mean())
    loss.backward()
    torch.testing.assert_close(x.grad, residual / 60)
    pulled = torch.zeros_like(before).index_add(0, indices, -residual) / 60
    torch.testing.assert_close(module._codebook.embed.grad[0], pulled)
    module.zero_grad()
    frozen = module(x, freeze_codebook=True)[2]
    frozen.backward()
    assert module._codebook.embed.grad is None


def test_gradients_of_quantize() -> None:
    x = _x(20, 3)
    grad = _x(20, 3, seed=1)
    for rotation, straight in ((False, True), (None, False), (True, False)):
        torch.manual_seed(0)
        module = VectorQuantize(3, 5, rotation_trick=rotation)
        inputs = x.clone().requires_grad_()
        quantize, _, _ = module(inputs)
        quantize.backward(grad)
        assert torch.equal(inputs.grad, grad) == straight


@pytest.mark.parametrize("by", ["mask", "lens"])
def test_masked_positions(by: str) -> None:
    x = _x(2, 5, 4)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] + [False] * 4])
    given = {"mask": mask} if by == "mask" else {"lens": torch.tensor([3, 1])}
    for zeros in (True, False):
        torch.manual_seed(0)
        module = VectorQuantize(4, 6, return_zeros_for_masked_padding=zeros)
        torch.manual_seed(0)
        short = VectorQuantize(4, 6)
        inputs = x.clone().requires_grad_()
        quantize, indices, loss = module(inputs, **given)
        expected, expected_indices, expected_loss = short(x[mask])
        assert torch.equal(quantize[mask], expected)
        assert torch.equal(indices[mask], expected_indices)
        assert (indices[~mask] == -1).all()
        assert torch.equal(loss, expected_loss)
        assert torch.equal(quantize[~mask], torch.zeros(6, 4) if zeros else x[~mask])
        assert torch.equal(module.codebook, short.codebook)
        assert (module.get_codes_from_indices(indices)[~mask] == 0).all()
        loss.backward()
        assert (inputs.grad[~mask] == 0).all()


def test_map_mask_with_heads() -> None:
    module = VectorQuantize(8, 16, heads=2, accept_image_fmap=True)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    quantize, indices, _ = module(_x(2, 8, 3, 4), mask=mask)
    assert torch.equal(indices >= 0, mask[..., None].expand(-1, -1, -1, 2))
    assert (quantize.movedim(1, -1)[~mask] == 0).all()


def test_nothing_moves_when_frozen() -> None:
    for module, call in (
        (VectorQuantize(3, 5, freeze_codebook=True), {}),
        (VectorQuantize(3, 5, ema_update=False), {}),
        (VectorQuantize(3, 5), {"freeze_codebook": True}),
        (VectorQuantize(3, 5), {"ema_update": False}),
        (VectorQuantize(3, 5).eval(), {}),
    ):
        before = {key: value.clone() for key, value in module.state_dict().items()}
        module(_x(20, 3), **call)
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_kmeans_and_expiry_keep_the_codes_in_use() -> None:
    torch.manual_seed(0)
    module = VectorQuantize(3, 8, kmeans_init=True, threshold_ema_dead_code=1)
    for step in range(40):
        _, indices, loss = module(_x(200, 3, seed=step) + (5.0 if step >= 10 else 0.0))
    assert len(indices.unique()) == 8  # most codes were left behind by the jump
    assert loss < 0.09  # the variance of the rows, which one code would leave


def test_loss_breakdown() -> None:
    module = VectorQuantize(3, 5, commitment_weight=0.25)
    _, _, loss, breakdown = module(_x(20, 3), return_loss_breakdown=True)
    torch.testing.assert_close(loss, 0.25 * breakdown.commitment)
    assert breakdown._fields == (
        "commitment", "codebook_diversity", "orthogonal_reg", "inplace_optimize",
    )  # fmt: skip
    assert module.eval()(_x(20, 3), return_loss_breakdown=True)[3].commitment.item() == 0.0


def test_half_precision_module_keeps_its_state() -> None:
    module = VectorQuantize(8, 16, codebook_dim=4).bfloat16()
    quantize, _, loss = module(_x(2, 9, 8).bfloat16())
    assert quantize.dtype == torch.bfloat16
    assert loss.dtype == module.codebook.dtype == torch.float32


def test_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    module = VectorQuantize(8, 16, heads=2, accept_image_fmap=True).eval()
    x = _x(2, 8, 3, 4)
    expected = module(x)
    quantize, indices, _ = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(quantize, expected[0])


@pytest.mark.parametrize(
    "argument",
    [
        {"directional_reparam": True},
        {"directional_reparam_variance": 1e-3},
        {"vq_bridge": torch.nn.Identity()},
        {"affine_param": True},
        {"sync_affine_param": True},
        {"sync_update_v": 0.1},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_refuses_what_is_out_of_scope_by_name(argument: dict) -> None:
    (name,) = argument
    with pytest.raises(ValueError, match=f"^VectorQuantize: {name}=.* see docs/migration.md"):
        VectorQuantize(8, 16, **argument)


def test_refuses_shapes_and_contradictions() -> None:
    with pytest.raises(ValueError, match=r"3 dimensions with 8 channels .* got \(2, 8, 9\)"):
        VectorQuantize(8, 16)(_x(2, 8, 9))
    with pytest.raises(ValueError, match=r"mask must be bool \(2, 9\).* got .*\(2, 8\)"):
        VectorQuantize(8, 16)(_x(2, 9, 8), mask=torch.ones(2, 8).bool())
    with pytest.raises(ValueError, match="mask excludes lens"):
        VectorQuantize(8, 16)(_x(2, 9, 8), mask=torch.ones(2, 9).bool(), lens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="excludes ema_update=True"):
        VectorQuantize(8, 16, learnable_codebook=True, ema_update=True)
    with pytest.raises(ValueError, match="heads must be at least 1; got 0"):
        VectorQuantize(8, 16, heads=0)
