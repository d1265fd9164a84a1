"""Grouped quantize: the law "member i is quantize(tensors[i])", bit for bit, in one allocation and few launches."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from conftest import INTERPRET
from oracle import assert_same_parts
from test_laws import DTYPES, KINDS, NAMES, get_format, lay_out, values
from torch import nn

import tritonq as tq
from tritonq import bulk_plans, bulk_quantize, bulk_tables, plans, reference, tuning
from tritonq.formats import FORMATS, Format, ScaleType, register
from tritonq.tensor import Layout

# A format of every kind: groups in slices, zero points, words of 32 bits, rows, blocks, groups that are padded or share
# bytes, tensors, a tensor scale, tables, super-groups.
SOME = ("int4_g128", "int4_g128_asym", "int3_g128", "int8_channel", "fp8_e4m3_channel", "fp8_e4m3_b128x128", "e3m4_g48",
        "int3_g7", "fp8_e4m3_tensor", "int4_tensor_asym", "mxfp8", "mxfp4", "mxfp6_e3m2", "nvfp4", "nf4_g64", "q4_k",
        "q6_k")  # fmt: skip
ON_GPU = tuple(dict.fromkeys((*FORMATS, *SOME, "int5_g20", "e1m2_b3x5", "int3_g64_asym", "int4_g1", "int2_g3_asym",
          "e5m1_b16x16_f16", "nf4_g48_bf16", "int5_g96", "int3_g96_f16", "int6_channel", "int8_g8_asym_u4_s32",
          "int2_tensor", "int8_g16_asym", "e4m3_g32_ue5m3")))  # fmt: skip


@pytest.fixture(autouse=True)
def plans_as_before():
    yield
    plans.forget()


def check(tensors, fmt, device, directions=(True, True), expected_of=None, **options):
    """Every member against the reference; `tensors` lie on the CPU. Returns the BulkBuffer."""
    rowwise, columnwise = directions
    moved = [moved_to(x, device) for x in tensors]
    made = tq.grouped_quantize(moved, fmt, rowwise=rowwise, columnwise=columnwise, **options)
    check_members(made, tensors, fmt, directions, expected_of)
    return made


def moved_to(x, device):
    """x with its strides; `Tensor.to` keeps those of dense tensors only."""
    if device == "cpu":
        return x
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((span,), (1,)).to(device).as_strided(x.shape, x.stride())


def check_members(made, tensors, fmt, directions=(True, True), expected_of=None):
    sides = (("rows", made, lambda x: x), ("columns", made.columns, lambda x: x.mT))
    for wanted, (side, members, view) in zip(directions, sides, strict=True):
        assert (0 if members is None else len(members)) == (len(tensors) if wanted else 0)
        for i, x in enumerate(tensors if wanted else ()):
            given = {} if expected_of is None else expected_of(i)
            x, q = view(x), members[i]
            assert (q.shape, q.dtype, q.format) == (x.shape, x.dtype, fmt)
            assert_same_parts(q.parts(), reference.quantize(x.contiguous(), fmt, **given), f"{fmt.name} {i} {side}")


def mixed(fmt, dtype, seed=0, small=False):
    """Members of differing ranks, shapes, strides and sizes, without elements among them; NaN and infinity in one."""
    g = fmt.super_group or (fmt.group[1] if fmt.group[1] > 0 else 40)
    shapes = [((3, g + 5), "contiguous"), ((0, 2 * g), "contiguous"), ((2, 3, 2 * g), "permuted"),
              ((5, 2 * g + 1), "transposed")]  # fmt: skip
    if not small:
        shapes += [((2, g), "contiguous"), ((4, 0), "contiguous"), ((2, 2, 3, g), "swapped"), ((9, g + 3), "step"),
                   ((1, 1), "contiguous"), ((3, 17), "expanded")]  # fmt: skip
    found = []
    for i, (shape, layout) in enumerate(shapes):
        found.append(lay_out(values(shape, dtype, seed + i, KINDS[i % len(KINDS)]), layout))
    found[0][1, 2], found[0][2, -1] = torch.nan, -torch.inf
    return found


@pytest.mark.skipif(INTERPRET, reason="some formats are enough where a program costs milliseconds")
@pytest.mark.parametrize("name", NAMES)
def test_members_are_single_quantizations(name, device):
    fmt = get_format(name)
    if device == "cuda" and name not in ON_GPU:
        pytest.skip("a format of its kind is tested; each compiles kernels of its own")
    check(mixed(fmt, DTYPES[sum(map(ord, name)) % 4]), fmt, device)


@pytest.mark.skipif(not INTERPRET, reason="test_members_are_single_quantizations does more")
@pytest.mark.parametrize("name", SOME)
def test_some_formats(name, device):
    fmt = get_format(name)
    check(mixed(fmt, DTYPES[sum(map(ord, name)) % 4], small=True), fmt, device)


def only_on_a_gpu(name, device, otherwise):
    """Formats that differ by their kernels; the CPU path goes member by member whatever they are."""
    if device != "cuda" and name not in otherwise:
        pytest.skip("a GPU test")


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("directions", [(True, False), (False, True)], ids=["rows", "columns"])
def test_one_direction(name, directions, device):
    """Of aligned members, which take wide loads, and whose tiles are many."""
    only_on_a_gpu(name, device, ("int4_g128", "nvfp4", "fp8_e4m3_tensor"))
    fmt = get_format(name)
    shape = (64, 256) if INTERPRET else (160, 512)
    made = check([values(shape, torch.bfloat16, i) for i in range(3)], fmt, device, directions)
    assert (made.columns is not None, bool(made.members)) == directions[::-1]
    assert made.base.numel() > 0 or not directions[0]


@pytest.mark.parametrize("name", SOME)
def test_aligned_members_in_both_directions(name, device):
    only_on_a_gpu(name, device, ("int4_g128", "q4_k"))
    fmt = get_format(name)
    shapes = [(64, 256), (32, 512)] if INTERPRET else [(256, 768), (256, 768), (512, 256), (2, 128, 256)]
    check([values(shape, torch.bfloat16, i) for i, shape in enumerate(shapes)], fmt, device)


@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "int8_channel", "fp8_e4m3_b16x16", "int3_g7", "q4_k"])
def test_any_tile(name, device, monkeypatch):
    """Law 8: tile sizes do not matter."""
    fmt = get_format(name)
    if INTERPRET and name != "nvfp4":
        pytest.skip("programs cost milliseconds")
    shapes = ((20, 70), (1, 64), (33, 32)) if INTERPRET else ((20, 300), (1, 512), (33, 256))
    tensors = [values(shape, torch.bfloat16, i) for i, shape in enumerate(shapes)]
    for size, width in ((1 << 10, 16),) if INTERPRET else ((512, 8), (1 << 13, 128)):
        monkeypatch.setattr(tuning, "TILE", size)
        monkeypatch.setattr(tuning, "WRITTEN_COLUMNS", width)
        plans.forget()
        check(tensors, fmt, device)


@pytest.mark.parametrize("name", ["int8_channel", "fp8_e4m3_b256x256", "int4_g33000_asym"][: 1 if INTERPRET else 3])
def test_groups_larger_than_a_tile(name, device):
    """Rows that `row_kernel` loops over, large blocks, large groups: their extremes are collected by many programs."""
    fmt, columns = get_format(name), 140_000 if name == "int8_channel" and device == "cuda" else 66_200
    small = (5, 40) if INTERPRET else (304, 300)
    tensors = [values((2, columns), torch.bfloat16, 1), values(small, torch.bfloat16, 2)]
    if name == "int8_channel":  # too long for a tile of columns that lie apart
        tensors.append(values((1 if INTERPRET else 3, 20_000), torch.bfloat16, 3))
    check(tensors, fmt, device, (True, False))
    check([x.mT.contiguous() for x in tensors], fmt, device, (False, True))


def test_tokens_sorted_by_expert(device):
    """sizes cut one tensor along its first axis; some experts have no tokens."""
    sizes = (0, 7, 1, 0, 24, 0)
    x = values((32, 64 if INTERPRET else 256), torch.bfloat16, 3)
    for name in ("mxfp8", "nvfp4", "int8_channel"):
        fmt = get_format(name)
        made = tq.grouped_quantize(moved_to(x, device), name, sizes=sizes, columnwise=True)
        check_members(made, x.split(sizes), fmt)
    wide = values((4, 3, 64), torch.float32, 4).transpose(0, 1)
    made = tq.grouped_quantize(moved_to(wide, device), "mxfp4", sizes=[1, 2], columnwise=True)
    check_members(made, wide.split([1, 2]), get_format("mxfp4"))


def test_many_members_of_all_sizes(device):
    """Rows of one tensor are quantized one by one, so members are rows of the result for all of it."""
    generator = torch.Generator().manual_seed(0)
    sizes = [int(n) for n in torch.randint(0, 9, (20 if INTERPRET else 90,), generator=generator)]
    sizes[3], sizes[-1] = 120 if INTERPRET else 4000, 0
    x = values((sum(sizes), 64), torch.bfloat16, 1)
    expected = reference.quantize(x, get_format("mxfp8"))
    made = tq.grouped_quantize(moved_to(x, device), "mxfp8", sizes=sizes)
    for i, rows in enumerate(zip(*(expected[name].split(sizes) for name in ("qdata", "scale")), strict=True)):
        assert_same_parts(made[i].parts(), dict(zip(("qdata", "scale"), rows, strict=True)), f"member {i}")


if INTERPRET:
    import triton
    import triton.language as tl

    from tritonq.kernels import grouped

    @triton.jit
    def entries_kernel(table_ptr, out_ptr, entries, scale):
        entry_ptr, index = grouped._entry(table_ptr, entries, scale)
        tl.store(out_ptr + 2 * tl.program_id(0), grouped._field(entry_ptr, "slot"))
        tl.store(out_ptr + 2 * tl.program_id(0) + 1, index)


@pytest.mark.skipif(not INTERPRET, reason="a kernel of its own")
@pytest.mark.parametrize("counts", [(3,) * 20, (1,), (1, 50, 1, 1, 2), (40, 1, 1, 1, 1, 1, 9), (1,) * 30, (2, 7) * 12])
def test_programs_find_their_entries(counts):
    table = torch.zeros(len(counts), grouped.FIELDS.value, dtype=torch.int64)
    starts = torch.tensor([0, *counts]).cumsum(0)
    table[:, grouped.place("start")], table[:, grouped.place("slot")] = starts[:-1], torch.arange(len(counts))
    programs = int(starts[-1])
    out = torch.full((programs, 2), -1, dtype=torch.int64)
    entries_kernel[(programs,)](table, out, len(counts), min((len(counts) << 31) // programs, (1 << 31) - 1))
    assert out.tolist() == [[i, j] for i, n in enumerate(counts) for j in range(n)]


def divisor(*tensors):
    """G = 448 * 6 / amax over the finite elements of all, as the definition has it."""
    finite = [x.double()[torch.isfinite(x)].abs().amax() for x in tensors if x.numel() and x.nan_to_num(0, 0, 0).any()]
    return (torch.tensor([448.0 * 6.0]) / torch.stack(finite).amax().float()) if finite else torch.ones(1)


def test_tensor_scales(device):
    """One a member, one of all, given ones; a member of zeros and one without elements do not count."""
    fmt = get_format("nvfp4")
    tensors = [values((6, 48), torch.bfloat16, 1), 30 * values((2, 5, 32), torch.bfloat16, 2),
               torch.zeros(3, 32, dtype=torch.bfloat16), torch.zeros(0, 16, dtype=torch.bfloat16)]  # fmt: skip
    tensors[0][0, 0] = torch.inf
    own, shared = [divisor(x) for x in tensors], divisor(*tensors)
    assert len({*map(float, own), float(shared)}) == 3 and float(shared) == float(own[1])
    check(tensors, fmt, device, expected_of=lambda i: {"tensor_scale": own[i]})
    check(tensors, fmt, device, expected_of=lambda i: {"tensor_scale": shared}, share_tensor_scale=True)
    given = torch.tensor([[3.0], [0.5], [7.0], [2.0]])
    check(tensors, fmt, device, expected_of=lambda i: {"tensor_scale": given[i]}, tensor_scale=given.to(device))
    check(tensors, fmt, device, expected_of=lambda i: {"tensor_scale": given[0]}, tensor_scale=given[:1].to(device))


@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3_tensor", "int8_channel", "int4_g128"])
def test_nothing_but_empty_members(name, device):
    check([torch.zeros(shape, dtype=torch.bfloat16) for shape in ((0, 16), (3, 0), (0, 0))], get_format(name), device)


def test_tensor_scale_of_a_whole_tensor_scale(device):
    """A format nobody has heard of: one scale a tensor, of two levels."""
    fmt = Format("bulk_test_two_levels", get_format("nvfp4").element, (-1, -1), ScaleType("e4m3"), tensor_scale=True)
    check([values((6, 48), torch.bfloat16, 1), values((70,), torch.bfloat16, 2).view(7, 10)], fmt, device)


def test_pointers_at_odd_addresses():
    """Tensors that are no whole number of elements apart, as mapped files have them."""
    x = values((4, 64), torch.bfloat16, 5)
    data = bytearray(3) + bytearray(x.view(torch.uint8).numpy().tobytes())
    odd = torch.frombuffer(data, dtype=torch.bfloat16, offset=3).view(4, 64)
    assert odd.data_ptr() % 2 == 1 and torch.equal(odd, x)
    for tensors in ([x, odd], [odd, x], [odd]):
        check_members(tq.grouped_quantize(tensors, "mxfp8"), [x] * len(tensors), get_format("mxfp8"), (True, False))


# ------------------------------------------------------------------------------------------------- launches, tables


@pytest.mark.skipif(not INTERPRET, reason="counts launches of the interpreter")
def test_launches_do_not_depend_on_the_number_of_members(device, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    launched, run = [], InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: (launched.append(self.fn.__name__), run(self, *a, **k))[1]
    )
    expected = {
        "mxfp8": ["grouped_kernel"], "int4_g128": ["grouped_kernel"], "int8_channel": ["grouped_kernel"],
        "fp8_e4m3_b16x16": ["grouped_kernel"], "e3m4_g48": ["grouped_kernel"], "q4_k": ["grouped_super_kernel"],
        "nvfp4": ["grouped_keys_kernel", "grouped_kernel"],
        "int3_g7": ["grouped_kernel", "grouped_apply_kernel"],
        "fp8_e4m3_tensor": ["grouped_keys_kernel", "grouped_apply_kernel"],
    }  # fmt: skip
    for name, kernels in expected.items():
        for count in (1, 3):
            launched.clear()
            tq.grouped_quantize([values((16, 40), torch.bfloat16, i) for i in range(count)], name, columnwise=True)
            assert launched == kernels, name


def on_device(call):
    """Names of what a call runs on the GPU, from torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as log:
        call()
        torch.cuda.synchronize()
    return [event.name for event in log.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.gpu
def test_gpu_launches():
    """Kernels and copies of a call with 64 members: no copy from the host once a table is there."""
    tensors = [torch.randn(48, 256, device="cuda", dtype=torch.bfloat16) for _ in range(64)]
    expected = {"int4_g128": 1, "int8_channel": 1, "mxfp8": 1, "q4_k": 1, "nvfp4": 2, "fp8_e4m3_tensor": 2}
    for name, kernels in expected.items():
        for directions in ({}, {"columnwise": True}, {"rowwise": False, "columnwise": True}):
            call = lambda name=name, directions=directions: tq.grouped_quantize(tensors, name, **directions)  # noqa: E731
            first = on_device(call)
            call()
            later = on_device(call)
            for events, copies in ((first, 1), (later, 0)):
                found = [e for e in events if "Memcpy" in e], [e for e in events if not e.startswith("Mem")]
                assert len(found[0]) == copies, f"{name} {directions}: {events}"
                assert len(found[1]) == kernels, f"{name} {directions}: {events}"


@pytest.mark.skipif(not INTERPRET, reason="only kernels collect maxima in memory")
@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3_tensor", "int4_tensor_asym"])
def test_maxima_are_left_at_zero(name, device, monkeypatch):
    """A table serves the next call, which has smaller numbers."""
    tables, make = {}, bulk_tables._table
    monkeypatch.setattr(bulk_tables, "_table", lambda of, *rest: tables.setdefault(id(of), (of, make(of, *rest)))[1])
    tensors = [values((4, 40), torch.bfloat16, i) for i in range(2)]
    for factor in (8.0, 0.125):
        for x in tensors:
            x.mul_(factor)
        check(tensors, get_format(name), device)
    assert len(tables) == 1
    assert not any(table[len(of.table) :].any() for of, table in tables.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4", "fp8_e4m3_tensor", "int4_tensor_asym"])
def test_new_numbers_in_the_same_tensors(name):
    """The table of the call before is used again."""
    tensors = [torch.randn(96, 192, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
    for factor in (8.0, 0.125, 1.0):
        for x in tensors:
            x.mul_(factor)
        made = tq.grouped_quantize(tensors, name, columnwise=True)
        check_members(made, [x.cpu() for x in tensors], get_format(name))


@pytest.mark.gpu
def test_gpu_calls_do_not_wait():
    tensors = [torch.randn(64, 256, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    tq.grouped_quantize(tensors, "nvfp4", columnwise=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for count in (8, 5, 5):
            made = tq.grouped_quantize(tensors[:count], "nvfp4", columnwise=True)
        moved = made.to("cpu", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(moved.base, made.base.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "int8_channel", "fp8_e4m3_tensor"])
@pytest.mark.parametrize("known", [True, False], ids=["again", "first_call_with_these_tensors"])
def test_cuda_graph(name, known):
    """Replays follow new data, long after other calls took their turn."""
    fmt = get_format(name)
    tensors = [torch.randn(40, 192, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
    other = [torch.randn(40, 192, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
    for _ in range(3):
        tq.grouped_quantize(tensors if known else other, name, columnwise=True)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = tq.grouped_quantize(tensors, name, columnwise=True)
    plans.forget()
    gc.collect()
    for _ in range(20):
        tq.grouped_quantize([t.clone() for t in other], name, columnwise=True)
    for seed in range(2):
        for x in tensors:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 3)
        graph.replay()
        torch.cuda.synchronize()
        check_members(made, [x.cpu() for x in tensors], fmt)


@pytest.mark.gpu
def test_inference_mode():
    """What is kept from one call to the next can be used in any mode."""
    tensors = [torch.randn(8, 96, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    with torch.inference_mode():
        bulk_tables._arenas.clear()
        bulk_tables._room = 0
        tq.grouped_quantize(tensors, "nvfp4")
    tq.grouped_quantize(tensors[:2], "nvfp4")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = tq.grouped_quantize(tensors, "nvfp4")
    graph.replay()
    torch.cuda.synchronize()
    check_members(made, [x.cpu() for x in tensors], get_format("nvfp4"), (True, False))
    with torch.inference_mode():
        made = tq.grouped_quantize(tensors, "nvfp4")
    check_members(made, [x.cpu() for x in tensors], get_format("nvfp4"), (True, False))


@pytest.mark.gpu
def test_streams():
    """Calls on two streams at a time, of which one is far behind: each has a table and maxima of its own."""
    tensors = [torch.randn(64, 512, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    first = tq.grouped_quantize(tensors, "nvfp4")
    with torch.cuda.stream(side):
        second = tq.grouped_quantize(tensors, "nvfp4")
    torch.cuda.synchronize()
    for made in (first, second):
        check_members(made, [x.cpu() for x in tensors], get_format("nvfp4"), (True, False))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    """Counted over all members, and offsets of more within one tensor."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16).repeat(33, 4).view(-1, 8192)[: (1 << 18) + 24]
    assert x.numel() > 1 << 31
    sizes = [1 << 17, 0, (1 << 17) + 20, 4]
    for name in ("mxfp4", "nvfp4"):
        made = tq.grouped_quantize(x, name, sizes=sizes, columnwise=True)
        pieces = x.split(sizes)
        for i in (2, 3):
            single = tq.quantize(pieces[i], name)
            for part, values_ in single.parts().items():
                assert torch.equal(made[i].parts()[part].view(torch.uint8), values_.view(torch.uint8)), (name, i, part)
        last = tq.quantize(pieces[3].mT.contiguous(), name)
        for part, values_ in last.parts().items():
            assert torch.equal(made.columns[3].parts()[part].view(torch.uint8), values_.view(torch.uint8)), (name, part)
        del made


@pytest.mark.gpu
def test_memory():
    """The result, a table and the maxima; dropping one direction frees it."""
    tensors = [torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    tq.grouped_quantize(tensors, "nvfp4", columnwise=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = tq.grouped_quantize(tensors, "nvfp4", columnwise=True)
    size = [made.base.untyped_storage().nbytes(), made.columns.base.untyped_storage().nbytes()]
    assert torch.cuda.memory_allocated() - before <= sum(size) + 2 * 512
    assert torch.cuda.max_memory_allocated() - before <= sum(size) + (64 << 10)
    made.columns = None
    assert torch.cuda.memory_allocated() - before <= size[0] + 512
    member = made[3]
    del made
    assert torch.cuda.memory_allocated() - before >= size[0]  # a member holds the whole
    del member
    gc.collect()
    assert torch.cuda.memory_allocated() == before


# ------------------------------------------------------------------------------------------------------ one buffer


without_kernels = pytest.mark.skipif(INTERPRET, reason="does not depend on kernels")


def sample(device="cpu", name="nvfp4"):
    tensors = [values(shape, torch.bfloat16, i) for i, shape in enumerate(((4, 48), (0, 32), (2, 3, 80)))]
    return tq.grouped_quantize([moved_to(x, device) for x in tensors], name, columnwise=True)


def same(got, expected):
    assert (got.layout, got.dtype, len(got)) == (expected.layout, expected.dtype, len(expected))
    assert torch.equal(got.base.cpu(), expected.base.cpu())
    for q, wanted in zip(got, expected, strict=True):
        assert (q.format, q.shape, q.dtype) == (wanted.format, wanted.shape, wanted.dtype)
        assert {k: v.dtype for k, v in q.parts().items()} == {k: v.dtype for k, v in wanted.parts().items()}


def one_storage(made):
    """Members are slices of one storage, from multiples of 256 bytes on, codes of each aligned as a QTensor's own."""
    storages = {q._buf.untyped_storage().data_ptr() for q in made if q.numel()}
    assert storages == {made.base.untyped_storage().data_ptr()}
    end = 0
    for q, layout in zip(made, made.layout.members, strict=True):
        start = q._buf.storage_offset() - made.base.storage_offset()
        assert start % 256 == 0 and start >= end and q._buf.numel() == layout.nbytes
        assert layout == Layout.of(q.format, tuple(q.shape))
        end = start + layout.nbytes
    assert end == made.base.numel()


def test_one_storage(device):
    made = sample(device)
    one_storage(made)
    one_storage(made.columns)
    assert made.base.untyped_storage().data_ptr() != made.columns.base.untyped_storage().data_ptr()
    assert made.nbytes == made.base.numel() + made.columns.base.numel()
    assert made.members[2] is made[2] and made[-1] is made[2] and made[1:] == [made[1], made[2]]
    assert len(made) == 3 and next(iter(made)) is made[0]
    with pytest.raises(IndexError):
        made[3]


@pytest.mark.skipif(INTERPRET, reason="the interpreter keeps what it was called with")
def test_dropping_one_direction_frees_it():
    for dropped in ("columns", "rows"):
        made = sample()
        rows, columns = (weakref.ref(b.untyped_storage()) for b in (made.base, made.columns.base))
        gone, kept = (columns, rows) if dropped == "columns" else (rows, columns)
        gc.disable()
        try:
            if dropped == "columns":
                made.columns = None
            else:
                made = made.columns
            assert gone() is None and kept() is not None
        finally:
            gc.enable()


def round_trips():
    def saved(made):
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    return {"save": saved, "pickle": lambda made: pickle.loads(pickle.dumps(made)), "deepcopy": copy.deepcopy,
            "clone": tq.BulkBuffer.clone}  # fmt: skip


@without_kernels
@pytest.mark.parametrize("way", round_trips())
def test_copies_keep_one_storage(way):
    made = sample()
    expected, pointer = made.base.clone(), made.base.data_ptr()
    copied = round_trips()[way](made)
    same(copied, made)
    same(copied.columns, made.columns)
    one_storage(copied)
    one_storage(copied.columns)
    copied.base.zero_()
    assert torch.equal(made.base, expected) and made.base.data_ptr() == pointer
    assert not copied[0].qdata.view(torch.uint8).any()


@without_kernels
def test_a_slice_of_a_larger_buffer_is_saved_alone():
    made = sample()
    arena = torch.zeros(1 << 20, dtype=torch.uint8)
    arena[512 : 512 + made.base.numel()].copy_(made.base)
    inside = tq.BulkBuffer(arena[512 : 512 + made.base.numel()], made.layout, made.dtype)
    same(inside, made)
    assert len(pickle.dumps(inside)) < 100_000


@without_kernels
def test_saving_takes_a_format_that_is_known():
    fmt = Format("bulk_test_unlisted", get_format("int4_g128").element, (1, 8), ScaleType("bf16"))
    made = tq.grouped_quantize([torch.ones(2, 16)], fmt)
    with pytest.raises(ValueError, match="bulk_test_unlisted"):
        pickle.dumps(made)
    try:
        register(fmt)
        same(pickle.loads(pickle.dumps(made)), made)
    finally:
        FORMATS.pop("bulk_test_unlisted", None)


@without_kernels
def test_rebind_moves_members_and_parameters():
    """Identity stays, nothing is copied, and what the tensors dequantize to follows the new buffer."""
    made = sample()
    members = made.members
    parameters = [nn.Parameter(q, requires_grad=False) for q in members]
    other = sample().base
    other[made.layout.offsets[0] : made.layout.offsets[0] + 4] = 0x77
    assert made.rebind(other, parameters) is made
    assert made.base is other and made.members == members
    for own in (members, parameters):
        assert {q._buf.untyped_storage().data_ptr() for q in own} == {other.untyped_storage().data_ptr()}
    assert all(isinstance(p, nn.Parameter) for p in parameters)
    assert torch.equal(parameters[0].qdata.view(-1)[:4], torch.full((4,), 0x77, dtype=torch.uint8))
    assert torch.equal(parameters[2].dequantize(), made[2].dequantize())
    with pytest.raises(ValueError, match=r"contiguous uint8 of shape \(\d+,\), got torch.uint8 of shape \(3,\)"):
        made.rebind(other[:3])
    with pytest.raises(ValueError, match="one tensor a member, 3, got 1"):
        made.rebind(other, parameters[:1])
    halves = nn.ParameterList(parameters).half()
    made.rebind(sample().base, list(halves))
    assert all(p.dtype is torch.float16 and p.dequantize().dtype is torch.float16 for p in halves)
    plain = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=r"rebind points QTensors at the buffer, got Parameter of torch\.float32 at 1"):
        made.rebind(other, [parameters[0], plain, parameters[2]])
    assert made.base is not other and plain.data_ptr() and torch.equal(plain.detach(), torch.ones(3))


@pytest.mark.skipif(INTERPRET, reason="the interpreter keeps what it was called with")
def test_rebind_frees_what_it_left():
    made = sample()
    list(made)
    left, base = weakref.ref(made.base.untyped_storage()), made.base.clone()
    gc.disable()
    try:
        made.rebind(base)
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_to_and_back():
    made = sample("cuda")
    pinned = made.to("cpu").pin_memory()
    assert pinned.is_pinned() and pinned[0].is_pinned() and pinned.pin_memory() is pinned
    copies = [e for e in on_device(lambda: pinned.to("cuda", non_blocking=True)) if "Memcpy" in e]
    assert len(copies) == 2  # one a direction
    back = pinned.to("cuda", non_blocking=True)
    same(back, made)
    one_storage(back)
    back.record_stream(torch.cuda.Stream())
    assert made.to("cuda") is made and made.to(made.device) is made
    members = pinned.members
    pinned.rebind(back.base)
    assert all(q.device.type == "cuda" for q in members) and torch.equal(members[2].dequantize(), made[2].dequantize())


def test_out(device):
    tensors = [moved_to(values((4, 48), torch.bfloat16, i), device) for i in range(2)]
    made = tq.grouped_quantize([torch.zeros_like(x) for x in tensors], "nvfp4", columnwise=True)
    pointers = made.base.data_ptr(), made.columns.base.data_ptr()
    assert tq.grouped_quantize(tensors, "nvfp4", columnwise=True, out=made) is made
    assert (made.base.data_ptr(), made.columns.base.data_ptr()) == pointers
    check_members(made, [x.cpu() for x in tensors], get_format("nvfp4"))
    with pytest.raises(ValueError, match="out has to come from a call with tensors of the same shapes"):
        tq.grouped_quantize(tensors[:1], "nvfp4", columnwise=True, out=made)
    with pytest.raises(ValueError, match="same shapes, format and directions"):
        tq.grouped_quantize(tensors, "nvfp4", out=made)
    with pytest.raises(TypeError, match="out is a BulkBuffer, got list"):
        tq.grouped_quantize(tensors, "nvfp4", out=[])


@without_kernels
def test_gradients_do_not_flow():
    x = torch.ones(2, 32, requires_grad=True)
    assert not any(q.requires_grad for q in tq.grouped_quantize([x], "mxfp8"))


@without_kernels
def test_meta():
    made = tq.grouped_quantize([torch.empty(4, 64, device="meta")], "int4_g128", columnwise=True)
    assert made.device.type == "meta" and made.columns[0].shape == (64, 4)


def test_errors(device):
    x = torch.ones(4, 64, device=device)
    for arguments, error, match in (
        ((x, "mxfp8"), TypeError, r"sequence of tensors, got one; pass sizes"),
        (([], "mxfp8"), ValueError, "at least one tensor, got none"),
        (([x, 3], "mxfp8"), TypeError, "expected a torch.Tensor, got int"),
        (([x, x.bfloat16()], "mxfp8"), TypeError, "one dtype and device, got torch.bfloat16 on .* at 1 beside"),
        (([x.int()], "mxfp8"), TypeError, "cast it first"),
        (([x], "nothing"), ValueError, "nothing"),
        (([torch.ones(3, device=device)], "fp8_e4m3_b16x16"), ValueError, "blocks of 16 x 16"),
    ):
        with pytest.raises(error, match=match):
            tq.grouped_quantize(*arguments)
    for options, error, match in (
        ({"rowwise": False}, ValueError, "both False"),
        ({"tensor_scale": torch.ones(1, device=device)}, ValueError, "mxfp8 has no tensor_scale"),
        ({"share_tensor_scale": True}, ValueError, "mxfp8 has no tensor_scale"),
        ({"sizes": [1]}, TypeError, "sizes cut one tensor, got list"),
    ):
        with pytest.raises(error, match=match):
            tq.grouped_quantize([x], "mxfp8", **options)
    for options, error, match in (
        ({"tensor_scale": torch.ones(2, device=device)}, ValueError, "1 or 3 elements, one a tensor, got 2"),
        ({"tensor_scale": torch.ones(1, device=device).double()}, TypeError, "float32, got torch.float64"),
        ({"tensor_scale": torch.ones(1, device=device), "share_tensor_scale": True}, ValueError, "leave one of them"),
    ):
        with pytest.raises(error, match=match):
            tq.grouped_quantize([x, x, x], "nvfp4", **options)
    for sizes in ([3], [5, -1], [2, 3]):
        with pytest.raises(ValueError, match=r"add up to the rows of a tensor of shape \(4, 64\)"):
            tq.grouped_quantize(x, "mxfp8", sizes=sizes)
    with pytest.raises(ValueError, match=">= 2 dimensions"):
        tq.grouped_quantize([torch.ones(64, device=device)], "mxfp8", columnwise=True)


@pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")
@pytest.mark.parametrize("name", ["nvfp4", "int8_channel"])
def test_operator(name, device):
    tensors = [values((6, 70), torch.float32, i).to(device) for i in range(2)]
    operator = torch.ops.tritonq.grouped_quantize.default
    torch.library.opcheck(operator, (tensors, name, True, True, None, False))

    def step(*tensors):
        return bulk_quantize.quantize_into_buffers(tensors, name, True, True)

    backend = "inductor" if device == "cuda" else "aot_eager"
    for got, expected in zip(
        torch.compile(step, fullgraph=True, backend=backend)(*tensors), step(*tensors), strict=True
    ):
        assert torch.equal(got, expected)


# --------------------------------------------------------------------------------------------------- compilation


def launches(name, shapes, columnwise=True, dtype=torch.bfloat16):
    from test_compile import launched

    tensors = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    return launched(lambda: tq.grouped_quantize(tensors, name, columnwise=columnwise))


LARGE = ((1536, 2048), (1536, 2048))
# Each target once with rows and columns, and formats of different kinds; a GPU test runs what is compiled for sm_90.
COMPILED = [
    ("sm_80", "nvfp4", LARGE), ("sm_90", "int4_g128", LARGE), ("sm_90", "q6_k", LARGE), ("sm_100", "mxfp8", LARGE),
    ("sm_120", "fp8_e4m3_tensor", LARGE), ("gfx942", "int8_channel", LARGE), ("gfx950", "int4_g128_asym", LARGE),
    ("sm_90", "int3_g7", ((7, 33), (5, 301))),
]  # fmt: skip


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target,name,shapes", COMPILED)
def test_compiles(target, name, shapes, tmp_path):
    """Without spills, and from aligned members in 16-byte loads."""
    import re

    import test_compile

    for one in launches(name, shapes):
        compiled = test_compile.check(one, test_compile.TARGETS[target], tmp_path, 255)
        if target.startswith("sm") and shapes is LARGE:
            assert re.search(r"ld\.global[.\w:]*\.(v4\.(b32|u32|f32)|v8\.b16|v2\.(b64|u64))", compiled.asm["ptx"])


def test_fields_fit_an_entry():
    pytest.importorskip("triton")
    from tritonq.kernels import grouped

    fmt = get_format("nvfp4")
    views = bulk_quantize._job((((4, 64), (64, 1)), ((3, 70), (1, 3))), fmt, True, True).views
    made = bulk_plans.program(views, fmt, torch.bfloat16, True, torch.device("cpu"), "own")
    assert made.table.shape[1] == grouped.FIELDS.value and len(made.sources) == len(made.table)
    assert [step.last - step.first for step in made.steps] == [2, 4]
    starts = made.table[2:, grouped.place("start")]
    assert (starts.diff() > 0).all() and int(starts[0]) == 0
