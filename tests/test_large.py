"""Tensors of more than 2^31 elements on a GPU: right at both ends, in the middle, and where 32 bits end."""

import pytest
import torch
from oracle import assert_same, assert_same_parts

from tritonq import hadamard, learned_ops, ops, reference
from tritonq.formats import get_format
from tritonq.learned_reference import Learned, Wanted

COLUMNS = 4096
ROWS = (1 << 31) // COLUMNS + 256  # whole blocks of 128 rows
AROUND = [0, ROWS // 2, (1 << 30) // COLUMNS, (1 << 31) // COLUMNS, ROWS]  # rows where something may go wrong
# A row, a group or a block at a time, scales of the tensor, padded groups, codes that share bytes and words.
NAMES = (
    "int4_g128", "int8_channel", "mxfp4", "mxfp8", "nvfp4", "int4_g128_asym", "int3_g128", "mxfp6_e2m3", "nf4_g64",
    "fp8_e4m3_b128x128", "fp8_e4m3_tensor", "e3m4_g48", "int5_g96", "q4_k", "q6_k",
)  # fmt: skip

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("large")]


@pytest.fixture(scope="module")
def x():
    if torch.cuda.get_device_properties().total_memory < 24 << 30:
        pytest.skip("takes 24 GiB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    assert x.numel() > 1 << 31
    return x


def windows(rows, step):
    """Slices of whole blocks of `step` rows around each of AROUND, scaled to `rows`."""
    size = 2 * step
    for row in AROUND:
        start = min(max(0, row * rows // ROWS - step), rows - size) // step * step
        yield slice(start, start + size)


def expected(window, parts, fmt):
    """Parts of rows of x, given those of the whole tensor where all of it has a say."""
    known = {k: parts[k].cpu() for k in ("tensor_scale",) if k in parts}
    if fmt.group[0] == -1:
        known["scale"] = parts["scale"].cpu()
    return reference.quantize(window.cpu(), fmt, **known)


def part_of(parts, rows, fmt):
    """Parts that belong to these rows of the tensor, on the CPU."""
    blocks = slice(rows.start // fmt.group[0], -(-rows.stop // fmt.group[0])) if fmt.group[0] > 0 else None
    found = {}
    for name, part in parts.items():
        if name == "tensor_scale" or (name == "scale" and blocks is None):
            found[name] = part.cpu()
        else:
            found[name] = part[rows if name == "qdata" else blocks].cpu()
    return found


def check_rows(parts, x, fmt):
    for rows in windows(x.shape[0], max(4, fmt.group[0])):
        assert_same_parts(part_of(parts, rows, fmt), expected(x[rows], parts, fmt), f"{fmt.name} rows {rows}")


@pytest.mark.parametrize("name", NAMES)
def test_both_ends_and_the_middle(x, name):
    fmt = get_format(name)
    parts = ops.quantize(x, fmt)
    if fmt.group[0] == -1 or fmt.tensor_scale:
        amax = torch.stack([rows.abs().amax() for rows in x.split(1 << 14)]).amax().float().cpu()
        whole = reference.quantize(amax.reshape(1, 1), fmt)
        last = "tensor_scale" if fmt.tensor_scale else "scale"
        assert_same(parts[last].cpu(), whole[last], last)
    check_rows(parts, x, fmt)
    y = ops.dequantize(parts, fmt, tuple(x.shape), x.dtype)
    for rows in windows(ROWS, max(4, fmt.group[0])):
        values = reference.dequantize(part_of(parts, rows, fmt), fmt, (rows.stop - rows.start, COLUMNS), x.dtype)
        assert_same(y[rows].cpu(), values, f"dequantize rows {rows}")
    del parts
    done = ops.qdq(x, fmt)
    assert all(torch.equal(a, b) for a, b in zip(y.split(1 << 14), done.split(1 << 14), strict=True))


@pytest.mark.parametrize("name", ["int8_channel", "int4_g128", "fp8_e4m3_channel"])
def test_one_row(x, name):
    """A single row, which for channels is one group."""
    fmt = get_format(name)
    row = x.view(1, -1)
    parts = ops.quantize(row, fmt)
    n, y = row.shape[1], ops.qdq(row, fmt)
    for end in (1 << 12, n // 2, 1 << 30, (1 << 31) + (1 << 11), n):
        columns = slice(end - (1 << 12), end)
        scale = parts["scale"] if fmt.group[1] == -1 else parts["scale"][:, columns.start // 128 : columns.stop // 128]
        piece = reference.quantize(row[:, columns].cpu(), fmt, scale=scale.cpu())
        codes = parts["qdata"][:, columns.start * fmt.bits // 8 : columns.stop * fmt.bits // 8]
        assert_same(codes.cpu(), piece["qdata"], f"{columns}")
        assert_same(y[:, columns].cpu(), reference.dequantize(piece, fmt, (1, 1 << 12), x.dtype), f"{columns}")
    if fmt.group[1] == -1:  # its ends say what the scale is
        ends = torch.tensor([[row.amax().item(), row.amin().item()]])
        assert_same(parts["scale"].cpu(), reference.quantize(ends, fmt)["scale"], "scale")
    else:
        last = reference.quantize(x[-8:].cpu(), fmt)["scale"]
        assert_same(parts["scale"].view(ROWS, -1)[-8:].cpu(), last, "scale")


@pytest.mark.parametrize("name", ["int4_g128", "mxfp8"])
def test_transposed(x, name):
    """Columns of x as rows: groups run over strides."""
    fmt = get_format(name)
    check_rows(ops.quantize(x.mT, fmt), x.mT, fmt)


def test_given_scales_search_and_stochastic_rounding(x):
    fmt = get_format("int4_g128")
    parts = ops.quantize(x, fmt, search="mse")
    for rows in windows(ROWS, 4):
        assert_same_parts(part_of(parts, rows, fmt), ops.quantize(x[rows].cpu(), fmt, search="mse"), f"{rows}")
    again = ops.quantize(x, fmt, scale=parts["scale"])
    assert torch.equal(again["qdata"], parts["qdata"])
    del again, parts
    generator = torch.Generator().manual_seed(1)
    y = ops.qdq(x, fmt, rounding="stochastic", generator=generator)
    seed = ops._value(ops._draw(torch.Generator().manual_seed(1)))
    last = x[-4:].cpu()
    # The random numbers of the last rows, by their index in the whole tensor, are not those of a tensor of four rows.
    from tritonq.codecs import philox

    chosen = reference.quantize(last, fmt)
    u = philox.uniform(seed, x.numel() - last.numel(), 4, COLUMNS, COLUMNS, torch.device("cpu"))
    expected_rows = reference.encode_decode(last.float(), chosen["scale"], None, None, fmt, x.dtype, u=u)
    assert_same(y[-4:].cpu(), expected_rows.to(x.dtype), "stochastic")


def test_dual_outputs(x):
    fmt = get_format("mxfp8")
    rows, columns = ops.quantize_both(x, fmt)
    check_rows(rows, x, fmt)
    check_rows(columns, x.mT, fmt)


def test_hadamard(x):
    y = hadamard(x, seed=3)
    for rows in windows(ROWS, 4):
        assert_same(y[rows].cpu(), hadamard(x[rows].cpu(), seed=3), f"{rows}")


@pytest.mark.parametrize("name", ["int4_g128", "fp8_e4m3_channel", "fp8_e4m3_b128x128"])
def test_learned(x, name):
    """Values, gradients and codes with tuning parameters; x is its own v and dy."""
    fmt = get_format(name)
    ratio = torch.rand(fmt.scale_shape(tuple(x.shape)), generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    given, wanted = Learned(x, ratio, ratio), Wanted(v=True, high=True)
    calls = (
        lambda x, given: {"y": learned_ops.qdq(x, fmt, given)},
        lambda x, given: {"dv": learned_ops.backward(x, x, fmt, given, wanted)["dv"]},
        lambda x, given: {"codes": learned_ops.quantized(x, fmt, given)["qdata"]},
    )
    for call in calls:
        found = call(x, given)
        for rows in windows(ROWS, fmt.group[0] if fmt.group[0] > 1 else 4):
            own = ratio[rows.start // fmt.group[0] : rows.stop // fmt.group[0]].cpu()
            part = x[rows].cpu()
            expected_rows = call(part, Learned(part, own, own))
            assert_same_parts({n: t[rows].cpu() for n, t in found.items()}, expected_rows, f"{rows}")
