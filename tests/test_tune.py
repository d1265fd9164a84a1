"""The tuner with a clock that the test sets, its command, several ranks; on a GPU the real thing."""

import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRET
from rich.console import Console

from tritonq import cli, ops, plans, timing, tune, tuning, tuning_cache
from tritonq.formats import FORMATS, get_format
from tritonq.tuning_files import OPS, Gpu, parse_file

ROOT = Path(__file__).parent.parent
GPU = Gpu("sm_90", "some-gpu", "Some GPU", 100)
SHAPE = (4, 512)
REACHES = {
    "scale": ("int3_g7", (4, 61)), "keys": ("nvfp4", SHAPE), "row_quantize": ("int8_channel", (1, 33_000)),
    "row_qdq": ("int8_channel", (1, 33_000)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The user's folder, empty, without entries that tritonq comes with."""
    monkeypatch.setenv("TRITONQ_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(tuning_cache, "shipped_folder", lambda: None)
    tuning_cache.forget()
    yield tmp_path / "own" / "tuning_cache"
    tuning_cache.forget()


class Clock:
    """Times by the choice that is in force; `default` for others."""

    def __init__(self, default=100.0, **slow_or_fast):
        self.default, self.times, self.seen = default, slow_or_fast, []

    def __call__(self, calls):
        for call in calls:
            call()
        (choice,) = tuning.forced_here().values()
        self.seen.append(choice)
        return self.times.get("x".join(map(str, choice.values())) or "heuristic", self.default)


def run(clock, op="quantize", name="int4_g128", **options):
    return tune.tune([op], [name], [SHAPE], device="cpu", timer=clock, gpu=GPU, **options)


def stored(folder, op="quantize"):
    entries, problem = parse_file(folder / GPU.arch / GPU.slug / f"{op}.json", GPU.slug, op)
    assert problem is None
    return entries


# ------------------------------------------------------------------------------------------------------------ cases


def test_cases():
    """Only kernels that a format uses, and only those named."""
    found = tune.cases(formats=["int4_g128", "nvfp4", "int8_tensor", "int3_g7"], shapes=[(64, 4096)])
    by_format = {}
    for case in found:
        by_format.setdefault(case.fmt.name, []).append(case.op)
    every = ["quantize", "qdq", "apply", "apply_qdq", "dequantize"]
    assert by_format["int4_g128"] == every and by_format["nvfp4"] == [*every, "keys"]
    assert by_format["int8_tensor"] == ["apply", "apply_qdq", "dequantize", "keys"]
    assert "scale" in by_format["int3_g7"]
    rows = tune.cases(formats=["int8_channel"], shapes=[(2, 100_000)], ops=["row_qdq", "qdq"], dtypes=["float16"])
    assert [(c.op, c.dtype) for c in rows] == [("row_qdq", torch.float16)]
    assert len(tune.cases(quick=True)) < len(tune.cases()) and {c.fmt.name for c in tune.cases()} == set(FORMATS)
    assert {c.op for c in tune.cases(["qdq"])} == {"qdq"}


@pytest.mark.parametrize(
    "arguments,said",
    [
        ({"ops": ["qqq"]}, "unknown op 'qqq'; known: quantize"),
        ({"formats": ["int99"]}, "unknown format 'int99'"),
        ({"dtypes": ["int8"]}, "unknown dtype 'int8'; known: bfloat16"),
        ({"shapes": [(0, 4)]}, "positive extents"),
        ({"shapes": [()]}, "positive extents"),
        ({"shapes": [(7,)], "formats": ["fp8_e4m3_b128x128"]}, "blocks of 128 x 128"),
        ({"ops": ["row_qdq"], "shapes": [(4, 4)]}, "no kernel of row_qdq"),
    ],
)
def test_wrong_requests(arguments, said):
    with pytest.raises(ValueError, match=said):
        tune.tune(**arguments, timer=Clock(), gpu=GPU, device="cpu")


# --------------------------------------------------------------------------------------------------------- choosing


def test_ties_go_to_the_earlier():
    assert tune.best_of([100.0, 98.1, 98.5]) == 0
    assert tune.best_of([100.0, 97.0, 98.5]) == 1
    assert tune.best_of([100.0, 99.0, 97.9, 90.0]) == 3


def test_the_fastest_is_written(own_folder):
    """And used in this process; the file says what it took."""
    clock = Clock(**{"2048x32x2": 80.0, "4096x16x2": 79.0, "heuristic": 90.0})
    (outcome,) = run(clock)
    wanted = {"TILE": 2048, "PER_THREAD": 32, "SLICES": 2}
    assert (outcome.choice, outcome.us, outcome.heuristic_us, outcome.error) == (wanted, 80.0, 90.0, None)
    assert outcome.tried == len(clock.seen) > 5 and clock.seen[0] == {} and not outcome.skipped
    (entry,) = stored(own_folder)
    assert (entry.config, entry.us, entry.heuristic_us, entry.format) == (wanted, 80.0, 90.0, "int4_g128")
    assert entry.fields.layout == "flat" and tuple(entry.size) == (0, 11) and not entry.stale
    key = tuning_cache.fields(get_format("int4_g128"), torch.bfloat16, "flat")
    assert tuning_cache.find(GPU, "quantize", key, entry.size).config == wanted


def test_the_heuristic_wins_ties(own_folder):
    (outcome,) = run(Clock(heuristic=101.5))
    assert outcome.choice == {} and stored(own_folder)[0].config == {}


def test_layouts(own_folder):
    """A format whose groups are rows is measured in rows."""
    (outcome,) = run(Clock(), "qdq", "int8_channel")
    (entry,) = stored(own_folder, "qdq")
    assert outcome.error is None and entry.fields.layout == "rows" and tuple(entry.size) == (2, 9)


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs(op, own_folder):
    """Each op is reached, checked and written."""
    name, shape = REACHES.get(op, ("int4_g128_asym", SHAPE))
    (outcome,) = tune.tune([op], [name], [shape], device="cpu", timer=Clock(), gpu=GPU, quick=True)
    assert outcome.error is None and not outcome.skipped and outcome.choice == {}, outcome
    assert len(stored(own_folder, op)) == 1


def test_failing_candidates_are_skipped(own_folder):
    """Out of memory, a compiler that gives up, a time that is none."""
    clock = Clock()

    def failing(calls):
        time = clock(calls)
        number = len(clock.seen)
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        if number == 3:
            raise RuntimeError("PassManager::run failed\nmore lines")
        return {4: float("nan"), 5: 0.0, 6: 50.0}.get(number, time)

    (outcome,) = run(failing)
    assert outcome.us == 50.0 and outcome.choice == clock.seen[5] and outcome.tried == len(clock.seen) - 4
    said = "\n".join(outcome.skipped)
    assert len(outcome.skipped) == 4 and "OutOfMemoryError: CUDA out of memory" in said
    assert "RuntimeError: PassManager::run failed" in said and "more lines" not in said and "nan" in said
    assert len(stored(own_folder)) == 1


def test_other_bits_are_skipped(monkeypatch, own_folder):
    """A candidate that changes the result is never timed; neither is a heuristic that differs from the CPU."""
    real = ops.quantize

    def wrong(x, fmt, **options):
        parts = real(x, fmt, **options)
        if tuning.forced_here().get("group", {}).get("TILE") == 2048:
            parts["scale"].view(torch.int16)[0] ^= 1
        return parts

    monkeypatch.setattr(ops, "quantize", wrong)
    clock = Clock()
    (outcome,) = run(clock)
    assert outcome.skipped and all("other bits" in reason for reason in outcome.skipped)
    assert outcome.choice == {} and not any(choice.get("TILE") == 2048 for choice in clock.seen)

    calls = []

    def differing(x, fmt, **options):
        parts = real(x, fmt, **options)
        calls.append(1)
        parts["qdata"][0, 0] = len(calls)
        return parts

    monkeypatch.setattr(ops, "quantize", differing)
    clock = Clock()
    (outcome,) = run(clock, folder=own_folder / "elsewhere")
    assert "GPU and CPU differ" in outcome.error and outcome.choice is None and not clock.seen
    assert not list((own_folder / "elsewhere").rglob("*.json"))


def test_no_time_for_the_heuristic(own_folder):
    """Nothing is written where there is nothing to compare with."""

    def failing(calls):
        raise RuntimeError("no")

    (outcome,) = run(failing)
    assert outcome.error and outcome.choice is None and len(outcome.skipped) > 5
    assert not list(own_folder.rglob("*.json"))


def test_interrupts_are_not_swallowed(own_folder):
    def interrupted(calls):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
    assert not tuning.forced_here() and not list(own_folder.rglob("*.json"))


def test_progress_and_folder(tmp_path):
    steps = []
    tune.tune(
        ["qdq"], ["int4_g128", "mxfp4"], [SHAPE], device="cpu", timer=Clock(), gpu=GPU, quick=True,
        progress=lambda *step: steps.append(step), folder=tmp_path / "repository",
    )  # fmt: skip
    assert [(s[0], s[1]) for s in steps] == [(0, 2), (1, 2), (2, 2)] and steps[1][2] == "qdq mxfp4 4x512 bfloat16"
    path = tmp_path / "repository" / GPU.arch / GPU.slug / "qdq.json"
    assert len(parse_file(path, GPU.slug, "qdq")[0]) == 2


def test_an_unwritable_folder_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    clock = Clock()
    with pytest.raises(OSError):
        run(clock, folder=tmp_path / "file")
    assert not clock.seen


@pytest.mark.skipif(not INTERPRET, reason="the CPU path has no kernels")
def test_candidates_reach_the_kernels(monkeypatch):
    """In the interpreter: each candidate is a launch with its own constants."""
    seen = []
    real = plans.Plan.__call__
    monkeypatch.setattr(
        plans.Plan, "__call__", lambda self, *t, **k: seen.append(self.constants) or real(self, *t, **k)
    )
    (outcome,) = run(Clock(), quick=True)
    assert outcome.error is None and not outcome.skipped and len(set(map(repr, seen))) >= 3


@pytest.mark.skipif(not INTERPRET, reason="the CPU path has no kernels")
@pytest.mark.skipif(not hasattr(plans, "tuning_cache"), reason="plans do not ask the cache")
@pytest.mark.parametrize("op", OPS)
def test_plans_ask_the_cache(op, monkeypatch):
    """Each kernel is configured by the entry of its own op, found by what the tuner files it under."""
    name, shape = REACHES.get(op, ("int4_g128_asym", SHAPE))
    (case,) = tune.cases([op], [name], [shape])
    m, asked, launched = case.matrix, [], []
    chosen = tuning.candidates(op, case.fmt, m.batch * m.rows, m.columns)[-1]

    def lookup(*arguments):
        asked.append(arguments)
        return chosen if arguments[0] == op else None

    monkeypatch.setattr(tuning_cache, "lookup", lookup)
    real = plans.Plan.__call__
    monkeypatch.setattr(plans.Plan, "__call__", lambda self, *t, **k: launched.append(self) or real(self, *t, **k))
    plans.forget()
    x = torch.randn(shape).to(torch.bfloat16)
    tune._call(case, x)()
    plans.forget()
    cpu = torch.device("cpu")
    assert (op, case.fmt, torch.bfloat16, m.batch * m.rows, m.columns, m.strides[2], cpu) in asked
    config = tuning.configure(op, case.fmt, m.rows, m.columns, chosen)
    extents = tuple(v for k, v in config.items() if k not in ("num_warps", "maxnreg"))
    windows = {plan.constants[i : i + len(extents)] for plan in launched for i in range(len(plan.constants))}
    assert extents in windows, (extents, windows)


# ----------------------------------------------------------------------------------------------------- on first use

CUDA = torch.device("cuda", 0)


@pytest.fixture
def first_use(monkeypatch):
    """Calls on a GPU that is the CPU: what is looked up for it tunes, by the clock that is returned."""
    clock, measure = Clock(**{"2048x32x2": 80.0}), tune.tune_case
    monkeypatch.setattr(tuning_cache, "on_missing", None)
    monkeypatch.setattr(tuning_cache, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        tune, "tune_case", lambda case, device, timer, quick: measure(case, torch.device("cpu"), clock, quick)
    )
    tune._tried.clear()
    tune.tune_on_first_use()
    return clock


def look_up(op="quantize", name="int4_g128", rows=1, columns=2048, column_stride=1):
    return tuning_cache.lookup(op, get_format(name), torch.bfloat16, rows, columns, column_stride, CUDA)


BEST = {"TILE": 2048, "PER_THREAD": 32, "SLICES": 2}


def test_nothing_is_tuned_unasked(first_use, monkeypatch, own_folder):
    monkeypatch.setattr(tuning_cache, "on_missing", None)
    assert look_up() is None and not first_use.seen and not own_folder.exists()


def test_the_first_call_tunes(first_use, own_folder):
    """Once a size, also in a process that starts later; sizes beside it do not count."""
    assert look_up() == BEST and stored(own_folder)[0].config == BEST
    measured = len(first_use.seen)
    assert measured > 2 and look_up() == BEST and len(first_use.seen) == measured
    tuning_cache.forget()
    tune._tried.clear()
    assert look_up() == BEST and len(first_use.seen) == measured
    assert look_up(columns=4096) == BEST and len(first_use.seen) > measured


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_tunes_on_first_use(op, first_use, own_folder):
    """An entry has the key that was looked up."""
    name, (rows, columns) = REACHES.get(op, ("int8_channel", SHAPE))
    if op == "keys":
        rows, columns = 1, rows * columns
    assert look_up(op, name, rows, columns) is not None and len(stored(own_folder, op)) == 1


def test_no_tuning_where_it_would_be_in_the_way(first_use, monkeypatch):
    """What cannot be tuned at once is tuned by a later call."""
    assert look_up(column_stride=7) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert look_up() is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert look_up() is None
    with tune._busy:
        assert look_up() is None
    assert not first_use.seen and look_up() == BEST


def test_only_the_first_rank_tunes(first_use, monkeypatch):
    monkeypatch.setattr(tune._Ranks, "__init__", lambda self: setattr(self, "first", False))
    assert look_up() is None and not first_use.seen


def test_the_tuner_does_not_tune_within(first_use, monkeypatch):
    """What the tuner looks up while it measures."""
    found = []
    monkeypatch.setattr(tune, "_copies", lambda case, device: found.append(look_up(columns=1 << 20)) or 1)
    run(first_use)
    assert found == [None]


def test_a_call_survives_what_cannot_be_tuned(first_use, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITONQ_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="TRITONQ_AUTOTUNE: not tuned.*quantize int4_g128"):
        assert look_up() is None
    tuning_cache.forget()
    assert look_up() is None and not first_use.seen  # and says so once


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_variable(value):
    code = "import tritonq; from tritonq import tuning_cache; print(tuning_cache.on_missing is not None)"
    env = {**os.environ, "TRITONQ_AUTOTUNE": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(value == "1")


# ------------------------------------------------------------------------------------------------------------ ranks


def one_rank(rank, folder, results):
    """Rank 0 measures; rank 1 must not, and knows the same afterwards."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    clock = Clock(**{"2048x32x2": 80.0})
    outcomes = run(clock, folder=folder / f"rank{rank}")
    key = tuning_cache.fields(get_format("int4_g128"), torch.bfloat16, "flat")
    found = tuning_cache.find(GPU, "quantize", key, tuning_cache.size(1, 2048))
    blocked = folder / "blocked"
    blocked.touch()
    try:
        run(clock, folder=blocked)
        error = None
    except Exception as raised:
        error = str(raised)
    results.put((rank, outcomes[0].us, found and found.config, len(clock.seen) > 0, error))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_rank_0_tunes_for_all(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=one_rank, args=(rank, tmp_path, results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    found = sorted(results.get() for _ in ranks)
    choice = {"TILE": 2048, "PER_THREAD": 32, "SLICES": 2}
    assert [r[:4] for r in found] == [(0, 80.0, choice, True), (1, 80.0, choice, False)]
    assert found[0][4] and "rank 0 could not tune" in found[1][4]
    assert list((tmp_path / "rank0").rglob("*.json")) and not (tmp_path / "rank1").exists()


# --------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def command(run):
    return functools.partial(run, "tune")


@pytest.mark.parametrize(
    "arguments,said",
    [
        (("--formats", "int99"), "unknown format 'int99'; known: int8_channel"),
        (("--formats", "int4_g128,int99"), "unknown format 'int99'"),
        (("--ops", "matmul"), "unknown op 'matmul'; known: quantize, qdq"),
        (("--dtypes", "int8"), "unknown dtype 'int8'; known: bfloat16"),
        (("--shapes", "4096by4"), "4096x14336, got '4096by4'"),
        (("--shapes", "٣x4"), "4096x14336"),
        (("--shapes", "0x4"), "positive extents"),
        (("--ops", "row_qdq", "--shapes", "4x4", "--list", "--formats"), "requires an argument"),
        (("--device", "cpu"), "GPU"),
        ((), "no GPU"),
    ],
)
def test_bad_requests_are_one_line(arguments, said, command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = command(*arguments)
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("error: ") and said in err, err
    assert "defect" not in err and "Traceback" not in err


@pytest.fixture
def pretend_gpu(monkeypatch):
    """The command runs on the CPU with a clock."""
    real = tune.tune
    monkeypatch.setattr(tune, "require_gpu", lambda device=None: torch.device("cpu"))
    clock = Clock(**{"2048x32x2": 80.0})
    monkeypatch.setattr(tune, "tune", lambda *a, **k: real(*a, **k, timer=clock, gpu=GPU))
    return clock


def test_command(command, pretend_gpu, tmp_path, own_folder, monkeypatch):
    monkeypatch.setattr(cli, "out", Console(width=120))
    arguments = ("--formats", "int4_g128", "--ops", "quantize", "--shapes", "4x512", "--quick")
    code, out, err = command(*arguments, "--out", tmp_path / "repository")
    assert code == 0 and "int4_g128" in out and not own_folder.exists(), err
    assert len(stored(tmp_path / "repository")) == 1
    code, out, _ = command(*arguments, "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["us"] == 80.0 and row["choice"]["TILE"] == 2048 and row["skipped"] == []
    assert stored(own_folder)[0].us == 80.0
    assert command("--ops", "quantize,qdq", "--ops", "dequantize", *arguments[:2], *arguments[4:])[0] == 0


def test_command_says_what_failed(command, pretend_gpu, monkeypatch, own_folder):
    pretend_gpu.times["heuristic"] = float("nan")
    code, out, err = command("--formats", "int4_g128", "--ops", "qdq", "--shapes", "4x512", "--quick")
    assert code == 2 and "skipped: qdq int4_g128" in out
    assert "1 of 1 could not be tuned" in err.splitlines()[-1] and "defect" not in err


def test_list(command, own_folder, monkeypatch):
    entry = tuning_cache.entry(get_format("mxfp4"), torch.bfloat16, 1, 1 << 26, 1, {}, 80.0, 81.0)
    tuning_cache.store(GPU, "qdq", [entry])
    monkeypatch.setattr(cli, "out", Console(width=200))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = command("--list", "--json")
    rows = [row for row in json.loads(out) if row["gpu"] == GPU.slug]
    assert code == 0 and not err and len(rows) == 1
    assert rows[0]["origin"] == "user" and rows[0]["config"] == {} and rows[0]["stale"] is False
    monkeypatch.setattr(tuning_cache, "source_hash", lambda: "0" * 16)
    tuning_cache.store(
        GPU, "qdq", [tuning_cache.entry(get_format("mxfp4"), torch.bfloat16, 1, 1 << 20, 1, {}, 2.0, 2.0)]
    )
    code, out, _ = command("--list")
    assert code == 0 and "mxfp4" in out and "stale" in out and "heuristic" in out
    code, out, _ = command("--list", "--ops", "dequantize", "--json")
    assert code == 0 and not [row for row in json.loads(out) if row["gpu"] == GPU.slug]


# ------------------------------------------------------------------------------------------------------------ a GPU


@pytest.mark.gpu
def test_on_a_gpu(command, own_folder):
    """Times are those of a device: a copy takes as long as its bytes, and an entry is found again by its GPU."""
    x = torch.randn(1 << 26, device="cuda", dtype=torch.bfloat16)
    outs = [{"y": torch.empty_like(x)} for _ in range(2)]
    us = timing.device_us([lambda out=out: {"y": out["y"].copy_(x)} for out in outs])
    assert 20 < us < 5000
    arguments = ("--formats", "int4_g128", "--ops", "quantize,dequantize", "--shapes", "1024x4096", "--quick", "--json")
    code, out, err = command(*arguments)
    assert code == 0, err
    rows = json.loads(out)
    assert [r["error"] for r in rows] == [None, None] and not any(r["skipped"] for r in rows), rows
    assert all(0 < r["us"] <= r["heuristic_us"] for r in rows)
    for row in rows:
        fmt = get_format("int4_g128")
        device = torch.device("cuda", torch.cuda.current_device())
        assert tuning_cache.lookup(row["op"], fmt, torch.bfloat16, 1, 1 << 22, 1, device) == row["choice"]
