"""Every GPU kernel, in every shipped configuration, compiled for sm_80, sm_90 and sm_100: no GPU.

It holds under the Triton that is installed and under any other that stands before it on PYTHONPATH.
What is asserted is read from the machine code by `benchmarks/static`. The second half breaks
machine code on purpose, to show that each check sees what it is for.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

pytest.importorskip("triton")

from benchmarks.static import __main__ as report
from benchmarks.static import hazards, regression, sass
from benchmarks.static.shipped import SEARCHED, Examined, Outcome, examine

MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# ALU instructions per (row, code) pair in the main loop, by codes per slot: a fold needs one, and
# four more per slot.
MOST_ALU = {4: 2.25, 8: 1.7, 16: 1.7}
MOST_ALU_NARROW_HOPPER = 1.45
# Share of them that lies between a product's issue and the wait for it. Others are not held to
# it: ptxas 12.9 (Triton 3.9) waits for each product at once where 12.8 does not.
LEAST_OVERLAP = {"search D8": 0.5, "search D64": 0.5, "search D256": 0.5}
LEAST_OVERLAP_HOPPER = 0.55
# Moves of spilled registers that a version's assembler makes; in all other kernels there are none.
SPILLS = {
    "3.6.0": {
        ("resolve D512", 80): 4,
        ("search D16", 100): 2,
        ("sum_codes D8", 90): 3,
        ("rows vector_quantize_bwd rotation D8", 80): 2,
        ("rows vector_quantize_bwd rotation D256", 80): 2,
        ("sampling product gated n64 bfloat16", 100): 12,
    }
}
# Those of them inside a main loop: of two accumulators beside three bfloat16 pieces of 64 samples.
SPILLS_IN_LOOPS = {"3.6.0": {("sampling product gated n64 bfloat16", 100): 8}}
# Instructions per product's result and trip of a masked convolution's main loop, all kinds: below
# what the matrix unit takes for it, so that it need not wait. Per result and trip of 64 16-bit
# numbers deep it takes 4 of 128 lanes' clocks on sm_90.
MOST_ISSUED_CONVOLUTION = {("conv taps half", 90): 2.0, ("conv taps tf32", 90): 2.0}


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return examine(workers=2)


@pytest.fixture(scope="module")
def examined(outcome: Outcome) -> list[Examined]:
    return outcome.examined


@pytest.fixture(scope="module")
def programs(examined: list[Examined]) -> dict[tuple[str, int], sass.Program]:
    return {(case.name, case.capability): sass.parse(case.code.sass) for case in examined}


Programs = dict[tuple[str, int], sass.Program]


def test_every_shipped_tile_is_compiled() -> None:
    from fastvq.kernels.triton.nearest_code_tiles import choose_tiles, shipped

    for capability, widths in SEARCHED.items():
        chosen = {choose_tiles(width, divmod(capability, 10)) for width in widths}
        assert chosen == set(shipped()[f"sm_{capability}"])


def test_every_case_compiles(outcome: Outcome) -> None:
    assert outcome.failures == {}


def test_no_register_is_spilled(programs: Programs) -> None:
    import triton

    known = SPILLS.get(triton.__version__, {})
    spills = {key: sass.count_spills(program) for key, program in programs.items()}
    assert {key: n for key, n in spills.items() if n > known.get(key, 0)} == {}
    inside = SPILLS_IN_LOOPS.get(triton.__version__, {})
    for key in known.keys() & programs.keys():
        for loop in sass.find_main_loops(programs[key]):
            assert sass.count(loop.body, {"LDL", "STL"}) <= inside.get(key, 0), key


def test_shared_memory_fits(examined: list[Examined]) -> None:
    for case in examined:
        assert case.code.shared_bytes <= sass.SHARED_PER_BLOCK[case.capability], case.name
        assert sass.blocks_per_sm(case.code) >= 1, case.name


def costs(examined: list[Examined], programs: Programs) -> dict[tuple[str, int], sass.LoopCost]:
    """The dearest main loop of every kernel that scores."""
    dearest = {}
    for case in examined:
        if case.search is not None:
            loops = sass.find_main_loops(programs[case.name, case.capability])
            assert loops, f"{case.name} sm_{case.capability}: no loop has matrix instructions"
            measured = [sass.measure(loop, case.search) for loop in loops]
            dearest[case.name, case.capability] = max(measured, key=lambda cost: cost.alu)
    assert len(dearest) >= 20
    return dearest


def test_every_product_is_on_the_matrix_unit(examined: list[Examined], programs: Programs) -> None:
    for (name, capability), cost in costs(examined, programs).items():
        assert cost.products == 1, f"{name} sm_{capability}"
        wanted = MATRIX_INSTRUCTION[capability]
        found = {i.opcode for i in programs[name, capability].instructions} & sass.MATRIX
        assert found == {wanted}, f"{name} sm_{capability}"


def test_both_warpgroups_of_a_hopper_kernel_have_a_main_loop(programs: Programs) -> None:
    hopper = [program for (name, _), program in programs.items() if name.startswith("hopper")]
    assert len(hopper) >= 8
    for program in hopper:
        assert len(sass.find_main_loops(program)) == 2


def test_nothing_touches_what_is_in_flight(programs: Programs) -> None:
    for (name, capability), program in programs.items():
        found = [*hazards.find_dummies(program), *hazards.find_hazards(program)]
        assert not found, f"{name} sm_{capability}: {', '.join(map(str, found[:3]))}"


def test_alu_instructions_per_pair(examined: list[Examined], programs: Programs) -> None:
    groups = {(c.name, c.capability): c.model.group for c in examined if c.model is not None}
    over = {}
    for (name, capability), cost in costs(examined, programs).items():
        bound = most_alu(name, groups[name, capability])
        if bound is not None and cost.alu > bound:
            over[name, capability] = round(cost.alu, 2)
    assert over == {}


def most_alu(name: str, group: int) -> float | None:
    if name.startswith("search"):
        # Wider rows keep the matrix unit busier than the ALU: 512 columns cost 16 ALU operations.
        return MOST_ALU[group] if name != "search D512" else None
    return most_alu_hopper(name)


def most_alu_hopper(name: str) -> float | None:
    width = int(re.findall(r"W(\d+)", name)[0])
    return MOST_ALU_NARROW_HOPPER if width <= 32 or "norms" not in name else None


def test_folding_overlaps_the_next_product(examined: list[Examined], programs: Programs) -> None:
    for (name, capability), cost in costs(examined, programs).items():
        if capability != 90:
            continue
        least = LEAST_OVERLAP.get(name)
        if name.startswith("hopper") and most_alu_hopper(name) is not None:
            least = LEAST_OVERLAP_HOPPER
        if least is not None:
            assert cost.overlap is not None
            assert cost.overlap >= least, name


def test_the_exact_score_rounds_each_square(programs: Programs) -> None:
    resolvers = [program for (name, _), program in programs.items() if name.startswith("resolve ")]
    assert len(resolvers) >= 3
    for program in resolvers:
        opcodes = {instruction.opcode for instruction in program.instructions}
        assert {"DADD", "DMUL"} <= opcodes
        assert not opcodes & {"DFMA", "DMMA"}


def test_masked_convolutions_multiply_on_the_matrix_unit(
    examined: list[Examined], programs: Programs
) -> None:
    found = {}
    for case in examined:
        if case.product is None:
            continue
        key = case.name, case.capability
        loops = sass.find_main_loops(programs[key])
        assert len(loops) == 1, key
        found[key] = sass.measure(loops[0], case.product.search)
        # Neither a tap that is masked nor one that is live is multiplied twice or not at all.
        assert found[key].products == 1, key
        opcodes = {instruction.opcode for instruction in programs[key].instructions}
        assert opcodes & sass.MATRIX == {MATRIX_INSTRUCTION[case.capability]}, key
        # Operands go to shared memory past the registers, 16 bytes at a time where they can.
        copies = [i for i in loops[0].body if i.opcode == "LDGSTS"]
        assert copies, key
        if "taps" in case.name:
            assert all("128" in copy.name for copy in copies), key
    assert len(found) >= 18
    for key, bound in MOST_ISSUED_CONVOLUTION.items():
        assert found[key].issued <= bound, key


def test_every_product_of_a_gated_layer_is_on_the_matrix_unit(programs: Programs) -> None:
    gated = {key: p for key, p in programs.items() if "gated_masked_conv" in key[0]}
    assert len(gated) == 24
    for (name, capability), program in gated.items():
        loops = sass.find_main_loops(program)
        # Of the horizontal stack: taps and link; on the way back the 1×1 after the gate as well.
        # Where the layer is conditioned, the map's 1×1 too.
        wanted = {"vertical": 1, "horizontal": 2 + ("backward" in name)}
        conditioned = "conditioned" in name
        assert len(loops) == wanted[name.split()[2]] + conditioned, (name, capability)
        opcodes = {instruction.opcode for instruction in program.instructions}
        assert opcodes & sass.MATRIX == {MATRIX_INSTRUCTION[capability]}


def test_sums_rows_and_convolutions_are_free_of_atomics(programs: Programs) -> None:
    # Bits in shared memory are how sm_100 gives out tensor memory.
    found = {
        key: {
            instruction.name
            for instruction in program.instructions
            if instruction.opcode in {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"}
            and not instruction.name.startswith(("ATOMS.OR", "ATOMS.AND"))
        }
        for key, program in programs.items()
        if key[0].startswith(("sums", "rows", "conv"))
    }
    assert len(found) >= 60
    assert not any(found.values())


def test_no_lane_of_a_sum_waits_for_another(programs: Programs) -> None:
    for (name, capability), program in programs.items():
        if "segment_sum" in name:
            walks = [loop for loop in sass.find_loops(program) if loop.counts["DADD"]]
            assert len(walks) == 1, f"{name} sm_{capability}"
            # A key that passed through shared memory would cost a barrier a row.
            assert not walks[0].counts["BAR"], f"{name} sm_{capability}"


def test_hopper_launcher_counts_shared_memory(examined: list[Examined]) -> None:
    from fastvq.kernels.triton.nearest_code_hopper import TILINGS

    for case in examined:
        if case.name.startswith("hopper"):
            width = int(re.findall(r"W(\d+)", case.name)[0])
            has_norms = "norms" in case.name
            counted = TILINGS[width, has_norms].shared_bytes(width, has_norms)
            assert case.code.shared_bytes <= counted <= case.code.shared_bytes + 512


def test_the_report_has_a_line_for_every_case(examined: list[Examined]) -> None:
    rows = [report.summarise(case) for case in examined]
    text = report.table(rows)
    assert len(text.splitlines()) > len(examined) >= 40
    for case in examined:
        assert re.search(rf"^{re.escape(case.name)} +{case.capability} ", text, re.MULTILINE)
    assert "262144×16384×8: " in text
    assert "conv taps half, 5×5, 256 channels: " in text


def test_nothing_is_worse_than_the_committed_figures(examined: list[Examined]) -> None:
    import triton

    committed = regression.load().get(triton.__version__)
    if committed is None:
        pytest.skip(f"benchmarks/static/baseline.json has no rows for Triton {triton.__version__}")
    rows = [report.summarise(case) for case in examined]
    worse = regression.regressions(rows, committed)
    assert worse == [], "python -m benchmarks.static --update, if this is meant"


# What follows breaks the machine code of one Hopper kernel and of one plain kernel.


def sass_of(examined: list[Examined], name: str) -> Examined:
    found = [case for case in examined if (case.name, case.capability) == (name, 90)]
    if not found:
        pytest.skip(f"{name} did not compile")
    return found[0]


@pytest.fixture(params=["hopper W16", "search D8"])
def healthy(request: pytest.FixtureRequest, examined: list[Examined]) -> Examined:
    return sass_of(examined, request.param)


def main_loop_lines(case: Examined, holds: str) -> list[str]:
    """Lines of a main loop's code that hold a text."""
    loop = sass.find_main_loops(sass.parse(case.code.sass))[0]
    first, last = loop.body[0].address, loop.body[-1].address
    lines = []
    for line in case.code.sass.splitlines():
        found = re.match(r"\s*/\*([0-9a-f]{4,})\*/", line)
        if found and first <= int(found[1], 16) <= last and holds in line:
            lines.append(line)
    return lines


def broken_rules(text: str) -> set[str]:
    return {hazard.rule for hazard in hazards.find_hazards(sass.parse(text))}


def test_a_removed_wait_is_seen(healthy: Examined) -> None:
    lines = main_loop_lines(healthy, "GMMA") + main_loop_lines(healthy, "WARPGROUP.DEPBAR")
    lines.sort(key=lambda line: int(line.split("*")[1], 16))
    # A wait between two products on one accumulator could be left out.
    needed = [
        line
        for line, after in zip(lines, [*lines[1:], lines[0]])
        if "DEPBAR" in line and ("RZ" in after or "DEPBAR" in after)
    ]
    assert len(needed) >= 2
    seen = [
        "accumulator touched in flight" in broken_rules(healthy.code.sass.replace(wait, ""))
        for wait in needed
    ]
    # Where a warpgroup has two accumulators in turn, the wait for the second covers the first.
    assert sum(seen) >= max(2, len(needed) - 1)


def test_removed_maxima_are_seen(examined: list[Examined]) -> None:
    # The plain kernel copies its accumulator, which reads it: its maxima are not followed.
    case = sass_of(examined, "hopper W16")
    text = case.code.sass
    for line in main_loop_lines(case, "FMNMX")[:6]:
        text = text.replace(line, "")
    assert "accumulator overwritten unread" in broken_rules(text)


def test_a_dummy_is_seen(healthy: Examined) -> None:
    product = main_loop_lines(healthy, "HGMMA")[0]
    dummy = re.sub(r"HGMMA\S+ R\d+", "HGMMA.64x8x16.F16 RZ", product)
    program = sass.parse(healthy.code.sass.replace(product, f"{product}\n{dummy}"))
    assert len(hazards.find_dummies(program)) == 1


def test_a_deleted_product_is_seen(healthy: Examined) -> None:
    product = main_loop_lines(healthy, "HGMMA")[0]
    program = sass.parse(healthy.code.sass.replace(product, ""))
    assert healthy.search is not None
    found = [sass.measure(loop, healthy.search).products for loop in sass.find_main_loops(program)]
    assert min(found) < 1


def test_an_overwritten_operand_is_seen(examined: list[Examined]) -> None:
    case = sass_of(examined, "hopper W16")
    product = main_loop_lines(case, "HGMMA")[0]
    operand = re.findall(r"HGMMA\S+ R\d+, (R\d+)", product)[0]
    write = re.sub(r"HGMMA.*;", f"MOV {operand}, RZ ;", product)
    text = case.code.sass.replace(product, f"{product}\n{write}")
    assert "operand overwritten in flight" in broken_rules(text)


@pytest.mark.parametrize(
    ("added", "measure"),
    [
        ("LDL R4, [R1]", sass.count_spills),
        ("FMNMX R4, R4, R5, !PT", lambda program: sass.count(program.instructions, sass.ALU)),
    ],
)
def test_an_added_instruction_is_counted(
    healthy: Examined, added: str, measure: Callable[[sass.Program], int]
) -> None:
    product = main_loop_lines(healthy, "HGMMA")[0]
    line = re.sub(r"(\*/\s+).*;", rf"\g<1>{added} ;", product)
    text = healthy.code.sass.replace(product, f"{line}\n{product}")
    assert measure(sass.parse(text)) == measure(sass.parse(healthy.code.sass)) + 1
