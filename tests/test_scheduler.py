"""The scheduler: plans that lose nothing and fit their budget, streaming that gives the bytes of one call."""

import contextlib
import math
import os
import subprocess
import sys
import threading

import pytest
import safetensors
import torch
from conftest import INTERPRET
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same, assert_same_parts
from safetensors.torch import save_file

import tritonq as tq
from tritonq import boxes, memory, ops
from tritonq.formats import get_format
from tritonq.tiles import Tiles

pytestmark = pytest.mark.skipif(INTERPRET, reason="streaming does not depend on kernels")

# Groups, zero points, groups that share bytes, rows, one scale, two levels, blocks, super-groups.
KINDS = ("int4_g128", "int4_g32_asym", "int3_g50", "int8_channel", "fp8_e4m3_tensor", "int4_tensor_asym", "nvfp4",
         "fp8_e4m3_b16x32", "q4_k", "q6_k", "mxfp6_e3m2")  # fmt: skip


def dense(shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def generator():
    return torch.Generator().manual_seed(7)


# ------------------------------------------------------------------------------------------------------------ planning


@st.composite
def layouts(draw):
    """(contiguous tensor of numbers that count up, the same values with other strides)"""
    shape = [*draw(st.lists(st.integers(1, 9), min_size=0, max_size=3)), draw(st.integers(1, 700))]
    shape = shape if len(shape) > 1 else [draw(st.integers(1, 40)), *shape]
    count = torch.arange(math.prod(shape)).view(shape)
    order = draw(st.permutations(range(len(shape))))
    inverse = [order.index(i) for i in range(len(shape))]
    return count, count.permute(order).contiguous().permute(inverse)


@settings(max_examples=120, deadline=None)
@given(layouts(), st.sampled_from([*KINDS, "int2_g12", "fp8_e4m3_b3x7"]), st.integers(1, 3000), st.data())
def test_tiles_cover_everything_once(layout, name, limit, data):
    """Every element and every byte of every part belongs to one tile, which holds whole groups and bytes and fits the
    limit unless it cannot be cut; also where tiles are put back and the limit shrinks."""
    count, strided = layout
    fmt = get_format(name)
    tiles = Tiles(tuple(strided.shape), strided.stride(), fmt)
    parts = {
        part: torch.zeros(shape, dtype=torch.int32) for part, (shape, _) in fmt.storage(tuple(count.shape)).items()
    }
    values = torch.zeros(count.shape, dtype=torch.int32)
    (r, c), refusals = fmt.group, 2
    while (tile := tiles.take(limit)) is not None:
        if refusals and tiles.can_be_cut(tile) and data.draw(st.booleans()):
            refusals -= 1
            limit = tiles.halved(tile, torch.OutOfMemoryError(), torch.device("cpu"))
            continue
        assert 0 < tile.size <= limit or not tiles.can_be_cut(tile)
        numbers = tile.of_strided(strided)
        assert torch.equal(numbers, tile.of_values(count)) and tuple(numbers.shape) == tile.shape
        assert tile.first == int(numbers.flatten()[0])  # in row-major order of the whole tensor
        assert torch.equal(numbers.flatten(), torch.arange(tile.first, tile.first + tile.size)) or r > 1
        (_, row, column), (_, end_row, end_column) = tile.box
        rows, columns = tile.slab.rows, tile.slab.columns
        assert column * fmt.bits % 8 == 0
        if r > 0:
            assert row % r == 0 and (end_row % r == 0 or end_row == rows)
            whole = columns if c == -1 else fmt.super_group or c
            assert column % whole == 0 and (end_column % whole == 0 or end_column == columns)
        tile.of_values(values).add_(1)
        for part, (shape, _) in fmt.storage(tile.shape).items():
            piece = tile.of_part(part, parts[part])
            assert tuple(piece.shape) == shape and piece.is_contiguous()
            piece.add_(1)
    assert bool((values == 1).all())
    for part, seen in parts.items():
        shared = part == "tensor_scale" or (r == -1 and part != "qdata")
        assert shared or bool((seen == 1).all()), part


def test_the_smallest_tile_that_fails_says_so():
    tiles = Tiles((4, 256), (256, 1), get_format("int4_g128"))
    tile = tiles.take(1)
    assert tile.shape == (1, 1, 128)
    with pytest.raises(torch.OutOfMemoryError, match=r"\(1, 1, 128\).*\(4, 256\).*67108864 bytes.*output_device"):
        tiles.halved(tile, torch.OutOfMemoryError(), torch.device("cpu"))


def test_boxes_come_in_order():
    found = [tuple(box) for box in boxes.cut(boxes.whole((5, 10)), (2, 4), 9)]
    assert found == [
        ((0, 0), (2, 4)), ((0, 4), (2, 8)), ((0, 8), (2, 10)), ((2, 0), (4, 4)), ((2, 4), (4, 8)), ((2, 8), (4, 10)),
        ((4, 0), (5, 8)), ((4, 8), (5, 10)),
    ]  # fmt: skip
    assert list(boxes.cut(boxes.whole((0, 10)), (2, 4), 9)) == []


# ------------------------------------------------------------------------------------------------------------- budgets


def test_workspace():
    assert memory.budget() == 64 << 20
    with tq.workspace(1000) as size:
        assert size == memory.budget() == 1000
        with tq.workspace("1.5MiB"):
            assert memory.budget() == 3 << 19
            seen = []
            thread = threading.Thread(target=lambda: seen.append(memory.budget()))
            thread.start()
            thread.join()
            assert seen == [64 << 20]
        assert memory.budget() == 1000
    with pytest.raises(ValueError, match="workspace 'much' is not a size"), tq.workspace("much"):
        pass
    for size in (0, 0.5):
        with pytest.raises(ValueError, match=f"workspace {size} is not"), tq.workspace(size):
            pass
    assert memory.budget() == 64 << 20


@pytest.mark.parametrize("name", ["int4_g64", "fp8_e4m3_tensor"])
def test_the_smallest_workspace(name):
    """A row of groups at a time, with nothing to divide by zero."""
    x = torch.randn(3, 64)
    with tq.workspace(1):
        q = tq.quantize(x, name, device=["cpu", "cpu"])
        y = tq.qdq(x, name, device=["cpu", "cpu"])
    assert torch.equal(q.dequantize(), tq.qdq(x, name)) and torch.equal(y, tq.qdq(x, name))
    with pytest.raises(TypeError, match=r"float64, got torch\.int8"):
        tq.dequantize(q, torch.int8, device=["cpu", "cpu"])


@pytest.mark.parametrize("what", ["quantize", "qdq"])
@pytest.mark.parametrize("budget", [1 << 14, 1 << 16, 100_000])
def test_device_memory_fits_the_budget(budget, what):
    x = dense((64, 1024))
    for name in ("int4_g128", "nvfp4", "fp8_e4m3_tensor", "q4_k"):
        fake = FakeDevice()
        with tq.workspace(budget):
            getattr(tq, what)(x, name, device=fake)
        assert budget // 3 < fake.peak <= budget and fake.live == 0, name


# ----------------------------------------------------------------------------------------------------------- streaming


LAYOUTS = {
    "matrix": lambda: dense((37, 400)),
    "ragged": lambda: dense((3, 21, 333), torch.float32),
    "transposed": lambda: dense((400, 70)).t(),
    "slabs": lambda: dense((2, 3, 48, 4, 64)).permute(0, 3, 1, 2, 4)[:, ::2],
    "vector": lambda: dense((9000,), torch.float16),
}


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_one_call(name, layout, pinned):
    """Law 8: quantize, QDQ and dequantize through a device whose copies and kernels run as late as they may."""
    x = LAYOUTS[layout]()
    if get_format(name).group[0] > 1 and x.ndim < 2:
        x = x.view(90, 100)
    expected = tq.quantize(x, name)
    with tq.workspace(1 << 14):
        q = tq.quantize(x, name, device=FakeDevice(pinned, seed=1))
        y = tq.qdq(x, name, device=FakeDevice(pinned, seed=2))
        again = tq.dequantize(expected, device=FakeDevice(pinned, seed=3))
    assert_same_parts(q.parts(), expected.parts())
    assert_same(y, ops.qdq(x, name))
    assert_same(again, expected.dequantize())
    assert q.dtype is x.dtype and q.shape == x.shape == y.shape == again.shape


@pytest.mark.parametrize("name,options", [
    *[(name, {"rounding": "stochastic"}) for name in ("int4_g64", "int4_g64_asym_f16", "nvfp4", "int4_tensor", "q4_k")],
    *[(name, {"search": "mse"}) for name in ("nvfp4", "fp8_e4m3_b8x32", "int4_tensor")],
    ("mxfp4", {"search": "mse", "importance": torch.rand(128)}),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))  # fmt: skip
def test_options_do_not_see_tiles(name, options):
    x = dense((16, 128))
    stochastic = "rounding" in options

    def run(**more):
        return tq.quantize(x, name, **options, **more, **({"generator": generator()} if stochastic else {}))

    def values(**more):
        return tq.qdq(x, name, **options, **more, **({"generator": generator()} if stochastic else {}))

    expected, y = run(), values()
    assert stochastic or not torch.equal(expected.scale.float(), tq.quantize(x, name).scale.float())
    with tq.workspace(1 << 11):
        assert_same_parts(run(device=FakeDevice()).parts(), expected.parts())
        assert_same(values(device=[FakeDevice(), FakeDevice(pinned=True)]), y)


def test_given_parts():
    x = dense((40, 256))
    for name in ("int4_g64", "int4_g64_asym", "nvfp4", "fp8_e4m3_tensor", "fp8_e4m3_b16x32", "int8_channel"):
        known = {n: p for n, p in tq.quantize(2 * x, name).parts().items() if n != "qdata"}
        expected = tq.quantize(x, name, **known)
        assert not torch.equal(expected.qdata.view(torch.uint8), tq.quantize(x, name).qdata.view(torch.uint8))
        with tq.workspace(1 << 13):
            assert_same_parts(tq.quantize(x, name, **known, device=FakeDevice()).parts(), expected.parts())
            assert_same(tq.qdq(x, name, **known, device=FakeDevice()), expected.dequantize())
    divisor = tq.quantize(2 * x, "nvfp4").tensor_scale
    with tq.workspace(1 << 13):
        q = tq.quantize(x, "nvfp4", tensor_scale=divisor, device=FakeDevice())
    assert_same_parts(q.parts(), tq.quantize(x, "nvfp4", tensor_scale=divisor).parts())
    with pytest.raises(ValueError, match="has shape"):
        tq.quantize(x, "int4_g64", scale=torch.ones(3, dtype=torch.bfloat16), device=FakeDevice())


@pytest.mark.parametrize("name", ["fp8_e4m3_tensor", "int4_tensor_asym", "nvfp4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pinned", [False, True])
def test_one_scale_with_what_is_not_finite(name, bad, pinned):
    """Infinity and NaN take a tensor's one scale, and are left out of a divisor; wherever the tile lies, and whether
    the host or the device looks at it."""
    x = dense((64, 128), torch.float32)
    x[40, 3] = bad
    with tq.workspace(1 << 13):
        q = tq.quantize(x, name, device=FakeDevice(pinned))
    assert_same_parts(q.parts(), tq.quantize(x, name).parts())


@pytest.mark.parametrize("name", ["fp8_e4m3_tensor", "nvfp4"])
def test_a_tensor_within_the_budget_is_copied_once(name):
    """The second pass finds it on the device. What passes through staging buffers is copied once at any rate: the host
    finds the extremes."""
    x, copied = dense((64, 256)), []

    class Counting(FakeDevice):
        def copy(self, target, source):
            copied.append(source.nbytes if source.dtype is x.dtype else 0)
            super().copy(target, source)

    for pinned, budget, passes in ((True, 1 << 17, 1), (True, 1 << 14, 2), (False, 1 << 17, 1), (False, 1 << 14, 1)):
        copied.clear()
        with tq.workspace(budget):
            q = tq.quantize(x, name, device=Counting(pinned), output_device="cpu")
        assert_same_parts(q.parts(), tq.quantize(x, name).parts())
        assert sum(copied) == passes * x.nbytes


def test_hadamard_streams():
    x = dense((5, 30, 160))
    with tq.workspace(1 << 13):
        y = tq.hadamard(x, seed=3, device=FakeDevice())
        back = tq.hadamard(y, seed=3, inverse=True, device="cpu", out=torch.empty_like(y))
    assert_same(y, tq.hadamard(x, seed=3))
    assert_same(back, tq.hadamard(y, seed=3, inverse=True))


def test_several_devices_share_a_tensor():
    x, devices = dense((300, 256)), [FakeDevice(seed=i) for i in range(3)]
    for name in ("int4_g128", "nvfp4"):
        with tq.workspace(1 << 13):
            assert_same_parts(tq.quantize(x, name, device=devices).parts(), tq.quantize(x, name).parts())
        assert_same(tq.qdq(x, name, device=["cpu", "cpu"]), tq.qdq(x, name))
    assert sum(device.counts["compute"] for device in devices) > 20
    with pytest.raises(ValueError, match="empty"):
        tq.quantize(x, "int4_g128", device=[])


@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "fp8_e4m3_tensor"])
def test_a_device_that_is_named_several_times(name):
    """Its threads keep to the budget together."""
    x, seen = dense((300, 256)), []
    expected = tq.quantize(x, name)
    for pinned in (False, True):
        device = FakeDevice(pinned, shared=True)
        with tq.workspace(1 << 14):
            q = tq.quantize(x, name, device=[device] * 3, progress=lambda *_: seen.append(threading.get_ident()))
        assert_same_parts(q.parts(), expected.parts())
        assert device.peak <= 1 << 14
        assert threading.get_ident() != seen[-1]
        assert pinned == (threading.get_ident() not in seen) or name == "int4_g128"  # the host finds extremes
        seen.clear()


def test_an_error_of_one_device_ends_the_others():
    class Broken(FakeDevice):
        def staging(self, nbytes):
            raise RuntimeError("broken")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="broken"), tq.workspace(1 << 13):
        tq.quantize(dense((300, 256)), "int4_g128", device=[Broken(), FakeDevice()])
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["int4_g128", "nvfp4"])
def test_slices_of_safetensors(name, tmp_path):
    """A mapped tensor streams from the file: nothing of its 32 MiB becomes memory of the process."""
    x = dense((8192, 2048))
    save_file({"w": x}, tmp_path / "w.safetensors")
    expected = tq.quantize(x, name)
    out = tq.quantize(x[:1], name)
    out = torch.empty_like(expected)
    del x
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        for source in (file.get_slice("w"), file.get_tensor("w")):
            before = anonymous()
            with tq.workspace("2MiB"):
                q = tq.quantize(source, name, device=FakeDevice(), out=out)
            assert anonymous() - before < 16 << 20
            assert q is out
            assert_same_parts(q.parts(), expected.parts())


def anonymous():
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0


def test_progress():
    x, seen = dense((64, 256)), []
    for name, passes in (("int4_g128", 1), ("nvfp4", 2), ("fp8_e4m3_tensor", 2)):
        seen.clear()
        with tq.workspace(1 << 13):
            tq.quantize(x, name, device=FakeDevice(), progress=lambda done, total: seen.append((done, total)))
        assert {total for _, total in seen} == {passes * x.numel()} and len(seen) > 8
        assert seen == sorted(seen) and seen[-1][0] == passes * x.numel()
    tq.quantize(x, "int4_g128", device=FakeDevice(), progress=True)  # no terminal, no bar


# ----------------------------------------------------------------------------------------------- running out of memory


@pytest.mark.parametrize("fault", [("empty", 0), ("empty", 2), ("compute", 0), ("compute", 4), ("compute", 9)], ids=str)
@pytest.mark.parametrize("name", ["int4_g128", "fp8_e4m3_b2x32", "nvfp4", "fp8_e4m3_tensor"])
def test_out_of_memory_loses_nothing(name, fault):
    """The tile at which memory runs out is put back, and the rest goes on in halves."""
    x, sizes = dense((128, 512)), []
    fake = FakeDevice(lazy=False, faults=[fault])
    with tq.workspace(1 << 15):
        q = tq.quantize(x, name, device=fake, progress=lambda done, total: sizes.append(done))
    assert_same_parts(q.parts(), tq.quantize(x, name).parts())
    assert fake.counts[fault[0]] > fault[1], "the fault never happened"
    taken = [b - a for a, b in zip([0, *sizes], sizes, strict=False)]
    plain = []
    with tq.workspace(1 << 15):
        tq.quantize(x, name, device=FakeDevice(), progress=lambda done, total: plain.append(done))
    assert min(taken) < plain[0] and sum(taken) == plain[-1]
    assert fake.live == 0


def test_a_device_smaller_than_the_budget():
    x, fake = dense((128, 512)), FakeDevice(lazy=False, capacity=20_000)
    y = tq.qdq(x, "mxfp4", device=fake)
    assert_same(y, tq.qdq(x, "mxfp4"))
    assert fake.peak <= 20_000


@pytest.mark.parametrize("kind", ["empty", "compute"])
def test_the_smallest_tile_fails(kind):
    x = dense((64, 512))
    with pytest.raises(torch.OutOfMemoryError, match=r"int4_g128.*\(1, 1, 128\).*\(64, 512\).*workspace is 67108864"):
        tq.quantize(x, "int4_g128", device=FakeDevice(lazy=False, faults=[kind]))


def test_qdq_keeps_its_scales_within_the_budget(monkeypatch):
    """Formats whose scales lie in memory between two passes (here all, on the CPU)."""
    monkeypatch.setattr(ops, "_SMALL", 1 << 10)
    x, allocated = dense((3, 40, 384)), []
    inner = ops._allocate_scales

    def allocate(fmt, x, names):
        found = inner(fmt, x, names)
        allocated.append(sum(part.nbytes for part in found.values()))
        return found

    for name in ("int4_g32_asym", "nvfp4", "q4_k", "fp8_e4m3_b16x32", "int3_g50"):
        expected, sized = tq.quantize(x, name, rounding="stochastic", generator=generator()), ops._allocate_scales
        monkeypatch.setattr(ops, "_allocate_scales", allocate)
        with tq.workspace(1 << 10):
            y = tq.qdq(x, name, rounding="stochastic", generator=generator())
        monkeypatch.setattr(ops, "_allocate_scales", sized)
        assert_same(y, expected.dequantize())
        assert max(allocated) <= 1 << 10 and (len(allocated) > 1 or name == "fp8_e4m3_b16x32")
        allocated.clear()


def test_qdq_goes_on_in_tiles_where_its_scales_do_not_fit(monkeypatch):
    """A device with room for the result, and for few scales besides."""
    x, inner, room = dense((3, 40, 384)), ops._allocate_scales, 600

    def allocate(fmt, x, names):
        if sum(part.nbytes for part in inner(fmt, x, names).values()) > room:
            raise torch.OutOfMemoryError
        return inner(fmt, x, names)

    expected = {name: tq.qdq(x, name) for name in ("int4_g32_asym", "nvfp4", "fp8_e4m3_b16x32", "int3_g50")}
    monkeypatch.setattr(ops, "_allocate_scales", allocate)
    for name, y in expected.items():
        assert_same(tq.qdq(x, name), y)
    room = 1
    with pytest.raises(torch.OutOfMemoryError, match=r"int4_g32_asym.*\(1, 1, 32\).*\(3, 40, 384\)"):
        tq.qdq(x, "int4_g32_asym")


# ------------------------------------------------------------------------------------------------------------- surface


def test_where_results_are_left():
    x = dense((64, 256))
    expected = tq.quantize(x, "int4_g128")
    out = torch.empty_like(expected)
    assert tq.quantize(x, "int4_g128", device=FakeDevice(), output_device="cpu", out=out) is out
    assert_same_parts(out.parts(), expected.parts())
    y = torch.empty_like(x)
    assert tq.qdq(x, "int4_g128", device=FakeDevice(), out=y) is y
    assert_same(y, expected.dequantize())
    assert tq.qdq(x, "int4_g128", out=y.zero_()) is y
    assert_same(y, expected.dequantize())
    assert tq.qdq(x[:8], "mxfp4", search="mse", out=y[:8]).data_ptr() == y.data_ptr()
    assert_same(y[:8], tq.qdq(x[:8], "mxfp4", search="mse"))
    assert_same(tq.dequantize(expected, out=y), expected.dequantize())
    assert tq.dequantize(expected, torch.float32, device=FakeDevice()).dtype is torch.float32
    with pytest.raises(ValueError, match="out is on cpu and output_device says meta"):
        tq.qdq(x, "int4_g128", output_device="meta", out=y)
    with pytest.raises(ValueError, match="out has to be a contiguous"):
        tq.qdq(x, "int4_g128", device=FakeDevice(), out=torch.empty(3))
    with pytest.raises(TypeError, match="out is a tensor"):
        tq.quantize(x, "int4_g128", device=FakeDevice(), out=out.parts())
    with pytest.raises(ValueError, match="contiguous"):
        window = tq.quantize(torch.cat([x, x], 1), "int4_g128")[:, :256]
        tq.quantize(x, "int4_g128", device=FakeDevice(), out=window)
    with pytest.raises(ValueError, match="out has to be"):
        tq.quantize(x, "int4_g64", device=FakeDevice(), out=out)
    for function in (lambda x, **kw: tq.qdq(x, "int4_g128", **kw), tq.hadamard):
        with pytest.raises(ValueError, match="no gradient"):
            function(x.float().requires_grad_(), device=FakeDevice())
        with torch.no_grad():
            function(x.float().requires_grad_(), device=FakeDevice())


def test_traced_graphs_take_a_device():
    x = dense((8, 256))
    compiled = torch.compile(lambda x: tq.qdq(x, "mxfp4", device="cpu"), backend="eager", fullgraph=True)
    assert_same(compiled(x), tq.qdq(x, "mxfp4"))
    meta = tq.qdq(x.to("meta"), "mxfp4", search="mse")
    assert meta.is_meta and meta.shape == x.shape


def test_empty_tensors():
    for name, shape in (("int4_g128", (0, 128)), ("nvfp4", (4, 0)), ("fp8_e4m3_tensor", (0,))):
        x = torch.empty(shape)
        q = tq.quantize(x, name, device=FakeDevice())
        assert_same_parts(q.parts(), tq.quantize(x, name).parts())
        assert tq.qdq(x, name, device=FakeDevice()).shape == tq.dequantize(q, device=FakeDevice()).shape == shape


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16", "FP8"])
def test_models_stream(scheme):
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Sequential(torch.nn.Linear(128, 64)))

    expected = tq.quantize_(model(), scheme)
    with tq.workspace(1 << 14):
        found = tq.quantize_(model(), scheme, device=FakeDevice())
    for (name, q), (_, wanted) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        if isinstance(wanted, tq.QTensor):
            assert_same_parts(q.parts(), wanted.parts())
        else:
            assert_same(q.detach(), wanted.detach())
        assert q.device.type == "cpu", name


# ------------------------------------------------------------------------------------------------------------ on a GPU


def allocated():
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("name", [*KINDS, "fp8_e4m3_b128x128", "nf4_g64", "mxfp8"])
def test_gpu_streams(name, pinned):
    """Both ways, within the budget, in a stream of the caller."""
    x = dense((4096, 2000), torch.bfloat16)
    x = x.pin_memory() if pinned else x
    expected, y = tq.quantize(x.cuda(), name), tq.qdq(x.cuda(), name)
    back = expected.dequantize().cpu()
    fmt = get_format(name)
    torch.cuda.synchronize()
    for budget in ("2MiB", "64MiB"):
        with tq.workspace(budget) as size, torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(2):  # the first loads kernels
                before = allocated()
                torch.cuda.reset_peak_memory_stats()
                q = tq.quantize(x, name, device="cuda")
                row = 6 * max(fmt.group[0], 1) * x.shape[1]  # bytes in and out of a row of blocks
                peak = torch.cuda.max_memory_allocated() - before - q._buf.nbytes
            assert peak <= max(size, row) + (1 << 20)
            assert_same_parts(
                {n: p.cpu() for n, p in q.parts().items()}, {n: p.cpu() for n, p in expected.parts().items()}
            )
            before = allocated()
            torch.cuda.reset_peak_memory_stats()
            on_host = tq.quantize(x, name, device="cuda", output_device="cpu")
            out = torch.empty_like(x, pin_memory=pinned)
            values = tq.qdq(x, name, device="cuda", out=out)
            again = tq.dequantize(on_host, device="cuda", output_device="cpu")
            assert torch.cuda.max_memory_allocated() - before <= max(size, row) + (1 << 20)
            assert_same_parts(on_host.parts(), {n: p.cpu() for n, p in expected.parts().items()})
            assert values is out
            assert_same(values, y.cpu())
            assert_same(again, back)
            left = tq.qdq(x, name, device="cuda")
            assert left.is_cuda
            assert_same(left.cpu(), y.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4_g64", "nvfp4", "int3_g20_asym", "int4_tensor"])
def test_gpu_options(name):
    x = dense((1024, 1000))
    weights = torch.rand(1000)
    for options, own in (
        ({"rounding": "stochastic"}, {}),
        ({"search": "mse"}, {}),
        ({"search": "mse"}, {"importance": weights}),
    ):
        seeded = {"generator": generator()} if "rounding" in options else {}
        on_gpu = {n: v.cuda() for n, v in own.items()}
        expected = tq.quantize(x.cuda(), name, **options, **on_gpu, **seeded)
        seeded = {"generator": generator()} if "rounding" in options else {}
        with tq.workspace("512KiB"):
            q = tq.quantize(x, name, **options, **own, **seeded, device=["cuda", "cuda"])
        assert_same_parts({n: p.cpu() for n, p in q.parts().items()}, {n: p.cpu() for n, p in expected.parts().items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "fp8_e4m3_b128x128"])
def test_gpu_results_leave_the_device(name):
    """From a tensor on the GPU, of any strides, in slabs that no copy joins."""
    x = dense((2, 3, 256, 4, 256)).cuda().permute(0, 3, 1, 2, 4)[:, ::2]
    expected = tq.quantize(x, name)
    with tq.workspace("256KiB"):
        q, y = tq.quantize(x, name, output_device="cpu"), tq.qdq(x, name, output_device="cpu")
    assert_same_parts(q.parts(), {n: p.cpu() for n, p in expected.parts().items()})
    assert_same(y, expected.dequantize().cpu())
    assert_same(tq.dequantize(expected, output_device="cpu"), y)


@pytest.mark.gpu
def test_gpu_source_may_change_after_the_call():
    x = dense((8192, 4096)).pin_memory()
    expected = tq.quantize(x.cuda(), "int4_g128")
    torch.cuda._sleep(20_000_000)
    q = tq.quantize(x, "int4_g128", device="cuda")
    x.zero_()
    assert_same_parts({n: p.cpu() for n, p in q.parts().items()}, {n: p.cpu() for n, p in expected.parts().items()})


@pytest.fixture
def little_memory():
    """A function that leaves so many MiB of the GPU to this process."""
    torch.cuda.synchronize()
    total = torch.cuda.get_device_properties(0).total_memory

    def leave(mib):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (mib << 20)) / total)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_gpu_runs_out_of_memory(little_memory):
    """A plan that does not fit goes on in smaller tiles."""
    x = dense((16384, 4096))  # 128 MiB, of which six times 32 would be on their way
    expected = {name: tq.qdq(x.cuda(), name).cpu() for name in ("int4_g128", "nvfp4")}
    little_memory(48)
    for name, y in expected.items():
        with tq.workspace("1GiB"):
            assert_same(tq.qdq(x, name, device="cuda", output_device="cpu"), y)


SMALLEST = """
import re, torch
import tritonq as tq
x = torch.zeros(2, 16 << 20, dtype=torch.bfloat16)
tq.qdq(x, "int8_channel", device="cuda", output_device="cpu")
torch.cuda.synchronize()
torch.cuda.empty_cache()
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (24 << 20)) / total)
for where, wanted in (("cpu", r"smallest.*bytes are free.*workspace is 67108864 bytes"),
                      (None, r"no memory for the result.*output_device='cpu'")):
    try:
        tq.qdq(x, "int8_channel", device="cuda", **({"output_device": where} if where else {}))
    except torch.OutOfMemoryError as error:
        assert re.search(wanted, str(error), re.DOTALL), error
    else:
        raise AssertionError(f"it fits: {torch.cuda.memory_reserved()} bytes reserved")
"""


@pytest.mark.gpu
def test_gpu_smallest_tile_does_not_fit():
    """A row of 32 MiB has one scale. In a process of its own: what other tests left in torch's cache may be enough."""
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", SMALLEST], capture_output=True, text=True, timeout=120, env=where)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_gpu_mapped_file(tmp_path):
    x = dense((4096, 2048))
    save_file({"w": x}, tmp_path / "w.safetensors")
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        q = tq.quantize(file.get_slice("w"), "nvfp4", device="cuda")
    wanted = tq.quantize(x, "nvfp4")
    assert_same_parts({n: p.cpu() for n, p in q.parts().items()}, wanted.parts())


@pytest.mark.gpu
def test_gpu_devices_share_a_tensor():
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    x = dense((4096, 4096))
    for name in ("int4_g128", "nvfp4"):
        wanted = tq.quantize(x, name)
        for several in (devices, devices * 2):
            q = tq.quantize(x, name, device=several)
            assert q.device == torch.device("cuda:0")
            assert_same_parts({n: p.cpu() for n, p in q.parts().items()}, wanted.parts())
            q = tq.quantize(x, name, device=several, output_device="cpu")
            assert_same_parts(q.parts(), wanted.parts())


def test_a_search_goes_tile_by_tile():
    """Where x lies, too, and into `out`: no more scales than the budget holds."""
    x, seen = dense((300, 256)), []
    expected = tq.quantize(x, "int4_g32", search="mse").dequantize()
    out = torch.empty_like(x)
    for target in (None, out):
        seen.clear()
        with tq.workspace(1 << 10):
            y = tq.qdq(x, "int4_g32", search="mse", out=target, progress=lambda done, total: seen.append(done))
        assert_same(y, expected)
        assert len(seen) >= 4 and seen[-1] == x.numel() and (target is None or y is out)
