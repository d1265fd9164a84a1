"""`tritonq.ste`: exact values against ml_dtypes and exact arithmetic, the identity for every derivative."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import INTERPRET
from oracle import assert_same, check_replay
from test_laws import DTYPES, LAYOUTS, lay_out, values
from torch.autograd import forward_ad

import tritonq as tq
from tritonq import ops, plans, ste, tiling, tuning

FP8 = {
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
    torch.float8_e5m2: ml_dtypes.float8_e5m2, torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
TYPES = (*FP8, "ue5m3")
OTHERS = ("e2m1", "e2m3", "e3m2", "e3m4", "e4m0", "e6m1", "ue4m3", "e4m3ieee", "e5m2", "float8_e4m3fnuz")
FUNCTIONS = {"round": (), "floor": (), "ceil": (), "clamp": (-0.5, 0.75), "cast": (torch.float8_e4m3fn,)}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
eager_only = pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")
EDGES = (0.0, math.inf, math.nan, 1e-45, 1e-30, 447.9, 464.0, 1e5, 114688.0, 122880.0, 3e38)


@pytest.fixture(autouse=True)
def plans_as_before():
    yield
    plans.forget()


def fields(dtype):
    """(exponent bits, mantissa bits, bias, signed, special) from the name."""
    name = str(dtype).removeprefix("torch.").removeprefix("float8_")
    signed = not name.startswith("u")
    name = name.removeprefix("u")
    e, m = int(name[1]), int(name[3])
    special = name[4:] or {(4, 3): "fn", (5, 3): "fn", (5, 2): "ieee"}.get((e, m), "")
    return e, m, 2 ** (e - 1) - 1 + (special == "fnuz"), signed, special


def numbers(dtype):
    """Finite magnitudes by code, from the definition of a code, in float64."""
    e_bits, m_bits, bias, _, special = fields(dtype)
    found = []
    for code in range(1 << (e_bits + m_bits)):
        e, m = code >> m_bits, code & ((1 << m_bits) - 1)
        last = e == (1 << e_bits) - 1
        if (special == "ieee" and last) or (special == "fn" and last and m == (1 << m_bits) - 1):
            continue
        found.append(2.0 ** (e - bias) * (1 + m / 2**m_bits) if e else 2.0 ** (1 - bias) * m / 2**m_bits)
    return np.array(found)


def nearest(x, dtype):
    """x as float64 to the nearest number of the type, ties to the even code, saturating; only comparisons and exact
    midpoints. What lies beyond the type of x becomes its largest number."""
    known = numbers(dtype)
    _, _, _, signed, special = fields(dtype)
    exact = x.double().numpy()
    a = np.where(np.isnan(exact), 0, np.abs(exact) if signed else np.maximum(exact, 0))
    low = np.searchsorted(known, a, side="right") - 1
    high = np.minimum(low + 1, len(known) - 1)
    middle = (known[low] + known[high]) / 2
    code = np.where((a > middle) | ((a == middle) & (low % 2 == 1)), high, low)
    y = np.minimum(known[code], torch.finfo(x.dtype).max)
    if signed:
        y = np.copysign(y, exact)
        if special == "fnuz":
            y = y + 0.0
    return torch.from_numpy(np.where(np.isnan(exact), np.nan, y)).to(x.dtype)


def inputs(dtype, of):
    """Numbers of the type `of`, their midpoints and the neighbours of both in `dtype`, edges, and random numbers."""
    known = numbers(of)
    known = known if len(known) <= 128 else np.concatenate([known[:40], known[80:100], known[-40:]])
    points = np.concatenate([known, (known[1:] + known[:-1]) / 2, known[-1:] * 2 - known[-2], EDGES])
    x = torch.from_numpy(np.concatenate([points, -points])).to(dtype)
    beside = [torch.nextafter(x, torch.full_like(x, side)) for side in (math.inf, -math.inf)]
    random = [values((300,), dtype, 1, kind) for kind in ("normal", "wide", "top", "tiny")]
    scaled = [r * float(known[-1]) / 3 for r in random[:1]]
    return torch.cat([x, *beside, *random, *scaled])


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("of", FP8, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number(dtype, of, device):
    """All 65536, against ml_dtypes after a clamp, which torch and ml_dtypes leave to the caller."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    top = float(ml_dtypes.finfo(FP8[of]).max)
    with np.errstate(invalid="ignore"):
        expected = np.clip(x.float().numpy(), -top, top).astype(FP8[of]).astype(np.float32)
    got = ste.cast(x.to(device), of).cpu()
    assert_same(got, torch.from_numpy(expected).to(dtype))
    assert got.isnan().sum() == x.isnan().sum()  # ml_dtypes has no other way to lose a NaN, tritonq might


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_even(dtype, device):
    """Every midpoint and its neighbours in x's own dtype. In fp64 they are ties once they are rounded to fp32."""
    for of in (*TYPES, *OTHERS):
        x = inputs(dtype, of)
        got = ste.cast(x.to(device), of)
        assert got.dtype is dtype and got.device.type == device
        assert_same(got.cpu(), nearest(x, of), str(of))


def test_fp64_is_rounded_once(device):
    """1.0625 is a tie of e4m3; a little above it, fp32 cannot tell."""
    x = torch.tensor([1.0625 + 1e-12, 1.0625, 1.0625 - 1e-12, 1e-320, 1e300, -1e300], dtype=torch.float64)
    got = ste.cast(x.to(device), "e4m3").cpu()
    assert got.tolist() == [1.125, 1.0, 1.0, 0.0, 448.0, -448.0]
    assert ste.cast(x.float().to(device), "e4m3").cpu()[0] == 1.0


def test_range_beyond_the_dtype_of_x(device):
    """UE5M3 reaches 114688 and fp16 65504: finite stays finite."""
    x = torch.tensor([57344, 63456, 63488, 65504, math.inf], dtype=torch.float16, device=device)
    assert ste.cast(x, "ue5m3").tolist() == [57344, 61440, 65504, 65504, 65504]
    assert ste.cast(x[:1], torch.float8_e5m2).tolist() == [57344]
    assert ste.cast(x.bfloat16()[-1:], "ue5m3").tolist() == [114688]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_and_clamping(dtype, device):
    """Against numpy in float64, which holds every input."""
    x = torch.cat([values((500,), dtype, 2, kind) for kind in ("normal", "wide", "ties")])
    x[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    exact = x.double().numpy()
    for name, expected in (
        ("round", np.rint(exact)), ("floor", np.floor(exact)), ("ceil", np.ceil(exact)),
        ("clamp", np.clip(exact, -0.5, 0.75)),
    ):  # fmt: skip
        got = getattr(ste, name)(x.to(device), *FUNCTIONS[name])
        assert_same(got.cpu(), torch.from_numpy(expected).to(dtype), name)
    assert_same(ste.clamp(x.to(device), None, 0.75).cpu(), torch.from_numpy(np.minimum(exact, 0.75)).to(dtype))
    assert_same(ste.clamp(x.to(device), -1, None).cpu(), torch.from_numpy(np.maximum(exact, -1)).to(dtype))


def test_any_strides(device):
    """The layout is that of torch's own elementwise functions, so that compiled code may count on it."""
    x = values((2, 3, 4, 33), torch.bfloat16, 3)
    for layout, ndim in itertools.product(LAYOUTS, (2, 4) if INTERPRET else (1, 2, 3, 4)):
        view = lay_out(x[(0,) * (4 - ndim)], layout).to(device)
        got = ste.cast(view, "e4m3")
        assert_same(got.cpu(), nearest(view.cpu(), "e4m3"), f"{layout} {ndim}")
        assert got.stride() == torch.empty_like(view).stride()
        if "expanded" not in layout:
            own = lay_out(x[(0,) * (4 - ndim)], layout).to(device)
            around = own.as_strided((own.untyped_storage().nbytes() // 2,), (1,), 0)  # with what lies in between
            around[around == 0] = 1.03125
            before, expected = around.clone(), nearest(own.cpu(), "e4m3")
            assert ste.cast_(own, "e4m3") is own
            assert_same(own.cpu(), expected, f"in place, {layout} {ndim}")
            before.as_strided(own.shape, own.stride(), own.storage_offset()).copy_(own)
            assert_same(around, before, f"around, {layout} {ndim}")
    negative = torch._neg_view(values((3, 32), torch.float32, 4).to(device))
    assert_same(ste.cast(negative, "e4m3").cpu(), nearest(negative.cpu().resolve_neg(), "e4m3"))
    expected = nearest(negative.cpu().resolve_neg(), "e4m3")
    assert_same(ste.cast_(negative, "e4m3").cpu().resolve_neg(), expected)


def test_no_dimension_and_no_elements(device):
    for dtype, name in itertools.product(DTYPES, FUNCTIONS):
        f = getattr(ste, name)
        assert f(torch.tensor(0.26, dtype=dtype, device=device), *FUNCTIONS[name]).shape == ()
        for shape in ((0,), (3, 0), (0, 4)):
            y = f(torch.empty(shape, dtype=dtype, device=device), *FUNCTIONS[name])
            assert y.shape == shape and y.dtype is dtype
            assert f(torch.empty(shape, dtype=dtype, device="meta"), *FUNCTIONS[name]).shape == shape
    assert ste.cast(torch.tensor(3.3, device=device), "e2m1").item() == 3.0


def test_any_tile(device, monkeypatch):
    """Law 8: no tile size changes a bit, on the GPU or on the CPU."""
    x = values((37, 83), torch.float64, 3)
    expected = nearest(x, "ue5m3")
    for size in (1 << 11, 1 << 16) if INTERPRET else (128, 1 << 12, 1 << 14):
        monkeypatch.setattr(tuning, "TILE", size)
        monkeypatch.setattr(tiling, "SCRATCH", size)
        plans.forget()
        for view in (x, x.T.contiguous().T, torch.stack([x, x], -1)[..., 0]):
            assert_same(ste.cast(view.to(device), "ue5m3").cpu(), expected, f"tile {size}")


def test_names_of_types(device):
    """A dtype, its name with and without prefixes, and an element type of one's own mean the same."""
    x = values((64,), torch.float32, 5).to(device)
    for dtype in FP8:
        name = str(dtype).removeprefix("torch.")
        for other in (name, name.removeprefix("float8_"), name.replace("float8", "fp8")):
            assert torch.equal(ste.cast(x, other), ste.cast(x, dtype))
    assert torch.equal(ste.cast(x, tq.minifloat(5, 3, "fn", signed=False, name="mine")), ste.cast(x, "ue5m3"))


def test_errors(device):
    x = torch.ones(4, device=device)
    for name, arguments in FUNCTIONS.items():
        with pytest.raises(TypeError, match=rf"ste\.{name} takes .*int32; cast it first"):
            getattr(ste, name)(x.int(), *arguments)
        with pytest.raises(TypeError, match=rf"ste\.{name}_ takes a torch\.Tensor, got list"):
            getattr(ste, f"{name}_")([1.0], *arguments)
    for dtype in (torch.float16, torch.bfloat16, torch.int8, "int4", "nf4", "e9m9", "ue8m0", "float", tq.integer(4)):
        with pytest.raises(ValueError, match="floats of at most 8 bits") as caught:
            ste.cast(x, dtype)
        assert "ue5m3" in str(caught.value) and "float8_e4m3fn" in str(caught.value)
    with pytest.raises(TypeError, match="got int"):
        ste.cast(x, 8)
    for low, high, error, words in (
        (1, 0, ValueError, "got 1 and 0"), (math.nan, 1, ValueError, "low of ste.clamp is NaN"),
        (None, None, ValueError, "got neither"), (0, x, TypeError, "high .* got Tensor"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            ste.clamp(x, low, high)


# --------------------------------------------------------------------------------------------------------- gradients


def special_input(device, dtype=torch.float32):
    """In range, out of range, between integers, infinite, NaN."""
    return torch.tensor([[0.3, -2.5, 1e30, -7e4], [math.inf, -math.inf, math.nan, 0.0]], dtype=dtype, device=device)


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_gradient_is_the_identity_everywhere(name, dtype, device):
    """Also where the value was clipped, and a gradient of 1e-4, which unscaled fp8 would turn into 0."""
    arguments = [(of,) for of in TYPES] if name == "cast" else [FUNCTIONS[name]]
    for own in arguments:
        x = special_input(device, dtype).requires_grad_()
        y = getattr(ste, name)(x, *own)
        assert y.dtype is dtype and y.requires_grad
        for dy in (torch.full_like(x, 1e-4), torch.randn_like(x)):
            (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
            assert torch.equal(dx, dy) and dx.dtype is dtype


@every_function
def test_nothing_is_saved(name, device):
    x = torch.randn(4, 8, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = getattr(ste, name)(x, *FUNCTIONS[name])
        getattr(ste, f"{name}_")(x * 1, *FUNCTIONS[name])
        assert not saved
        x.square()  # the hook does see what others save
    assert saved and y.grad_fn is not None
    with torch.no_grad():
        assert getattr(ste, name)(x, *FUNCTIONS[name]).grad_fn is None


@every_function
def test_transforms(name, device):
    """grad, vmap over any axis, jvp, Hessians, forward mode, double backward: d(y^2) = 2 y dx and its own is 2."""

    def f(x):
        return getattr(ste, name)(x, *FUNCTIONS[name])

    x, tangent = torch.randn(3, 4, device=device), torch.randn(3, 4, device=device)
    y = f(x)

    def loss(x):
        return f(x).square().sum()

    assert torch.equal(torch.func.grad(loss)(x), 2 * y)
    assert torch.equal(torch.func.vmap(f, in_dims=1, out_dims=1)(x), y)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x), 2 * y)
    value, pushed = torch.func.jvp(f, (x,), (tangent,))
    assert torch.equal(value, y) and torch.equal(pushed, tangent)
    assert torch.equal(torch.func.hessian(loss)(x[0]), 2 * torch.eye(4, device=device))
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        assert torch.equal(jacobian(f)(x[0]), torch.eye(4, device=device))
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, tangent))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    assert torch.equal(first, 2 * y) and torch.equal(second, torch.full_like(x, 2))


@every_function
def test_autocast(name, device):
    """Rounding is no matrix product: autocast leaves dtypes alone."""
    x = torch.randn(4, 8, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = getattr(ste, name)(x, *FUNCTIONS[name])
        product = y @ y.T
    assert y.dtype is torch.float32 and product.dtype is torch.bfloat16
    assert torch.equal(y, getattr(ste, name)(x, *FUNCTIONS[name]))
    product.sum().backward()
    assert x.grad.dtype is torch.float32 and x.grad.abs().sum() > 0


@eager_only
@every_function
def test_one_graph(name, device):
    """torch.compile(fullgraph=True) gives the bits and the gradients of eager calls, in place and inside torch.func."""

    def f(x):
        y = getattr(ste, name)(x.T[1:], *FUNCTIONS[name])
        z = getattr(ste, f"{name}_")(x * 2, *FUNCTIONS[name])
        return y, z, *transforms(lambda t: getattr(ste, name)(t, *FUNCTIONS[name]), x.detach())

    def transforms(f, x):
        gradient = torch.func.grad(lambda x: f(x).square().sum())
        return gradient(x), torch.func.vmap(gradient)(x), torch.func.jvp(f, (x,), (x + 3,))[1]

    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"  # the CPU of a test machine may have no compiler
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    x = torch.randn(4, 8, device=device, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    got, expected = compiled(x), f(twin)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    for results in (got, expected):
        (results[0].square().sum() + results[1].sum()).backward()
    assert torch.equal(x.grad, twin.grad)


@eager_only
def test_operator_and_export(device):
    operator = torch.ops.tritonq.cast.default
    x = torch.randn(3, 32, device=device)
    for view in (x, x.T[1:]):
        torch.library.opcheck(operator, (view, 4, 3, "fn", True))

    class Layer(torch.nn.Module):
        def forward(self, x):
            return ste.cast(x, torch.float8_e5m2)

    program = torch.export.export(Layer(), (x,))
    assert any(node.target is operator for node in program.run_decompositions().graph.nodes)
    assert torch.equal(program.module()(x), ste.cast(x, "e5m2"))
    many = torch.compile(lambda x: ste.cast(x, "e4m3"), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 7, device=device)
        assert torch.equal(many(x), ste.cast(x, "e4m3"))


# ---------------------------------------------------------------------------------------------------------- in place


@every_function
def test_in_place(name, device):
    """The tensor itself with the gradient of the function; autograd learns that it was overwritten."""

    def overwrite(x):
        return getattr(ste, f"{name}_")(x, *FUNCTIONS[name])

    leaf = torch.randn(3, 4, device=device, requires_grad=True)
    expected = getattr(ste, name)(leaf.detach(), *FUNCTIONS[name])
    y = leaf * 1
    version = y._version
    assert overwrite(y) is y and y._version > version and torch.equal(y, expected)
    y.square().sum().backward()
    assert torch.equal(leaf.grad, 2 * expected)
    base = leaf * 1  # through a view: the gradient of the rest stays as it was
    overwrite(base.T[1:3])
    assert torch.equal(base.detach()[:, 1:3], expected[:, 1:3])
    assert torch.equal(base.detach()[:, 3], leaf.detach()[:, 3])
    leaf.grad = None
    base.sum().backward()
    assert leaf.grad.eq(1).all()
    stale = leaf * 1
    sine = stale.sin()
    overwrite(stale)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sine.sum().backward()


@every_function
def test_in_place_on_leaves(name, device):
    """Refused before anything is written where a gradient is wanted; fine without one."""
    f = getattr(ste, f"{name}_")
    leaf = torch.randn(3, 4, device=device, requires_grad=True)
    before = leaf.detach().clone()
    for target in (leaf, leaf[1:]):
        with pytest.raises(RuntimeError, match=rf"ste\.{name}_ would overwrite a leaf .*use ste\.{name}"):
            f(target, *FUNCTIONS[name])
    assert torch.equal(leaf, before)
    version = leaf._version
    with torch.no_grad():
        assert f(leaf, *FUNCTIONS[name]) is leaf and leaf.requires_grad and leaf._version > version
    plain = before.clone()
    f(plain, *FUNCTIONS[name])
    assert torch.equal(plain, leaf) and torch.equal(plain, getattr(ste, name)(before, *FUNCTIONS[name]))
    with pytest.raises(RuntimeError, match="memory"):
        f(before[:, :1].expand(3, 4), *FUNCTIONS[name])


@every_function
def test_transforms_in_place(name, device):
    """On copies made inside."""
    x = torch.randn(3, 4, device=device)
    y = getattr(ste, name)(x, *FUNCTIONS[name])

    def f(x):
        return getattr(ste, f"{name}_")(x.clone(), *FUNCTIONS[name])

    assert torch.equal(torch.func.vmap(f)(x), y)
    assert torch.equal(torch.func.grad(lambda x: f(x).square().sum())(x), 2 * y)
    value, pushed = torch.func.jvp(f, (x,), (x,))
    assert torch.equal(value, y) and torch.equal(pushed, x)


# ----------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_compiles(target, tmp_path):
    """One launch; input and output move 16 bytes at a time, and nothing goes through shared memory."""
    import test_compile

    for dtype, of in itertools.product(DTYPES, (torch.float8_e4m3fn, torch.float8_e5m2fnuz, "ue5m3")):
        (one,) = launches((64, 4096), dtype, of)
        compiled = test_compile.check(one, test_compile.TARGETS[target], tmp_path, 80)
        if target == "sm_90":
            assert compiled.metadata.shared == 0
            for op in ("ld", "st"):
                moves = [line for line in compiled.asm["ptx"].splitlines() if f"{op}.global" in line]
                assert moves and all(f"{op}.global.v{16 // max(4, dtype.itemsize)}.b" in line for line in moves)
    strided = launches((4, 7, 33), torch.float16, "ue5m3", lambda x: x.transpose(0, 1)[:, :, ::2])
    assert strided
    for one in strided:
        test_compile.check(one, test_compile.TARGETS[target], tmp_path)


def launches(shape, dtype=torch.bfloat16, of="e4m3", view=lambda x: x):
    from test_compile import launched

    return launched(lambda: ste.cast(view(torch.zeros(shape, dtype=dtype)), of))


def test_a_permuted_tensor_is_one_launch():
    """Whatever is dense in memory is one long row; in place, too."""
    if INTERPRET:
        pytest.skip("interpreted kernels are not recorded")
    from test_compile import launched

    x = torch.zeros(3, 4, 5, 6).permute(2, 0, 3, 1)
    for call in (lambda: ste.cast(x, "e4m3"), lambda: ste.cast_(x, "e4m3")):
        (one,) = launched(call)
        assert one.programs == 1


@pytest.mark.gpu
def test_cuda_graph():
    x = torch.randn(256, 1024, device="cuda").bfloat16()
    check_replay(x, lambda: [getattr(ste, name)(x, *own) for name, own in FUNCTIONS.items()])


@pytest.mark.gpu
def test_memory():
    """Forward keeps its output, backward its gradient, and in place nothing."""
    x = torch.randn(1 << 24, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for name, own in FUNCTIONS.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = getattr(ste, name)(x, *own)
        assert torch.cuda.max_memory_allocated() - before <= x.nbytes + 4096
        del y
        plain = x.detach().clone()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        getattr(ste, f"{name}_")(plain, *own)
        assert torch.cuda.max_memory_allocated() - before <= 4096


@pytest.mark.gpu
@pytest.mark.xdist_group("large")
def test_more_elements_than_32_bits_count():
    if torch.cuda.get_device_properties().total_memory < 24 << 30:
        pytest.skip("takes 24 GiB of GPU memory")
    n = (1 << 31) + 4099
    x = torch.empty(n, dtype=torch.bfloat16, device="cuda").normal_()
    for own in (x, x[:-1].view(-1, 2).T):  # one long row, and columns a row apart
        y = ste.cast(own, "e4m3")
        flat, found = own.reshape(-1) if own.is_contiguous() else own[0], y if own.ndim == 1 else y[0]
        for part in (slice(0, 4096), slice((1 << 30) - 99, (1 << 30) + 99), slice(-4099, None)):
            assert_same(found[part].cpu(), nearest(flat[part].cpu(), "e4m3"))
        del y


@pytest.mark.gpu
def test_cpu_and_gpu_agree():
    """Law 2 on a million random bit patterns, a whole tensor at a time."""
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    for of in (*TYPES, *OTHERS):
        for own in (x, x.double() * (1 + 1e-9), x.to(torch.bfloat16), x.to(torch.float16)):
            assert_same(ste.cast(own.cuda(), of).cpu(), ste.cast(own, of), f"{of} {own.dtype}")
    assert not ops.traced(x)
