"""Candidates: law 8 for each, what a choice may change, and the entries that are committed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import INTERPRET
from oracle import assert_same, assert_same_parts

from tritonq import ops, plans, reference, tuning, tuning_cache
from tritonq.formats import FORMATS, get_format
from tritonq.tuning_files import KNOBS, OPS, Gpu, check_choice, is_canonical, parse_file

ROOT = Path(__file__).parent.parent
every_op = pytest.mark.parametrize("op", OPS)
SHAPES = {"flat": (1, 1 << 26), "rows": (4096, 14336), "ragged": (300, 1000), "tiny": (1, 3)}


@pytest.fixture(autouse=True)
def plans_as_before():
    yield
    plans.forget()


# ------------------------------------------------------------------------------------------------------- candidates


@every_op
def test_candidates(op):
    """First the heuristic; then choices that a file may hold, each another configuration; fewer with quick."""
    for name in (*FORMATS, "int3_g7", "e3m4_g48", "int4_g3", "int8_g16", "int8_tensor", "int3_g4_i6_s8"):
        fmt = get_format(name)
        for rows, columns in SHAPES.values():
            if not tuning.serves(op, fmt, columns):
                continue
            found = tuning.candidates(op, fmt, rows, columns)
            configs = [tuning.configure(op, fmt, rows, columns, choice) for choice in found]
            assert found[0] == {} and configs[0] == tuning.configure(op, fmt, rows, columns, None)
            assert len({tuple(c.values()) for c in configs}) == len(configs) <= 64
            for choice, config in zip(found, configs, strict=True):
                check_choice(op, choice)
                extents = [n for k, n in config.items() if k != "maxnreg"]
                assert all(n >= 1 and n & (n - 1) == 0 for n in extents), config
                assert 1 <= config["num_warps"] <= 16
                if "W" in config:
                    assert config["W"] * config["GROUPS"] >= 8 and (config["S"] == 1 or config["W"] >= 8)
                    assert (config["R"], config["S"] * config["W"]) == tuning._padded_group(fmt, columns)
                elif "BLOCK_M" in config:
                    assert config["BLOCK_N"] >= 8 and config["BLOCK_M"] * config["BLOCK_N"] <= 1 << 16
            quick = tuning.candidates(op, fmt, rows, columns, quick=True)
            assert quick[0] == {} and len(quick) <= len(found) and all(c in found or len(c) for c in quick)


@pytest.mark.skipif(INTERPRET, reason="conftest makes tiles larger there")
def test_there_is_something_to_choose():
    fmt = get_format("int4_g128")
    for op, shape, least in (
        ("quantize", "flat", 36), ("qdq", "flat", 36), ("dequantize", "flat", 12), ("dequantize", "rows", 24)
    ):  # fmt: skip
        full, quick = (len(tuning.candidates(op, fmt, *SHAPES[shape], quick=q)) for q in (False, True))
        assert least <= full <= 50 and 4 <= quick < full, (op, full, quick)


@every_op
def test_choices_keep_heuristics_out_of_reach(op):
    """No choice: the heuristic, exactly. A forced one: on every path, and undone after an error."""
    fmt, (rows, columns) = get_format("nvfp4"), SHAPES["flat"]
    before = tuning.configure(op, fmt, rows, columns, {})
    choice = tuning.candidates(op, fmt, rows, columns)[-1]
    wanted = tuning.configure(op, fmt, rows, columns, choice)
    assert wanted != before
    with pytest.raises(KeyError), tuning.forced(op, choice):
        assert tuning.configure(op, fmt, rows, columns, {}) == wanted
        with tuning.forced(op, {}):
            assert tuning.configure(op, fmt, rows, columns, choice) == before
        assert tuning.configure(op, fmt, rows, columns, {}) == wanted
        raise KeyError
    assert tuning.configure(op, fmt, rows, columns, {}) == before


def test_every_kernel_is_served():
    """Each op has a format and a shape that reach it."""
    seen = set()
    for name in ("int4_g128", "int3_g7", "nvfp4", "int8_channel", "int8_tensor"):
        for columns in (1000, 4096, 100_000, 300_000):
            seen |= {op for op in OPS if tuning.serves(op, get_format(name), columns)}
    assert seen == set(OPS)


# ------------------------------------------------------------------------------------------------------------ law 8

LAW_8 = {
    "int4_g128": (3, 640), "mxfp4": (5, 333), "nvfp4": (2, 1040), "fp8_e4m3_channel": (3, 1500),
    "int3_g128": (3, 640), "int8_g32_asym": (4, 256), "fp8_e4m3_b128x128": (130, 200), "e3m4_g48": (7, 149),
    "int3_g7": (24, 301), "int8_tensor": (6, 999), "q4_k": (3, 1120), "q6_k": (3, 512),
    "q2_k": (3, 1040),
}  # fmt: skip


def distinct(op, fmt, shape, quick=False):
    """Candidates for a tensor; in the interpreter those that differ in more than the number of warps."""
    columns = shape[-1]
    flat = fmt.group[0] == 1 and fmt.group[1] > 0 and columns % fmt.group[1] == 0
    rows, columns = (1, shape[0] * columns) if flat else shape
    found = {}
    for choice in tuning.candidates(op, fmt, rows, columns, quick):
        config = tuning.configure(op, fmt, rows, columns, choice)
        found.setdefault(tuple(v for k, v in config.items() if k != "num_warps" or not INTERPRET), choice)
    return list(found.values())


@pytest.mark.parametrize("name", LAW_8)
def test_every_candidate_gives_the_same_bits(name, device):
    """Law 8, for every kernel that this format reaches, against the reference."""
    if device == "cpu" and not INTERPRET:
        pytest.skip("the CPU path has no kernels")
    fmt, shape = get_format(name), LAW_8[name]
    host = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    host[0, :40] *= 1e-3
    expected = reference.quantize(host, fmt)
    values = reference.dequantize(expected, fmt, shape, host.dtype)
    x, parts = host.to(device), {k: v.contiguous().to(device) for k, v in expected.items()}
    given = {k: v for k, v in parts.items() if k != "qdata"}
    tensor_scale = parts.get("tensor_scale")
    count = 0
    for op in OPS:
        if not tuning.serves(op, fmt, shape[-1]):
            continue
        for choice in distinct(op, fmt, shape, quick=True):  # `tritonq tune` checks what it measures
            plans.forget()
            count += 1
            with tuning.forced(op, choice):
                note = f"{op} {choice}"
                if op in ("quantize", "row_quantize", "scale"):
                    assert_same_parts(ops.quantize(x, fmt, tensor_scale=tensor_scale), expected, note)
                elif op == "keys":
                    assert_same_parts(ops.quantize(x, fmt), expected, note)
                elif op in ("qdq", "row_qdq"):
                    assert_same(ops.qdq(x, fmt, tensor_scale=tensor_scale).cpu(), values, note)
                elif op == "apply":
                    assert_same_parts(ops.quantize(x, fmt, **given), expected, note)
                elif op == "apply_qdq":
                    assert_same(ops.qdq(x, fmt, **given).cpu(), values, note)
                else:
                    assert_same(ops.dequantize(parts, fmt, shape, host.dtype).cpu(), values, note)
    assert count >= (3 if fmt.super_group else 5)


def test_row_kernel_candidates(device):
    """The same for rows that are read twice."""
    if device == "cpu" and not INTERPRET:
        pytest.skip("the CPU path has no kernels")
    fmt, shape = get_format("int8_channel"), (1, 33_000)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = reference.quantize(x, fmt)
    for op in ("row_quantize", "row_qdq"):
        for choice in distinct(op, fmt, shape):
            plans.forget()
            with tuning.forced(op, choice):
                if op == "row_quantize":
                    assert_same_parts(ops.quantize(x.to(device), fmt), expected, str(choice))
                else:
                    y = reference.dequantize(expected, fmt, shape, x.dtype)
                    assert_same(ops.qdq(x.to(device), fmt).cpu(), y, str(choice))


# ------------------------------------------------------------------------------------------------ committed entries

KERNEL = {
    "quantize": "group_kernel-quantize", "qdq": "group_kernel-qdq", "scale": "group_kernel-scale",
    "row_quantize": "row_kernel-quantize", "row_qdq": "row_kernel-qdq", "apply": "apply_kernel-quantize",
    "apply_qdq": "apply_kernel-qdq", "dequantize": "dequantize_kernel", "keys": "keys_kernel",
}  # fmt: skip


def committed(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")


def problems(path, folder):
    """What is wrong with a committed file, kernels aside."""
    arch, gpu, file = (*path.relative_to(folder).parts, "", "", "")[:3]
    op = file.removesuffix(".json")
    if len(path.relative_to(folder).parts) != 3 or op not in OPS or file != f"{op}.json":
        return [f"{path}: not <arch>/<gpu>/<op>.json"]
    if not re.fullmatch(r"sm_\d+|gfx\w+", arch):
        return [f"{path}: {arch} is no architecture"]
    entries, problem = parse_file(path, gpu, op)
    if problem:
        return [f"{path}: {problem}"]
    found = [] if is_canonical(path.read_text(), entries) else [f"{path}: not sorted, or not one entry a line"]
    for entry in entries:
        fmt = FORMATS.get(entry.format) or get_format(entry.format)
        key = tuning_cache.fields(fmt, getattr(torch, entry.fields.dtype), entry.fields.layout)
        if key != entry.fields:
            found.append(f"{path}: {entry.format} has other fields than its entry")
        if entry.us > entry.heuristic_us * 1.02 or (entry.config and entry.us > entry.heuristic_us):
            found.append(f"{path}: {entry.format} is slower than the heuristic")
    return found


def compile_entry(entry, op, arch, folder):
    """Cross-compile the kernel that an entry configures: on NVIDIA without spills; returns its launches."""
    import test_compile
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    fmt, columns = get_format(entry.format), 1 << entry.size.log2_columns
    shape = (64, 4096) if entry.fields.layout == "flat" else (64, columns)
    with tuning.forced(op, entry.config):
        found = [
            one for one in test_compile.record(fmt, shape, getattr(torch, entry.fields.dtype)) if KERNEL[op] in one.name
        ]
    plans.forget()
    assert found, f"{op} does not serve {entry.format} on {shape}"
    for one in found:
        test_compile.check(one, target, folder, registers=255)
    return found


def synthetic(root, choice, fmt="int4_g128", op="quantize", gpu=None):
    gpu = gpu or Gpu("sm_90", "nvidia-h100-80gb-hbm3", "NVIDIA H100 80GB HBM3", 132)
    entry = tuning_cache.entry(get_format(fmt), torch.bfloat16, 1, 1 << 26, 1, choice, 80.0, 90.0)
    return tuning_cache.store(gpu, op, [entry], root)


def test_committed_files():
    folder = ROOT / "tuning_cache"
    assert [p for path in committed(folder) for p in problems(path, folder)] == []


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("path", committed(ROOT / "tuning_cache"), ids=lambda p: str(p.relative_to(ROOT)))
def test_committed_entries_compile(path, tmp_path):
    arch, gpu = path.parent.parent.name, path.parent.name
    entries, _ = parse_file(path, gpu, path.stem)
    distinct = {(e.fields, tuple(e.config.items())): e for e in entries if e.fields.layout != "strided"}
    for entry in distinct.values():
        compile_entry(entry, path.stem, arch, tmp_path)


def test_the_check_sees_good_and_bad_files(tmp_path):
    path = synthetic(tmp_path, {"TILE": 2048, "PER_THREAD": 16, "SLICES": 2})
    assert problems(path, tmp_path) == [] and committed(tmp_path) == [path]
    text = path.read_text()
    for old, new, said in (
        ('"TILE": 2048', '"TILE": 2047', "TILE"), ('"int4_g128"', '"int4_g64"', "other fields"),
        ('"us": 80.0', '"us": 95.0', "slower"), ('"config"', ' "config"', "one entry a line"),
        ('"H100', '"A100', "instead of"), ('"NVIDIA H100', '"NVIDIA A100', "instead of"),
    ):  # fmt: skip
        path.write_text(text.replace(old, new))
        found = problems(path, tmp_path)
        assert (len(found) == 1 and said in found[0]) or text == path.read_text(), (old, found)
    path.write_text(text)
    stray = path.rename(path.with_name("quantise.json"))
    assert "not <arch>/<gpu>/<op>.json" in problems(stray, tmp_path)[0]
    content = json.loads(text)
    content["entries"] *= 2
    stray.rename(path).write_text(json.dumps(content))
    assert len(problems(path, tmp_path)) == 1


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_check_compiles(arch, tmp_path):
    """The kernel that is compiled has the constants of the choice; one that spills is refused."""
    gpu = Gpu(arch, "some-gpu", "Some GPU", 100)
    choice = {"TILE": 2048, "PER_THREAD": 16, "SLICES": 2}
    path = synthetic(tmp_path / "cache", choice, gpu=gpu)
    (entry,), _ = parse_file(path, gpu.slug, "quantize")
    (one,) = compile_entry(entry, "quantize", arch, tmp_path)
    config = tuning.configure("quantize", get_format("int4_g128"), 1, 64 * 4096, choice)
    assert all(one.constants[k] == config[k] for k in ("S", "M", "R", "GROUPS", "W"))
    assert one.options["num_warps"] == config["num_warps"]
    flat = {"TILE": 2048, "PER_THREAD": 32, "BLOCK_N": 1024}
    path = synthetic(tmp_path / "cache", flat, "mxfp4", "dequantize", gpu)
    (entry,), _ = parse_file(path, gpu.slug, "dequantize")
    (one,) = compile_entry(entry, "dequantize", arch, tmp_path)
    assert one.constants["BLOCK_N"] == 1024
    if arch == "sm_90":  # 256 elements a thread
        bad = replace(entry, format="nvfp4", config={"TILE": 8192, "PER_THREAD": 256, "SLICES": 1})
        with pytest.raises(AssertionError, match=r"local memory|registers"):
            compile_entry(bad, "quantize", arch, tmp_path)


def test_ranges_are_powers_of_two():
    assert all(n & (n - 1) == 0 for knobs in KNOBS.values() for values in knobs.values() for n in values)


@pytest.mark.parametrize("name", ["int5_g20", "int4_g20", "int3_g50", "e3m4_g48", "mxfp4"])
def test_tiles_hold_runs_of_eight_codes(name, monkeypatch):
    """Also where tiles are as small as tests make them."""
    fmt = get_format(name)
    for size in (64, 256, 4096):
        monkeypatch.setattr(tuning, "TILE", size)
        for columns in (1, 7, 20, 40, 65, 515, 1 << 20):
            for op in ("apply", "apply_qdq", "dequantize"):
                assert tuning.flat_config(7, columns, fmt, op)["BLOCK_N"] >= 8


def test_padded_groups_have_several_warps(monkeypatch):
    """With Triton 3.6 on sm_90 a tile of one warp gave 54 of 576 groups of 20 elements, read along columns, the wrong
    scale; with four warps every test passes there."""
    monkeypatch.setattr(tuning, "TILE", 4096)  # not that of the interpreter
    for name in ("int5_g20", "int4_g20", "int8_g3"):
        fmt = get_format(name)
        for mode in ("quantize", "qdq", "scale"):
            assert tuning.group_config(288, 1920, fmt, mode)[0]["num_warps"] == 4
