"""Instructions are counted right, and the committed counts cover every format."""

import json

import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRET

from bench import instructions, sass
from bench.launches import Launch
from tritonq.bench import cases, report
from tritonq.formats import get_format


@triton.jit
def add_kernel(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(z_ptr + offsets, tl.load(x_ptr + offsets, mask) + tl.load(y_ptr + offsets, mask), mask)


@triton.jit
def sum_kernel(x_ptr, z_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x_ptr + start + lane)
    tl.store(z_ptr + lane, total)


def taken(kernel, tensors, n, block, programs, folder):
    """(row, instructions of all warps) of a launch with 4 warps."""
    one = Launch(kernel, (*tensors, n, block), {"num_warps": 4}, programs)
    return instructions.count(one, 90, n, folder)


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
def test_counts_of_an_addition(tmp_path):
    """1024 elements over 2 programs of 128 threads: each thread adds four numbers, from two loads and to one store."""
    x = torch.zeros(1024)
    row, issued = taken(add_kernel, (x, x, x), 1024, 512, 2, tmp_path)
    assert row["memory"] == {"LDG.16": 2, "STG.16": 1} and row["elements_a_thread"] == 4
    assert issued["FADD"] == 2 * 4 * 4  # programs x warps x numbers a thread
    assert row["taken"] == row["static"] < 60
    assert sass.pipes(issued)["fp32"] == issued["FADD"]


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
def test_loops_count_as_often_as_they_read(tmp_path):
    x = torch.zeros(64 * 512)
    row, issued = taken(sum_kernel, (x, x[:512]), x.numel(), 512, 1, tmp_path)
    assert 64 <= row["memory"]["LDG.16"] < 68  # what is read ahead of the loop counts, too
    assert issued["FADD"] == pytest.approx(4 * 4 * 64, rel=0.05)


def flow(text, bytes_per_thread=0.0):
    """Names of the instructions taken; a line is an instruction at the next multiple of 16."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return sass.Flow(
        sass.parse("\n".join(f"        /*{16 * i:04x}*/   {line} ; /* 0x0 */" for i, line in enumerate(lines))),
        bytes_per_thread,
    ).taken()


def test_slow_paths_are_not_taken():
    """Neither a call that a branch avoids, nor the longer of two alternatives, nor an early exit."""
    found = flow(
        """LDG.E R0, desc[UR4][R2.64]
        @P0 EXIT
        @!P1 BRA 0x50
        MOV R4, 0x50
        CALL.REL.NOINC 0xf0
        @P2 BRA 0x80
        FADD R0, R0, R0
        BRA 0xb0
        FMUL R0, R0, R0
        FMUL R0, R0, R0
        FMUL R0, R0, R0
        STG.E desc[UR4][R2.64], R0
        EXIT
        BRA 0xd0
        NOP
        MUFU.RCP R0, R0
        RET.REL.NODEC R4 0x0"""
    )
    assert dict(found.names) == {"LDG.E": 1, "EXIT": 2, "BRA": 3, "FADD": 1, "STG.E": 1}
    assert found.calls == 0


def test_a_call_without_a_way_around_counts_its_subroutine():
    found = flow("CALL.REL.NOINC 0x30\nSTG.E desc[UR4][R2.64], R0\nEXIT\nMUFU.RCP R0, R0\nRET.REL.NODEC R4 0x0")
    assert found.calls == 1 and found.names["MUFU.RCP"] == 1 and found.names["STG.E"] == 1


def test_work_is_not_skipped():
    """The branch around a loop is shorter, but moves fewer bytes."""
    text = (
        "@P0 BRA 0x40\nLDG.E.128 R0, desc[UR4][R2.64]\nFADD R0, R0, R0\n@P1 BRA 0x10\nSTG.E desc[UR4][R2.64], R0\nEXIT"
    )
    found = flow(text, 160.0)
    assert found.names["LDG.E.128"] == found.names["FADD"] == 10
    assert found.names["STG.E"] == 1
    with pytest.raises(ValueError, match="trips"):
        flow("FADD R0, R0, R0\n@P1 BRA 0x0\nEXIT")


def test_widths_and_pipes():
    assert [sass.Instruction(0, "", name, "").width for name in ("LDG.E.128", "STG.E.U8", "LDS", "STSM.16.M88.4")] == [
        16, 1, 4, 16,
    ]  # fmt: skip
    assert sass.cycles(sass.Counter({"LOP3.LUT": 3, "IMAD.SHL.U32": 2, "FADD": 1})) == {
        "issue": 6, "ALU": 6, "FMA": 4, "XU": 0, "FP64": 0, "LSU": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no pipe"):
        sass.pipes(sass.Counter({"NEWOP": 1}))


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not launched")
def test_launches_are_those_of_the_benchmark():
    """Two passes where the scale of the tensor is not given, one where it is."""
    x = torch.zeros((64, 256), dtype=torch.bfloat16)
    fmt = get_format("nvfp4")
    names = [[one.name for one in instructions.recorded(fmt, op, x)] for op in ("quantize", "quantize" + cases.GIVEN)]
    assert names == [["keys_kernel-True", "group_kernel-quantize"], ["group_kernel-quantize"]]


def committed():
    return json.loads(instructions.INSTRUCTIONS.read_text(encoding="utf-8")), report.read(instructions.KERNELS)


def test_every_format_and_op_is_counted():
    counted, measured = committed()
    wanted = {(name, op) for name in cases.all_formats() for op in cases.operations(get_format(name))}
    rows = {(row["format"], row["op"]): row for row in counted["rows"]}
    assert rows.keys() == wanted, "run `make instructions`"
    assert list(rows) == sorted(rows)
    for row in rows.values():
        assert 0 < row["instructions"] <= row["static"] or any("keys" in one["kernel"] for one in row["launches"])
        assert sum(row["pipes"].values()) == pytest.approx(row["instructions"], abs=0.1)
    assert len(instructions.compared(counted, measured)) == len(measured["rows"])
