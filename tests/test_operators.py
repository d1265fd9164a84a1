"""`torch.ops.tritonq.*`: what torch asks of an operator, and graphs that hold every call."""

import pytest
import torch
from conftest import INTERPRET
from oracle import check_replay

import tritonq as tq
from tritonq import formats, ops
from tritonq.formats import SUPER_PARTS, get_format

NAMES = ("int4_g128", "int4_g128_asym", "fp8_e4m3_channel", "mxfp8", "mxfp4", "nvfp4", "int3_g128", "fp8_e4m3_b128x128",
         "q4_k", "q6_k")  # fmt: skip
pytestmark = pytest.mark.skipif(INTERPRET, reason="kernels in the interpreter cannot be traced")
every_name = pytest.mark.parametrize("name", NAMES)


def sample(device, requires_grad=False, shape=(4, 384)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    return x.requires_grad_(requires_grad)


def given(x, name):
    """Arguments of the operators after the format: the parts of x that can be given."""
    parts = ops.quantize(x.detach(), name)
    return [
        None if (part := parts.get(n)) is None else ops._bits(part) for n in ("scale", "zero_point", "tensor_scale")
    ]


def test_given_scales_are_never_reinterpreted(device):
    """A scale of another 16-bit type is refused in a graph and under vmap as in an eager call: its bits mean another
    number."""
    x, scale = sample(device), torch.ones(4, 3, dtype=torch.float16, device=device)
    assert get_format("int4_g128").scale.dtype is torch.bfloat16

    def call(x):
        return tq.qdq(x, "int4_g128", scale=scale)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for run in (call, compiled, lambda x: torch.func.vmap(call)(x[None])):
        with pytest.raises(TypeError, match=r"stored as torch\.bfloat16, got torch\.float16"):
            run(x)


@every_name
@pytest.mark.parametrize("with_scales", [False, True])
def test_opcheck(name, with_scales, device):
    """Schema, fake tensors, autograd registration and tracing, as torch checks them."""
    x = sample(device)
    if with_scales and get_format(name).super_group:
        pytest.skip("takes no given scales")
    extra = given(x, name) if with_scales else []
    operators = torch.ops.tritonq
    torch.library.opcheck(operators.quantize.default, (x, name, *extra))
    torch.library.opcheck(operators.qdq.default, (sample(device, requires_grad=True), name, *extra))
    torch.library.opcheck(operators.qdq_backward.default, (x, torch.ones_like(x), name, *extra))
    parts = ops.quantize(x, name)
    arguments = (ops._bits(parts["qdata"]), *given(x, name))
    supers = {key: parts[key] for key in SUPER_PARTS if key in parts}
    torch.library.opcheck(operators.dequantize.default, (*arguments, name, list(x.shape), torch.bfloat16), supers)
    if get_format(name).tensor_scale:
        torch.library.opcheck(operators.tensor_scale.default, (x, name))


@every_name
def test_one_graph_with_gradients(name, device):
    """torch.compile(fullgraph=True) gives the bits of eager calls, and their gradients; no recompilation."""

    def step(x):
        y = tq.qdq(x, name)
        parts = ops.quantize(x.detach(), name)
        return y, ops.dequantize(parts, name, tuple(x.shape), x.dtype), parts["qdata"].view(torch.uint8)

    backend = "inductor" if device == "cuda" else "aot_eager"  # the CPU of a test machine may have no compiler
    torch._dynamo.reset()  # every format compiles this function anew, and 8 times is torch's limit
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(2):
        x = torch.randn(4, 384, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()
        twin = x.detach().clone().requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            got, expected = compiled(x), step(twin)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        (got[0] * got[0].detach()).sum().backward()
        (expected[0] * expected[0].detach()).sum().backward()
        assert torch.equal(x.grad, twin.grad)


@pytest.mark.parametrize("name", ["e3m2_g20", "fp8_e5m2_b16x48", "e2m1_g16_ue5m3", "int5_g40_asym"])
def test_names_resolve_in_a_graph(name):
    """A format that nobody registered or used before, named inside of what is compiled. In Python 3.11 Dynamo stopped
    at the lock of a cached property."""
    torch._dynamo.reset()
    formats._resolve.cache_clear()
    x = torch.randn(16, 96)
    compiled = torch.compile(lambda x: tq.qdq(x, name), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), tq.qdq(x, name))


def test_symbolic_shapes(device):
    compiled = torch.compile(lambda x: tq.qdq(x, "int4_g128"), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 9):
        x = sample(device, shape=(rows, 256))
        assert torch.equal(compiled(x), tq.qdq(x, "int4_g128"))


def test_fake_tensors_and_modes(device):
    """Under a dispatch mode calls become operators: shapes and types without data, and counters see them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    with FakeTensorMode():
        x = torch.empty(8, 256, device=device, dtype=torch.bfloat16)
        assert ops.qdq(x, "mxfp4").shape == (8, 256)
        assert {k: (tuple(v.shape), v.dtype) for k, v in ops.quantize(x, "nvfp4").items()} == get_format(
            "nvfp4"
        ).storage((8, 256))

    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Spy():
        ops.qdq(sample(device), "mxfp4")
    assert torch.ops.tritonq.qdq.default in seen


def test_export(device):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return tq.qdq(x, "mxfp8")

    program = torch.export.export(Layer(), (sample(device),))
    assert any(node.target is torch.ops.tritonq.qdq.default for node in program.graph.nodes)
    assert torch.equal(program.module()(sample(device)), tq.qdq(sample(device), "mxfp8"))


@pytest.mark.gpu
@every_name
def test_cuda_graph(name):
    """Every op is captured; a replay on new data gives what an eager call gives."""
    x = sample("cuda", shape=(256, 1024)).bfloat16()

    def step():
        parts = ops.quantize(x, name)
        return ops.qdq(x, name), ops.dequantize(parts, name, tuple(x.shape), x.dtype)

    check_replay(x, step)
