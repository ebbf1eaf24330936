"""What is measured of an item: nats and errors by their definitions, and the geometry of maps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvq.models import HierarchicalPrior
from fastvq.train.anomaly import AnomalyModel, Standardisation, cell_means, code_nats, spread
from fastvq.train.priors import train_prior
from fastvq.train.run_folder import load_run

from .conftest import prior_config


@pytest.fixture(scope="module")
def prior_run(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional prior over the codes of `stage1_run`."""
    return train_prior(
        prior_config(codes, tmp_path_factory.mktemp("runs") / "prior"), progress=False
    )


def items(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_spread_lays_every_code_over_its_own_cell() -> None:
    code_map = torch.arange(1.0, 7.0).view(1, 2, 3)
    laid = spread(code_map, 2)
    assert laid.shape == (1, 4, 6)
    for row in range(4):
        for column in range(6):
            assert laid[0, row, column] == code_map[0, row // 2, column // 2] / 4
    torch.testing.assert_close(laid.sum(), code_map.sum())


def test_maps_of_one_dimension() -> None:
    assert spread(torch.tensor([[2.0, 4.0]]), 2).tolist() == [[1.0, 1.0, 2.0, 2.0]]
    assert cell_means(torch.tensor([[1.0, 3.0, 5.0]]), 2).tolist() == [[2.0, 2.0, 5.0]]


def test_cell_means_by_their_definition() -> None:
    values = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1))
    means = cell_means(values, 2)
    for row in range(5):
        for column in range(4):
            top, left = row // 2 * 2, column // 2 * 2
            cell = values[:, top : top + 2, left : left + 2]
            torch.testing.assert_close(means[:, row, column], cell.mean(dim=(1, 2)))


def test_measures_by_their_definitions(prior_run: Path) -> None:
    run = load_run(prior_run)
    model: Any = run.stage1_model()
    pictures = items()
    for levels in (1, 2):
        found = AnomalyModel(run, levels=levels).measure(pictures)
        decoded = model.decode_codes(model.encode(pictures), levels=levels).clamp(0, 1)
        squared = (decoded - pictures).square()
        torch.testing.assert_close(found.mse, squared.mean(dim=(1, 2, 3)))
        variance = pictures.var(dim=(1, 2, 3), unbiased=False)
        torch.testing.assert_close(found.relative_error, found.mse / variance)
        torch.testing.assert_close(found.error.mean(dim=(1, 2)), found.mse)
        assert found.surprise is not None
        torch.testing.assert_close(found.surprise.sum(dim=(1, 2)), found.nats)
    assert found.level_nats.shape == (3, 2)


def test_surprise_adds_the_levels_over_the_codes_that_cover_a_position(prior_run: Path) -> None:
    run = load_run(prior_run)
    judge = AnomalyModel(run)
    pictures = items()
    top, bottom = code_nats(judge.prior, judge.model.encode(pictures))
    surprise = judge.measure(pictures).surprise
    assert surprise is not None
    rows, columns = 8 // top.shape[1], 8 // bottom.shape[1]
    for row, column in ((0, 0), (3, 5), (7, 7)):
        expected = top[:, row // rows, column // rows] / rows**2
        expected = expected + bottom[:, row // columns, column // columns] / columns**2
        torch.testing.assert_close(surprise[:, row, column], expected)


def test_a_flat_picture_has_a_finite_relative_error(stage1_run: Path) -> None:
    found = AnomalyModel(load_run(stage1_run)).measure(torch.full((1, 3, 8, 8), 0.5))
    assert math.isclose(float(found.relative_error), float(found.mse) * 255**2, rel_tol=1e-5)


def test_nats_under_classes_are_those_of_their_mixture() -> None:
    torch.manual_seed(0)
    prior = HierarchicalPrior(
        [3, 4], [(1, 2), (2, 2)], hidden_channels=4, num_layers=2, num_classes=3
    ).double()
    codes = [torch.randint(0, 3, (5, 1, 2)), torch.randint(0, 4, (5, 2, 2))]
    with torch.no_grad():
        maps = code_nats(prior, codes)
        each = [prior.log_prob(codes, torch.full((5,), label)) for label in range(3)]
        firsts = [prior.code_log_prob(codes, torch.full((5,), label))[0] for label in range(3)]
    assert [one.shape for one in maps] == [one.shape for one in codes]
    total = sum(one.flatten(1).sum(1) for one in maps)
    expected = -torch.stack(each).exp().mean(dim=0).log()
    # The maps are float32: a sum of 6 terms below 10, each off by half a unit: 6 · 10 · 2⁻²⁴
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=4e-6)
    first = -torch.stack(firsts)[:, :, 0, 0].exp().mean(dim=0).log()
    torch.testing.assert_close(maps[0][:, 0, 0].double(), first, rtol=0, atol=6e-7)


def test_without_a_prior_there_is_no_likelihood(stage1_run: Path) -> None:
    found = AnomalyModel(load_run(stage1_run)).measure(items())
    assert found.surprise is None
    assert found.level_nats.shape == (3, 0)
    with pytest.raises(ValueError, match="levels must be in 1 … 2"):
        AnomalyModel(load_run(stage1_run), levels=3)


def test_the_combined_score_weighs_both_alike() -> None:
    rng = np.random.default_rng(0)
    nats, errors = rng.normal(200.0, 20.0, 500), rng.normal(0.3, 0.1, 500)
    standard = Standardisation.fit(nats, errors)
    combined = standard.combined(nats, errors)
    direct = (nats - nats.mean()) / nats.std() + (errors - errors.mean()) / errors.std()
    np.testing.assert_allclose(combined, direct, rtol=1e-12, atol=1e-12)
    scaled = Standardisation.fit(10 * nats + 3, 0.01 * errors)
    np.testing.assert_allclose(
        scaled.combined(10 * nats + 3, 0.01 * errors), combined, rtol=0, atol=1e-10
    )
    with pytest.raises(ValueError, match="likelihood of held-in items must vary"):
        Standardisation.fit(np.ones(9), errors[:9])
