"""Exact incremental sampling on GPUs: whole maps of codes without waiting for the device.

The vertical stack of a row (`vertical`) is one CUDA graph, the kernels of one code
(`kernels/triton/sample_row`) another; both are replayed with a position that lives on the device.
Nothing in a map depends on what was drawn in it: a draw in doubt is taken at face value and
marked, and `proof` settles it once the map is there.

Launches per code: two for a gated layer, three for attention, two for the head, one for the draw,
one for the next position.

Buffers, for n samples, C channels, H × W maps: as in `cached`, keys beside their values as
(n, H·W, 2C).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastvq.nn.causal_attention import coordinates
from fastvq.ops.backends import why_not
from fastvq.sampling.noise import sample_states
from fastvq.sampling.plan import AttentionPlan, CausalLayerPlan, PriorPlan
from fastvq.sampling.request import Conditioning, Request
from fastvq.sampling.vertical import VerticalStack

# The draw holds a code's scores in one program's registers.
MOST_CODES = 2048


def can_run(plan: PriorPlan, *, interpreted: bool = False) -> bool:
    """Whether the Triton kernels draw from this plan: maps, float32 on a GPU, at most 2048 codes.

    Args:
        interpreted: Triton's interpreter will do, which runs on a CPU to check values.
    """
    weight = plan.embedding
    if plan.dimensions != 2 or weight.dtype != torch.float32 or len(weight) > MOST_CODES:
        return False
    return why_not("triton", "sample_row", weight, by_name=interpreted) is None


class Replayed:
    """A function of no arguments whose kernels are captured at the second call and replayed.

    The first call runs them one by one: it compiles what must be compiled.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == 1:
            self._function()
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        # Not `torch.cuda.graph`, which waits for the device and collects garbage first.
        graph = torch.cuda.CUDAGraph()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            graph.capture_begin()
            try:
                self._function()
            finally:
                graph.capture_end()
        current.wait_stream(side)
        return graph


Launcher = Callable[[Callable[[], None]], Callable[[], None]]


def one_by_one(function: Callable[[], None]) -> Callable[[], None]:
    """The launcher without graphs, for Triton's interpreter."""
    return function


class GpuMapExecutor:
    """Draws whole maps.

    Args:
        plan: the prior's weights; `can_run(plan)`.
        conditioning: class labels and map of every sample; the map in float32.
        request: what to draw; its noise and rule are used here.
        weights_dtype: how the weights of the products are kept, float32 or bfloat16. bfloat16 is
            for a prior whose weights have it already: nothing is rounded.
        launcher: how a function that launches kernels is called again and again.
    """

    def __init__(
        self,
        plan: PriorPlan,
        conditioning: Conditioning,
        request: Request,
        *,
        weights_dtype: torch.dtype = torch.float32,
        launcher: Launcher | None = None,
    ) -> None:
        n, height, width = request.num_samples, request.height, request.width
        self._plan, self._request, self._weights_dtype = plan, request, weights_dtype
        new = plan.embedding.new_zeros
        self._vertical = VerticalStack(plan, conditioning, n, width)
        self._codes = new((n, height, width), dtype=torch.int64)
        self._doubts = new((n, height, width), dtype=torch.int8)
        self.logits = new(n, request.num_codes)  # of the code drawn last
        self._position, self._row = new(1, dtype=torch.int64), new(1, dtype=torch.int64)
        if launcher is None:
            launcher = Replayed if plan.embedding.is_cuda else one_by_one
        features, draw, keep = self._launches()
        self._start_row = launcher(self._next_row)
        self._draw_code = launcher(lambda: self._step([*features, *draw]))
        self._keep_code = launcher(lambda: self._step([*features, keep]))

    def draw(self, codes: Tensor, after_row: Callable[[], None] = lambda: None) -> Tensor:
        """Draw the unknown codes (−1) in place.

        Args:
            codes: (n, H, W) int64.
            after_row: called when a row's launches are on their way.
        Returns:
            (n, H, W) bool, on the device: which draws are in doubt.
        """
        known = (codes >= 0).all(dim=0).tolist()
        self._codes.copy_(codes)
        for state in (self._doubts, self._position, self._row):
            state.zero_()
        with torch.cuda.device_of(codes):
            for columns in known:
                self._start_row()
                for is_known in columns:
                    (self._keep_code if is_known else self._draw_code)()
                after_row()
        codes.copy_(self._codes)
        return self._doubts.bool()

    def _next_row(self) -> None:
        self._vertical.start_row(self._codes, self._row)
        self._row += 1

    def _step(self, launches: list[Callable[[], None]]) -> None:
        for launch in launches:
            launch()
        self._position += 1

    def _weight(self, weight: Tensor, taps: int = 1) -> Tensor:
        """(taps · inputs, outputs) → (outputs, taps, inputs)."""
        return weight.T.unflatten(1, (taps, -1)).to(self._weights_dtype).contiguous()

    def _launches(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]], partial[None]]:
        """The kernels of one code: its features; the head and the draw; or its known code."""
        from fastvq.kernels.triton.sample_row import Columns, draw_code, row_product

        plan, rule = self._plan, self._request.rule
        n, width = self._request.num_samples, self._request.width
        num_codes, channels = plan.embedding.shape
        head, new = plan.head, plan.embedding.new_zeros

        def vectors(size: int) -> Columns:
            return Columns(new(n, size), size)

        def same(bias: Tensor) -> Columns:
            return Columns(bias, 0)

        product = partial(row_product, position=self._position, width=width)
        # Of a gated layer, every column's input of the current row, `reach` columns of zeros first.
        padded = [
            new(n, layer.reach + width, channels) if isinstance(layer, CausalLayerPlan) else None
            for layer in plan.layers
        ]
        inputs = [
            vectors(channels)
            if rows is None
            else Columns(rows[:, rows.shape[1] - width :], rows.stride(0), channels)
            for rows in padded
        ]
        inputs.append(vectors(channels))  # the head's
        gated, hidden = vectors(channels), vectors(head.hidden_weight.shape[1])
        logits = Columns(self.logits, num_codes)
        features: list[Callable[[], None]] = []
        row_terms = iter(self._vertical.row_terms)
        for layer, rows, here, after in zip(plan.layers, padded, inputs, inputs[1:]):
            if isinstance(layer, AttentionPlan):
                features += self._attention(layer, here, after, product)
                continue
            assert rows is not None
            terms = next(row_terms)
            features.append(
                partial(
                    product,
                    Columns(rows, rows.stride(0), channels),
                    self._weight(layer.horizontal_weight, layer.taps),
                    Columns(terms, terms.stride(1), terms.stride(0)),
                    gated,
                    taps=layer.taps,
                    dilation=layer.dilation,
                    gated=True,
                )
            )
            weight, bias = self._weight(layer.out_weight), same(layer.out_bias)
            residual = here if layer.residual else None
            features.append(partial(product, gated, weight, bias, after, residual=residual))
        weight, bias = self._weight(head.hidden_weight), same(head.hidden_bias)
        to_hidden = partial(product, inputs[-1], weight, bias, hidden, rectified=True)
        weight, bias = self._weight(head.logit_weight), same(head.logit_bias)
        to_logits = partial(product, hidden, weight, bias, logits, rectified=True)
        top_p = 1.0 if rule.top_p is None else rule.top_p
        drawn = partial(
            draw_code,
            states=sample_states(self._request.seed, self._request.samples, self._request.level),
            codes=self._codes,
            doubts=self._doubts,
            embedding=plan.embedding.contiguous(),
            first_input=inputs[0],
            position=self._position,
            rule=torch.tensor(
                [rule.temperature, top_p], dtype=torch.float64, device=self._codes.device
            ),
            greedy=rule.temperature == 0,
            top_k=rule.top_k,
            top_p=top_p < 1,
        )
        draw: list[Callable[[], None]] = [to_hidden, to_logits, partial(drawn, logits.tensor)]
        return features, draw, partial(drawn, None)

    def _attention(
        self, plan: AttentionPlan, here: object, after: object, product: partial[None]
    ) -> list[Callable[[], None]]:
        """Query, key and value; what the query sees; the projection of that."""
        from fastvq.kernels.triton.sample_row import Columns, attend

        request, channels = self._request, plan.out_weight.shape[0]
        positions = request.height * request.width
        new = plan.out_weight.new_zeros
        n = request.num_samples
        query, seen, cache = new(n, channels), new(n, channels), new(n, positions, 2 * channels)
        position = coordinates(request.height, request.width, like=plan.out_weight).flatten(1).T
        terms = position @ plan.position_weight + plan.bias  # (H·W, 3C)
        return [
            partial(
                product,
                here,
                self._weight(plan.weight),
                Columns(terms, 0, position=3 * channels),
                Columns(cache, positions * 2 * channels, position=2 * channels),
                head=query,
            ),
            partial(attend, query, cache, seen, self._position, plan.heads),
            partial(
                product,
                Columns(seen, channels),
                self._weight(plan.out_weight),
                Columns(plan.out_bias, 0),
                after,
                residual=here,
            ),
        ]
