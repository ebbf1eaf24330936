"""Quantizers of other libraries before and after `replace_modules`: everything stays equal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from compat import host_modules as hosts
from ops.nearest_code_cases import ordered_argmin
from tolerances import UNIT_ROUNDOFF
from torch import Tensor, nn

import fastvq
from fastvq.compat import equivalent

DIM, CODES, STEPS = 8, 24, 4


class Case(NamedTuple):
    """A host module, an input for it, and how many quantizers are replaced in it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    replaced: int


def _map_cases(name: str, cls: Any, options: list[dict[str, Any]]) -> dict[str, Case]:
    return {
        f"{name} {' '.join(map(str, chosen))}".strip(): Case(
            lambda chosen=chosen: cls(CODES, DIM, 0.25, **chosen), (2, DIM, 5, 4), 1
        )
        for chosen in options
    }


REMAPS: list[dict[str, Any]] = [
    {},
    {"legacy": False},
    {"sane_index_shape": True},
]
REMAPPED = [
    {"remap": [5, 2, 11, 3, 7, 5], "unknown_index": "extra"},
    {"remap": [5, 2, 11, 3, 7], "unknown_index": "random", "sane_index_shape": True},
    {"remap": list(range(0, CODES, 2)), "unknown_index": 1, "legacy": False},
]
CASES: dict[str, Case] = {
    "rosinality": Case(lambda: hosts.Quantize(DIM, CODES), (2, 5, 4, DIM), 1),
    "rosinality one channel": Case(lambda: hosts.Quantize(1, CODES, 0.9), (7, 1), 1),
    **_map_cases("taming 1", hosts.VectorQuantizer, [{}]),
    **_map_cases("taming 2", hosts.VectorQuantizer2, [*REMAPS, *REMAPPED]),
    **_map_cases("diffusers", hosts.DiffusersVectorQuantizer, [*REMAPS, *REMAPPED]),
    **{
        f"llamagen ratio {ratio} l2 {l2} usage {usage}": Case(
            lambda ratio=ratio, l2=l2, usage=usage: hosts.LlamaGenVectorQuantizer(
                CODES, DIM, 0.25, ratio, l2, usage
            ),
            (2, DIM, 5, 4),
            1,
        )
        for ratio, l2, usage in ((0.0, True, True), (0.1, True, False), (0.1, False, True))
    },
    "encodec": Case(
        lambda: hosts.ResidualVectorQuantization(
            num_quantizers=3, dim=DIM, codebook_size=CODES, kmeans_init=False
        ),
        (2, DIM, 100),
        4,
    ),
    "encodec k-means": Case(
        lambda: hosts.ResidualVectorQuantization(
            num_quantizers=2, dim=DIM, codebook_size=CODES, kmeans_init=True, kmeans_iters=2
        ),
        (2, DIM, 100),
        3,
    ),
    "encodec projected": Case(
        lambda: hosts.ResidualVectorQuantization(
            num_quantizers=2, dim=DIM, codebook_size=CODES, codebook_dim=3, kmeans_init=False
        ),
        (2, DIM, 100),
        3,
    ),
    "encodec one": Case(
        lambda: hosts.VectorQuantization(DIM, CODES, kmeans_init=False), (2, DIM, 100), 1
    ),
    "dac": Case(lambda: hosts.ResidualVectorQuantize(20, 3, CODES, 0.5), (4, 20, 9), 3),
}
if hosts.REAL["diffusers"]:
    CASES |= _map_cases("real diffusers", hosts.REAL["diffusers"], REMAPS)
if hosts.REAL["encodec"]:
    for kmeans in (False, True):
        CASES[f"real encodec {kmeans}"] = Case(
            lambda kmeans=kmeans: hosts.REAL["encodec"](
                num_quantizers=3, dim=DIM, codebook_size=CODES, kmeans_init=kmeans
            ),
            (2, DIM, 100),
            4,
        )
if hosts.REAL["dac"]:
    CASES["real dac"] = Case(
        lambda: hosts.REAL["dac"](20, 3, CODES, quantizer_dropout=0.5), (4, 20, 9), 3
    )
by_case = pytest.mark.parametrize("name", CASES)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The host in a model, and a replaced copy of that model."""
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(nn.ModuleDict({"q": CASES[name].make()}).to(dtype))
        _detach_buffers(models[-1])
    host, ours = models
    reports = fastvq.replace_modules(ours)
    assert all(report.replaced for report in reports), "\n".join(map(str, reports))
    assert len(reports) == CASES[name].replaced
    return host, ours


def _detach_buffers(model: nn.Module) -> None:
    """Undo what a cast makes of a parameter among the buffers: part of a graph."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.detach()


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randn(CASES[name].shape, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(STEPS)
    ]


def flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


def assert_equal_results(got: Any, expected: Any, terms: int) -> None:
    """The same structure, shapes and dtypes; integers equal; floats to the rounding of their sums.

    Every float here is a product of sums of at most `terms` terms that are not larger than a few
    times the largest element: n·u relative to that, on each side, and a factor of 4 for the
    few sums in a row.
    """
    got, expected = flat(got), flat(expected)
    assert [type(leaf) for leaf in got] == [type(leaf) for leaf in expected]
    for ours, theirs in zip(got, expected):
        if not isinstance(theirs, Tensor):
            assert ours == theirs
            continue
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs)
        elif theirs.numel():
            size = 1.0 + theirs.abs().max().item()
            bound = 4 * 2 * terms * UNIT_ROUNDOFF[theirs.dtype] * size
            assert (ours - theirs).abs().max().item() <= bound


def total_loss(outputs: Any, weight: Tensor) -> Tensor:
    """A scalar that depends on every output that has a gradient."""
    loss = torch.zeros((), dtype=weight.dtype)
    for leaf in flat(outputs):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            scale = weight[: leaf.numel()].view(leaf.shape) if leaf.numel() > 1 else 0.7
            loss = loss + (leaf * scale).sum()
    return loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@by_case
def test_training_steps_are_equal(name: str, dtype: torch.dtype) -> None:
    host, ours = make(name, dtype)
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.05) if list(model.parameters()) else None
        for model in (host, ours)
    ]
    weight = torch.randn(4096, generator=torch.Generator().manual_seed(5), dtype=dtype)
    terms = STEPS * math.prod(CASES[name].shape)
    for step, x in enumerate(inputs(name, dtype)):
        results = []
        for model, optimizer in zip((host, ours), optimizers):
            torch.manual_seed(step)
            leaf = x.clone().requires_grad_()
            outputs = model["q"](leaf)
            total_loss(outputs, weight).backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            results.append((outputs, leaf.grad, gradients, list(model.state_dict().values())))
        assert_equal_results(results[1], results[0], terms)


@by_case
def test_evaluation_is_equal_and_changes_nothing(name: str) -> None:
    host, ours = make(name)
    for model in (host, ours):
        torch.manual_seed(0)
        model["q"](inputs(name, torch.float32)[0])
        model.eval()
    before = copy.deepcopy(ours.state_dict())
    terms = STEPS * math.prod(CASES[name].shape)
    for x in inputs(name, torch.float32):
        results = []
        for model in (host, ours):
            torch.manual_seed(0)
            with torch.no_grad():
                results.append(model["q"](x))
        assert_equal_results(results[1], results[0], terms)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def searched(host: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a host compares and the codes it compares them to, as it rounds them."""
    if isinstance(host, hosts.Quantize):
        return x.reshape(-1, host.dim), host.embed.T
    if isinstance(host, hosts.EuclideanCodebook):
        return x.reshape(-1, x.shape[-1]), host.embed
    if isinstance(host, hosts.VectorQuantize):
        rows = host.in_proj(x).transpose(1, 2).reshape(-1, host.codebook_dim)
        return F.normalize(rows), F.normalize(host.codebook.weight.detach())
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    weight = host.embedding.weight.detach()
    if getattr(host, "l2_norm", False):
        return F.normalize(rows, dim=-1), F.normalize(weight, dim=-1)
    return rows, weight


SINGLE = {
    "rosinality": (lambda: hosts.Quantize(DIM, 512), (600, DIM)),
    "taming 1": (lambda: hosts.VectorQuantizer(512, DIM, 0.25), (2, DIM, 20, 15)),
    "taming 2": (lambda: hosts.VectorQuantizer2(512, DIM, 0.25), (2, DIM, 20, 15)),
    "diffusers": (lambda: hosts.DiffusersVectorQuantizer(512, DIM, 0.25), (2, DIM, 20, 15)),
    "llamagen": (
        lambda: hosts.LlamaGenVectorQuantizer(512, DIM, 0.25, 0.0, True, False),
        (2, DIM, 20, 15),
    ),
    "encodec": (lambda: hosts.EuclideanCodebook(DIM, 512, False), (2, 300, DIM)),
    "dac": (lambda: hosts.VectorQuantize(20, 512, DIM), (2, 20, 300)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SINGLE)
def test_indices_are_exact_and_dtypes_the_hosts(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    build, shape = SINGLE[name]
    host = build().to(dtype).eval()
    ours = equivalent(host)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        rows, codes = searched(host, x)
        got, expected = flat(ours(x)), flat(host(x))
    indices = [leaf for leaf in got if isinstance(leaf, Tensor) and leaf.dtype == torch.int64]
    assert torch.equal(indices[0].view(-1), ordered_argmin(rows, codes, "l2"))
    for mine, theirs in zip(got, expected):
        if isinstance(theirs, Tensor):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert [p.dtype for p in ours.state_dict().values()] == [
        p.dtype for p in host.state_dict().values()
    ]


def test_a_host_in_bfloat16_gives_wrong_indices_and_the_replacement_does_not() -> None:
    torch.manual_seed(0)
    host = hosts.VectorQuantizer2(1024, 64, 0.25).bfloat16()
    x = torch.randn(2, 64, 16, 16).bfloat16()
    rows, codes = searched(host, x)
    truth = ordered_argmin(rows, codes, "l2")
    assert not torch.equal(host(x)[2][2], truth)
    assert torch.equal(equivalent(host)(x)[2][2], truth)


@by_case
def test_state_dicts_load_in_both_directions(name: str) -> None:
    host, ours = make(name)
    ours["q"](inputs(name, torch.float32)[0])
    fresh, _ = make(name)
    fresh.load_state_dict(ours.state_dict())
    again = make(name)[1]
    again.load_state_dict(fresh.state_dict())
    assert list(ours.state_dict()) == list(host.state_dict()) == list(again.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    for model in (ours.eval(), fresh.eval(), again.eval()):
        torch.manual_seed(0)
        last = model["q"](inputs(name, torch.float32)[1])
        if model is ours:
            first = last
        assert_equal_results(last, first, STEPS * math.prod(CASES[name].shape))


@pytest.mark.parametrize("name", [name for name in CASES if "dac" not in name])
def test_a_replaced_model_can_be_copied(name: str) -> None:
    _, ours = make(name)
    twin = copy.deepcopy(ours)
    for x in inputs(name, torch.float32)[:2]:
        results = []
        for model in (ours, twin):
            torch.manual_seed(0)
            results.append((model["q"](x), list(model.state_dict().values())))
        assert_equal_results(results[1], results[0], 0)


class Tokenizer(nn.Module):
    """Quantizers in the places where models keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize_b = hosts.Quantize(DIM, CODES)
        self.levels = nn.ModuleList([hosts.VectorQuantizer2(CODES, DIM, 0.25)])
        self.shared = self.levels[0]
        self.head = nn.Linear(DIM, DIM)


def test_the_report_names_every_place_and_tensors_stay_the_same() -> None:
    model = Tokenizer().eval()
    model.shared.embedding.weight.requires_grad_(False)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    head = model.head
    reports = fastvq.replace_modules(model)
    assert [str(report) for report in reports] == [
        "quantize_b: Quantize (rosinality/vq-vae-2-pytorch): replaced",
        "levels.0, shared: VectorQuantizer2 (taming-transformers): replaced",
    ]
    assert [(report.path, report.other_paths, report.replaced) for report in reports] == [
        ("quantize_b", (), True),
        ("levels.0", ("shared",), True),
    ]
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert model.shared is model.levels[0]
    assert model.head is head
    assert not model.quantize_b.training
    assert not model.shared.embedding.weight.requires_grad
    assert model.quantize_b.n_embed == CODES
    assert fastvq.replace_modules(model) == []


def test_random_state_and_host_stay_as_they_were() -> None:
    model = nn.ModuleList(case.make() for case in CASES.values())
    _detach_buffers(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    fastvq.replace_modules(model)
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def left(module: nn.Module) -> str:
    """Why a module stays, after checking that it does."""
    model = nn.ModuleDict({"inner": module})
    (report,) = fastvq.replace_modules(model)
    assert model["inner"] is module
    assert not report.replaced
    assert str(report).startswith("inner: ")
    assert report.reason in str(report)
    return report.reason


def _hooked() -> nn.Module:
    module = hosts.Quantize(DIM, CODES)
    module.register_forward_hook(lambda *_: None)
    return module


def _hooked_inside() -> nn.Module:
    module = hosts.VectorQuantizer2(CODES, DIM, 0.25)
    module.embedding.register_forward_pre_hook(lambda *_: None)
    return module


def _parametrized() -> nn.Module:
    module = hosts.VectorQuantizer2(CODES, DIM, 0.25)
    nn.utils.parametrizations.weight_norm(module.embedding)
    return module


def _parametrized_itself() -> nn.Module:
    module = hosts.Quantize(DIM, CODES)
    nn.utils.parametrize.register_parametrization(module, "embed", nn.Identity())
    return module


def _patched() -> nn.Module:
    module = hosts.Quantize(DIM, CODES)
    module.forward = lambda x: hosts.Quantize.forward(module, 2 * x)
    return module


def _renormed() -> nn.Module:
    module = hosts.VectorQuantizer(CODES, DIM, 0.25)
    module.embedding = nn.Embedding(CODES, DIM, max_norm=1.0)
    return module


class _Cosine(hosts.Quantize):
    """A fork: same name, path, attributes and state, other distances."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(F.normalize(input, dim=-1))


class _OtherAverage(hosts.Quantize):
    """A fork that differs in training alone."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = super().forward(input)
        if self.training:
            self.cluster_size.mul_(0.5)
        return result


class _OtherReturn(hosts.VectorQuantizer):
    """Returns in another order, as the quantizer that taming's first one was made from."""

    def forward(self, z: Tensor) -> Any:
        z_q, loss, info = super().forward(z)
        return loss, z_q, *info


def _renamed(cls: type, base: type) -> Any:
    cls.__name__, cls.__module__ = base.__name__, base.__module__
    return cls


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hooks": (_hooked, "it has hooks"),
    "hooks inside": (_hooked_inside, "its embedding has hooks"),
    "parametrized inside": (_parametrized, "its embedding has a parametrization"),
    "parametrized": (_parametrized_itself, "it has a parametrization"),
    "patched": (_patched, "its forward was replaced"),
    "max_norm": (_renormed, "not a plain nn.Embedding"),
    "meta": (lambda: hosts.Quantize(DIM, CODES).to("meta"), "meta device"),
    "another distance": (
        lambda: _renamed(_Cosine, hosts.Quantize)(DIM, CODES),
        "it computes something else in evaluation: result",
    ),
    "another average": (
        lambda: _renamed(_OtherAverage, hosts.Quantize)(DIM, CODES),
        "it computes something else in training: result['state']['cluster_size']",
    ),
    "another return": (
        lambda: _renamed(_OtherReturn, hosts.VectorQuantizer)(CODES, DIM, 0.25),
        "it computes something else",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_would_be_lost_is_left_with_the_reason(name: str) -> None:
    build, reason = LEFT[name]
    assert reason in left(build())


def test_a_subclass_is_left() -> None:
    class Logging(hosts.VectorQuantizer2):
        pass

    assert "subclass of VectorQuantizer2" in left(Logging(CODES, DIM, 0.25))


def test_the_model_itself_cannot_be_swapped_but_has_an_equivalent() -> None:
    host = hosts.Quantize(DIM, CODES).eval()
    (report,) = fastvq.replace_modules(host)
    assert not report.replaced
    assert "equivalent()" in str(report)
    x = torch.randn(9, DIM)
    assert torch.equal(equivalent(host)(x)[2], host(x)[2])
    with pytest.raises(ValueError, match="equivalent: Linear has none: it is not recognised"):
        equivalent(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got list"):
        fastvq.replace_modules([host])  # type: ignore[arg-type]


# DAC's losses are the host's own code.
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shape[1] != 20])
def test_a_vector_that_is_not_finite_costs_itself_alone(name: str) -> None:
    host, ours = make(name)
    clean = inputs(name, torch.float32)
    for model in (host, ours):
        model["q"](clean[0])
    dirty = clean[1].clone()
    if "rosinality" in name:
        dirty[0, ..., :] = torch.nan
    else:
        dirty[0, :, 0] = torch.nan
    ours.train()
    outputs = ours["q"](dirty)
    floats = [leaf for leaf in flat(outputs) if isinstance(leaf, Tensor) and leaf.dim() > 1]
    assert floats[0].isnan().any()
    assert floats[0].isfinite().any()
    assert all(value.isfinite().all() for value in ours.state_dict().values())


ENTRIES = ["taming 1", *[name for name in CASES if name.startswith(("taming 2", "diff", "llama"))]]


@pytest.mark.parametrize("name", ENTRIES)
def test_codes_of_indices(name: str) -> None:
    host, ours = make(name)
    high = getattr(host["q"], "re_embed", CODES)
    indices = torch.randint(0, high, (2 * 3 * 4,))
    shapes: list[tuple[Any, ...]] = [((2, 3, 4, DIM),)]
    if "remap" not in name:
        shapes.append((None,))
    if "llama" in name:
        shapes = [(), ((2, DIM, 3, 4),), ((2, 3, 4, DIM), False)]
    for arguments in shapes:
        expected = host["q"].get_codebook_entry(indices.clone(), *arguments)
        assert torch.equal(ours["q"].get_codebook_entry(indices, *arguments), expected)


def test_codes_of_rosinalitys_and_encodecs_indices() -> None:
    host, ours = make("rosinality")
    ids = torch.randint(0, CODES, (2, 3))
    assert torch.equal(ours["q"].embed_code(ids), host["q"].embed_code(ids))
    for name in ("encodec", "encodec projected"):
        host, ours = make(name)
        ids = torch.randint(0, CODES, (2, 2, 5))
        torch.testing.assert_close(ours["q"].decode(ids), host["q"].decode(ids), rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["encodec", "encodec projected"])
def test_encodec_levels(name: str, training: bool) -> None:
    host, ours = make(name)
    x = inputs(name, torch.float32)[0]
    for model in (host, ours):
        model.train(training)
    for levels in (None, 1, 2):
        assert torch.equal(ours["q"].encode(x, levels), host["q"].encode(x, levels))
        codes = [model["q"](x, n_q=levels)[1] for model in (ours.eval(), host.eval())]
        assert torch.equal(codes[0], codes[1])
