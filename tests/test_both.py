"""Dual outputs: the law "the parts of x and of x.mT from one read are those of two quantizations", bit for bit."""

import itertools
import re

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same_parts, check_replay
from test_laws import DTYPES, KINDS, LAYOUTS, NAMES, examples, get_format, lay_out, values

import tritonq as tq
from tritonq import ops, plans, reference, tuning
from tritonq.formats import FORMATS

every_format = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def plans_as_before():
    yield
    plans.forget()


def check(x, fmt, device, what="", **given):
    """Both results of a CPU tensor x against the reference."""
    expected = [reference.quantize(x, fmt, **given), reference.quantize(x.mT.contiguous(), fmt, **given)]
    given = {name: part.to(device) for name, part in given.items()}
    both = ops.quantize_both(x.to(device) if device != "cpu" else x, fmt, **given)
    for parts, wanted, shape, side in zip(both, expected, (x.shape, x.mT.shape), ("rows", "columns"), strict=True):
        assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == fmt.storage(tuple(shape))
        assert_same_parts(parts, wanted, f"{what} {side}")


@st.composite
def matrices(draw, fmt):
    """[..., N, K] with last groups that are not full in either direction."""
    cols = fmt.group[1] if fmt.group[1] > 0 else 40
    extents = sorted({1, 2, max(1, cols - 1), cols, cols + 1, 2 * cols + 3, 5})
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (*lead, draw(st.sampled_from(extents)), draw(st.sampled_from(extents)))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    return lay_out(values(shape, dtype, draw(st.integers(0, 1000)), draw(st.sampled_from(KINDS))), layout)


@every_format
def test_both_are_two_single_ones(name, device):
    fmt = get_format(name)

    @examples(device, 25, 3)
    @given(matrices(fmt))
    def law(x):
        check(x, fmt, device)

    law()


@every_format
def test_non_finite_elements_poison_their_groups(name, device):
    """In each direction those of its own row or column."""
    fmt = get_format(name)
    g = fmt.group[1] if fmt.group[1] > 0 else 20
    x = values((g + 3, 2 * g + 1), torch.float32, 1)
    x[0, 1], x[g // 2, 0], x[-1, -1] = torch.nan, torch.inf, -torch.inf
    x[:, g] = 0.0
    x[1, ::2] = -0.0
    check(x, fmt, device)


SOME = (
    "mxfp8", "nvfp4", "int4_g128", "int4_g128_asym", "int3_g64_asym", "mxfp6_e3m2", "fp8_e4m3_b128x128", "e3m4_g48",
    "int5_g20", "int4_g20", "int8_g3", "int4_g1", "int2_g128", "e5m1_b16x16_f16", "int8_g16_asym",
)  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_any_tile(name, device, monkeypatch):
    """Law 8: tile sizes do not matter."""
    fmt = get_format(name)
    x = values((130, 200), torch.bfloat16, 5)
    for size, width in itertools.product((1 << 12, 1 << 16) if INTERPRET else (64, 512, 1 << 13), (8, 128)):
        monkeypatch.setattr(tuning, "TILE", size)
        monkeypatch.setattr(tuning, "WRITTEN_COLUMNS", width)
        plans.forget()
        check(x, fmt, device, f"tile {size}, width {width}")


@pytest.mark.parametrize("name", SOME)
def test_whole_words_and_ragged_ends(name, device):
    """Rows and columns of whole words, of whole bytes, and of neither, and more than one matrix."""
    fmt = get_format(name)
    shapes = ((64, 128), (66, 90)) if INTERPRET else ((128, 256), (64, 100), (70, 33), (3, 40, 96), (2, 2, 31, 50))
    for shape in shapes:
        for layout in ("contiguous", "transposed", "swapped"):
            check(lay_out(values(shape, torch.bfloat16, 3), layout), fmt, device, f"{shape} {layout}")


def test_matrices_that_are_no_batch(device):
    """Leading axes that no stride joins: a launch for each slab."""
    x = values((2, 3, 2, 40, 64), torch.bfloat16, 2).transpose(0, 2)
    for name in ("mxfp8", "nvfp4"):
        check(x if device == "cpu" else x.cpu(), get_format(name), device)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int4_g128_asym", "fp8_e4m3_tensor", "int8_channel"])
def test_no_elements(name, device):
    fmt = get_format(name)
    for shape in ((0, 64), (3, 0), (2, 0, 5), (0, 0), (0, 3, 4)):
        x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        rows, columns = ops.quantize_both(x, fmt)
        assert_same_parts(rows, ops.quantize(x, fmt))
        assert_same_parts(columns, ops.quantize(x.mT, fmt))


def test_given_tensor_scale(device):
    check(values((40, 72), torch.bfloat16, 4), get_format("nvfp4"), device, tensor_scale=torch.tensor([1.5]))


def test_qtensors(device):
    """tq.quantize_both gives QTensors of x and of its transpose."""
    x = values((2, 34, 70), torch.bfloat16, 6).to(device)
    for name in ("mxfp8", "nvfp4", "int8_channel"):
        rows, columns = tq.quantize_both(x, name)
        assert rows.shape == x.shape and columns.shape == x.mT.shape and columns.dtype == x.dtype
        assert_same_parts(rows.parts(), tq.quantize(x, name).parts())
        assert_same_parts(columns.parts(), tq.quantize(x.mT.contiguous(), name).parts())


def test_errors(device):
    with pytest.raises(ValueError, match=r">= 2 dimensions, got shape \(64,\); reshape"):
        tq.quantize_both(torch.ones(64, device=device), "mxfp8")
    with pytest.raises(TypeError, match="cast it first"):
        tq.quantize_both(torch.ones(2, 64, dtype=torch.int32, device=device), "mxfp8")
    with pytest.raises(ValueError, match="has no tensor_scale; leave it out"):
        ops.quantize_both(torch.ones(2, 64, device=device), "mxfp8", tensor_scale=torch.ones(1, device=device))


@pytest.mark.skipif(not INTERPRET, reason="counts launches of the interpreter")
def test_one_launch(device, monkeypatch):
    """One kernel serves groups of a row and squares; tensor scales take their amax before."""
    from triton.runtime.interpreter import InterpretedFunction

    launched, run = [], InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: (launched.append(self.fn.__name__), run(self, *a, **k))[1]
    )
    x = values((40, 72), torch.bfloat16, 1)
    for name in ("mxfp8", "int4_g128_asym", "fp8_e4m3_b16x16", "e3m4_g64"):
        launched.clear()
        ops.quantize_both(x, name)
        assert launched == ["both_kernel"], name
    launched.clear()
    ops.quantize_both(x, "nvfp4")
    assert launched == ["keys_kernel", "both_kernel"]


@pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int4_g128_asym", "int8_channel"])
def test_operator(name, device):
    x = values((34, 70), torch.float32, 6).to(device)
    torch.library.opcheck(torch.ops.tritonq.quantize_both.default, (x, name))

    def step(x):
        return [part.view(torch.uint8) for side in ops.quantize_both(x, name) for part in side.values()]

    backend = "inductor" if device == "cuda" else "aot_eager"
    for got, expected in zip(torch.compile(step, fullgraph=True, backend=backend)(x), step(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int8_channel"])
def test_cuda_graph(name):
    x = torch.randn(256, 1024, device="cuda").bfloat16()

    def step():
        return [part.view(torch.uint8) for side in ops.quantize_both(x, name) for part in side.values()]

    check_replay(x, step)


# --------------------------------------------------------------------------------------------------- compilation


def launches(name, shape, dtype=torch.bfloat16, transposed=False):
    from test_compile import launched

    x = torch.zeros(shape, dtype=dtype)
    found = launched(lambda: ops.quantize_both(x.mT if transposed else x, name))
    return [one for one in found if one.name == "both_kernel"]


TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int4_g128_asym", "fp8_e4m3_b128x128"])
def test_compiles(name, target, tmp_path):
    """Without spills; rows of input come in 16-byte loads and codes of 8 bits leave in 16-byte stores."""
    import test_compile

    (one,) = launches(name, (4096, 14336))
    compiled = test_compile.check(one, test_compile.TARGETS[target], tmp_path, 255)
    if target == "sm_90":
        assert re.search(r"ld\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"])
        if name == "mxfp8":
            assert re.search(r"st\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"])
        (turned,) = launches(name, (4096, 14336), transposed=True)
        assert (turned.signature, turned.constants) == (one.signature, one.constants)


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("name", [n for n, fmt in FORMATS.items() if tuning.fits_both(fmt)])
def test_registry_compiles(name, tmp_path):
    import test_compile

    (one,) = launches(name, (4096, 14336))
    test_compile.check(one, test_compile.TARGETS["sm_90"], tmp_path, 255)


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(
    "name,shape,dtype",
    [("int3_g64_asym", (64, 100), torch.float16), ("e3m4_g64", (70, 333), torch.float32),
     ("mxfp6_e3m2", (128, 512), torch.float64), ("int8_g16", (40, 64), torch.bfloat16),
     ("nf4_g64", (3, 64, 128), torch.bfloat16)],
)  # fmt: skip
def test_odd_shapes_and_types_compile(name, shape, dtype, tmp_path):
    import test_compile

    (one,) = launches(name, shape, dtype)
    test_compile.check(one, test_compile.TARGETS["sm_80"], tmp_path, 255)
