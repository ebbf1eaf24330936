"""Proving whole maps: what is wrong is found, put right and drawn again from there."""

from __future__ import annotations

import warnings

import pytest
import torch
from sampling.priors import build_prior, conditioning_of
from torch import Tensor

from fastvq import sampling
from fastvq.sampling import draw as draw_module
from fastvq.sampling.full import FullExecutor
from fastvq.sampling.proof import draw_and_prove

SHAPE = (2, 3)


def _request(n: int, verify: bool = False) -> sampling.Request:
    cpu = torch.device("cpu")
    return sampling.make_request(
        SHAPE, n, num_codes=10, device=cpu, temperature=0.0, seed=0, verify=verify
    )


def _counting_prior(codes: Tensor, sample: Tensor) -> Tensor:
    """Logits (1, 10, H, W) whose argmax is the sample's index, then the code before plus one."""
    before = torch.cat([sample - 1, codes.flatten()[:-1]])
    wanted = (before + 1) % 10
    return torch.nn.functional.one_hot(wanted, 10).double().T.view(1, 10, *SHAPE)


class _Careless:
    """Continues each map by counting, but each call writes 9 at the next of its errors."""

    def __init__(self, errors: list[list[int]], told: bool = True) -> None:
        self.errors, self.told, self.calls = errors, told, []

    def __call__(self, codes: Tensor, samples: Tensor) -> Tensor:
        self.calls.append(samples.tolist())
        doubts = torch.zeros_like(codes, dtype=torch.bool)
        for place, sample in enumerate(samples.tolist()):
            flat, doubt = codes[place].flatten(), doubts[place].flatten()
            before = sample - 1
            for position in range(len(flat)):
                if flat[position] < 0:
                    flat[position] = before + 1
                    if self.errors[sample][:1] == [position] and not doubt.any():
                        self.errors[sample].pop(0)
                        flat[position] = 9
                        doubt[position] = True
                before = int(flat[position])
                flat[position] %= 10
            codes[place] = flat.view(SHAPE)
            doubts[place] = doubt.view(SHAPE) & self.told
        return doubts


@pytest.mark.parametrize("verify", [False, True])
def test_maps_are_drawn_again_from_the_first_mistake(verify: bool) -> None:
    blank = torch.full((3, *SHAPE), -1)
    blank[0, 0, 1], blank[2, 1, 1] = 5, 0
    draw_maps = _Careless([[], [1, 4], [3]], told=not verify)
    codes = draw_and_prove(draw_maps, _counting_prior, blank, _request(3, verify=verify))
    assert codes.flatten(1).tolist() == [
        [0, 5, 6, 7, 8, 9],
        [1, 2, 3, 4, 5, 6],
        [2, 3, 4, 5, 0, 1],
    ]
    assert draw_maps.calls == [[0, 1, 2], [1, 2], [1]]


def test_a_mistake_without_doubt_is_told() -> None:
    """Beside a doubt that proves right, in a map that is proven because of it."""
    draw_maps = _Careless([[2]], told=False)

    def with_a_doubt(codes: Tensor, samples: Tensor) -> Tensor:
        doubts = draw_maps(codes, samples)
        doubts[0, 0, 0] = True
        return doubts

    blank = torch.full((1, *SHAPE), -1)
    with pytest.warns(UserWarning, match="differ from float64 by more than the tolerance"):
        codes = draw_and_prove(with_a_doubt, _counting_prior, blank, _request(1))
    assert codes.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_maps_without_doubt_are_not_computed_again() -> None:
    def refuse(codes: Tensor, sample: Tensor) -> Tensor:
        raise AssertionError("no draw is in doubt")

    blank = torch.full((2, *SHAPE), -1)
    codes = draw_and_prove(_Careless([[], []]), refuse, blank, _request(2))
    assert codes[1].flatten().tolist() == [1, 2, 3, 4, 5, 6]


class _Disturbed(FullExecutor):
    """Logits off by 0.3, as no rounding would."""

    def step(self, codes: Tensor, row: int, column: int, want_logits: bool) -> Tensor | None:
        logits = super().step(codes, row, column, want_logits)
        return None if logits is None else logits + 0.3 * torch.randn_like(logits).sign()


@pytest.mark.parametrize("rule", [{}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.8}])
def test_verified_codes_rest_on_no_tolerance(
    rule: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shape, n = "condition", (3, 5), 3
    model = build_prior(name)
    arguments = {**rule, **conditioning_of(name, n, shape), "seed": 1}
    expected = model.sample(shape, n, **arguments)
    monkeypatch.setattr("fastvq.sampling.loop.FullExecutor", _Disturbed)
    monkeypatch.setattr(draw_module, "TOLERANCE", 0.0)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, which a tolerance of 0 leaves in doubt
        wrong = model.sample(shape, n, method="full", **arguments)
        right = model.sample(shape, n, method="full", verify=True, **arguments)
    assert not torch.equal(wrong, expected)
    assert torch.equal(right, expected)


def test_verifying_changes_no_code() -> None:
    model, shape = build_prior("plain"), (4, 5)
    assert torch.equal(model.sample(shape, 3, seed=2, verify=True), model.sample(shape, 3, seed=2))


def test_what_is_not_finite_is_named() -> None:
    def broken(codes: Tensor, sample: Tensor) -> Tensor:
        logits = _counting_prior(codes, sample)
        logits[..., 1, 2] = torch.nan
        return logits

    blank = torch.full((1, *SHAPE), -1)
    with pytest.raises(RuntimeError, match="logits at row 1, column 2 must be finite"):
        draw_and_prove(_Careless([[]]), broken, blank, _request(1, verify=True))
