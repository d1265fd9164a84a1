"""Every kernel, with the arguments that `ops` launches it with, compiles for every target; on NVIDIA without spills.

Launches are recorded instead of run, so signatures, specialisation and tuning are those of the real thing.
"""

import importlib.util
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import INTERPRET
from triton.backends.compiler import GPUTarget

from bench import sass
from bench.launches import launched
from tritonq import ops
from tritonq.formats import FORMATS, get_format

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled; run without TRITON_INTERPRET")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32), "gfx942": GPUTarget("hip", "gfx942", 64), "gfx950": GPUTarget("hip",
    "gfx950", 64),
}  # fmt: skip
REPRESENTATIVE = ("int4_g128", "int4_g128_asym", "int3_g128", "fp8_e4m3_channel", "fp8_e4m3_b128x128", "mxfp4",
                  "nvfp4", "fp8_e4m3fnuz_channel", "e3m4_g48", "nf4_g64", "mxint8", "q4_k", "q6_k")  # fmt: skip
WIDE_LOADS = ("int4_g128", "int8_channel", "fp8_e4m3_channel", "mxfp8", "mxfp4", "nvfp4", "nf4_g64", "mxint8",
              "q4_k", "q6_k")  # fmt: skip
SEARCHED = ("int4_g128", "int4_g128_asym", "mxfp4", "nvfp4", "nf4_g64", "fp8_e4m3_tensor", "fp8_e4m3_b128x128")
# A value that waits for the end, saved once beside calls of the full division.
FRAMES = {"search_kernel": 8}
FRAMES_OF_TABLES = {"apply_kernel-quantize": 8, "apply_kernel-qdq": 8}
REGISTERS = 160  # of aligned input; odd shapes keep more offsets and masks alive


@cache
def launches(name, shape=(64, 4096), dtype=torch.bfloat16):
    """Distinct launches of quantize, qdq, dequantize, and qdq with given scales, of a contiguous tensor."""
    return record(get_format(name), shape, dtype)


def record(fmt, shape, dtype, **rounding):
    def call():
        x = torch.zeros(shape, dtype=dtype)
        parts = ops.quantize(x, fmt, **rounding)
        ops.qdq(x, fmt, **rounding)
        ops.dequantize(parts, fmt, shape, dtype)
        if not fmt.super_group:  # which takes no given scales and has no search
            ops.qdq(x, fmt, **{k: v for k, v in parts.items() if k != "qdata"}, **rounding)
        if fmt.name in SEARCHED:
            ops.quantize(x, fmt, search="mse", **rounding)
            ops.quantize(x, fmt, search="mse", importance=x.reshape(-1, shape[-1])[0].float(), **rounding)

    return tuple({one.key: one for one in launched(call)}.values())


def check(one, target, folder, registers=REGISTERS):
    compiled = one.compile(target)
    if target.backend == "cuda":
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = sass.resources(cubin)
        fmt = one.constants.get("FMT")
        known = FRAMES | FRAMES_OF_TABLES if fmt is not None and fmt.element.values else FRAMES
        frame = known.get(one.name, 0)
        assert usage["LOCAL"] == 0 and usage["STACK"] <= frame, f"{one.name}: local memory {usage}"
        assert usage["REG"] <= registers, f"{one.name}: {usage['REG']} registers"
        assert not re.search(r"\b(ld|st)\.local", compiled.asm["ptx"]), one.name
        assert "div.full" not in compiled.asm["ptx"] and "div.approx" not in compiled.asm["ptx"], (
            f"{one.name}: inexact division"
        )
    else:
        assert ".vgpr_spill_count: 0" in re.sub(r" +", " ", compiled.asm["amdgcn"]), f"{one.name}: spills"
    return compiled


LARGE = (4096, 8192)  # tiles are not those of a small tensor
# Half of the formats for targets that have a sibling here, which compiles the others, too.
PAIRS = [
    (target, name)
    for target in TARGETS
    for i, name in enumerate(REPRESENTATIVE)
    if target in ("sm_80", "sm_90", "gfx942") or i % 2 == 0
]


@pytest.mark.parametrize("target,name", PAIRS)
def test_compiles(target, name, tmp_path):
    """Every code path on every target, with the tiles of small tensors and those of large ones."""
    shape = LARGE if target in ("sm_90", "sm_120", "gfx950") else (64, 4096)
    for one in launches(name, shape):
        check(one, TARGETS[target], tmp_path)


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in REPRESENTATIVE])
def test_registry_compiles(name, tmp_path):
    for one in launches(name, LARGE):
        check(one, TARGETS["sm_90"], tmp_path)


@pytest.mark.parametrize(
    "name,shape,dtype",
    [
        ("int4_g128", (7, 301), torch.float16),
        ("int3_g7", (5, 33), torch.float32),
        ("fp8_e4m3_tensor", (100, 999), torch.float64),
        ("int4_tensor_asym", (100, 999), torch.bfloat16),
        ("fp8_e4m3_b256x256", (300, 700), torch.bfloat16),
        ("nvfp4", (3, 40), torch.float32),
        ("int8_channel", (2, 300000), torch.bfloat16),
        ("fp8_e4m3_channel", (2, 65536), torch.bfloat16),
        ("int5_g20", (9, 45), torch.float16),
        ("mxfp8_rceil", (4, 4096), torch.float64),
        ("e4m3_g32_ue5m3", (8, 96), torch.float32),
        ("int6_channel", (8, 5000), torch.bfloat16),
        ("int5_g96", (8, 5000), torch.bfloat16),
        ("int6_g80_asym", (9, 333), torch.float32),
        ("q3_k", (7, 1000), torch.float32),
        ("e2m1_g16_u8_s64", (5, 333), torch.float64),
    ],
)
def test_odd_shapes_and_types_compile(name, shape, dtype, tmp_path):
    """Unaligned sizes, groups larger than a tile, other input types: other specialisations of the same kernels."""
    for one in launches(name, shape, dtype):
        check(one, TARGETS["sm_80"], tmp_path, 192)


def test_every_kernel_is_covered():
    """The recorded launches contain every kernel of tritonq/kernels, in every mode."""
    seen = {
        one.name
        for name in ("int4_g128", "int3_g7", "nvfp4", "fp8_e4m3_tensor", "int8_channel", "q4_k")
        for one in launches(name)
    }
    seen |= {one.name for one in launches("int3_g7", (5, 33), torch.float32)}
    for columns in (8192, 40000, 100_000, 300_000):
        seen |= {one.name for one in launches("int8_channel", (2, columns))}
    from test_at_once import launches as at_once
    from test_both import launches as both
    from test_bulk import launches as bulk
    from test_hadamard import launches as hadamard
    from test_learned_compile import launches as learned
    from test_ste import launches as cast

    few = (*at_once("nvfp4"), *both("mxfp8", (64, 64)), *hadamard((64, 64)), *cast((64, 64)))
    seen |= {one.name for one in few}
    seen |= {one.name for name in ("int4_g128", "fp8_e4m3_tensor") for one in learned(name)}
    seen |= {one.name for name in ("int4_g128", "fp8_e4m3_tensor", "q4_k") for one in bulk(name, [(64, 64)])}
    kernels = set()
    for file in (Path(ops.__file__).parent / "kernels").glob("*.py"):
        kernels |= set(re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+_kernel)\(", file.read_text()))
    assert kernels == {name.split("-")[0] for name in seen}
    assert {f"group_kernel-{mode}" for mode in ("quantize", "qdq", "scale")} <= seen
    assert {f"super_group_kernel-{mode}" for mode in ("quantize", "qdq")} <= seen


@pytest.mark.parametrize("name", WIDE_LOADS)
def test_input_loads_are_16_bytes_wide(name):
    """bf16 input comes in 16-byte global loads on sm_80 and later."""
    rows = launches(name, (8, 65536))  # too long for a tile, so a channel is read twice
    kernels = [one for one in {*launches(name), *rows} if one.constants.get("MODE") in ("quantize", "qdq")]
    assert kernels
    assert any("row_kernel" in one.name for one in kernels) == (get_format(name).group[1] == -1)
    for one in kernels:
        ptx = one.compile(TARGETS["sm_90"]).asm["ptx"]
        assert re.search(r"ld\.global[.\w:]*\.(v4\.(b32|u32|f32)|v8\.b16|v2\.(b64|u64))", ptx), one.name


# -------------------------------------------------------------------------------------- cache keys (trap 6)

EDIT = ("(x + MAGIC) - MAGIC", "(x + MAGIC) - MAGIC + 0.0")


def codec_with_source(folder, monkeypatch, edit):
    """int4_g128 whose codec's device functions are a copy of the integer ones, edited or not."""
    fmt = get_format("int4_g128")
    source = Path(ops.__file__).parent.joinpath("codecs/integer_triton.py").read_text()
    if edit:
        assert EDIT[0] in source
        source = source.replace(*EDIT)
    path = folder / f"edited_{edit}" / "device_functions.py"
    path.parent.mkdir()
    path.write_text(source)
    name = f"tritonq_test_device_{edit}"
    spec = importlib.util.spec_from_file_location("tritonq_test_device", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    codec = replace(fmt.element.codec, device_module=name)
    return replace(fmt, element=replace(fmt.element, codec=codec))


def test_cache_key_follows_device_source(tmp_path, monkeypatch):
    """numerics.md trap 6: editing a codec's device source must not serve a stale kernel."""
    same, edited = (codec_with_source(tmp_path, monkeypatch, edit) for edit in (False, True))
    assert same.name == edited.name
    assert same.cache_key != edited.cache_key
    assert get_format("int4_g128").cache_key == replace(get_format("int4_g128")).cache_key

    def hashes(fmt):
        return {one.name: one.source().hash() for one in record(fmt, (64, 256), torch.bfloat16)}

    first, second = hashes(same), hashes(edited)
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first), "Triton would serve a stale kernel"


def test_scale_codec_is_part_of_the_cache_key():
    """A scale stored as a minifloat brings its codec's source too."""
    fmt = get_format("int4_g128")
    assert fmt.scale.element.cache_key in fmt.cache_key and fmt.element.cache_key in fmt.cache_key


def test_no_unary_minus_where_the_sign_of_zero_counts():
    """In Triton 3.6 unary minus is 0 - x, which turns 0 into 0: on an H100 `quotient` lost -0 that way."""
    import ast
    import inspect

    from tritonq.codecs import scale_triton

    tree = ast.parse(inspect.getsource(scale_triton.quotient.fn))
    minus = [n for n in ast.walk(tree) if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.USub)]
    assert all(isinstance(n.operand, ast.Constant) for n in minus)
