"""The kernels of learned QDQ compile for every target; on NVIDIA without spills and with 16-byte accesses of v."""

import re
from functools import cache

import pytest
import torch
from conftest import INTERPRET
from test_compile import REGISTERS, TARGETS, check

from bench.launches import launched
from tritonq import learned_ops, ops
from tritonq.formats import get_format
from tritonq.learned_reference import Learned, Wanted

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled; run without TRITON_INTERPRET")
# On all targets; a sample of the others on sm_90.
EVERYWHERE = {"int4_g128": ("qdq", "step", "quantize"), "nvfp4": ("step",), "fp8_e4m3_channel": ("step",)}
SAMPLE = ("mxfp4", "int4_g128_asym", "nf4_g64", "fp8_e4m3_b128x128", "q4_k")
SHAPE = (64, 14336)


@cache
def launches(name, shape=SHAPE, dtype=torch.bfloat16, of_v=torch.float32):
    """Forward, backward, step and quantize with v and both ratios, and what a given scale takes."""
    fmt = get_format(name)

    def call():
        x, v = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=of_v)
        ratio, divisor = torch.zeros(fmt.scale_shape(shape)), torch.ones(1) if fmt.tensor_scale else None
        given = Learned(v, ratio, ratio, False, divisor)
        learned_ops.qdq(x, fmt, given)
        learned_ops.backward(x, x, fmt, given, Wanted(True, True, True, True))
        learned_ops.quantized(x, fmt, given)
        learned_ops.step(x, x, fmt, given, torch.zeros(2), (-0.5, 0.5, 0.0, 1.0), False)
        if not fmt.super_group:
            learned = Learned(None, ratio, ratio if fmt.zero_point else None, True, divisor)
            learned_ops.qdq(x, fmt, learned)
            learned_ops.backward(x, x, fmt, learned, Wanted(True, False, True, fmt.zero_point))
            stored = {name: torch.zeros(s, dtype=d) for name, (s, d) in fmt.storage(shape).items()}
            scale = ops._bits(stored["scale"])
            learned_ops.quantized(x, fmt, Learned(v, scale, stored.get("zero_point"), True, divisor))

    return tuple({one.key: one for one in launched(call)}.values())


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, name, tmp_path):
    for one in launches(name):
        if one.constants.get("MODE") in EVERYWHERE[name]:
            check(one, TARGETS[target], tmp_path, REGISTERS)


@pytest.mark.parametrize("name", SAMPLE)
def test_formats_compile(name, tmp_path):
    for one in launches(name):
        if one.name.endswith("step"):
            check(one, TARGETS["sm_90"], tmp_path, REGISTERS)


@pytest.mark.parametrize("name", [*EVERYWHERE, *SAMPLE])
def test_gradient_without_parameters_compiles(name, tmp_path):
    found = launched(lambda: ops.qdq_backward(torch.zeros(SHAPE), torch.zeros(SHAPE), get_format(name)))
    assert found
    for one in found:
        check(one, TARGETS["sm_90"], tmp_path, REGISTERS)


@pytest.mark.parametrize(
    "name,shape,dtype,of_v",
    [
        ("int3_g7", (5, 33), torch.float32, torch.bfloat16),
        ("fp8_e4m3_b256x256", (300, 700), torch.float64, torch.float16),
    ],
)
def test_odd_shapes_and_types_compile(name, shape, dtype, of_v, tmp_path):
    for one in launches(name, shape, dtype, of_v):
        if not one.constants.get("GIVEN") and not one.name.endswith("backward"):
            check(one, TARGETS["sm_80"], tmp_path, 192)


@pytest.mark.parametrize("name", ["int4_g128", "nvfp4", "fp8_e4m3_channel"])
def test_accesses_are_16_bytes_wide(name):
    """x, v, dy, y and dv: anything narrower than 16 bytes belongs to groups."""
    for one in launches(name):
        if one.constants.get("HAS_V") and one.constants.get("MODE") in ("qdq", "step"):
            ptx = one.compile(TARGETS["sm_90"]).asm["ptx"]
            wide = len(re.findall(r"(?:ld|st)\.global[.\w:]*\.v4\.b32", ptx))
            narrow = len(re.findall(r"(?:ld|st)\.global[.\w:]*\.(?:b16|b8|u8|u16|v2\.b32)", ptx))
            assert wide >= 4 and narrow == 0, one.name
