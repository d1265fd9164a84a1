"""Formats as data: names, storage, errors, registration, and that nothing branches on a name."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tritonq.formats as formats
from tritonq import ops
from tritonq.formats import FORMATS, Format, ScaleType, get_element, get_format, integer, lookup, minifloat, register

PACKAGE = Path(formats.__file__).parent
UNLISTED = (
    "e3m4_g48", "int5_g20", "int3_g7", "int3_g64_asym", "e2m0_g16", "e1m2_b3x5", "int6_channel", "int4_tensor_asym",
    "e5m1_b16x16_f16", "mxfp4_rceil", "mxfp8_ceil", "mxfp4_even", "int4_g128_half_range", "int8_channel_absmax",
    "e4m3_g32_ue5m3", "e3m0_g32_e8m0_even", "int4_g128_f16", "fp8_e4m3_channel_bf16", "int4_g128_full_range",
    "nf4_channel", "nf4_b16x16", "nf4_g48_bf16", "af4_g64", "nf4_tensor_f16_absmax", "mxint8_rceil", "int8f6_g32",
    "int4f3_channel_f32", "int4_g32_asym_u6_s256", "int6_g16_i8_s256", "e2m1_g16_u8_s64", "int4_g8_u4_s32_half_range",
)  # fmt: skip


@pytest.mark.parametrize("name", [*FORMATS, *UNLISTED])
def test_names_round_trip(name):
    fmt = get_format(name)
    assert (
        fmt.name == name
        and get_format(fmt.name) == fmt
        and get_format(fmt) is fmt
        and hash(fmt) == hash(get_format(name))
    )


# OCP MX 1.0 tables 1 to 4, OCP OFP8; e3m4 and the others use every code: (2 - 2^-M) 2^(2^X - 1 - bias).
MAXIMA = {"e2m1": 6, "e2m3": 7.5, "e3m2": 28, "e4m3": 448, "e5m2": 57344, "e3m4": 31, "e4m3fnuz": 240,
          "e5m2fnuz": 57344,
          "fp8_e4m3": 448, "fp8_e5m2": 57344, "e2m0": 4, "e1m2": 3.5, "e3m0": 16, "e4m3ieee": 240, "e3m4ieee": 15.5,
          "int2": 1, "int3": 3, "int4": 7, "int8": 127, "int8f6": 127 / 64, "int3f2": 0.75, "nf4": 1,
          "af4": 1}  # fmt: skip


@pytest.mark.parametrize("name", MAXIMA)
def test_element_max(name):
    """element.max is computed from the codes."""
    assert get_element(name).max == MAXIMA[name]


def test_scale_types():
    assert {n: ScaleType(n).max for n in ("e8m0", "e4m3", "ue5m3", "f16", "bf16", "f32")} == {
        "e8m0": 2.0**127, "e4m3": 448, "ue5m3": 114688, "f16": 65504, "bf16": (2 - 2.0**-7) * 2.0**127,
        "f32": (2 - 2.0**-23) * 2.0**127,
    }  # fmt: skip
    assert ScaleType("e8m0", "floor").dtype is torch.float8_e8m0fnu and ScaleType("ue5m3").dtype is torch.uint8


def test_defaults_of_names():
    """int takes full_range and bf16, fp8 scales are fp32, MX is e8m0 floor in groups of 32, NVFP4 two levels of 16."""
    fields = {n: (f.group, f.scale.name, f.scale.rule, f.zero_point, f.tensor_scale) for n, f in FORMATS.items()}
    assert fields["int4_g128"] == ((1, 128), "bf16", "full_range", False, False)
    assert fields["int4_g128_asym"] == ((1, 128), "bf16", "minmax", True, False)
    assert fields["fp8_e4m3_channel"] == ((1, -1), "f32", "absmax", False, False)
    assert fields["fp8_e4m3_tensor"][0] == (-1, -1) and fields["fp8_e4m3_b128x128"][0] == (128, 128)
    for name in ("mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8"):
        assert fields[name] == ((1, 32), "e8m0", "floor", False, False)
    assert fields["nf4_g64"] == ((1, 64), "f32", "absmax", False, False)
    int8f6 = get_format("int8f6_g32").scale
    assert (int8f6.name, int8f6.rule) == ("bf16", "absmax")
    assert fields["nvfp4"] == ((1, 16), "e4m3", "absmax", False, True)
    assert fields["q4_k"] == ((1, 32), "u6", "minmax", False, False) and get_format("q4_k").super_group == 256
    assert fields["q6_k"] == ((1, 16), "i8", "full_range", False, False) and not get_format("q6_k").minimum
    assert (
        get_format("int4_g128_half_range").scale.rule == "half_range"
        and get_format("mxfp4_rceil").scale.rule == "rceil"
    )


STORAGE = {
    ("int4_g128", (3, 300)): {"qdata": ((3, 150), torch.uint8), "scale": ((3, 3), torch.bfloat16)},
    ("int3_g64_asym", (2, 5, 101)): {"qdata": ((2, 5, 38), torch.uint8), "scale": ((2, 5, 2), torch.bfloat16),
                                     "zero_point": ((2, 5, 2), torch.uint8)},
    ("int8_channel", (4, 7)): {"qdata": ((4, 7), torch.int8), "scale": ((4, 1), torch.bfloat16)},
    ("fp8_e4m3_tensor", (2, 3, 5)): {"qdata": ((2, 3, 5), torch.float8_e4m3fn), "scale": ((1,), torch.float32)},
    ("fp8_e4m3_b128x128", (2, 200, 300)): {"qdata": ((2, 200, 300), torch.float8_e4m3fn), "scale": ((2, 2, 3),
    torch.float32)},
    ("mxfp4", (65,)): {"qdata": ((33,), torch.uint8), "scale": ((3,), torch.float8_e8m0fnu)},
    ("mxfp6_e3m2", (2, 33)): {"qdata": ((2, 25), torch.uint8), "scale": ((2, 2), torch.float8_e8m0fnu)},
    ("nvfp4", (2, 17)): {"qdata": ((2, 9), torch.uint8), "scale": ((2, 2), torch.float8_e4m3fn),
    "tensor_scale": ((1,), torch.float32)},
    ("e4m3_g32_ue5m3", (2, 0)): {"qdata": ((2, 0), torch.float8_e4m3fn), "scale": ((2, 0), torch.uint8)},
    ("int8_channel", (2, 0)): {"qdata": ((2, 0), torch.int8), "scale": ((2, 1), torch.bfloat16)},
    ("nf4_g64", (3, 130)): {"qdata": ((3, 65), torch.uint8), "scale": ((3, 3), torch.float32)},
    ("mxint8", (2, 33)): {"qdata": ((2, 33), torch.int8), "scale": ((2, 2), torch.float8_e8m0fnu)},
    ("q4_k", (3, 300)): {"qdata": ((3, 150), torch.uint8), "scale": ((3, 10), torch.uint8),
                         "group_minimum": ((3, 10), torch.uint8), "super_scale": ((3, 2), torch.float16),
                         "super_minimum": ((3, 2), torch.float16)},
    ("q6_k", (256,)): {"qdata": ((192,), torch.uint8), "scale": ((16,), torch.int8),
                       "super_scale": ((1,), torch.float16)},
    ("fp8_e4m3fnuz_channel", (1,)): {"qdata": ((1,), torch.float8_e4m3fnuz), "scale": ((1,), torch.float32)},
}  # fmt: skip


@pytest.mark.parametrize("name,shape", STORAGE)
def test_storage(name, shape):
    expected = STORAGE[name, shape]
    fmt = get_format(name)
    assert fmt.storage(shape) == expected and fmt.scale_shape(shape) == expected["scale"][0]
    size = 0
    for part, dtype in expected.values():
        size += torch.empty(part, dtype=dtype).nbytes
    assert fmt.nbytes(shape) == size


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown format 'int4g128'") as error:
        get_format("int4g128")
    assert all(name in str(error.value) for name in FORMATS) and "\n" not in str(error.value)
    with pytest.raises(TypeError, match="int"):
        get_format(4)


@pytest.mark.parametrize("name", ["int9_g8", "int1_g8", "e5m5_g16", "fp8_e3m2_g16", "int4_g0", "int4_gx", "mxfp5",
                                  "mxfp8_e3m2",
                                  "mxfp6", "nf5_g64", "e0m3_g16", "int4_g128_foo", "fp8_e4m3_g32_asym",
                                  "int4_g32_ue5m3_full_range", "nf4_g64_asym", "nf4_g64_full_range", "int8f6_g32_asym",
                                  "int8f6_g32_half_range", "int4_g32_u6", "int4_g32_s256", "int4_g32_bf16_s256",
                                  "int4_g32_asym_i8_s256", "int4_g32_i8_s256_absmax", "int4_g48_i8_s256", "q7_k",
                                  "int4_channel_i8_s256", "int4_g32_i8_s16", "int4_g32_i8_s8192",
                                  "int4_g32_u6_s256_minmax", "e2m1_g16_i8_s64", "int8f6_g32_asym_u6_s256",
                                  "int4_g4_i8_s4", "int4f4_g32", "mxint8_e4m3", "mxint4", "nf3_g64",
                                  ""])  # fmt: skip
def test_impossible_names_are_value_errors(name):
    with pytest.raises(ValueError) as error:
        get_format(name)
    assert "\n" not in str(error.value)


def test_group_errors_give_the_shape():
    with pytest.raises(ValueError, match=r"128 x 128.*\(300,\)"):
        ops.quantize(torch.zeros(300), "fp8_e4m3_b128x128")
    with pytest.raises(ValueError, match="scalar"):
        ops.quantize(torch.zeros(()), "int4_g128")
    with pytest.raises(TypeError, match="int64"):
        ops.quantize(torch.zeros(4, dtype=torch.int64), "int4_g128")


def test_given_part_errors_name_part_and_shapes():
    x = torch.zeros(2, 256)
    with pytest.raises(ValueError, match=r"scale.*\(2, 256\).*\(2, 2\).*\(2, 3\)"):
        ops.quantize(x, "int4_g128", scale=torch.ones(2, 3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="float32"):
        ops.quantize(x, "int4_g128", scale=torch.ones(2, 2))
    with pytest.raises(ValueError, match="zero_point"):
        ops.quantize(x, "int4_g128_asym", scale=torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="tensor_scale"):
        ops.quantize(x, "int4_g128", tensor_scale=torch.ones(1))


@pytest.mark.parametrize("change", [
    {"zero_point": True}, {"group": (0, 4)}, {"group": (-1, 4)}, {"group": (2, -1)}, {"scale": ScaleType("f64")},
    {"scale": ScaleType("bf16", "floor")}, {"scale": ScaleType("e8m0", "absmax")}, {"scale": ScaleType("ue5m3",
    "full_range")},
])  # fmt: skip
def test_contradictory_formats_are_refused(change):
    with pytest.raises(ValueError, match="bad"):
        replace(
            get_format("mxfp4") if change == {"zero_point": True} else get_format("int4_g128"), name="bad", **change
        )


def test_impossible_elements_are_refused():
    for build in (lambda: integer(1), lambda: integer(9), lambda: minifloat(0, 3), lambda: minifloat(5, 2, "nope"),
                  lambda: integer(8, 8), lambda: integer(8, -1),
                  lambda: minifloat(1, 0, "fn"), lambda: minifloat(1, 2, "ieee"), lambda: minifloat(9, 9)):  # fmt: skip
        with pytest.raises(ValueError):
            build()


@pytest.mark.parametrize("values,complaint", [
    ((0.0,), "1 values"), (range(-1, 256), "257 values"), ((-1, 0.5, 1), "lacks 0"), ((0, 1, 1), "1.0 at 2 after 1.0"),
    ((1, 0), "0.0 at 1 after 1.0"), ((0, 1, 1 + 1e-9), "equal"), ((0, float("nan")), "nan at 1"),
    ((float("-inf"), 0), "-inf at 0"), ((0, 1e39), "1e[+]39 at 1"), ((0, 1e-40), "subnormal"),
])  # fmt: skip
def test_impossible_tables_are_refused(values, complaint):
    with pytest.raises(ValueError, match=f"table 'mine'.*{complaint}") as error:
        lookup("mine", values)
    assert "\n" not in str(error.value)


def test_tables_are_data():
    """Values are rounded to fp32 and are part of equality and keys; bits follow from their count; -0 is 0."""
    a, b = lookup("mine", (-1, -0.0, 0.1, 1)), lookup("mine", (-1, 0, 0.2, 1))
    assert a != b and a.digest != b.digest and a.cache_key != b.cache_key and hash(a) == hash(b)
    assert a == lookup("mine", torch.tensor([-1, 0, 0.1, 1]).tolist()) and "-0.0" not in repr(a.values)
    assert a.values[2] == float(torch.tensor(0.1)) and (a.max, a.zero_code, a.nan_code, a.emax) == (1, 1, -1, 0)
    bits = {2: 2, 3: 2, 4: 2, 5: 3, 8: 3, 9: 4, 16: 4, 17: 5, 129: 8, 256: 8}
    assert {n: lookup("mine", range(n)).bits for n in bits} == bits
    full = lookup("mine", range(-1, 255))
    assert full.dtype is None and Format("mine_g32", full, (1, 32)).qdtype is torch.uint8
    assert lookup("mine", range(5)).table == (0, 1, 2, 3, 4, 4, 4, 4)


def test_tensor_scales_need_a_short_maximum():
    """The kernels divide by element.max in a way that is exact for 12 significant bits."""
    Format("good", lookup("mine", (0, 1 + 2**-11)), (1, 16), ScaleType("e4m3"), tensor_scale=True)
    with pytest.raises(ValueError, match="12 bits"):
        Format("bad", lookup("mine", (0, 1 + 2**-12)), (1, 16), ScaleType("e4m3"), tensor_scale=True)


def test_a_table_of_ones_own_is_a_usable_format(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))
    mine = register(Format("mine_g8", lookup("mine", (-1, -0.3, 0, 0.2, 0.9)), (1, 8)))
    x = torch.tensor([[2.0, -2.0, 0.7, -0.3, 0.1, 0.2, 0.0, -0.0]])
    parts = ops.quantize(x, "mine_g8")
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == mine.storage((1, 8))
    # The scale is 2. -0.15 and 0.1 lie halfway between 0, the even code 2, and its neighbours; 0.35 is nearer to 0.2.
    expected = torch.tensor([[1.8, -2.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0]])
    y = ops.dequantize(parts, "mine_g8", (1, 8), x.dtype)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y, ops.qdq(x, "mine_g8")) and not torch.signbit(y[0, -1])


def test_replace_and_register_make_a_usable_format(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))
    mine = replace(get_format("int4_g128"), name="mine", group=(1, 48), scale=ScaleType("f32", "absmax"))
    assert register(mine) is mine and get_format("mine") is mine and register(mine) is mine
    x = torch.randn(5, 100)
    parts = ops.quantize(x, "mine")
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == mine.storage((5, 100))
    y = ops.dequantize(parts, "mine", (5, 100), x.dtype)
    assert torch.equal(y, ops.qdq(x, "mine")) and torch.allclose(y, x, atol=float(x.abs().max()) / 7)


def test_name_conflicts_are_refused(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))
    for name in ("int4_g128", "int5_g24"):  # registered, and parametric
        with pytest.raises(ValueError, match=name):
            register(replace(get_format(name), group=(1, 16)))
    assert register(get_format("int5_g24")) == get_format("int5_g24")


def test_same_name_different_contents_are_different():
    """__hash__ looks at the name alone; equality, repr and the kernels' cache key do not."""
    for name, change in (("int4_g128", {"group": (1, 64)}), ("q4_k", {"super_group": 128})):
        a = get_format(name)
        b = replace(a, **change)
        assert hash(a) == hash(b) and a != b and repr(a) != repr(b) and a.cache_key != b.cache_key


def test_defaults_are_whole_formats():
    fmt = Format("plain", minifloat(2, 1), (1, 8))
    assert fmt.scale == ScaleType("f32", "absmax") and not fmt.zero_point and not fmt.tensor_scale


# ------------------------------------------------------------------------------------------------- no names in logic

_HOLDER = re.compile(r"(fmt|format|elem|element|type|weights?|inputs?)$", re.IGNORECASE)


def _is_name(node, scale_too):
    if not (isinstance(node, ast.Attribute) and node.attr == "name"):
        return False
    holder = ast.unparse(node.value).split(".")[-1]
    return bool(_HOLDER.search(holder)) or (scale_too and holder.endswith("scale"))


def _has_string(node):
    return any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in ast.walk(node))


def branches_on_names(source, scale_too):
    """Lines that compare the name of a format or element with a string, or look inside it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(_is_name(s, scale_too) for s in sides) and any(_has_string(s) for s in sides):
                found.append(node.lineno)
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_name(node.func.value, scale_too)
        ):
            found.append(node.lineno)  # startswith, split, ...
        elif isinstance(node, ast.Match) and _is_name(node.subject, scale_too):
            found.append(node.lineno)
    return found


def _logic():
    for part in ("kernels", "codecs", "io", "reference.py", "tiling.py", "ops.py", "tuning.py"):
        path = PACKAGE / part
        yield from path.rglob("*.py") if path.is_dir() else [path]


@pytest.mark.parametrize("path", list(_logic()), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_branches_on_a_name(path):
    """`scale.name` is a type tag, used in formats.py and codecs only."""
    assert branches_on_names(path.read_text(), scale_too=path.parent.name != "codecs") == []


def test_the_check_for_names_sees_them():
    for bad in (
        "fmt.name == 'int4'",
        "x.element.name in ('e2m1',)",
        "FMT.name.startswith('mx')",
        "fmt.scale.name != 'e8m0'",
    ):
        assert branches_on_names(f"if {bad}: pass", True) == [1]
    for good in ("path.name == 'config.json'", "fmt.bits == 4", "other.name == fmt.name", "fmt.scale.rule == 'floor'"):
        assert branches_on_names(f"if {good}: pass", True) == []
