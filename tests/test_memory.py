"""Memory is a test: what every operation takes beyond its result, for every format.

Formats that take one pass: 1 MiB on a GPU. Others, searches and gradients: the budget of `tritonq.workspace`. On the
CPU two threads take 8 MiB, whatever the format.
"""

import pytest
import torch
from conftest import INTERPRET
from extra_memory import extra, nbytes

import tritonq as tq
from tritonq import memory, tuning
from tritonq.formats import FORMATS, get_format

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter has a memory of its own")
MIB = 1 << 20

# Everything registered; then groups that share bytes, that are larger than a tile of a kernel, that are padded; one
# scale with a zero point; super-groups without a name.
NAMES = (
    *FORMATS,
    "int3_g50",
    "int4_g12_asym",
    "fp8_e4m3_b256x256",
    "e3m4_g48",
    "int4_tensor_asym",
    "int5_g64_asym_u6_s512",
)
ON_CPU = ("int4_g128_asym", "int3_g50", "fp8_e4m3_tensor", "nvfp4", "q4_k")


def gradient(x, dy, fmt):
    x = x.detach().requires_grad_()
    y = tq.qdq(x, fmt)
    y.backward(dy)
    return y.detach(), x.grad


def dequantized(x, fmt):
    q = tq.quantize(x, fmt)
    return lambda: tq.dequantize(q)


def upstream(x, fmt):
    dy = torch.randn_like(x)
    return lambda: gradient(x, dy, fmt)


def parameters(x, fmt):
    """v, min_scale and max_scale where tuning starts."""
    ratio = torch.ones(fmt.scale_shape(tuple(x.shape)), device=x.device)
    return {"v": torch.zeros(x.shape, device=x.device), "min_scale": ratio, "max_scale": ratio.clone()}


def learned(x, fmt):
    """Forward and backward: y and the gradients of the parameters."""
    given, dy = {name: p.requires_grad_() for name, p in parameters(x, fmt).items()}, torch.randn_like(x)

    def call():
        for p in given.values():
            p.grad = None
        y = tq.qdq(x, fmt, **given)
        y.backward(dy)
        return y.detach(), *[p.grad for p in given.values()]

    return call


def stepped(x, fmt):
    """The same with the step inside backward: y alone."""
    given, dy, step = parameters(x, fmt), torch.randn_like(x), tq.SignStep(0.005, device=x.device)

    def call():
        y = tq.qdq(x, fmt, **given, step=step)
        y.backward(dy)
        return y.detach()

    return call


def grouped(x, fmt):
    """Halves, along rows and columns."""
    members = x.split([x.shape[0] // 2, 0, x.shape[0] // 2])

    def call():
        bulk = tq.grouped_quantize(members, fmt, columnwise=True)
        return bulk.base, bulk.columns.base

    return call


# Name: (what is prepared and not counted) -> the call that is measured.
OPS = {
    "quantize": lambda x, fmt: lambda: tq.quantize(x, fmt),
    "qdq": lambda x, fmt: lambda: tq.qdq(x, fmt),
    "dequantize": dequantized,
    "gradient": upstream,
    "stochastic": lambda x, fmt: lambda: tq.qdq(x, fmt, rounding="stochastic"),
    "both": lambda x, fmt: lambda: tq.quantize_both(x, fmt),
    "grouped": grouped,
    "search": lambda x, fmt: lambda: tq.quantize(x, fmt, search="mse"),
    "search_qdq": lambda x, fmt: lambda: tq.qdq(x, fmt, search="mse"),
    "learned": learned,
    "stepped": stepped,
}


def leaves_scales(fmt, columns, stochastic):
    """Whether a kernel finds the scales of QDQ and another one applies them."""
    return not tuning.fits(fmt, columns, stochastic)


def limit(op, fmt, x):
    """Bytes beyond the result on a GPU."""
    if op in ("search", "search_qdq"):
        return memory.budget()
    if op in ("gradient", "learned", "stepped"):
        return MIB if tuning.fits_tile(fmt, x.shape[1]) else memory.budget()
    if op in ("qdq", "stochastic") and leaves_scales(fmt, x.shape[1], op == "stochastic"):
        return memory.budget()
    return MIB


def prepared(op, name, shape, device):
    """The call, or a skip where there is none."""
    fmt = get_format(name)
    if "search" in op and fmt.super_group:
        pytest.skip("super-groups have no search")
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.bfloat16)
    return fmt, x, OPS[op](x, fmt)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", NAMES)
def test_gpu(name, op):
    """512 MiB of weights, of which a format that leaves its scales in memory for a while has more than the budget."""
    fmt, x, call = prepared(op, name, (16384, 16384), "cuda")
    if op == "search_qdq":
        with tq.workspace("8MiB"):  # codes would be 64 MiB or more
            assert extra(call, "cuda")[1] <= 8 * MIB
        return
    call() if op != "search" else None  # kernels are loaded, and what is kept for them
    result, taken = extra(call, "cuda")
    assert taken <= limit(op, fmt, x), f"{taken / MIB:.2f} MiB beyond {nbytes(result) / MIB:.0f}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int3_g50", "int4_g12_asym"])
def test_gpu_budget(name):
    """Scales that QDQ leaves in memory are those of a tile."""
    _, x, call = prepared("qdq", name, (16384, 16384), "cuda")
    expected = call()
    for budget in ("4MiB", "16MiB"):
        with tq.workspace(budget) as size:
            result, taken = extra(call, "cuda")
        assert taken <= size + MIB
        assert torch.equal(result, expected)
    assert x.nbytes == 512 * MIB


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["contiguous", "transposed"])
def test_gpu_hadamard(kind):
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = x if kind == "contiguous" else x.t()
    tq.hadamard(x, seed=1)
    assert extra(lambda: tq.hadamard(x, seed=1), "cuda")[1] <= MIB


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", ["quantize", "qdq", "dequantize", "gradient", "learned", "stepped"])
@pytest.mark.parametrize("name", ON_CPU)
def test_cpu(name, op, two_threads):
    """Tiles of 3 MiB a thread and what their arithmetic takes, never a tensor of the size of x (8 MiB, 16 as fp32)."""
    fmt, x, call = prepared(op, name, (2048, 2048), "cpu")
    result, taken = extra(call, "cpu")
    scales = fmt.nbytes(tuple(x.shape)) - fmt.row_bytes(x.shape[1]) * x.shape[0]  # QDQ keeps them for a while
    assert taken <= 8 * MIB + (scales if op != "quantize" else 0), (
        f"{taken / MIB:.2f} MiB beyond {nbytes(result) / MIB:.0f}"
    )


def test_cpu_others(two_threads):
    x = torch.randn(2048, 2048).to(torch.bfloat16)
    assert extra(lambda: tq.quantize(x[:512], "mxfp4", rounding="stochastic"), "cpu")[1] <= 8 * MIB
    assert extra(lambda: tq.hadamard(x, seed=1), "cpu")[1] <= 8 * MIB
    assert extra(lambda: tq.hadamard(x.t(), seed=1), "cpu")[1] <= 8 * MIB
    assert extra(lambda: tq.quantize_both(x, "mxfp8"), "cpu")[1] <= 8 * MIB
    assert extra(grouped(x, get_format("nvfp4")), "cpu")[1] <= 8 * MIB
    assert extra(lambda: tq.quantize(x[:256], "nvfp4", search="mse"), "cpu")[1] <= memory.budget()


def test_the_measure_sees_memory(two_threads):
    """Also where it is freed before the end, and inside of an operator."""
    x = torch.randn(1 << 20)
    assert extra(lambda: x.abs(), "cpu")[1] == 0
    assert extra(lambda: x.abs().neg(), "cpu")[1] == x.nbytes
    assert extra(lambda: x.view(-1, 2).t().reshape(-1).sum(), "cpu")[1] >= x.nbytes
    y, taken = extra(lambda: (x.abs(), x[:10]), "cpu")
    assert taken <= 0 and nbytes(y) == 2 * x.nbytes
    assert nbytes(tq.quantize(x, "int4_g128")) >= x.numel() // 2


def test_every_operation_is_here():
    """A new function of the package that returns tensors has to be measured, or named here."""
    measured = {"quantize", "dequantize", "qdq", "quantize_both", "grouped_quantize", "hadamard"}
    others = {"swizzle", "unswizzle", "quantize_", "quantize_checkpoint", "save_pretrained", "get_format", "get_scheme",
              "integer", "lookup", "minifloat", "register", "workspace", "fake_quantize_", "convert_",
              "freeze_observers_", "remove_fake_quantize_", "payload_data_"}  # fmt: skip
    functions = {name for name in tq.__all__ if callable(getattr(tq, name)) and name[0].islower()}
    assert functions == measured | others
