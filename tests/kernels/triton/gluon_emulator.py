"""Runs the Python text of a Gluon kernel on the CPU: warps, barriers, TMA copies, wgmma.

Triton interprets no Gluon. What is emulated here is the part that nearest_code_hopper.py uses, and
of it what goes wrong silently on a GPU:

- Partitions and copies take turns at random, seeded, one step at a time. A wait that nothing can
  end is an error.
- A product in flight is computed when it is waited for, and its operands must not have changed
  since it was issued: codes overwritten too early are an error.
- A result read before its wait, an accumulator reused in flight, a barrier that more arrive at than
  it counts, a copy of other than the expected size: errors.
- Shared memory starts as NaN.

Not emulated: registers, layouts, timing, memory consistency between threads of a partition.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction


class EmulationError(AssertionError):
    """The kernel did what would go wrong on a GPU."""


class Scheduler:
    """Lets one actor at a time take a step: partitions (threads) and copies in flight."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lock = threading.Condition()
        self.mine = threading.local()
        self.ready: dict[int, Callable[[], bool]] = {}
        self.copies: list[Callable[[], None]] = []
        self.turn: int | None = None
        self.failure: BaseException | None = None

    def step(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Give the turn away; come back when it is given to me, which needs `ready()`."""
        me = getattr(self.mine, "number", None)
        if me is None:  # before the partitions start
            return
        with self.lock:
            self.ready[me] = ready
            self._choose()
            self._await_turn(me)

    def _await_turn(self, me: int) -> None:
        self.lock.wait_for(lambda: self.failure is not None or self.turn == me)
        if self.failure is not None:
            raise EmulationError("another partition failed")

    def _choose(self) -> None:
        while self.ready:
            actors = [actor for actor, ready in self.ready.items() if ready()]
            if not actors and not self.copies:
                self.failure = self.failure or EmulationError("deadlock: every partition waits")
                break
            number = self.random.randrange(len(actors) + len(self.copies))
            if number < len(actors):
                self.turn = actors[number]
                break
            self.copies.pop(number - len(actors))()
        self.lock.notify_all()

    def run(self, partitions: list[Callable[[], None]]) -> None:
        """Run partitions to their ends; the first failure is raised here."""

        def body(me: int) -> None:
            self.mine.number = me
            try:
                with self.lock:
                    self._await_turn(me)
                partitions[me]()
            except BaseException as error:
                with self.lock:
                    self.failure = self.failure or error
            with self.lock:
                del self.ready[me]
                self._choose()

        self.ready = {me: lambda: True for me in range(len(partitions))}
        threads = [threading.Thread(target=body, args=(me,)) for me in self.ready]
        with self.lock:
            self._choose()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure


class Layout:
    """Stands for any layout: where elements lie is not emulated."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


class Value:
    """A tensor in registers."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape = tuple(data.shape)
        self.type = types.SimpleNamespace(layout=Layout())

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.data.permute(order))

    def split(self) -> tuple[Value, Value]:
        assert self.shape[-1] == 2
        return Value(self.data[..., 0]), Value(self.data[..., 1])

    def _with(self, other: Any, compute: Callable[[Any, Any], Tensor]) -> Value:
        return Value(compute(self.data, raw(other)))

    def __and__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a & b)

    def __or__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a | b)

    def __add__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a + b)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a * b)

    def __gt__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a > b)

    def __lt__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a < b)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return self._with(other, lambda a, b: a == b)

    def __neg__(self) -> Value:
        return Value(-self.data)


def raw(value: Any) -> Any:
    if isinstance(value, Product):
        raise EmulationError("a product was read before it was waited for")
    return value.data if isinstance(value, Value) else value


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: int) -> Any:
        return Shared(self.data[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: Layout) -> Value:
        return Value(self.data.clone())


class Barrier:
    """An mbarrier: a phase ends when its arrivals and its bytes have come."""

    def __init__(self) -> None:
        self.phase = 0
        self.count = self.pending = self.bytes = 0

    def arrive(self, count: int = 1) -> None:
        if self.pending < count:
            raise EmulationError("more arrivals at a barrier than it counts in one phase")
        self.pending -= count
        self._flip()

    def receive(self, size: int) -> None:
        self.bytes -= size
        if self.bytes < 0:
            raise EmulationError("a copy brought more bytes than its barrier expects")
        self._flip()

    def _flip(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class Product:
    """A wgmma in flight: computed when it is waited for."""

    def __init__(self, rows: Any, codes: Shared, before: Any, use_acc: bool) -> None:
        self.operands = (rows, codes)
        self.snapshot = tuple(operand.data.clone() for operand in self.operands)
        self.before = before if use_acc else None
        self.value: Value | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return raw(self)

    def finish(self) -> None:
        for operand, then in zip(self.operands, self.snapshot):
            if not torch.equal(operand.data, then):  # also where NaN: never written
                raise EmulationError("an operand changed, or was missing, under a product")
        rows, codes = (operand.data.float() for operand in self.operands)
        total = rows @ codes
        if self.before is not None:
            before = self.before.value if isinstance(self.before, Product) else self.before
            assert before is not None
            total = total + before.data
        self.value = Value(total)


class Emulator:
    """One launch of a kernel of a module, block after block.

    Args:
        module: whose kernels are run; its text is not changed.
        seed: of the schedule.
    """

    def __init__(self, module: types.ModuleType, seed: int = 0) -> None:
        self.scheduler = Scheduler(seed)
        self.flying: dict[int, list[Product]] = {}
        self.block = self.blocks = 0
        self.namespace: dict[str, Any] = {}
        for name, value in vars(module).items():
            function = value.fn if isinstance(value, JITFunction) else value
            if getattr(function, "__module__", None) == module.__name__ and isinstance(
                function, types.FunctionType
            ):
                value = types.FunctionType(function.__code__, self.namespace, name)
            elif type(value).__name__ == "constexpr":
                value = value.value
            self.namespace[name] = value
        self.namespace |= {
            "gl": self._language(),
            "mbarrier": types.SimpleNamespace(
                init=self._init, wait=self._wait, arrive=self._arrive, expect=self._expect,
                MBarrierLayout=Layout,
            ),
            "_load_tile": self._load_tile,
            "warpgroup_mma": self._issue,
            "warpgroup_mma_wait": self._finish,
            "fence_async_shared": lambda: None,
        }  # fmt: skip

    def launch(self, name: str, blocks: int, *arguments: Any, **constants: Any) -> None:
        seed = self.scheduler.random.random()
        for block in range(blocks):
            self.scheduler = Scheduler(hash((seed, block)))
            self.block, self.blocks, self.flying = block, blocks, {}
            self.namespace[name](*arguments, **constants)

    # Barriers and copies.

    def _init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def _wait(self, barrier: Barrier, phase: int) -> None:
        self.scheduler.step(lambda: barrier.phase != phase)

    def _arrive(self, barrier: Barrier, count: int = 1) -> None:
        # One thread arrives for its partition, so what the partition reads must be complete.
        barrier.arrive(count)
        self.scheduler.step()

    def _expect(self, barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        barrier.arrive()
        self.scheduler.step()

    def _load_tile(self, described: Any, at: list[int], barrier: Barrier, target: Shared) -> None:
        def copy() -> None:
            tile = torch.zeros(described.block_shape, dtype=described.base.dtype)
            inside = [slice(start, start + size) for start, size in zip(at, described.block_shape)]
            found = described.base[tuple(inside)]  # what lies outside comes as zeros
            tile[tuple(slice(size) for size in found.shape)] = found
            target.data.copy_(tile)
            barrier.receive(tile.numel() * tile.element_size())

        with self.scheduler.lock:
            self.scheduler.copies.append(copy)
        self.scheduler.step()

    # Products.

    def _issue(
        self, rows: Any, codes: Shared, accumulator: Any, use_acc: bool, is_async: bool
    ) -> Product:
        mine = self.flying.setdefault(threading.get_ident(), [])
        if isinstance(accumulator, Product) and not (use_acc and accumulator in mine):
            raise EmulationError("an accumulator was given away while its product was in flight")
        product = Product(rows, codes, accumulator, use_acc)
        mine.append(product)
        self.scheduler.step()
        return product

    def _finish(self, left: int, deps: list[Product]) -> Value:
        self.scheduler.step()
        mine = self.flying[threading.get_ident()]
        while len(mine) > left:
            mine.pop(0).finish()
        (product,) = deps
        if product.value is None:
            raise EmulationError("a product was used that the wait leaves in flight")
        return product.value

    # The language.

    def _language(self) -> types.SimpleNamespace:
        def full(shape: list[int], value: Any, dtype: torch.dtype, layout: Layout) -> Value:
            return Value(torch.full(shape, value, dtype=dtype))

        def where(condition: Any, a: Any, b: Any) -> Any:
            if isinstance(condition, bool):
                return a if condition else b
            return Value(torch.where(raw(condition), raw(a), raw(b)))

        def reduce(values: Any, axis: int, combine: Callable[..., Any]) -> Any:
            columns = [[Value(c) for c in raw(value).unbind(axis)] for value in values]
            total = tuple(column[0] for column in columns)
            for other in zip(*(column[1:] for column in columns)):
                total = combine(*total, *other)
            return total

        def store(pointer: tuple[Tensor, Tensor], value: Value, mask: Value) -> None:
            target, at = pointer
            target[at[mask.data].long()] = value.data[mask.data].to(target.dtype)

        def load(pointer: tuple[Tensor, Tensor], mask: Value, other: float) -> Value:
            source, at = pointer
            found = torch.full(at.shape, other, dtype=source.dtype)
            found[mask.data] = source[at[mask.data].long()]
            return Value(found)

        def allocate(dtype: Any, shape: list[int], layout: Layout) -> Any:
            if dtype is torch.int64:
                return Barriers(shape[0])
            return Shared(torch.full(shape, float("nan"), dtype=dtype))

        return types.SimpleNamespace(
            constexpr=int, int32=torch.int32, int64=torch.int64,
            float16=torch.float16, float32=torch.float32,
            NVMMADistributedLayout=Layout, SliceLayout=Layout, DotOperandLayout=Layout,
            full=full, where=where, reduce=reduce, store=store, load=load,
            zeros=lambda shape, dtype, layout: full(shape, 0, dtype, layout),
            arange=lambda a, b, layout: Value(torch.arange(a, b, dtype=torch.int32)),
            expand_dims=lambda value, axis: Value(raw(value).unsqueeze(axis)),
            maximum=lambda a, b: Value(torch.maximum(raw(a), raw(b))),
            minimum=lambda a, b: Value(torch.minimum(raw(a), raw(b))),
            max=lambda value, axis: Value(raw(value).amax(axis)),
            min=lambda value, axis: Value(raw(value).amin(axis)),
            convert_layout=lambda value, layout: value,
            inline_asm_elementwise=self._assembly,
            static_range=range, cdiv=lambda a, b: -(-a // b),
            program_id=lambda axis: self.block, num_programs=lambda axis: self.blocks,
            allocate_shared_memory=allocate, warp_specialize=self._warp_specialize,
        )  # fmt: skip

    def _assembly(self, text: str, constraints: str, operands: list[Any], **_: Any) -> Value:
        meanings: dict[str, Callable[..., Tensor]] = {
            "max.f32 $0, $1, $2;": torch.maximum,
            "fma.rn.f32 $0, $1, $2, $3;": lambda a, b, c: (
                a.double() * b.double() + c.double()
            ).float(),
        }
        return Value(meanings[text](*map(raw, operands)))

    def _warp_specialize(
        self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any
    ) -> None:
        calls = [lambda f=function, a=args: f(*a) for function, args in partitions]
        self.scheduler.run(calls)
        if any(self.flying.values()):
            raise EmulationError("a partition ended with products in flight")


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.all[i]


class Pointer:
    """A kernel's pointer argument: adding offsets gives what load and store take."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __add__(self, offsets: Value) -> tuple[Tensor, Tensor]:
        return self.tensor, offsets.data
