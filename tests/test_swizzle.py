"""Scales in the 128 x 4 tiles of Blackwell: against the layout that cuBLAS documents, written as a loop."""

import itertools
import math

import pytest
import torch
from conftest import INTERPRET
from oracle import assert_same, assert_same_parts
from test_laws import lay_out, values

import tritonq as tq
from tritonq import ops, plans, reference, tuning
from tritonq.formats import get_format

NAMES = (
    "mxfp8", "mxfp4_rceil", "mxfp6_e2m3", "nvfp4", "mxint8", "e4m3_g32_ue5m3", "e3m0_g32_e8m0_even", "int5_g24_e8m0",
    "e4m3ieee_g16_e4m3", "int8_g7_e8m0", "int3_g3_e8m0",
)  # fmt: skip
every_format = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def plans_as_before():
    yield
    plans.forget()


def documented(scale):
    """Bytes [R, C] of scales, or of the only one among leading axes, in tiles of 128 x 4.

    cuBLAS documentation, "1D Block Scaling Factors Layout": a tile of scales of 128 rows and 4 columns is 512 bytes;
    the scale of row `outer` and column `inner` is at byte (outer % 32) * 16 + (outer / 32) * 4 + inner of its tile,
    and tiles are laid out row by row. Scales outside of the matrix are zeros.
    """
    if scale.ndim > 2:
        return torch.stack([documented(one) for one in scale])
    raw = scale.cpu().view(torch.uint8)
    rows, columns = raw.shape
    tile_columns = math.ceil(columns / 4)
    result = torch.zeros(math.ceil(rows / 128) * tile_columns * 512, dtype=torch.uint8)
    for outer, inner in itertools.product(range(rows), range(columns)):
        tile = (outer // 128) * tile_columns + inner // 4
        within = (outer % 128 % 32) * 16 + (outer % 128) // 32 * 4 + inner % 4
        result[tile * 512 + within] = raw[outer, inner]
    return result


SHAPES = ((1, 1), (128, 4), (130, 5), (31, 9), (300, 3), (2, 129, 2), (2, 3, 5, 4), (0, 3), (3, 0), (2, 0, 4))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout(shape, device):
    """swizzle is the documented layout, unswizzle its inverse, for any leading axes and strides."""
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in (torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn):
        for scale in (raw, lay_out(raw, "transposed"), lay_out(raw, "step")):
            got = tq.swizzle(scale.view(dtype) if scale.is_contiguous() else scale)
            assert got.device == raw.device and got.is_contiguous()
            if raw.numel():
                assert torch.equal(got.cpu().view(torch.uint8), documented(raw).reshape(got.shape))
            padded = -(-shape[-2] // 128) * 128 * (-(-shape[-1] // 4) * 4)
            assert got.shape == (*shape[:-2], padded)
            back = tq.unswizzle(got, shape)
            assert back.shape == shape and back.is_contiguous() and back.dtype == got.dtype
            assert torch.equal(back.view(torch.uint8), raw)
            assert torch.equal(tq.unswizzle(got.reshape(-1), shape).view(torch.uint8), raw)


def check(x, fmt, device, what="", **given):
    expected = reference.quantize(x, fmt, **given)
    wanted = documented(expected["scale"]).view(fmt.scale.dtype)
    given = {name: part.to(device) for name, part in given.items()}
    got = ops.quantize(x.to(device) if device != "cpu" else x, fmt, swizzled=True, **given)
    assert got["scale"].shape == (*x.shape[:-2], wanted.numel() // max(1, math.prod(x.shape[:-2])))
    assert_same(got["scale"].cpu(), wanted.reshape(got["scale"].shape), f"{what} scale")
    assert_same(tq.unswizzle(got["scale"], expected["scale"].shape).cpu(), expected["scale"], f"{what} unswizzled")
    rest = [{k: v for k, v in parts.items() if k != "scale"} for parts in (got, expected)]
    assert_same_parts(*rest, what)


@every_format
def test_quantize(name, device):
    """The kernel writes what swizzle makes of its scales, zero padding included."""
    fmt = get_format(name)
    g = fmt.group[1]
    for shape in ((5, 3 * g + 1), (130, 5 * g), (2, 3, 9 * g))[: 2 if INTERPRET else 3]:
        for layout in ("contiguous",) if INTERPRET else ("contiguous", "transposed", "step", "swapped"):
            x = lay_out(values(shape, torch.bfloat16, 1), layout)
            check(x, fmt, device, f"{shape} {layout}")


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "mxfp6_e3m2", "int5_g24_e8m0"])
def test_any_tile(name, device, monkeypatch):
    """Law 8, and padding that several tiles share."""
    x = values((3, 70, 300), torch.float32, 2)
    x[1, 3, 40] = torch.inf
    for size in (1 << 13, 1 << 16) if INTERPRET else (64, 1 << 10, 1 << 14):
        monkeypatch.setattr(tuning, "TILE", size)
        plans.forget()
        check(x, get_format(name), device, f"tile {size}")


def test_slabs_and_given_tensor_scale(device):
    check(values((2, 3, 2, 10, 64), torch.bfloat16, 2).transpose(0, 2), get_format("mxfp8"), device)
    check(values((4, 64), torch.bfloat16, 2), get_format("nvfp4"), device, tensor_scale=torch.tensor([2.5]))


def test_search(device):
    """Scales that were searched for come in the same order."""
    x = values((5, 96), torch.bfloat16, 3).to(device)
    plain = ops.quantize(x, "mxfp4", search="mse")
    assert_same_parts(ops.quantize(x, "mxfp4", search="mse", swizzled=True), {
        **plain, "scale": tq.swizzle(plain["scale"])
    })  # fmt: skip


def test_no_elements(device):
    for name, shape in itertools.product(("mxfp8", "nvfp4"), ((0, 64), (3, 0), (2, 0, 32))):
        parts = ops.quantize(torch.zeros(shape, device=device), name, swizzled=True)
        plain = ops.quantize(torch.zeros(shape, device=device), name)
        assert_same_parts(parts, {**plain, "scale": tq.swizzle(plain["scale"])})


def test_errors(device):
    x = torch.ones(4, 64, device=device)
    for name in ("int4_g32", "fp8_e4m3_b16x16", "int8_channel", "int4_g16_asym_e4m3"):
        with pytest.raises(ValueError, match=r"swizzled scales are bytes of groups along a row.*such as mxfp8"):
            ops.quantize(x, name, swizzled=True)
    with pytest.raises(ValueError, match=r"got shape \(2,\); reshape"):
        ops.quantize(x[0], "mxfp8", swizzled=True)
    parts = ops.quantize(x, "mxfp8")
    with pytest.raises(ValueError, match="swizzle those that are given"):
        ops.quantize(x, "mxfp8", scale=parts["scale"], swizzled=True)
    with pytest.raises(ValueError, match=r"got shape \(2,\); reshape"):
        tq.swizzle(parts["scale"][0])
    with pytest.raises(ValueError, match=r"\(4, 2\) take 512 elements in 128 x 4 tiles, got 8"):
        tq.unswizzle(parts["scale"], (4, 2))


@pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_operator(name, device):
    x = values((2, 34, 70), torch.float32, 6).to(device)
    operator, seed = torch.ops.tritonq.quantize_swizzled, torch.tensor(7)
    torch.library.opcheck(operator.default, (x, name))
    torch.library.opcheck(operator.default, (x, name), {"seed": seed})

    def step(x):
        return [part.view(torch.uint8) for part in ops.quantize(x, name, swizzled=True).values()]

    backend = "inductor" if device == "cuda" else "aot_eager"
    for got, expected in zip(torch.compile(step, fullgraph=True, backend=backend)(x), step(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif(not INTERPRET, reason="counts launches of the interpreter")
def test_one_launch(device, monkeypatch):
    """No second pass over the scales."""
    from triton.runtime.interpreter import InterpretedFunction

    launched, run = [], InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: (launched.append(self.fn.__name__), run(self, *a, **k))[1]
    )
    monkeypatch.setattr(tq.scale_tiles, "swizzle", None)
    ops.quantize(values((40, 72), torch.bfloat16, 1), "mxfp8", swizzled=True)
    assert launched == ["group_kernel"]


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_compiles(target, tmp_path):
    import test_compile

    def call():
        for name, shape in (("mxfp8", (64, 4096)), ("mxfp4", (3, 100, 352)), ("nvfp4", (64, 4096))):
            for rounding in ("nearest", "stochastic"):
                ops.quantize(torch.zeros(shape, dtype=torch.bfloat16), name, swizzled=True, rounding=rounding)

    found = test_compile.launched(call)
    compiled = [one for one in found if one.constants.get("SWIZZLED")]
    assert [one.constants["ROUNDING"] for one in compiled] == [0, 1] * 3
    for one in compiled:
        registers = 192 if one.constants["ROUNDING"] else test_compile.REGISTERS
        test_compile.check(one, test_compile.TARGETS[target], tmp_path, registers)
