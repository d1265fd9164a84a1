"""The benchmark without a GPU: peers define what tritonq computes, bytes, the regression check, table and picture."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tritonq import ops
from tritonq.bench import cases, command, measure, peers, plot, precompile, report, timing, verify
from tritonq.bench.eager import eager, lanes, pack, raw, typed, unpack
from tritonq.codecs import pack as bitstream
from tritonq.formats import FORMATS, get_format
from tritonq.timing import median_us, take_turns

ROOT = Path(__file__).parent.parent
UNLISTED = (*cases.UNLISTED, "int7_g64_asym", "int8_g64_asym", "int4_g32_half_range", "fp8_e4m3_b64x96")


pytestmark = pytest.mark.usefixtures("one_thread")


def same(a, b):
    return a.dtype is b.dtype and verify.same(a, b)


@pytest.mark.parametrize("shape", [(256, 256), (130, 336)], ids=["whole groups", "short groups"])
@pytest.mark.parametrize("name", [n for n in (*FORMATS, *UNLISTED) if not get_format(n).super_group])
def test_definitions_are_those_of_tritonq(name, shape):
    """Bit for bit: torch.compile races the same thing."""
    fmt, generator = get_format(name), torch.Generator().manual_seed(0)
    spread = torch.randn(shape[0], 1, generator=generator).exp()
    for dtype in measure.DTYPES.values():
        x = (torch.randn(shape, generator=generator) * spread).to(dtype)
        x[0] = 0
        definition = eager(fmt, shape, dtype)
        assert definition is not None
        expected = ops.quantize(x, fmt)
        parts = typed(definition.quantize(x), fmt)
        assert parts.keys() == expected.keys()
        assert [key for key in parts if not same(parts[key], expected[key])] == []
        y = ops.dequantize(expected, fmt, shape, dtype)
        assert same(definition.dequantize(raw(expected)), y)
        assert same(definition.qdq(x), y)
        if fmt.tensor_scale:
            assert same(definition.qdq(x, expected["tensor_scale"]), y)


def test_definitions_compile_in_one_graph():
    """Without a compiler at the end of it; a format of each kind."""
    for name in ("int4_g128_asym", "mxfp4", "nvfp4"):
        fmt, x = get_format(name), torch.randn(8, 256)
        definition = eager(fmt, (8, 256), x.dtype)
        torch.compiler.reset()
        compiled = torch.compile(definition.qdq, fullgraph=True, dynamic=False, backend="eager")
        assert same(compiled(x), ops.qdq(x, fmt))


@pytest.mark.parametrize("name", ["int4_g128_f16", "mxfp4_rceil", "e3m0_g32", "q4_k"])
def test_formats_without_a_definition(name):
    assert eager(get_format(name), (8, 256), torch.bfloat16) is None


def test_rows_that_end_within_a_chunk_have_no_definition():
    assert eager(get_format("int3_g128"), (8, 260), torch.bfloat16) is None


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_of_peers(bits):
    codes = torch.randint(0, 1 << bits, (3, 64), dtype=torch.int32)
    packed = pack(lanes(codes, bits), bits)
    assert packed.shape == (3, 8 * bits)
    assert torch.equal(packed, bitstream.pack(codes.to(torch.uint8), bits))
    assert torch.equal(unpack(packed, bits), codes)


# ------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("name", "op", "expected"),
    [
        # 64 x 256 elements of 2 bytes are 32768 bytes.
        ("int4_g128", "quantize", 32768 + 8192 + 2 * 128),  # half a byte each; two bf16 scales a row
        ("int4_g128", "dequantize", 32768 + 8192 + 2 * 128),
        ("int4_g128", "qdq", 65536),
        ("int4_g128_asym", "quantize", 32768 + 8192 + 3 * 128),  # and a zero point of one byte
        ("fp8_e4m3_tensor", "quantize", 2 * 32768 + 16384 + 4),  # reads twice
        ("fp8_e4m3_tensor", "dequantize", 32768 + 16384 + 4),
        ("fp8_e4m3_tensor", "qdq", 3 * 32768),
        ("fp8_e4m3_b128x128", "quantize", 32768 + 16384 + 4 * 2),  # 64 rows are one short block
        ("nvfp4", "quantize", 2 * 32768 + 8192 + 1024 + 4),
        ("nvfp4", "quantize, tensor scale given", 32768 + 8192 + 1024 + 4),
        ("nvfp4", "qdq, tensor scale given", 65536),
        ("int5_g96", "quantize", 32768 + 64 * 160 + 2 * 64 * 3),
    ],
)
def test_moved_bytes(name, op, expected):
    assert cases.moved_bytes(get_format(name), op, (64, 256), 2) == expected


def test_sizes():
    units = {"K": 10, "M": 20, "G": 30}
    for name, (rows, columns) in cases.SIZES.items():
        assert 2 * rows * columns == int(name[:-1]) << units[name[-1]]
    assert cases.parse_shape("8x4096") == (8, 4096)
    assert cases.parse_shape("16M") == (2048, 4096)
    with pytest.raises(ValueError, match="got '12'"):
        cases.parse_shape("12")


def test_inputs_exceed_the_cache():
    for nbytes in (64 << 10, 1 << 20, 64 << 20):
        assert timing.copies(nbytes) * nbytes >= timing.CACHE
    assert timing.copies(112 << 20) == 1
    assert timing.copies(112 << 20, l2=128 << 20) == 3


def test_calls_take_turns():
    made: list[int] = []
    held = take_turns([lambda i=i: made.append(i) or i for i in range(3)], 7)
    assert made == [0, 1, 2, 0, 1, 2, 0] and list(held) == [1, 2, 0]  # one result a buffer stays alive


@pytest.mark.parametrize("ms,replays", [(1.0, 50), (5.0, 20), (200.0, 5)])
def test_long_calls_are_repeated_less(ms, replays, monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None

        def elapsed_time(self, end):
            return ms

    runs: list[None] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert median_us(lambda: runs.append(None), 10) == ms * 100
    assert len(runs) == 3 + replays


# ------------------------------------------------------------------------------------------------------ verification


@pytest.mark.parametrize("name", ["int4_g128", "fp8_e4m3_tensor", "fp8_e4m3_b128x128", "nvfp4", "int8_tensor"])
def test_slices_are_verified_as_the_whole_is(name, monkeypatch):
    """On the CPU both sides are the same code, so what can differ is how slices are cut."""
    fmt, x = get_format(name), torch.randn(1000, 256)
    assert verify.verify(fmt, x) == "all"
    monkeypatch.setattr(verify, "WHOLE", 1 << 10)
    monkeypatch.setattr(verify, "SLICE", 1 << 14)
    assert verify.verify(fmt, x) == "slices"
    ranges = verify.row_ranges((1000, 256), fmt)
    assert ranges[0][0] == 0 and ranges[-1][1] == 1000


def test_a_wrong_result_is_seen(monkeypatch):
    monkeypatch.setattr(verify.ops, "qdq", lambda x, fmt: x)
    with pytest.raises(verify.Mismatch, match="int4_g128"):
        verify.verify(get_format("int4_g128"), torch.randn(16, 256))


def test_rows_of_a_format(monkeypatch):
    """The loop over operations and peers, with a clock that always says 10 us."""
    monkeypatch.setattr(timing, "device_us", lambda fn, arguments: (fn(*arguments[0]), 10.0)[1])
    monkeypatch.setattr(timing, "event_us", lambda fn, arguments: 20.0)
    monkeypatch.setattr(timing, "copies", lambda nbytes, l2: 2)
    monkeypatch.setattr(measure, "_l2", lambda: 0)
    monkeypatch.setattr(peers, "_compile", lambda fn: fn)
    x = torch.randn(64, 256).to(torch.bfloat16)
    rows = measure.bench_format(get_format("nvfp4"), x, 3000.0, ("torch.compile",))
    assert [row["op"] for row in rows] == list(cases.operations(get_format("nvfp4")))
    for row in rows:
        assert row["us"] == 10 and row["eager_us"] == 20 and row["verified"] == "all" and row["inputs"] == 2
        assert row["of_copy"] == pytest.approx(row["bytes"] / 10 / 1e3 / 3000, abs=1e-4)
        assert row["of_equal_copy"] == 1
        peer = row["peers"]["torch.compile"]
        assert peer["mismatch"] == 0 and peer["comparable"] and peer["speedup"] == 1


def test_budget_and_mismatch(monkeypatch):
    """A run stops where the slowest format so far would not fit any more, says so, and survives a wrong result."""
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    for name in ("require_gpu", "_host_times"):
        monkeypatch.setattr(measure, name, dict)
    monkeypatch.setattr(timing, "warm_up", lambda: None)
    monkeypatch.setattr(measure, "environment", lambda command: {"gpu": "none", "torch": "2", "triton": "3"})
    monkeypatch.setattr(measure, "_random", lambda shape, dtype: torch.randn(shape))
    monkeypatch.setattr(measure, "_copy", lambda x: {"us": 1.0, "gb_per_s": 3000.0})

    def bench_format(fmt, x, copy, labels):
        if fmt.name == "mxfp4":
            raise verify.Mismatch("mxfp4 differs")
        return [{"format": fmt.name, "op": "qdq", "us": 1.0, "of_copy": 1.0, "peers": {}}]

    monkeypatch.setattr(measure, "bench_format", bench_format)
    saved, names = [], ("mxfp4", "mxfp8", "nvfp4", "int4_g128")
    options = measure.Options(formats=names, shapes=((8, 256),), budget=22)
    found = measure.run(options, lambda line: None, lambda partial: saved.append(len(partial["rows"])))
    assert [row["format"] for row in found["rows"]] == ["mxfp8"] and saved == [1]
    assert (
        found["failed"] == ["mxfp4 8x256 bfloat16: mxfp4 differs"]
        and found["complete"] is False
        and found["budget_s"] == 22
    )
    assert found["left_out"] == [["nvfp4", [8, 256], "bfloat16"], ["int4_g128", [8, 256], "bfloat16"]]


def test_what_is_left_out_is_said_from_the_start(monkeypatch):
    """A run that is killed leaves a file that says so."""
    for name in ("require_gpu", "_host_times"):
        monkeypatch.setattr(measure, name, dict)
    monkeypatch.setattr(timing, "warm_up", lambda: None)
    monkeypatch.setattr(measure, "environment", lambda command: {"gpu": "none", "torch": "2", "triton": "3"})
    monkeypatch.setattr(measure, "_random", lambda shape, dtype: torch.randn(shape))
    monkeypatch.setattr(measure, "_copy", lambda x: {"shape": list(x.shape), "us": 1.0, "gb_per_s": 3000.0})
    monkeypatch.setattr(
        measure, "bench_format", lambda fmt, x, *_: [{"op": "qdq", "us": 1.0, "of_copy": 1.0, "peers": {}}]
    )
    monkeypatch.setattr(measure, "compile_all", lambda *arguments: (6, 6, 1.0))
    saved = []
    options = measure.Options(formats=("mxfp8", "mxfp4"), shapes=((8, 256), (16, 256)), workers=2)
    found = measure.run(options, lambda line: None, lambda partial: saved.append(list(partial["left_out"])))
    second = [[name, [16, 256], "bfloat16"] for name in ("mxfp8", "mxfp4")]
    assert saved == [[["mxfp4", [8, 256], "bfloat16"], *second], second, second[1:], []]
    assert found["complete"] and [copy["shape"] for copy in found["copies"]] == [[8, 256], [16, 256]]
    assert found["compiled"] == {"done": 6, "of": 6, "seconds": 1.0}


def test_compiling_ahead(monkeypatch):
    """Every operation once, in processes that are threads here; what fails is not counted."""

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, context, begin, arguments):
            super().__init__(workers)

    def compile_case(name, op, shape, dtype, labels):
        seen.append((name, op, shape, dtype, labels))
        if name == "mxfp4":
            raise RuntimeError

    seen: list[tuple] = []
    monkeypatch.setattr(precompile, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(precompile, "compile_case", compile_case)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    done, of, seconds = precompile.compile_all(["nvfp4", "mxfp4"], [(8, 256)], [torch.float16], ["torch.compile"], 2)
    assert (done, of) == (5, 8) and seconds >= 0 and len(set(seen)) == 8
    assert ("nvfp4", "qdq, tensor scale given", (8, 256), torch.float16, ("torch.compile",)) in seen


def test_a_case_calls_every_contender(monkeypatch):
    called = []

    def compiled(fn):
        called.append(fn.__name__)
        return fn

    monkeypatch.setattr(peers, "_compile", compiled)
    for op in cases.operations(get_format("nvfp4")):
        precompile.compile_case("nvfp4", op, (8, 256), torch.float32, ["torch.compile"], device="cpu")
    assert called == ["quantize", "dequantize", "qdq", "quantize", "qdq"]


def test_a_case_says_what_fails(monkeypatch):
    """After it has called the others."""
    called = []

    def compiled(fn):
        called.append(fn.__name__)
        raise ValueError("no compiler")

    monkeypatch.setattr(peers, "_compile", lambda fn: lambda *arguments: compiled(fn))
    with pytest.raises(RuntimeError, match="ValueError: no compiler"):
        precompile.compile_case("mxfp4", "qdq", (8, 256), torch.float32, ["torch.compile"], device="cpu")
    assert called == ["qdq"]


def test_difference():
    x = torch.tensor([1.0, -2.0, 3.0, 4.0])
    assert peers.difference(x, x) == (0, 0)
    assert peers.difference(torch.tensor([1.0, -2.0, 3.0, 3.0]), x) == (0.25, 0.25)


# ----------------------------------------------------------------------------------------------------------- reports


def result(**shares):
    """Synthetic measurements; the key is format__op."""
    rows = []
    for key, share in shares.items():
        name, op = key.split("__")
        for shape in ((256, 4096), (4096, 4096)):
            nbytes = 4 * math.prod(shape)
            rows.append(
                {
                    "format": name, "op": op, "shape": list(shape), "dtype": "bfloat16", "us": nbytes / share / 3e6,
                    "bytes": nbytes, "of_copy": share,
                    "peers": {
                        "torch.compile": {"us": 100.0, "speedup": 1.25, "comparable": True},
                        "torchao": {"error": "RuntimeError: no"},
                        "bitsandbytes nf4": {"us": 50.0, "speedup": None, "comparable": False},
                    },
                }
            )  # fmt: skip
    copies = [{"shape": [256, 4096], "dtype": "bfloat16", "us": 1.4, "gb_per_s": 3000.0}]
    return {"gpu": "NVIDIA H100", "torch": "2", "triton": "3", "copies": copies, "rows": rows}


def test_regressions():
    committed = result(int4_g128__qdq=0.9, mxfp4__qdq=0.9)
    assert report.regressions(committed, committed) == ([], [])
    assert report.regressions(result(int4_g128__qdq=0.86, mxfp4__qdq=1.0), committed) == ([], [])
    slower, missing = report.regressions(result(int4_g128__qdq=0.8), committed)
    assert slower[0] == "int4_g128 qdq 256x4096 bfloat16: 90.0% of a copy before, 80.0% now" and len(slower) == 2
    assert missing == ["mxfp4 qdq 256x4096 bfloat16", "mxfp4 qdq 4096x4096 bfloat16"]
    assert report.regressions(result(int4_g128__qdq=0.8), committed, tolerance=0.2)[0] == []
    with pytest.raises(ValueError, match="nothing to compare"):
        report.regressions(result(nvfp4__qdq=0.9), committed)


def test_committed_results_are_readable():
    for path in ROOT.glob("bench/results/*/kernels.json"):
        committed = report.read(path)
        assert report.regressions(committed, committed) == ([], [])
        assert len(report.table_rows(committed)) == len(committed["rows"])


def test_table(capsys):
    rows = report.table_rows(result(int4_g128__qdq=0.9))
    assert rows[0]["of copy"] == "90%" and rows[0]["x torch.compile"] == "1.25"
    assert rows[0]["others"] == "torchao fails, bitsandbytes nf4 (50.0 us, other values)"
    assert rows[0]["tensor"] == "2 MiB bfloat16"
    report.print_table(result(int4_g128__qdq=0.9))
    assert "int4_g128" in capsys.readouterr().out


def test_execute_on_files(tmp_path, capsys):
    new, committed = tmp_path / "new.json", tmp_path / "committed.json"
    report.write(result(int4_g128__qdq=0.8), new)
    report.write(result(int4_g128__qdq=0.9), committed)
    wanted = command.options(None, None, None, None, None, None, "test")
    assert command.execute(wanted, results=committed, check=committed) == 0
    assert command.execute(wanted, results=new, check=committed) == 1
    assert "SLOWER int4_g128" in capsys.readouterr().out
    assert command.execute(wanted, results=new, check=committed, tolerance=0.2, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["gpu"] == "NVIDIA H100"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="no result"):
        command.execute(wanted, results=tmp_path / "bad.json")


def test_options():
    def options(formats=None, shape=None, sizes=None, peers=None):
        return command.options(formats, shape, sizes, None, peers, None, "test")

    assert options().formats == cases.all_formats() and options().peers == peers.LABELS
    assert options(sizes=[]).shapes == tuple(cases.SIZES.values()) and options(sizes=[]).peers == ()
    assert options(shape="16x32", peers=["none"]).shapes == ((16, 32),) and options(peers=["none"]).peers == ()
    with pytest.raises(ValueError, match="one of them"):
        options(shape="16x32", sizes=["2M"])
    with pytest.raises(ValueError, match="unknown peer 'x'"):
        options(peers=["x"])
    with pytest.raises(ValueError, match="0 or more"):
        command.options(None, None, None, None, None, None, "test", workers=-1)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_picture(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"roofline.{suffix}"
    plot.draw(result(int4_g128__qdq=0.9, mxfp4__quantize=0.8), path)
    assert 0 < path.stat().st_size < 200_000
    if suffix == "svg":
        assert "int4_g128" in path.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only where there is no GPU")
def test_without_a_gpu():
    done = subprocess.run([sys.executable, "-m", "bench.kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the benchmark needs a CUDA GPU") and done.stderr.count("\n") == 1
