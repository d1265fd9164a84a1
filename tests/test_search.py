"""Scale search: the scales it finds against an oracle that tries all candidates, and everything a caller may pass.

The oracle is float64 numpy, written from the docstring of `tritonq.codecs.search` and the fields of a Format: windows
are those of the text, errors those of the nearest value, so it knows no rounding, no units and no order of sums.
"""

import functools
import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from conftest import INTERPRET
from oracle import assert_same, assert_same_parts
from test_laws import NAMES, get_format, lay_out, storage_bits

import tritonq as tq
from tritonq import ops, plans, reference, tuning

F32 = np.float32
ANCHORS = 3
# Formats of every kind of scale, element, group and zero point, for what need not run over all of them.
FEW = ("int4_g128", "int4_g128_asym", "int3_g7", "mxfp4", "nvfp4", "int4_g32_f16", "nf4_g48_bf16", "e1m2_b3x5",
       "int4_tensor_asym", "fp8_e4m3_channel")  # fmt: skip
if INTERPRET:
    FEW = ("int4_g128", "int3_g7", "mxfp4", "nvfp4", "e1m2_b3x5", "int3_g3_asym")
MORE = ("int4_g32_f16", "nf4_g48_bf16", "int4_tensor_asym", "fp8_e4m3_channel", "mxfp8_e5m2", "e4m3_g32_ue5m3",
        "int7_b2x6_absmax", "int8_g16_asym", "int6f2_g20", "table5_channel", "int2_tensor", "e3m0_g32_e8m0_even",
        "e2m3_g3")  # fmt: skip

SEARCHABLE = [n for n in NAMES if not get_format(n).super_group]  # super-groups refuse a search; test_super_groups.py
every_format = pytest.mark.parametrize("name", (*FEW, *MORE) if INTERPRET else SEARCHABLE)
SMALL_GROUPS = [n for n in SEARCHABLE if get_format(n).group[0] < 100]
few_in_the_interpreter = pytest.mark.parametrize("name", FEW if INTERPRET else SMALL_GROUPS)
few_formats = pytest.mark.parametrize("name", FEW)


def numbers(shape, kind="normal", seed=0, dtype=torch.bfloat16):
    rng = np.random.default_rng(seed)
    x = {
        "normal": lambda: rng.standard_normal(shape),
        "laplace": lambda: rng.laplace(size=shape),
        "student": lambda: rng.standard_t(4, size=shape),
    }[kind]()
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).reshape(shape)


def shape_of(fmt):
    """Whole groups and short ones."""
    rows, cols = fmt.group
    return (rows + 1 if rows > 1 else 3, 2 * cols + max(1, min(3, cols - 1)) if cols > 0 else 45)


def search(x, fmt, **options):
    return ops.quantize(x, fmt, search="mse", **options)


# ---------------------------------------------------------------------------------------------------------- the oracle


def stages(fmt):
    """[(step of the fp32 bits of a scale, first k, last k)], of e8m0 of its exponent."""
    if fmt.scale.name == "e8m0":  # two exponents below, one above
        return [(1, -2, 1)]
    if fmt.scale.name in ("e4m3", "ue5m3"):  # every number within an octave below and above
        return [(1 << 20, -8, 7)]
    size = math.prod(fmt.group) if min(fmt.group) > 0 else math.inf
    bits = fmt.element.bits
    if fmt.element.ebits or fmt.element.values:
        below, count = (96, 256) if bits <= 4 else (4, 128)
    elif bits == 4:
        below, count = (48, 128) if size <= 64 else (80, 128) if size <= 256 else (192, 256)
    else:
        below, count = {2: (320, 512), 3: (160, 256)}.get(bits, (32, 64))
    first = (1 << 16, -below, count - 1 - below)  # 128 to an octave
    return [first] if fmt.scale.name == "bf16" else [first, (1 << 13, -8, 7)]  # 1024 to an octave


@functools.cache
def scale_table(name):
    return np.array([oracle.load_scale(b, name) for b in range(256)], F32)


def scale_values(bits, name):
    """fp32 values of storage bits."""
    bits = np.asarray(bits, np.int64)
    if name == "f32":
        return bits.astype(np.uint32).view(F32)
    if name == "bf16":
        return (bits << 16).astype(np.uint32).view(F32)
    if name == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(F32)
    return scale_table(name)[bits]


def neighbours(bits, stage, name):
    """Storage bits of the candidates around a stored scale."""
    step, first, last = stage
    k = np.arange(first, last + 1)
    if name == "e8m0":
        return np.clip(bits + k, 0, 254)
    value = scale_values([bits], name)
    moved = np.clip((np.abs(value).view(np.int32).astype(np.int64) & -step) + k * step, 1, 0x7F7FFFFF)
    raw = np.copysign(moved.astype(np.int32).view(F32), value)
    if name == "f32":
        found = raw.view(np.uint32).astype(np.int64)
    else:
        ebits, mbits, kind, signed, _ = oracle.SCALES[name]
        found = oracle.encode_minifloat(raw, ebits, mbits, kind, signed)
        found = np.where(found % 2 ** (ebits + mbits) == 0, 1, found)
    return np.where(k == 0, bits, found)


def errors(x, w, factor, zero, element, short=False):
    """sum of w (x - nearest value)^2 for each factor [C] (and zero point [C]); x [n] holds fp32 numbers.

    short: nearest after multiplication with a 1 / factor of 16 bits, half up, as the search compares."""
    x, factor = x.astype(np.float64), factor.astype(F32)
    y = x / factor[:, None].astype(np.float64)
    if short:
        inverse = (((F32(1) / factor).view(np.int32) + 0x80) & -0x100).view(F32)
        y = x * inverse[:, None].astype(np.float64)
    if element.ebits or element.values:
        if element.values:
            values = np.array(element.values)
        else:
            positive = oracle.magnitudes(element.ebits, element.mbits, element.special)
            values = np.concatenate([-positive[:0:-1], positive])
        y = values[np.searchsorted((values[1:] + values[:-1]) / 2, y)]
    else:
        unit = 2.0**element.fraction
        zero = np.full(len(factor), 2 ** (element.bits - 1)) if zero is None else zero
        zero = zero[:, None].astype(np.float64)
        y = np.clip(np.rint(y * unit), -zero, 2**element.bits - 1 - zero) / unit
    y = (y.astype(F32) * factor[:, None]).astype(np.float64)
    return (w * (x - y) ** 2).sum(1)


def trials(bits, zero, stage, fmt):
    """(storage bits, zero points) of all candidates."""
    found = neighbours(bits, stage, fmt.scale.name)
    if not fmt.zero_point:
        return found, None
    top = 2**fmt.bits - 1
    ratio = scale_values([bits], fmt.scale.name) / scale_values(found, fmt.scale.name)  # fp32
    low = F32(zero) * ratio
    high = F32(top) - F32(top - zero) * ratio
    zeros = [np.clip(np.rint(z), 0, top) for z in (low, high, (low + high) * F32(0.5))]
    return np.tile(found, ANCHORS), np.concatenate(zeros)


def groups_of(x, fmt, importance=None):
    """(scale index, fp32 numbers [n], weights [n]) of every group; x a tensor."""
    flat = oracle.to_float32(x.to(torch.float64).cpu().numpy())
    view, _, groups = oracle.regions(flat.shape, fmt)
    weights = np.ones(flat.shape) if importance is None else np.broadcast_to(importance, flat.shape)
    flat, weights = flat.reshape(view), weights.reshape(view)
    return [(i, flat[where].ravel(), weights[where].ravel(), where) for i, where in groups]


def check(x, fmt, parts, importance=None, best=1e-5):
    """Every group of a result against all candidates: (searched errors, those of the rule)."""
    shape = tuple(x.shape)
    weights = None if importance is None else importance.to(torch.float64).cpu().numpy()
    y = ops.dequantize(parts, fmt, shape, torch.float64).cpu().numpy().reshape(oracle.regions(shape, fmt)[0])
    divisor = F32(parts["tensor_scale"].cpu()[0]) if fmt.tensor_scale else None
    rule = oracle.quantize(x.to(torch.float64).cpu().numpy(), fmt, tensor_scale=divisor)
    bits = storage_bits(parts["scale"])
    zeros = parts["zero_point"].cpu().numpy().ravel() if fmt.zero_point else [None] * len(bits)
    found = []
    for i, numbers, w, where in groups_of(x, fmt, weights):

        def tried(bits, zeros, short=True, numbers=numbers, w=w):
            factor = scale_values(bits, fmt.scale.name)
            factor = factor if divisor is None else factor / divisor
            return errors(numbers, w, factor, zeros, fmt.element, short)

        error = (w * (numbers.astype(np.float64) - y[where].ravel()) ** 2).sum()
        first, second = (*stages(fmt), None)[:2]
        candidates, zero = trials(rule.scale[i], rule.zero_point[i], first, fmt)
        compared = tried(candidates, zero)
        smallest, pool = tried(candidates, zero, short=False).min(), set(candidates.tolist())
        if second is not None:  # around whatever may have been the best of the first
            inner = []
            for j in np.flatnonzero(compared <= compared.min() * (1 + 1e-5)):
                more = trials(candidates[j], None if zero is None else zero[j], second, fmt)
                inner.append(tried(*more, short=False).min())
                pool |= set(more[0].tolist())
            smallest = min(smallest, max(inner))
        assert bits[i] in pool, f"group {i}: scale {bits[i]:#x} is outside the window"
        assert error <= smallest * (1 + best), f"group {i}: {error / smallest - 1:.2e} above the best candidate"
        own = np.array([rule.scale[i]]), np.array([rule.zero_point[i]]) if fmt.zero_point else None
        before = tried(*own, short=False)[0]
        assert error <= before * (1 + 1e-6), f"group {i}: {error / before - 1:.2e} above the rule"
        assert zeros[i] is None or 0 <= zeros[i] < 2**fmt.bits
        found.append((error, before))
    return np.array(found).T


def of_weights(columns, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).exponential(size=columns)).to(torch.float32)


def on_cpu(x, fmt, **options):
    """The tiled CPU path, also where kernels are what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "uses_triton", lambda x: False)
        moved = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return search(x.cpu(), fmt, **moved)


# ------------------------------------------------------------------------------------------------------------ results


@every_format
@pytest.mark.parametrize("kind,dtype,weighted", [("normal", torch.bfloat16, False), ("student", torch.float32, True)])
def test_no_candidate_is_better(name, kind, dtype, weighted, device):
    """The scale of every group is the best of its window, and never worse than the rule's; kernels agree bit for bit
    with the CPU path. Sums of rows were once capped at a limit that floats with a wide range reach: blocks of them got
    worse than the rule."""
    fmt = get_format(name)
    x = numbers(shape_of(fmt), kind, 1, dtype).to(device)
    importance = of_weights(x.shape[-1]).to(device) if weighted else None
    parts = search(x, fmt, importance=importance)
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == fmt.storage(tuple(x.shape))
    check(x, fmt, parts, importance)
    assert_same_parts({k: v.cpu() for k, v in parts.items()}, on_cpu(x, fmt, importance=importance))
    scale = scale_values(storage_bits(parts["scale"]), fmt.scale.name)
    assert np.isfinite(scale).all() and (scale != 0).all()


@pytest.mark.parametrize("name", ["fp8_e5m2_tensor", "e5m1_b4x40", "e6m1_channel", "e7m0_g40", "nf4_tensor",
                                  "mxfp8_e5m2", "int2_tensor_asym"])  # fmt: skip
def test_wide_and_narrow_codes(name, device):
    """Errors are summed in units that follow the codes: neither do large ones all hit the limit nor small ones all
    become 0, whatever the range of the element type."""
    fmt = get_format(name)
    x = numbers((5, 90), "laplace", 2).to(device)
    check(x, fmt, search(x, fmt))


def eager(x):
    """Errors [n] of a search as llama.cpp and auto-round do it: inverse scales around -8 / m, bf16 scales."""
    x = x.to(torch.float64).cpu().numpy()
    high, low = x.max(1), x.min(1)
    m = np.where(high >= -low, high, low)
    best = np.full(len(x), np.inf)
    for k in range(-100, 101):
        scale = torch.from_numpy(-m / (8 - 0.06 * k)).to(torch.bfloat16).to(torch.float64).numpy()[:, None]
        best = np.minimum(best, ((x - scale * np.clip(np.rint(x / scale), -8, 7)) ** 2).sum(1))
    return best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["normal", "laplace", "student"])
def test_int4_is_no_worse_than_an_eager_search(kind, dtype, device):
    """201 scales a group. Without tolerance, too, none of 24576 groups exceeds it (4096 of each kind), provided that
    both take the positive one where two elements share the largest magnitude: it decides the sign of the scale."""
    fmt = get_format("int4_g128")
    x = numbers((32 if INTERPRET else 512, 128), kind, 3, dtype).to(device)
    y = ops.dequantize(search(x, fmt), fmt, tuple(x.shape), torch.float64)
    error, other = ((x.double() - y) ** 2).sum(1).cpu().numpy(), eager(x)
    assert (error <= other * (1 + 1e-5)).all(), np.flatnonzero(error > other * (1 + 1e-5))
    assert error.sum() < other.sum()  # every bf16 number instead of 201


@pytest.mark.parametrize("name,most", [("int4_g128", 0.87), ("int3_g128", 0.83), ("int4_g128_asym", 0.92),
                                       ("nvfp4", 0.92), ("mxfp4", 0.96)])  # fmt: skip
def test_errors_fall(name, most, device):
    """What the search is for: a smaller squared error of normal weights than the rule's."""
    fmt = get_format(name)
    x = numbers((24, 256), "normal", 4).to(device)

    def error(parts):
        return float(((x.double() - ops.dequantize(parts, fmt, tuple(x.shape), torch.float64)) ** 2).sum())

    ratio = error(search(x, fmt)) / error(ops.quantize(x, fmt))
    assert ratio < most, ratio


@pytest.mark.parametrize("name", ["int4_g128_asym", "int3_g64_asym", "int2_g3_asym", "int4_tensor_asym"])
def test_zero_points_move(name, device):
    """Zero points move with scales: better than the best scale under the zero point of the rule."""
    fmt = get_format(name)
    x = numbers((12, 128), "laplace", 5)
    parts = search(x.to(device), fmt)
    found, _ = check(x, fmt, parts)
    rule = oracle.quantize(x.double().numpy(), fmt)
    fixed = []
    for i, group, w, _ in groups_of(x, fmt):
        candidates = neighbours(rule.scale[i], stages(fmt)[0], fmt.scale.name)
        zeros = np.full(len(candidates), rule.zero_point[i])
        fixed.append(errors(group, w, scale_values(candidates, fmt.scale.name), zeros, fmt.element).min())
    assert (found <= np.array(fixed) * (1 + 1e-5)).all()
    assert found.sum() < 0.998 * np.sum(fixed)
    assert parts["zero_point"].dtype is torch.uint8 and int(parts["zero_point"].max()) < 2**fmt.bits


def test_rule_wins_ties(device):
    """Numbers that the rule stores exactly keep its scale, as does a search that is switched off."""
    x = torch.arange(-8, 8.0, device=device).repeat(3, 8)
    for name in ("int4_g128", "int4_g128_f16", "int4_g128_f32", "int4_g128_asym"):
        assert_same_parts(search(x, name), ops.quantize(x, name), name)
    x = numbers((3, 256)).to(device)
    for name in FEW[:5]:
        for off in (None, False):
            assert_same_parts(ops.quantize(x, name, search=off), ops.quantize(x, name))
            assert torch.equal(tq.quantize(x, name, search=off).dequantize(), tq.quantize(x, name).dequantize())
        assert not torch.equal(search(x, name)["qdata"], ops.quantize(x, name)["qdata"])


# --------------------------------------------------------------------------------------------------------- importance


@few_formats
def test_importance_is_followed(name, device):
    """All the weight on one column: it gets the scale that suits it; the others are not looked at."""
    fmt = get_format(name)
    x = numbers(shape_of(fmt), "normal", 6, torch.float32).to(device)
    column = 1
    importance = torch.zeros(x.shape[-1], device=device)
    importance[column] = 0.7

    def error(parts):
        return ((x.double() - ops.dequantize(parts, fmt, tuple(x.shape), torch.float64)) ** 2)[:, column]

    weighted, plain = error(search(x, fmt, importance=importance)), error(search(x, fmt))
    if fmt.group[0] == 1:
        assert bool((weighted <= plain * (1 + 1e-5)).all())
    few = fmt.scale.name == "e8m0"  # four scales to choose from
    assert float(weighted.sum()) < (1.0 if few else 0.2 if fmt.group[0] == 1 else 0.9) * float(plain.sum())
    if fmt.group[1] > 0:  # groups whose weights are all 0 keep the rule's scales
        others = slice(1, None)
        assert_same(search(x, fmt, importance=importance)["scale"][:, others].clone().view(torch.uint8),
                    ops.quantize(x, fmt)["scale"][:, others].clone().view(torch.uint8))  # fmt: skip


@few_formats
def test_unit_of_importance(name, device):
    """Only ratios within a group count, so powers of two change no bit; other constants no error that one could see."""
    fmt = get_format(name)
    x = numbers(shape_of(fmt), "laplace", 7).to(device)
    importance = of_weights(x.shape[-1]).to(device)
    parts = search(x, fmt, importance=importance)
    for factor in (2.0**-90, 2.0**70):
        assert_same_parts(search(x, fmt, importance=importance * factor), parts, f"{factor}")
    assert_same_parts(search(x, fmt, importance=importance.double()), parts)
    check(x, fmt, search(x, fmt, importance=importance * 0.3), importance)
    check(x, fmt, search(x, fmt, importance=torch.full_like(importance, 1e-5)))
    if fmt.group[1] > 0:
        importance[: fmt.group[1]] *= 2.0**40
        assert_same_parts(search(x, fmt, importance=importance), parts, "another unit for each group")
    rule = ops.quantize(x, fmt)
    assert_same_parts(search(x, fmt, importance=torch.zeros_like(importance)), rule, "zeros")


def test_what_is_refused(device):
    x = numbers((2, 64), dtype=torch.float32).to(device)
    ones = torch.ones(64, device=device)
    rule = ops.quantize(x, "int4_g32")
    for quantize in (ops.quantize, tq.quantize, tq.qdq):
        for options, error, text in (
            ({"search": "MSE"}, ValueError, "'MSE'"),
            ({"search": True}, ValueError, "True"),
            ({"search": "awq"}, ValueError, "'mse'"),
            ({"importance": ones}, ValueError, "search='mse'"),
            ({"search": False, "importance": ones}, ValueError, "search='mse'"),
            ({"search": "mse", "scale": rule["scale"]}, ValueError, "leave out scale"),
            ({"search": "mse", "importance": ones[:63]}, ValueError, r"\(64,\).*\(63,\)"),
            ({"search": "mse", "importance": torch.ones_like(x)}, ValueError, r"\(64,\).*\(2, 64\)"),
            ({"search": "mse", "importance": ones.long()}, TypeError, "int64"),
            ({"search": "mse", "importance": [1.0] * 64}, TypeError, "list"),
            ({"search": "mse", "importance": ones.to("meta")}, ValueError, "on meta and the tensor on"),
            ({"search": "mse", "importance": -ones}, ValueError, "64 weights"),
            ({"search": "mse", "importance": ones / 0}, ValueError, "64 weights"),
            ({"search": "mse", "importance": ones.cumsum(0).sub(3).sqrt()}, ValueError, "2 weights"),
        ):
            with pytest.raises(error, match=text):
                quantize(x, "int4_g32", **options)
    asym = ops.quantize(x, "int4_g32_asym")
    with pytest.raises(ValueError, match="leave out scale"):
        ops.quantize(x, "int4_g32_asym", search="mse", scale=asym["scale"], zero_point=asym["zero_point"])


def test_a_refused_importance_leaves_out_alone(device):
    x = numbers((2, 64)).to(device)
    out = tq.quantize(x, "int4_g32")
    before = out.clone().dequantize()
    with pytest.raises(ValueError, match="negative"):
        tq.quantize(2 * x, "int4_g32", search="mse", importance=-torch.ones(64, device=device), out=out)
    assert torch.equal(out.dequantize(), before)
    with pytest.raises(ValueError, match="negative"):
        tq.quantize(x[:0], "int4_g32", search="mse", importance=-torch.ones(64, device=device))


# ------------------------------------------------------------------------------------------------------- every tensor


@pytest.mark.parametrize("name", (*(FEW if INTERPRET else SMALL_GROUPS), "e2m1_b4x8_e8m0_even", "e2m1_b3x4_e4m3"))
def test_zeros_and_non_finite_groups(name, device):
    """Groups of zeros are those of the rule, groups with NaN or infinity are NaN, and no other group notices.
    Neighbours of a NaN scale once were finite, and rows without NaN let one of them win."""
    fmt = get_format(name)
    rows, cols = fmt.group
    n, k = (2 * rows if rows > 1 else 4), (3 * cols if cols > 0 else 40)
    x = numbers((n, k), "normal", 8)
    given = {"tensor_scale": ops.tensor_scale(x.to(device), fmt)} if fmt.tensor_scale else {}
    clean = search(x.to(device), fmt, **given)
    scales = {key: part for key, part in clean.items() if key not in ("qdata", "tensor_scale")}
    zeros = torch.zeros_like(x).to(device)
    assert_same_parts(search(zeros, fmt), ops.quantize(zeros, fmt), "zeros")
    for bad in (math.nan, math.inf, -math.inf)[: 1 if INTERPRET else 3]:
        dirty = x.clone()
        dirty[0, 0] = bad
        dirty[-max(1, rows) :, k - max(1, cols) :] = 0.0
        parts = search(dirty.to(device), fmt, **given)
        y = ops.dequantize(parts, fmt, (n, k), x.dtype).cpu()
        if rows == -1:
            assert bool(y.isnan().all())
            continue
        expected = {key: part.clone() for key, part in scales.items()}
        rule = ops.quantize(dirty.to(device), fmt, **given)
        for key, part in expected.items():  # the first group, and the last where its zeros fill it
            for where in ((0, 0), (-1, -1)) if cols > 0 else ((0, 0),):
                as_bytes(part)[where] = as_bytes(rule[key])[where]
        touched = slice(None, None if cols > 0 else -1)
        for key, part in expected.items():
            assert_same(as_bytes(parts[key])[touched], as_bytes(part)[touched], f"{bad} {key}")
        first = y[: max(1, rows), : cols if cols > 0 else k]
        assert bool(first.isnan().all()) and int(y.isnan().sum()) == first.numel()


def as_bytes(part):
    """Bits of a part as integers of the same shape."""
    return part.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[part.dtype.itemsize])


@few_formats
def test_shapes_and_strides(name, device):
    """1 to 4 dimensions, any strides, views with a minus sign: the bits of contiguous tensors, the input left alone."""
    fmt = get_format(name)
    rows, cols = fmt.group
    shape = (2, 2, rows + 1 if rows > 1 else 3, cols + 5 if cols > 0 else 37)
    importance = of_weights(shape[-1]).to(device)
    for ndim in (1, 3) if INTERPRET else (1, 2, 3, 4):
        if rows > 1 and ndim == 1:
            continue
        x = numbers(shape[-ndim:], "normal", ndim, torch.float32)
        expected = on_cpu(x, fmt, importance=importance)
        check(x, fmt, expected, importance)
        for layout in ("contiguous", "transposed", "step", "permuted", "swapped")[: 2 if INTERPRET else 5]:
            view = lay_out(x, layout).to(device) if layout == "contiguous" else lay_out(x.to(device), layout)
            got = search(view, fmt, importance=importance)
            assert_same_parts({k: v.cpu() for k, v in got.items()}, expected, f"{ndim} {layout}")
            assert torch.equal(view.cpu(), x)
    x = torch.complex(numbers(shape[-2:], dtype=torch.float32), numbers(shape[-2:], seed=2, dtype=torch.float32))
    view = x.to(device).conj().imag
    assert view.is_neg()
    assert_same_parts(search(view, fmt), search(-x.to(device).imag.contiguous(), fmt), "negative view")
    rows_of_one = numbers(shape[-2:], dtype=torch.float32).to(device)[:1].expand(4, -1)
    assert_same_parts(search(rows_of_one, fmt), search(rows_of_one.contiguous(), fmt), "expanded")
    # every second weight of a longer vector
    spread = torch.stack([importance, importance], 1).view(-1)[::2]
    x = numbers(shape[-2:], seed=3).to(device)
    assert_same_parts(search(x, fmt, importance=spread), search(x, fmt, importance=importance), "strided weights")


@few_formats
def test_rows_are_searched_alone(name, device):
    """The scales of a row, or of a row of blocks, do not depend on what else the tensor holds."""
    fmt = get_format(name)
    if fmt.group[0] == -1:
        pytest.skip("one group")
    step = fmt.group[0]
    x = numbers((3 * step, shape_of(fmt)[1]), "student", 9).to(device)
    given = {"tensor_scale": ops.tensor_scale(x, fmt)} if fmt.tensor_scale else {}
    whole = search(x, fmt, **given)
    for i in range(3):
        alone = search(x[i * step : (i + 1) * step], fmt, **given)
        for key in alone.keys() - {"tensor_scale"}:
            count = alone[key].shape[0]
            assert_same(as_bytes(whole[key])[i * count : (i + 1) * count], as_bytes(alone[key]), key)


@few_formats
def test_input_types(name, device):
    """The same numbers give the same bits from any floating type; fp64 and fp16 numbers of their own are searched."""
    fmt = get_format(name)
    x = (numbers(shape_of(fmt), "normal", 10) * 64).round() / 64  # of all types
    expected = search(x.to(device), fmt)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert torch.equal(x.to(dtype).double(), x.double())
        assert_same_parts(search(x.to(device, dtype), fmt), expected, str(dtype))
    for dtype in (torch.float16, torch.float64):
        x = numbers(shape_of(fmt), "laplace", 11, dtype).to(device)
        parts = search(x, fmt)
        check(x.float(), fmt, parts)
        assert_same_parts({k: v.cpu() for k, v in parts.items()}, on_cpu(x, fmt))


@few_in_the_interpreter
def test_magnitudes(name, device):
    """Numbers around 1e30 and 1e-30 give the codes of those around 1, under scales that differ by the power of two."""
    fmt = get_format(name)
    x = numbers(shape_of(fmt), "normal", 12).to(device)
    plain = search(x, fmt)
    for exponent in (100, -100):
        scaled = x * 2.0**exponent
        parts = search(scaled, fmt)
        y = ops.dequantize(parts, fmt, tuple(x.shape), torch.float32)
        assert bool(y.isfinite().all())
        if fmt.scale.name in ("bf16", "f32", "e8m0") or fmt.tensor_scale:
            unit = F32(1.0 if fmt.tensor_scale else 2.0**exponent)
            values = [scale_values(storage_bits(p["scale"]), fmt.scale.name) for p in (parts, plain)]
            assert np.array_equal(values[0], values[1] * unit)
            assert_same(parts["qdata"], plain["qdata"])
            if fmt.zero_point:
                assert_same(parts["zero_point"], plain["zero_point"])
        else:
            rule = ops.dequantize(ops.quantize(scaled, fmt), fmt, tuple(x.shape), torch.float32)
            assert float((y.double() - scaled).square().sum()) <= float((rule.double() - scaled).square().sum()) * 1.001


@few_formats
def test_extremes(name, device):
    """The largest and smallest numbers that there are: finite, the same everywhere."""
    fmt = get_format(name)
    top = float(torch.finfo(torch.float32).max)
    for factor in (top, 1e-38, 1e-44)[: 2 if INTERPRET else 3]:
        x = numbers(shape_of(fmt), "normal", 13, torch.float64)
        x = (x / x.abs().max() * factor).to(torch.float32).to(device)
        parts = search(x, fmt)
        assert bool(ops.dequantize(parts, fmt, tuple(x.shape), torch.float32).isfinite().all())
        assert_same_parts({k: v.cpu() for k, v in parts.items()}, on_cpu(x, fmt), f"{factor}")


def test_tensor_scale(device):
    """Computed like that of the rule, or given, and then the search works under it."""
    fmt = get_format("nvfp4")
    x = numbers((3, 40), "normal", 14).to(device)
    own = ops.tensor_scale(x, fmt)
    parts = search(x, fmt)
    assert_same(parts["tensor_scale"], own)
    assert_same_parts(search(x, fmt, tensor_scale=own), parts)
    given = own * 0.37
    parts = search(x, fmt, tensor_scale=given)
    assert_same(parts["tensor_scale"], given)
    check(x, fmt, parts)


@pytest.mark.parametrize("name", FEW if not INTERPRET else FEW[:2])
def test_no_elements(name, device):
    fmt = get_format(name)
    for shape in ((0,), (0, 64), (3, 0), (2, 0, 5), (2, 3, 0)):
        if fmt.group[0] > 1 and len(shape) < 2:
            continue
        x = torch.zeros(shape, device=device)
        importance = torch.ones(shape[-1], device=device)
        for options in ({}, {"importance": importance}):
            assert_same_parts(search(x, fmt, **options), ops.quantize(x, fmt))
        assert tq.qdq(x, fmt, search="mse").shape == shape


@pytest.fixture
def any_plan():
    yield
    plans.forget()


@few_formats
def test_any_config(name, device, any_plan, monkeypatch):
    """The same bits however candidates and groups are divided among threads, programs and CPU tiles."""
    from tritonq import tiling

    fmt = get_format(name)
    x = numbers(shape_of(fmt) if INTERPRET else (2 * shape_of(fmt)[0] + 5, shape_of(fmt)[1]), "normal", 15).to(device)
    importance = of_weights(x.shape[-1]).to(device)
    expected = search(x, fmt), search(x, fmt, importance=importance)
    kernels = device == "cuda" or INTERPRET
    configs = [(s, t, 1 << 16) for s, t in zip((1, 8), (1 << 16, 1 << 13), strict=True)]
    if device == "cuda":
        configs = [(s, t, 1 << 16) for s, t in itertools.product((1, 2, 4, 8), (512, 4096, 1 << 14))]
    for scales, tile, searched in configs if kernels else [(4, 4096, s) for s in (300, 1000, 1 << 20)]:
        monkeypatch.setattr(tuning, "SEARCH_SCALES", scales)
        monkeypatch.setattr(tuning, "TILE", tile)
        monkeypatch.setattr(tiling, "SEARCHED", searched)
        plans.forget()
        what = f"{scales} {tile} {searched}"
        assert_same_parts(search(x, fmt), expected[0], what)
        if not INTERPRET:
            assert_same_parts(search(x, fmt, importance=importance), expected[1], what)


# ---------------------------------------------------------------------------------------------------------- interfaces


@few_formats
def test_qdq(name, device):
    """qdq takes the scales that quantize finds; its gradient is that of scales passed in."""
    fmt = get_format(name)
    x = numbers(shape_of(fmt), "normal", 16, torch.float32).to(device)
    importance = of_weights(x.shape[-1]).to(device)
    for options in ({"search": "mse"}, {"search": "mse", "importance": importance}):
        parts = ops.quantize(x, fmt, **options)
        y = tq.qdq(x, fmt, **options)
        assert torch.equal(y, ops.dequantize(parts, fmt, tuple(x.shape), x.dtype))
        leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
        tq.qdq(leaf, fmt, **options).backward(torch.ones_like(x))
        tq.qdq(twin, fmt, **{k: v for k, v in parts.items() if k != "qdata"}).backward(torch.ones_like(x))
        assert torch.equal(leaf.grad, twin.grad)
        assert set(leaf.grad.unique().tolist()) <= {0.0, 1.0} and float(leaf.grad.mean()) > 0.6
    assert (leaf.grad == 0).any() or name not in ("int4_g128", "nvfp4")  # clipped


@few_formats
def test_out(name, device):
    """`out` receives the result of a search and comes back; one that does not fit is refused."""
    fmt = get_format(name)
    x = numbers(shape_of(fmt), "normal", 17).to(device)
    importance = of_weights(x.shape[-1]).to(device)
    out = tq.quantize(torch.zeros_like(x), fmt)
    pointer = out.data_ptr()
    for options in ({}, {"importance": importance}):
        got = tq.quantize(x, fmt, search="mse", out=out, **options)
        assert got is out and out.data_ptr() == pointer
        assert_same_parts(out.parts(), search(x, fmt, **options))
    assert_same_parts(tq.quantize(x, fmt, out=out).parts(), ops.quantize(x, fmt), "the rule again")


def test_wrong_out(device):
    x = numbers((4, 256)).to(device)
    good = tq.quantize(x, "int4_g128")
    for out, error in (
        (tq.quantize(x, "int4_g64"), ValueError), (tq.quantize(x[:2], "int4_g128"), ValueError),
        (tq.quantize(x.float(), "int4_g128"), ValueError), (x.clone(), TypeError), (good.parts(), TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="out "):
            tq.quantize(x, "int4_g128", search="mse", out=out)
    wide = tq.quantize(torch.cat([x, x], 1), "int4_g128")
    with pytest.raises(ValueError, match="contiguous"):
        tq.quantize(x, "int4_g128", search="mse", out=wide[:, :256])
    with pytest.raises(ValueError, match="lacks scale"):
        ops.quantize(x, "int4_g128", search="mse", out={"qdata": good.qdata})


traceable = pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")


@traceable
@pytest.mark.parametrize("name", ["int4_g128", "int4_g128_asym", "nvfp4", "mxfp4", "fp8_e4m3_channel"])
def test_opcheck(name, device):
    x = numbers((4, 256), dtype=torch.float32).to(device)
    for importance in (None, of_weights(256).to(device)):
        torch.library.opcheck(torch.ops.tritonq.quantize.default, (x, name, None, None, None, True, importance))


@traceable
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["int4_g128", "int4_g128_asym", "nvfp4"])
def test_compiled(name, backend, device):
    """One graph, the bits of eager calls."""
    importance = of_weights(256).to(device)

    def step(x, importance):
        plain, weighted = search(x, name), search(x, name, importance=importance)
        return plain["qdata"], ops._bits(plain["scale"]), weighted["qdata"], tq.qdq(x, name, search="mse")

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(2):
        x = numbers((4, 256), seed=seed, dtype=torch.float32).to(device)
        for got, expected in zip(compiled(x, importance), step(x, importance), strict=True):
            assert torch.equal(got, expected)


# -------------------------------------------------------------------------------------------------------------- models

SMALL = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
SEARCHED = ("W4A16", "W4A16_ASYM", "MXFP4A16", "NVFP4A16")
whole_models = pytest.mark.skipif(INTERPRET, reason="too many programs for the interpreter")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    pytest.importorskip("transformers")
    import models

    return models.save("llama", tmp_path_factory.mktemp("source") / "tiny", **SMALL)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@whole_models
def test_which_schemes_search(device):
    """Codes of up to 4 bits are searched for unless that is switched off, others only where it is asked for."""
    for scheme, default in (*((s, "mse") for s in SEARCHED), ("W8A16", False), ("FP8_DYNAMIC", False)):
        for asked, expected in ((None, default), (False, False), ("mse", "mse")):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(256, 32, bias=False)).to(device, torch.bfloat16)
            dense = model[0].weight.detach().clone()
            q = tq.quantize_(model, scheme, search=asked, progress=False)[0].weight
            other = "mse" if expected is False else False
            assert_same_parts(q.parts(), ops.quantize(dense, q.format, search=expected), scheme)
            different = ops.quantize(dense, q.format, search=other)
            assert not torch.equal(as_bytes(q.scale), as_bytes(different["scale"])), scheme
    for wrong in ("rule", True, "MSE"):
        with pytest.raises(ValueError, match="search is None"):
            tq.quantize_(torch.nn.Sequential(torch.nn.Linear(256, 32)), "W4A16", search=wrong, progress=False)


@whole_models
@pytest.mark.parametrize("scheme", SEARCHED)
def test_model_and_checkpoint_agree(scheme, source, tmp_path):
    """quantize_ and quantize_checkpoint give the same bytes, with the search and without; those differ."""
    import models

    from tritonq.io.checkpoint import quantize_checkpoint
    from tritonq.io.model import save_pretrained

    found = {}
    for search in (None, False):
        quantize_checkpoint(source, tmp_path / f"file{search}", scheme, search=search, progress=False)
        model = models.build("llama", **SMALL)
        tq.quantize_(model, scheme, search=search, progress=False)
        save_pretrained(model, tmp_path / f"memory{search}")
        found[search] = files(tmp_path / f"file{search}")
        assert found[search] == files(tmp_path / f"memory{search}")
    assert found[None] != found[False]


@whole_models
def test_command_line(source, tmp_path, run):
    """--search mse is the default, rule its opposite; anything else is one line and exit code 2."""
    found = {}
    for option in ((), ("--search", "mse"), ("--search", "rule")):
        out = tmp_path / "-".join(("out", *option))
        code, _, err = run("quantize", source, out, "--scheme", "W4A16", *option)
        assert code == 0, err
        found[option[1:]] = files(out)
    assert found[()] == found["mse",] != found["rule",]
    for scheme in ("W4A16", "W8A16"):
        code, out, err = run("quantize", source, tmp_path / "no", "--scheme", scheme, "--search", "fast")
        assert code == 2 and not out and err.count("\n") == 1 and err.startswith("error: ")
        assert "--search" in err and "fast" in err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["int4_g128", "int3_g32_f16", "int8_b16x16", "int4_channel"])
def test_both_signs_where_the_largest_elements_tie(name, device):
    """Whichever of two elements of the same magnitude comes first, no group is worse than with either sign: at most the
    error of the search for the mirrored tensor, whose rule takes the other element."""
    fmt = get_format(name)
    x = torch.randn((32, 256), generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    x[:, 3::32], x[:, 17::32] = 3.5, -3.5
    x[:, 100], x[:, 200] = 4.0, -4.0
    found = []
    for tensor in (x, -x):
        parts = ops.quantize(tensor.to(device), fmt, search="mse")
        y = ops.dequantize(parts, fmt, tuple(x.shape), torch.float32).cpu()
        groups = reference.grouped((y - tensor.float()).double().square(), fmt)
        found.append(groups.sum((-3, -1) if fmt.group[0] > 1 else -1))
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=0)
    rule = ops.quantize(x, fmt)["scale"].float()
    assert bool((parts["scale"].float().cpu().sign() * rule.sign() != 0).all())
