"""Kernels that are launched before earlier launches have ended wait for these before they touch memory."""

import re

import pytest
import torch
from conftest import INTERPRET

from bench.launches import launched
from tritonq import launch, ops, plans
from tritonq.formats import get_format

FORMATS = ("int4_g128", "int8_channel", "mxfp4", "nvfp4", "fp8_e4m3_tensor", "fp8_e4m3_b128x128", "q4_k", "e3m4_g48")
KERNELS = {"group_kernel", "row_kernel", "apply_kernel", "keys_kernel", "dequantize_kernel", "super_group_kernel",
           "super_dequantize_kernel"}  # fmt: skip
MEMORY = re.compile(r"\b(ld|st)\.[\w.]*global|\batom\b|\bred\.|\bcp\.async")


def calls(name, early, columns=4096):
    fmt = get_format(name)

    def call():
        x = torch.zeros((64, columns), dtype=torch.bfloat16)
        parts = ops.quantize(x, fmt)
        ops.qdq(x, fmt)
        ops.dequantize(parts, fmt, tuple(x.shape), x.dtype)

    return list({one.key: one for one in launched(call, early)}.values())


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
def test_the_wait_comes_before_memory(tmp_path, monkeypatch):
    """In the code for sm_90; elsewhere there is none. No kernel lets the next one begin early: what that one reads
    before its own wait may be what is still written here."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what `begin` does is no part of the key of kept kernels
    seen = set()
    every = [(name, 4096) for name in FORMATS] + [("int8_channel", 65536)]  # a row is a program there
    for name, columns in every:
        for one in calls(name, True, columns):
            kernel = one.kernel.__name__
            assert one.options.get("launch_pdl", False) is (kernel in KERNELS), kernel
            if kernel not in KERNELS:
                continue
            new = kernel not in seen
            seen.add(kernel)
            code = one.compile(GPUTarget("cuda", 90, 32)).asm["ptx"]
            assert 0 < code.find("griddepcontrol.wait") < MEMORY.search(code).start(), (name, kernel)
            assert "launch_dependents" not in code
            if new:
                assert "griddepcontrol" not in one.compile(GPUTarget("cuda", 80, 32)).asm["ptx"]
        assert not any("launch_pdl" in one.options for one in calls(name, False, columns))
    assert seen == KERNELS


@pytest.fixture
def switch(monkeypatch):
    """Sets TRITONQ_PDL; plans are forgotten before and after."""

    def forget():
        launch.launches_early.cache_clear()
        plans.forget()

    def to(value):
        monkeypatch.setenv("TRITONQ_PDL", value)
        forget()

    yield to
    monkeypatch.undo()
    forget()


def test_which_devices_launch_early(switch, monkeypatch):
    capability = {0: (8, 0), 1: (8, 9), 2: (9, 0), 3: (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
    for value, expected in (("1", [False, False, True, True]), ("0", [False] * 4), ("", [False] * 4)):
        switch(value)
        found = [launch.launches_early(torch.device("cuda", index)) for index in range(4)]
        assert found == ([False] * 4 if torch.version.hip else expected)
        assert not launch.launches_early(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_behind_kernels_that_write_their_inputs(name, graph, switch):
    """Nobody waits on the host: torch writes what is quantized, quantizing writes what is dequantized, and that is
    what torch reads next, over the same memory again and again."""
    switch("1")
    fmt, shape = get_format(name), (256, 4096)
    source = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    factors = [1.0 + i / 64 for i in range(50)]
    x, y = torch.empty_like(source), torch.empty_like(source)
    out = ops.allocate(fmt, shape, source.device)
    sums = torch.zeros(len(factors), 2, shape[1], device="cuda")

    def step(i):
        torch.mul(source, factors[i], out=x)
        ops.quantize(x, fmt, out=out)
        ops.dequantize(out, fmt, shape, x.dtype, out=y)
        sums[i, 0] = y.float().sum(0)
        ops.qdq(x, fmt, out=y)
        sums[i, 1] = y.float().sum(0)

    expected = []
    for i in range(len(factors)):
        step(i)
        torch.cuda.synchronize()
        values = ops.qdq((source * factors[i]).clone(), fmt).float()
        torch.cuda.synchronize()
        expected.append(values.sum(0))
    sums.zero_()
    torch.cuda.synchronize()
    if graph:
        held = torch.cuda.CUDAGraph()
        with torch.cuda.graph(held):
            for i in range(len(factors)):
                step(i)
        runs = held.replay
    else:
        runs = lambda: [step(i) for i in range(len(factors))]  # noqa: E731
    for _ in range(5):
        sums.zero_()
        runs()
    torch.cuda.synchronize()
    for i, wanted in enumerate(expected):
        assert torch.equal(sums[i, 0], wanted) and torch.equal(sums[i, 1], wanted), i
