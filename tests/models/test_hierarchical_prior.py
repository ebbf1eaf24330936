"""HierarchicalPrior: conditioning on the levels above, probabilities, sampling, presets."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvq.models.hierarchical_prior import HierarchicalPrior
from fastvq.models.presets import PRESETS, preset
from fastvq.models.vqvae import VQVAE2

SHAPES = [(2, 3), (4, 6), (4, 12)]
SMALL: dict[str, Any] = {
    "hidden_channels": 8,
    "num_layers": 2,
    "condition_channels": 6,
    "conditioning_blocks": 1,
}


def _build(**more: Any) -> HierarchicalPrior:
    torch.manual_seed(0)
    prior = HierarchicalPrior([4, 5, 6], SHAPES, **{**SMALL, **more})
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(1.5)
    return prior


def _codes(batch: int = 2) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, k, (batch, *shape)) for k, shape in zip((4, 5, 6), SHAPES)]


def test_forward_shapes_and_sums() -> None:
    prior, codes = _build(num_classes=3), _codes()
    labels = torch.tensor([0, 2])
    logits = prior(codes, labels)
    assert [tuple(one.shape) for one in logits] == [(2, 4, 2, 3), (2, 5, 4, 6), (2, 6, 4, 12)]
    levels = prior.level_log_prob(codes, labels)
    assert levels.shape == (2, 3)
    for level, one in enumerate(logits):
        picked = one.log_softmax(1).gather(1, codes[level][:, None]).sum((1, 2, 3))
        # float32: 48 terms of size below 10, 48·480·2⁻²⁴
        torch.testing.assert_close(levels[:, level], picked, rtol=0, atol=1.4e-3)
    torch.testing.assert_close(prior.log_prob(codes, labels), levels.sum(1))


@pytest.mark.parametrize("shape", [(2, 3), (1, 1)])
def test_every_upper_code_reaches_the_codes_under_it_and_none_below_reaches_up(
    shape: tuple[int, int],
) -> None:
    prior = _build(conditioning_blocks=0).double().eval()
    shapes = [shape, (2 * shape[0], 2 * shape[1]), (2 * shape[0], 4 * shape[1])]
    codes = [torch.randint(0, k, (1, *one)) for k, one in zip((4, 5, 6), shapes)]
    with torch.no_grad():
        base = prior(codes)
        for level, (i, j) in itertools.product(range(3), itertools.product(*map(range, shape))):
            down, right = shapes[level][0] // shape[0], shapes[level][1] // shape[1]
            changed = [one.clone() for one in codes]
            changed[level][0, i * down, j * right] += 1
            changed[level] %= prior.num_codes[level]
            got = prior(changed)
            for other in range(3):
                moved = (got[other] != base[other]).any(dim=1)[0]
                if other < level:
                    assert not moved.any()
                if other > level:
                    scale = (shapes[other][0] // shapes[level][0],)
                    scale += (shapes[other][1] // shapes[level][1],)
                    i0, j0 = i * down * scale[0], j * right * scale[1]
                    assert moved[i0 : i0 + scale[0], j0 : j0 + scale[1]].all()


def test_probabilities_of_all_codes_sum_to_one() -> None:
    torch.manual_seed(0)
    prior = HierarchicalPrior(2, [(1, 1), (1, 2), (2, 2)], **SMALL).double()
    bits = torch.tensor(list(itertools.product((0, 1), repeat=7)))
    codes = [bits[:, :1].view(-1, 1, 1), bits[:, 1:3].view(-1, 1, 2), bits[:, 3:].view(-1, 2, 2)]
    # 128 float64 terms, each a product of seven softmax values
    torch.testing.assert_close(prior.log_prob(codes).exp().sum().item(), 1.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "num_classes": 3,
            "num_layers": [4, 3, 2],
            "kernel_size": [3, 5, 3],
            "dilations": [(1, 2), (1,), (1, 1)],
            "attention_every": [2, 0, 2],
            "attention_heads": 2,
            "dropout": [0.5, 0.1, 0.0],
        },
    ],
)
def test_sampling_does_not_depend_on_method_or_batch(options: dict[str, Any]) -> None:
    prior = _build(**options)
    told = {"class_labels": torch.tensor([0, 1, 2, 1])} if options else {}
    arguments: dict[str, Any] = {"seed": 3, "temperature": [1.0, 0.8, 0.9], "top_k": [None, 4, 3]}
    whole = prior.sample(4, **told, **arguments)
    assert [tuple(one.shape) for one in whole] == [(4, *shape) for shape in SHAPES]
    full = prior.sample(4, method="full", **told, **arguments)
    for one, same in zip(whole, full):
        assert torch.equal(one, same)
    told = {key: value[2:] for key, value in told.items()}
    for one, part in zip(whole, prior.sample(2, first_sample=2, **told, **arguments)):
        assert torch.equal(one[2:], part)
    assert prior.training


def test_given_levels_stay_and_other_shapes_work() -> None:
    prior, codes = _build(), _codes(3)
    drawn = prior.sample(3, given=[codes[0], None, torch.full_like(codes[2], -1)], seed=0)
    assert torch.equal(drawn[0], codes[0])
    shapes = [(3, 1), (3, 3), (6, 3)]
    drawn = prior.sample(2, shapes=shapes, seed=0)
    assert [tuple(one.shape[1:]) for one in drawn] == shapes
    assert len(prior(drawn)) == 3


def test_levels_draw_different_noise() -> None:
    torch.manual_seed(0)
    prior = HierarchicalPrior(16, [(4, 4), (4, 4)], **SMALL)
    with torch.no_grad():  # uniform logits: the codes are the noise's alone
        for level in prior.levels:
            level.head[3].weight.zero_()
            level.head[3].bias.zero_()
    top, bottom = prior.sample(1, seed=0)
    assert not torch.equal(top, bottom)


def test_one_level_is_a_pixelcnn() -> None:
    prior = HierarchicalPrior(4, [(3, 5)], hidden_channels=8, num_layers=2)
    (codes,) = prior.sample(2, seed=1)
    assert torch.equal(codes, prior.levels[0].sample((3, 5), 2, seed=1))
    assert torch.equal(prior.log_prob([codes]), prior.levels[0].log_prob(codes))


def test_every_parameter_learns() -> None:
    prior = _build(num_classes=3, attention_every=2, attention_heads=2)
    (-prior.log_prob(_codes(), torch.tensor([0, 1]))).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())


def test_saves_and_loads(tmp_path: Path) -> None:
    prior, codes = _build(dilations=[(1,), (1, 2), (1,)]).eval(), _codes()
    prior.save_pretrained(tmp_path)
    loaded = HierarchicalPrior.from_pretrained(tmp_path)
    assert torch.equal(loaded.log_prob(codes), prior.log_prob(codes))


def test_for_model_reads_the_levels() -> None:
    model = VQVAE2(
        hidden_channels=8,
        residual_channels=8,
        num_residual_blocks=1,
        levels=3,
        downsample=2,
        num_codes=7,
        code_dim=4,
    ).eval()
    prior = HierarchicalPrior.for_model(model, (16, 24), **SMALL)
    codes = model.encode(torch.rand(2, 3, 16, 24))
    assert [tuple(one.shape[1:]) for one in codes] == [tuple(shape) for shape in prior.shapes]
    assert prior.num_codes == [7, 7, 7]
    assert prior.log_prob(codes).shape == (2,)
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 8.*got 20"):
        HierarchicalPrior.for_model(model, 20)


def test_refusals() -> None:
    prior, codes = _build(), _codes()
    with pytest.raises(ValueError, match="must be a whole multiple of the one above"):
        HierarchicalPrior(4, [(2, 2), (3, 4)])
    with pytest.raises(ValueError, match="shapes must be"):
        HierarchicalPrior(4, [])
    with pytest.raises(ValueError, match="num_layers must be one value or 3, one per level; got 2"):
        _build(num_layers=[1, 2])
    with pytest.raises(ValueError, match=r"codes must be a list of 3 maps.*got 2"):
        prior(codes[:2])
    with pytest.raises(ValueError, match=r"codes\[1\] must have batch 2.*got 1"):
        prior([codes[0], codes[1][:1], codes[2]])
    with pytest.raises(ValueError, match=r"codes\[2\] must be in 0 … 5; got values"):
        prior([codes[0], codes[1], codes[2] + 6])
    with pytest.raises(ValueError, match="must be a whole multiple of the one above"):
        prior([codes[0], codes[1][:, :3], codes[2]])
    with pytest.raises(ValueError, match="temperature must be one value or 3"):
        prior.sample(1, temperature=[1.0])
    with pytest.raises(ValueError, match="given must be one value or 3"):
        prior.sample(1, given=[None])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_fit_together(name: str) -> None:
    chosen = preset(name)
    with torch.device("meta"):
        model = VQVAE2(**chosen["vqvae2"])
        prior = HierarchicalPrior(**chosen["prior"])
    assert len(prior.levels) == chosen["vqvae2"]["levels"]
    assert set(prior.num_codes) == {chosen["vqvae2"]["num_codes"]}
    fitting = HierarchicalPrior.for_model(
        model, chosen["image_size"], hidden_channels=8, num_layers=1, condition_channels=8
    )
    assert fitting.shapes == prior.shapes


def test_presets_are_copies_and_names_are_checked() -> None:
    preset("laptop-256")["vqvae2"]["levels"] = 9
    assert preset("laptop-256")["vqvae2"]["levels"] == 2
    with pytest.raises(ValueError, match="name must be one of vqvae2-imagenet256"):
        preset("none")
