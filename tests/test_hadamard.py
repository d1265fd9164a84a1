"""The random Hadamard transform against its matrix in exact arithmetic, the same bits on every backend."""

import itertools

import numpy as np
import pytest
import torch
from conftest import INTERPRET
from oracle import assert_same
from test_laws import DTYPES, LAYOUTS, lay_out, values

import tritonq as tq
from tritonq import plans, rotation, tuning

SIGNS = (1, -1, -1, 1, 1, 1, -1, 1, -1, 1, 1, -1, -1, -1, 1, 1)


@pytest.fixture(autouse=True)
def plans_as_before():
    yield
    plans.forget()


def matrix():
    """Sylvester's construction: H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    h = np.ones((1, 1))
    while len(h) < 16:
        h = np.block([[h, h], [h, -h]])
    return h


def staged(x, signs, inverse):
    """The formula of the docstring, element by element in fp32, on numpy arrays [n, 16]."""
    x = x.astype(np.float32) if inverse else x.astype(np.float32) * np.float32(signs)
    with np.errstate(all="ignore"):
        for h in (1, 2, 4, 8):
            y = x.copy()
            for i in range(16):
                if not i & h:
                    y[:, i], y[:, i | h] = x[:, i] + x[:, i | h], x[:, i] - x[:, i | h]
            x = y
        x = x * np.float32(0.25)
        return x * np.float32(signs) if inverse else x


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, inverse, device):
    """Bit for bit the documented order of sums; close to the matrix product."""
    for kind, shape in itertools.product(("normal", "wide", "tiny"), ((3, 48), (1, 16), (2, 3, 5, 32))):
        x = values(shape, dtype, 1, kind)
        y = tq.hadamard(x.to(device), signs=SIGNS, inverse=inverse)
        assert y.is_contiguous() and y.device.type == device
        flat = reference_float32(x).reshape(-1, 16)
        expected = torch.from_numpy(staged(flat, SIGNS, inverse)).reshape(shape)
        assert_same(y.cpu(), expected.to(dtype), f"{kind} {shape}")
        if kind == "normal":
            left = np.diag(SIGNS) @ matrix() if inverse else matrix() @ np.diag(SIGNS)
            exact = torch.from_numpy(flat.astype(np.float64) @ left.T / 4).reshape(shape)
            torch.testing.assert_close(y.cpu().double(), exact, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-5)


def reference_float32(x):
    top = torch.finfo(torch.float32).max
    return x.to(torch.float64).clamp(-top, top).to(torch.float32).numpy()


def test_inverse_undoes_it(device):
    """Exactly, on integers whose sums fp32 holds."""
    x = torch.randint(-512, 512, (5, 64), generator=torch.Generator().manual_seed(0)).float().to(device)
    for seed in (None, 0, 7, 2**64 - 1):
        assert torch.equal(tq.hadamard(tq.hadamard(x, seed=seed), seed=seed, inverse=True), x)
    a, b = (values((32, 64), torch.float32, s).to(device) for s in (1, 2))
    torch.testing.assert_close(tq.hadamard(a, seed=3) @ tq.hadamard(b, seed=3).T, a @ b.T, rtol=1e-4, atol=1e-4)


def test_any_strides(device):
    x = values((2, 3, 4, 32), torch.bfloat16, 3)
    for layout, ndim in itertools.product(LAYOUTS[1:], (2, 4) if INTERPRET else (1, 2, 3, 4)):
        view = lay_out(x[(0,) * (4 - ndim)], layout).to(device)
        expected = tq.hadamard(view.clone(memory_format=torch.contiguous_format), seed=5)
        assert_same(tq.hadamard(view, seed=5), expected, f"{layout} {ndim}")


def test_any_tile(device, monkeypatch):
    x = values((37, 80), torch.bfloat16, 3)
    expected = torch.from_numpy(staged(x.float().numpy().reshape(-1, 16), SIGNS, False)).reshape(37, 80).bfloat16()
    for size in (1 << 11, 1 << 16) if INTERPRET else (128, 1 << 12, 1 << 14):
        monkeypatch.setattr(tuning, "TILE", size)
        monkeypatch.setattr(rotation, "STEP", size // 2)
        plans.forget()
        assert_same(tq.hadamard(x.to(device), signs=SIGNS).cpu(), expected, f"tile {size}")


def test_non_finite_elements_stay_in_their_block(device):
    x = values((2, 48), torch.float32, 4)
    x[0, 3], x[1, 20], x[1, 40] = torch.nan, torch.inf, -torch.inf
    finite = tq.hadamard(x.to(device), seed=1).cpu().isfinite().reshape(2, 3, 16)
    assert finite.all(2).tolist() == [[False, True, True], [True, False, False]]
    assert not finite[~finite.all(2)].any()


def test_no_elements(device):
    for shape in ((0,), (0, 16), (3, 0), (2, 0, 32)):
        y = tq.hadamard(torch.zeros(shape, dtype=torch.bfloat16, device=device), seed=1)
        assert y.shape == shape and y.dtype is torch.bfloat16


def test_signs(device):
    """SplitMix64 by its published first outputs; signs as a list, a tensor, or drawn from the seed."""
    assert rotation.seed_bits(0) == 0xE220A8397B1DCDAF & 0xFFFF
    assert rotation.seed_bits(1234567) == 6457827717110365317 & 0xFFFF
    x = values((2, 32), torch.float32, 5).to(device)
    drawn = [-1 if rotation.seed_bits(9) >> i & 1 else 1 for i in range(16)]
    for signs in (drawn, tuple(map(float, drawn)), torch.tensor(drawn)):
        assert torch.equal(tq.hadamard(x, signs=signs), tq.hadamard(x, seed=9))
    assert torch.equal(tq.hadamard(x), tq.hadamard(x, signs=[1] * 16))


def test_errors(device):
    x = torch.ones(2, 32, device=device)
    with pytest.raises(ValueError, match=r"got shape \(2, 24\); pad the last axis to a multiple of 16"):
        tq.hadamard(x[:, :24])
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        tq.hadamard(x[0, 0])
    with pytest.raises(ValueError, match="pass one of them"):
        tq.hadamard(x, seed=1, signs=SIGNS)
    for signs in (SIGNS[:15], [0] * 16, [2] + [1] * 15):
        with pytest.raises(ValueError, match="signs are 16 numbers 1 or -1"):
            tq.hadamard(x, signs=signs)
    for seed in (-1, 2**64, 1.5, True):
        with pytest.raises(ValueError, match=r"seed is an integer from 0 to 2\^64 - 1"):
            tq.hadamard(x, seed=seed)
    with pytest.raises(TypeError, match="cast it first"):
        tq.hadamard(x.int())


def test_gradient(device):
    """Orthogonal, so the gradient is rotated back."""
    x = values((3, 32), torch.float32, 6).to(device).requires_grad_()
    dy = values((3, 32), torch.float32, 7).to(device)
    for inverse in (False, True):
        x.grad = None
        tq.hadamard(x, seed=3, inverse=inverse).backward(dy)
        assert torch.equal(x.grad, tq.hadamard(dy, seed=3, inverse=not inverse))


@pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")
def test_operator(device):
    x = values((3, 32), torch.float32, 6).to(device).requires_grad_()
    torch.library.opcheck(torch.ops.tritonq.hadamard.default, (x, 0x1234, False))
    backend = "inductor" if device == "cuda" else "aot_eager"

    def step(x):
        return tq.quantize_both(tq.hadamard(x, seed=3), "mxfp8")[1].dequantize()

    compiled = torch.compile(lambda x: tq.hadamard(x, seed=3), fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), tq.hadamard(x, seed=3))
    assert step(x).shape == (32, 3)


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_compiles(target, tmp_path):
    """Input and output move 16 bytes at a time, and nothing goes through shared memory."""
    import test_compile

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        (one,) = launches((64, 4096), dtype)
        compiled = test_compile.check(one, test_compile.TARGETS[target], tmp_path)
        if target == "sm_90" and dtype is torch.bfloat16:
            for op in ("ld", "st"):
                assert len([1 for line in compiled.asm["ptx"].splitlines() if f"{op}.global" in line]) == 4
                assert f"{op}.global.v4.b32" in compiled.asm["ptx"]
            assert compiled.metadata.shared == 0


def launches(shape, dtype=torch.bfloat16):
    from test_compile import launched

    return launched(lambda: tq.hadamard(torch.zeros(shape, dtype=dtype), seed=1))
