"""What only a GPU can show of a training step: memory, no waiting, streams, graphs, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvq import ops

pytestmark = pytest.mark.cuda

N, K, D = 65_536, 8192, 64
MIB = 2**20


def _inputs(n: int = N, k: int = K, d: int = D, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(n, d, device="cuda", generator=generator)
    codebook = torch.randn(k, d, device="cuda", generator=generator)
    return x.requires_grad_(), codebook.requires_grad_()


def _step(x: Tensor, codebook: Tensor, gradient: str = "straight_through") -> tuple[Tensor, ...]:
    """Forward, backward to x and to the codebook, statistics."""
    out = ops.vector_quantize(x, codebook, gradient=gradient)
    loss = out.quantized.square().mean() + out.commitment.mean() + out.codebook.mean()
    grads = torch.autograd.grad(loss, (x, codebook))
    counts, sums = ops.code_statistics(x.detach(), out.indices, len(codebook))
    return (*(t.detach() for t in out), *grads, counts, sums)


def _peak(run: Callable[[], object]) -> int:
    """Bytes allocated at the worst moment of `run` beyond those before it, results included."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def test_cuda_tensors_take_the_triton_kernels() -> None:
    x, codebook = _inputs(64, 8, 4)
    for op in ("nearest_code", "vector_quantize", "residual_quantize"):
        assert ops.explain(op, x, codebook).startswith(f"{op}: triton")
    assert ops.explain("code_statistics", x).startswith("code_statistics: triton")


def test_memory_of_the_search() -> None:
    x, codebook = _inputs()
    # The indices, the float16 operands of both sides, records of a few numbers by row and code.
    allowed = x.nbytes + 2 * codebook.nbytes + 64 * (N + K) + 4 * MIB
    assert _peak(lambda: ops.nearest_code(x, codebook)) <= allowed < N * K


def test_memory_of_a_training_step() -> None:
    x, codebook = _inputs()

    def forward_backward() -> object:
        out = ops.vector_quantize(x, codebook)
        return out, torch.autograd.grad(
            (out.quantized, out.commitment), x, (upstream, torch.ones_like(out.commitment))
        )

    upstream = torch.randn_like(x)
    # Results: quantized rows and their gradient, an index and two losses by row. Scratch: one of
    # the input's size and one of the codebook's.
    results = 2 * x.nbytes + 32 * N
    allowed = results + x.nbytes + 2 * codebook.nbytes + 64 * (N + K) + 4 * MIB
    assert _peak(forward_backward) <= allowed < N * K


def test_memory_of_the_sums() -> None:
    x, codebook = _inputs()
    indices = torch.randint(-1, K, (N,), device="cuda")
    allowed = x.nbytes + 2 * codebook.nbytes + 4 * MIB
    assert _peak(lambda: ops.code_statistics(x.detach(), indices, K)) <= allowed < N * K


def test_nothing_waits_for_the_device() -> None:
    x, codebook = _inputs()
    codebooks = torch.stack([codebook.detach()] * 3)
    _step(x, codebook)
    ops.residual_quantize(x.detach(), codebooks)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(x, codebook, "rotation")
        ops.residual_quantize(x.detach(), codebooks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_bitwise_repeatable(gradient: str) -> None:
    x, codebook = _inputs()
    with torch.no_grad():  # one code owns half of the rows
        x[: N // 2] = codebook[7] + 1e-3 * x[: N // 2]
    first = _step(x, codebook, gradient)
    for _ in range(5):
        for a, b in zip(first, _step(x, codebook, gradient)):
            assert torch.equal(a, b)


def test_streams_do_not_disturb_each_other() -> None:
    cases = [_inputs(20_001, 1000 + 24 * i, 32, seed=i) for i in range(4)]
    expected = [_step(*case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(5):
        found = []
        for case, stream in zip(cases, streams):
            with torch.cuda.stream(stream):
                found.append(_step(*case))
        torch.cuda.synchronize()
        for ours, alone in zip(found, expected):
            assert all(torch.equal(a, b) for a, b in zip(ours, alone))


def test_a_cuda_graph_holds_the_step() -> None:
    x, codebook = _inputs(5000, 700, 24)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _step(x, codebook, "rotation")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(x, codebook, "rotation")
    for seed in (1, 2):
        fresh = _inputs(5000, 700, 24, seed=seed)
        with torch.no_grad():
            x.copy_(fresh[0])
            codebook.copy_(fresh[1])
            x[3] = torch.nan
            fresh[0][3] = torch.nan
        graph.replay()
        torch.cuda.synchronize()
        for ours, eager in zip(captured, _step(*fresh, "rotation")):
            assert torch.equal(ours.nan_to_num(nan=7.0), eager.nan_to_num(nan=7.0))


def test_a_cuda_graph_holds_the_residual_levels() -> None:
    x, codebooks = torch.randn(3000, 16, device="cuda"), torch.randn(4, 50, 16, device="cuda")
    expected = ops.residual_quantize(x, codebooks)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.residual_quantize(x, codebooks)
    graph.replay()
    assert torch.equal(captured.indices, expected.indices)
    assert torch.equal(captured.quantized, expected.quantized)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_to_one_graph(mode: str) -> None:
    x, codebook = _inputs(3000, 300, 24)

    def loss(x: Tensor, codebook: Tensor) -> Tensor:
        out = ops.vector_quantize(x, codebook)
        counts, sums = ops.code_statistics(x.detach(), out.indices, 300)
        used = (counts > 0).sum() + sums.mean()
        return out.quantized.square().sum() + out.commitment.sum() + out.codebook.sum() + used

    loss(x, codebook).backward()
    assert x.grad is not None
    assert codebook.grad is not None
    eager = x.grad.clone(), codebook.grad.clone()
    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for _ in range(3):
        x.grad = codebook.grad = None
        compiled(x, codebook).backward()
        for ours, expected in zip((x.grad, codebook.grad), eager):
            torch.testing.assert_close(ours, expected)


def test_autocast_changes_no_index() -> None:
    x, codebook = _inputs()
    plain = ops.nearest_code(x, codebook)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(ops.nearest_code(x, codebook), plain)


def test_a_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, codebook = _inputs(4000, 300, 24)
    other = [t.detach().to("cuda:1").requires_grad_() for t in (x, codebook)]
    for ours, theirs in zip(_step(x, codebook), _step(*other)):
        assert torch.equal(ours, theirs.to("cuda:0"))
