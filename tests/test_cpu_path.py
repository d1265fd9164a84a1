"""The CPU path: tile by tile the reference's bits, in little memory, whatever the strides."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRET
from oracle import assert_same, assert_same_parts

from tritonq import ops, reference, tiling
from tritonq.formats import get_format

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(INTERPRET, reason="CPU tensors go to the interpreter under TRITON_INTERPRET=1")

NAMES = ("int4_g128", "int4_g128_asym", "int3_g128", "int8_channel", "int5_g20", "fp8_e4m3_tensor", "fp8_e4m3_b128x128",
         "mxfp8", "mxfp6_e3m2", "mxfp4", "nvfp4", "e3m4_g48", "int4_tensor_asym", "fp8_e4m3_b256x256", "q4_k",
         "q6_k")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1500, 1030), (3, 300, 1100), (1, 1_200_001), (5, 2, 3, 40_000)], ids=str)
def test_several_tiles_equal_the_reference(name, shape, monkeypatch):
    """Law 2 over several tiles: rows, columns, batches and groups that end inside one."""
    monkeypatch.setattr(tiling, "SCRATCH", 1 << 19)
    fmt = get_format(name)
    if fmt.group[0] > 1 and shape[-2] < 100:  # blocks of mostly padding: slow, and no other path
        shape = (130, 9_001)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    expected = reference.quantize(x, fmt)
    parts = ops.quantize(x, fmt)
    assert_same_parts(parts, expected)
    y = ops.dequantize(parts, fmt, shape, x.dtype)
    assert_same(y, reference.dequantize(expected, fmt, shape, x.dtype))
    assert_same(ops.qdq(x, fmt), y)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads):
    """Law 8: the tile grows with the threads, the result does not."""
    x = torch.randn(700, 2000, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in ("int4_g128", "fp8_e4m3_channel", "nvfp4"):
            assert_same_parts(ops.quantize(x, name), reference.quantize(x, get_format(name)))
    finally:
        torch.set_num_threads(before)


MEASURE = """
import ctypes, sys, threading, torch
from tritonq import ops
name, layout, what = sys.argv[1:]
torch.set_num_threads(2)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def input_of(n):
    x = torch.randn(n, 8192).to(torch.bfloat16)
    return x if layout == "contiguous" else x.view(8192, n).t()

ops.qdq(input_of(256), name)                                  # code, thread pools
ops.dequantize(ops.quantize(input_of(256), name), name, (256, 8192), torch.bfloat16)
x = input_of(4096)                                            # 64 MiB
parts = ops.quantize(x, name) if what == "dequantize" else None
ctypes.CDLL(None).malloc_trim(0)
peak, done = [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        done.wait(0.0005)

start = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
if what == "qdq":
    out = ops.qdq(x, name)
    size = out.nbytes
elif what == "quantize":
    out = ops.quantize(x, name)
    size = sum(p.nbytes for p in out.values())
else:
    out = ops.dequantize(parts, name, tuple(x.shape), torch.bfloat16)
    size = out.nbytes
done.set()
watcher.join()
print(max(peak[0], anonymous()) - start - size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and steers glibc")
@pytest.mark.parametrize("name,layout,what", [
    ("int4_g128", "contiguous", "qdq"), ("int4_g128", "transposed", "qdq"), ("fp8_e4m3_tensor", "contiguous", "qdq"),
    ("nvfp4", "contiguous", "qdq"), ("int3_g128", "transposed", "quantize"), ("int8_channel", "contiguous",
    "dequantize"), ("q4_k", "contiguous", "qdq"), ("q6_k", "transposed", "quantize"),
])  # fmt: skip
@pytest.mark.parametrize("heap", ["live", "default"])
def test_scratch_memory(name, layout, what, heap):
    """Peak anonymous memory beyond the output: 8 MiB of scratch, never a full-size intermediate (64 MiB or more here).

    "live" maps every tensor on its own, so memory that is free does not count; "default" has the heap's holes as well.
    """
    if heap == "default" and (name, what) not in (("int4_g128", "qdq"), ("fp8_e4m3_tensor", "qdq")):
        pytest.skip("the heap is looked at twice only")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if heap == "live":
        env["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    done = subprocess.run([sys.executable, "-c", MEASURE, name, layout, what], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    fmt = get_format(name)
    scales = fmt.nbytes((4096, 8192)) - fmt.row_bytes(8192) * 4096 if what == "qdq" else 0  # qdq keeps them for a while
    assert (int(done.stdout) - scales) / 2**20 <= {"live": 8 + 1, "default": 32}[heap]


def test_output_is_new_and_input_unchanged():
    x = torch.randn(64, 300)
    before = x.clone()
    for name in NAMES:
        y = ops.qdq(x, name)
        assert torch.equal(x, before) and y.data_ptr() != x.data_ptr()


def test_meta_tensors_have_shapes():
    x = torch.empty(8, 300, dtype=torch.bfloat16, device="meta")
    for name in NAMES:
        fmt = get_format(name)
        parts = ops.quantize(x, fmt)
        assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == fmt.storage((8, 300))
        y = ops.qdq(x, fmt)
        assert y.device.type == "meta" and y.shape == x.shape and y.dtype is x.dtype
