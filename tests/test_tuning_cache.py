"""The tuning cache: keys, lookups, the overlay, files that are wrong in every way, writers at the same time."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tritonq import tuning_cache, tuning_files
from tritonq.formats import get_format
from tritonq.tuning_files import KNOBS, OPS, Gpu, Size, parse_file, render

ROOT = Path(__file__).parent.parent
H100 = Gpu("sm_90", "nvidia-h100-80gb-hbm3", "NVIDIA H100 80GB HBM3", 132)
H200 = Gpu("sm_90", "nvidia-h200", "NVIDIA H200", 132)
FMT = get_format("int4_g128")
CHOICES = [
    {"TILE": tile, "PER_THREAD": each, "SLICES": 2} for tile in (1024, 2048, 4096, 8192) for each in (16, 32, 64)
]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """(shipped, user), empty; every test reads from the start."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setenv("TRITONQ_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(tuning_cache, "shipped_folder", lambda: shipped)
    monkeypatch.setattr(tuning_cache, "_warned", set())
    tuning_cache.forget()
    yield shipped, tmp_path / "own" / "tuning_cache"
    tuning_cache.forget()


def entry(columns=1 << 26, choice=CHOICES[0], fmt=FMT, dtype=torch.bfloat16, rows=1):
    return tuning_cache.entry(fmt, dtype, rows, columns, 1, choice, 80.0, 90.0)


def find(columns=1 << 26, gpu=H100, op="quantize", fmt=FMT, dtype=torch.bfloat16, rows=1, stride=1):
    key = tuning_cache.fields(fmt, dtype, tuning_cache.layout(rows, stride))
    found = tuning_cache.find(gpu, op, key, tuning_cache.size(rows, columns))
    return found and found.config


# --------------------------------------------------------------------------------------------------------- lookups


def test_nothing_is_known():
    assert find() is None


def test_exact_then_nearest_then_architecture(folders):
    shipped, _ = folders
    tuning_cache.store(H100, "quantize", [entry(1 << 24, CHOICES[0]), entry(1 << 28, CHOICES[1])], shipped)
    tuning_cache.store(H200, "quantize", [entry(1 << 26, CHOICES[2]), entry(1 << 10, CHOICES[3])], shipped)
    tuning_cache.forget()
    assert find(1 << 24) == CHOICES[0] and find((1 << 23) + 1) == CHOICES[0]
    assert find(1 << 27) == CHOICES[1] and find(1 << 34) == CHOICES[1]
    assert find(1 << 26) == CHOICES[0], "a tie goes to the smaller size, not to another GPU"
    assert find(1 << 10) == CHOICES[3], "too far from anything measured here"
    assert find(1 << 50) is None
    assert find(gpu=Gpu("sm_90", "nvidia-h800", "NVIDIA H800", 132)) == CHOICES[2]
    assert find(gpu=Gpu("sm_80", "nvidia-a100", "NVIDIA A100", 108)) is None


def test_keys_are_fields(folders):
    """Everything that shapes a kernel tells entries apart; a name does not."""
    tuning_cache.store(H100, "quantize", [entry()])
    tuning_cache.forget()
    assert find() == CHOICES[0]
    assert find(fmt=replace(FMT, name="my_own")) == CHOICES[0]
    for other in ("int4_g64", "int4_g128_asym", "int3_g128", "int4_g128_f16", "int4_g128_half_range"):
        assert find(fmt=get_format(other)) is None, other
    assert find(op="qdq") is None and find(dtype=torch.float16) is None
    assert find(rows=64, columns=1 << 20) is None and find(stride=2) is None


def test_rows_that_are_groups_need_their_length(folders):
    fmt = get_format("int8_channel")
    tuning_cache.store(H100, "quantize", [entry(4096, CHOICES[0], fmt, rows=4096)])
    tuning_cache.forget()
    assert find(4096, fmt=fmt, rows=1 << 14) == CHOICES[0] and find(3000, fmt=fmt, rows=4096) == CHOICES[0]
    assert find(8192, fmt=fmt, rows=4096) is None


def test_user_entries_overlay_shipped_ones(folders):
    shipped, user = folders
    tuning_cache.store(H100, "quantize", [entry(1 << 24, CHOICES[0]), entry(1 << 26, CHOICES[1])], shipped)
    path = tuning_cache.store(H100, "quantize", [entry(1 << 26, CHOICES[2])])
    assert path.is_relative_to(user)
    tuning_cache.forget()
    assert find(1 << 26) == CHOICES[2] and find(1 << 24) == CHOICES[0]
    assert {(f.origin, f.entry.size.log2_columns) for f in tuning_cache.every_entry()} == {
        ("shipped", 24), ("shipped", 26), ("user", 26)
    }  # fmt: skip


def test_stale_entries_are_used(folders):
    tuning_cache.store(H100, "quantize", [replace(entry(), source="0" * 16)])
    tuning_cache.forget()
    assert find() == CHOICES[0]
    (found,) = tuning_cache.every_entry()
    assert found.entry.stale and not entry().stale


def test_lookup_reads_once_and_only_for_a_gpu(folders, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning_cache, "gpu_of", lambda device: asked.append(device) or H100)
    read = []
    real = tuning_cache.parse_file
    monkeypatch.setattr(tuning_cache, "parse_file", lambda *a: read.append(a) or real(*a))
    arguments = ("quantize", FMT, torch.bfloat16, 1, 1 << 26, 1)
    assert tuning_cache.lookup(*arguments, torch.device("cpu")) is None and not asked and not read
    tuning_cache.store(H100, "quantize", [entry()])
    read.clear()
    device = torch.device("cuda", 0)
    assert tuning_cache.lookup(*arguments, device) == CHOICES[0]
    count = len(read)
    assert tuning_cache.lookup(*arguments, device) == CHOICES[0] and len(read) == count == 2
    assert tuning_cache.lookup("quantize", FMT, torch.bfloat16, 1, (1 << 26) - 5, 1, device) == CHOICES[0]
    assert len(asked) == 1


def test_remembered_entries_need_no_disk():
    tuning_cache.remember(H200, "qdq", [entry()])
    assert find(op="qdq", gpu=H200) == CHOICES[0] and find(op="qdq") == CHOICES[0]
    tuning_cache.forget()
    assert find(op="qdq", gpu=H200) is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "", "/", "a\0b", "NVIDIA  H100 80GB HBM3 ", "Ж" * 300])
def test_slugs_are_never_paths(name):
    found = tuning_cache.slug(name)
    assert tuning_files.SLUG.match(found) and len(found) <= 80


def test_user_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITONQ_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_cache.user_folder() == tmp_path / "tritonq" / "tuning_cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning_cache.user_folder() == tmp_path / ".cache" / "tritonq" / "tuning_cache"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert tuning_cache.user_folder() is None and find() is None
    with pytest.raises(OSError, match="TRITONQ_CACHE_DIR"):
        tuning_cache.store(H100, "quantize", [entry()])


# ----------------------------------------------------------------------------------------------------- wrong files


def good(op="quantize", entries=None):
    return json.loads(render(H100, [entry()] if entries is None else entries))


def changed(**values):
    content = good()
    content["entries"][0].update(values)
    return json.dumps(content)


def header(**values):
    return json.dumps({**good(), **values})


WRONG_FILES = {
    "empty": "",
    "not json": "{",
    "binary": b"\x00\xff\xfe" * 100,
    "not utf-8": b'{"schema": "\xff"}',
    "a list": "[]",
    "deep": "[" * 100_000,
    "deep in an entry": json.dumps(good()).replace("80.0", "[" * 50_000 + "]" * 50_000),
    "huge": " " * (tuning_files.LARGEST_FILE + 1),
    "nan": json.dumps(good()).replace("80.0", "NaN"),
    "infinity": json.dumps(good()).replace("80.0", "-Infinity"),
    "many digits": json.dumps(good()).replace("80.0", "1" * 5000),
    "no header": json.dumps({"entries": []}),
    "another header": header(extra=1),
    "another schema": header(schema=2),
    "a true schema": header(schema=True),
    "another GPU": header(gpu="NVIDIA A100"),
    "a list for a name": header(gpu=["NVIDIA H100 80GB HBM3"]),
    "no multiprocessors": header(multiprocessors=0),
    "a version of numbers": header(torch=2.11),
    "entries of text": header(entries="quantize"),
    "too many entries": header(entries=[0] * (tuning_files.MOST_ENTRIES + 1)),
}
WRONG_ENTRIES = {
    "overflow": json.dumps(good()).replace("80.0", "1e999"),
    "beyond floats": json.dumps(good()).replace("80.0", "1" + "0" * 400),
    "null": json.dumps({**good(), "entries": [None]}),
    "a missing field": json.dumps({**good(), "entries": [{"config": {}}]}),
    "an unknown field": changed(surprise=1),
    "text for a number": changed(config={**CHOICES[0], "TILE": "4096"}),
    "a float": changed(config={**CHOICES[0], "TILE": 4096.0}),
    "a boolean": changed(config={**CHOICES[0], "SLICES": True}),
    "no power of two": changed(config={**CHOICES[0], "TILE": 4095}),
    "zero": changed(config={**CHOICES[0], "TILE": 0}),
    "negative": changed(config={**CHOICES[0], "PER_THREAD": -32}),
    "out of range": changed(config={**CHOICES[0], "TILE": 1 << 30}),
    "an unknown knob": changed(config={**CHOICES[0], "num_stages": 3}),
    "a missing knob": changed(config={"TILE": 4096}),
    "a config of pairs": changed(config=[["TILE", 4096]]),
    "a path for a format": changed(format="../../../etc/passwd"),
    "an escape sequence": changed(format="\x1b[31mred"),
    "a long name": changed(format="x" * 101),
    "a surrogate": json.dumps(good()).replace('"int4_g128"', '"\\ud800"'),
    "an unknown dtype": changed(dtype="int8"),
    "a list for a dtype": changed(dtype=["bfloat16"]),
    "a group of text": changed(group="1x128"),
    "a group of floats": changed(group=[1.0, 128.0]),
    "three extents": changed(group=[1, 128, 1]),
    "an odd whole group": changed(group=[-1, 128]),
    "no layout": changed(layout="diagonal"),
    "a huge size": changed(log2_columns=10**6),
    "a negative size": changed(log2_rows=-1),
    "zero_point of 1": changed(zero_point=1),
    "a time of zero": changed(us=0),
    "a time of text": changed(us="fast"),
    "a source of text": changed(source="not hex!"),
    "an element of text": changed(element="../../x"),
}


def put(content, root, gpu=H100, op="quantize"):
    path = root / gpu.arch / gpu.slug / f"{op}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def one_warning(path, look):
    """What `look` finds, with exactly one warning that names the file, also on the second call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = look()
        tuning_cache.forget()
        assert look() == result
        tuning_cache.every_entry()
    assert len(caught) == 1, [str(w.message) for w in caught]
    message = str(caught[0].message)
    assert str(path) in message and len(message) < len(str(path)) + 600 and message.isprintable(), message
    return result


@pytest.mark.parametrize("content", WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_files_are_ignored(content, folders):
    path = put(content, folders[1])
    assert one_warning(path, find) is None


@pytest.mark.parametrize("content", WRONG_ENTRIES.values(), ids=WRONG_ENTRIES)
def test_wrong_entries_are_ignored(content, folders):
    """And the shipped entry shows through."""
    path = put(content, folders[1])
    tuning_cache.store(H100, "quantize", [entry(choice=CHOICES[5])], folders[0])
    tuning_cache.forget()
    assert one_warning(path, find) == CHOICES[5]


def test_the_rest_of_a_file_is_used(folders):
    content = good(entries=[entry(), entry(1 << 24, CHOICES[1])])
    content["entries"][1]["us"] = "fast"
    path = put(json.dumps(content), folders[1])
    left = content["entries"][0]["log2_columns"]
    assert one_warning(path, lambda: find(1 << left)) is not None
    entries, problem = parse_file(path, H100.slug, "quantize")
    assert len(entries) == 1 and "1 of 2 entries" in problem


def test_wrong_kinds_of_files(folders, tmp_path):
    """A folder, a pipe, a loop of links, a device, a file in place of a folder."""
    path = put("", folders[1])
    for make in (
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path),
        lambda: path.symlink_to("/dev/zero"),
    ):
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        make()
        tuning_cache.forget()
        tuning_cache._warned.clear()
        assert one_warning(path, find) is None
    path.unlink()
    path.write_text(json.dumps(good()))
    entries, problem = parse_file(path, H100.slug, "quantize")
    assert len(entries) == 1 and problem is None
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file")
    tuning_cache.forget()
    assert find() is None and tuning_cache.every_entry() == []


def test_unreadable(folders, monkeypatch):
    path = put(json.dumps(good()), folders[1])

    real = os.open

    def refuse(name, *rest, **options):
        if name == path:
            raise PermissionError(13, "Permission denied")
        return real(name, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert one_warning(path, find) is None


def test_strange_folders_are_passed_over(folders):
    shipped, _ = folders
    for arch, gpu in (("sm_90", "..x"), ("sm_90", "UPPER"), ("sm_9999", "nvidia-h200"), ("cuda", "nvidia-h200")):
        put(render(H200, [entry()]), shipped, Gpu(arch, gpu, "x", 1))
    put("not json", shipped, Gpu("sm_90", "nvidia-x", "x", 1), "../../outside")
    put("not json", shipped, Gpu("sm_90", "nvidia-x", "x", 1), "no-such-op")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find() is None and tuning_cache.every_entry() == []
    assert find(op="../../outside") is None and find(gpu=Gpu("../..", "x", "x", 1)) is None


def test_concurrent_readers_warn_once(folders):
    put("{", folders[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=find) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caught) == 1


# --------------------------------------------------------------------------------------------------------- writing


def test_files_are_sorted_and_stable(folders):
    shipped, _ = folders
    entries = [entry(1 << n, CHOICES[n % 5]) for n in (30, 20, 25)] + [entry(fmt=get_format("fp8_e4m3_g128"))]
    path = tuning_cache.store(H100, "quantize", entries, shipped)
    text = path.read_text()
    assert path == shipped / "sm_90" / "nvidia-h100-80gb-hbm3" / "quantize.json"
    for one in reversed(entries):
        tuning_cache.store(H100, "quantize", [one], shipped)
    assert path.read_text() == text and tuning_files.is_canonical(text, entries)
    content = json.loads(text)
    assert content.keys() == {"schema", "gpu", "multiprocessors", "triton", "torch", "source", "entries"}
    assert [e["format"] for e in content["entries"]] == ["fp8_e4m3_g128", *["int4_g128"] * 3]
    assert [e["log2_columns"] for e in content["entries"][1:]] == [20, 25, 30]
    lines = text.splitlines()
    assert all(json.dumps(e) in (lines[n], lines[n].rstrip(",")) for n, e in enumerate(content["entries"], 8))
    assert [p.name for p in path.parent.iterdir()] == ["quantize.json"], "no locks or temporary files are left"
    assert path.stat().st_mode & 0o444 == 0o444


def test_every_op_round_trips():
    """What the tuner may pick is what a reader accepts."""
    for op, kernel in OPS.items():
        knobs = KNOBS[kernel]
        for choice in ({}, {k: v[0] for k, v in knobs.items()}, {k: v[-1] for k, v in knobs.items()}):
            path = tuning_cache.store(H100, op, [entry(choice=choice)])
            entries, problem = parse_file(path, H100.slug, op)
            assert problem is None and [e.config for e in entries] == [choice]


def test_later_measurements_replace_earlier_ones():
    tuning_cache.store(H100, "quantize", [entry(choice=CHOICES[0]), entry(1 << 20)])
    path = tuning_cache.store(H100, "quantize", [entry(choice=CHOICES[1])])
    entries, _ = parse_file(path, H100.slug, "quantize")
    assert {e.size.log2_columns: e.config for e in entries} == {20: CHOICES[0], 26: CHOICES[1]}


def test_a_corrupt_file_is_written_anew(folders):
    path = put("{", folders[1])
    with pytest.warns(RuntimeWarning, match="ignored"):
        tuning_cache.store(H100, "quantize", [entry()])
    assert parse_file(path, H100.slug, "quantize") == ([entry()], None)


def test_a_failed_write_leaves_the_old_file(monkeypatch):
    path = tuning_cache.store(H100, "quantize", [entry()])
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        tuning_cache.store(H100, "quantize", [entry(1 << 20)])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["quantize.json"]


def test_names_that_are_no_paths(folders):
    for gpu, op in ((H100._replace(slug="../x"), "quantize"), (H100._replace(arch="../x"), "quantize"), (H100, "../x")):
        with pytest.raises(ValueError):
            tuning_cache.store(gpu, op, [entry()])
    odd = replace(FMT, name="../\x1b[31m")
    path = tuning_cache.store(H100, "quantize", [entry(fmt=odd)])
    assert parse_file(path, H100.slug, "quantize")[0][0].format == "unnamed"
    tuning_cache.forget()
    assert find(fmt=odd) == CHOICES[0]


def write_some(first, without_flock):
    if without_flock:
        tuning_files.fcntl = None
    for n in range(first, first + 6):
        tuning_cache.store(H100, "quantize", [entry(1 << n)])


@pytest.mark.parametrize("without_flock", [False, True])
def test_concurrent_writers_lose_nothing(without_flock, folders):
    path = tuning_cache.store(H100, "quantize", [])
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_some, args=(first, without_flock)) for first in (1, 7, 13, 19)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        entries, problem = parse_file(path, H100.slug, "quantize")
        assert problem is None, "a reader saw half a file"
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    entries, problem = parse_file(path, H100.slug, "quantize")
    assert problem is None and {e.size for e in entries} == {Size(0, n) for n in range(1, 25)}
    assert [p.name for p in path.parent.iterdir()] == ["quantize.json"]


def test_a_held_lock_times_out_and_a_dead_one_is_broken(monkeypatch, folders):
    monkeypatch.setattr(tuning_files, "fcntl", None)
    monkeypatch.setattr(tuning_files, "LOCK_SECONDS", 0.05)
    path = tuning_cache.store(H100, "quantize", [])
    lock = path.parent / ".lock"
    lock.touch()
    os.utime(lock, (time.time() + 60, time.time() + 60))
    with pytest.raises(TimeoutError, match="locked by another process"):
        tuning_cache.store(H100, "quantize", [entry()])
    os.utime(lock, (1, 1))
    tuning_cache.store(H100, "quantize", [entry()])
    assert not lock.exists() and len(parse_file(path, H100.slug, "quantize")[0]) == 1


def test_a_held_folder_lock_times_out(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    path = tuning_cache.store(H100, "quantize", [])
    monkeypatch.setattr(tuning_files, "LOCK_SECONDS", 0.05)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="locked by another process"):
            tuning_cache.store(H100, "quantize", [entry()])
    finally:
        os.close(descriptor)
    tuning_cache.store(H100, "quantize", [entry()])


# ------------------------------------------------------------------------------------------------- where it is found


def test_source_checkout():
    out = subprocess.run(
        [sys.executable, "-c", "from tritonq import tuning_cache as t; print(t.shipped_folder())"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    ).stdout.strip()  # fmt: skip
    assert Path(out) == ROOT / "tuning_cache" and Path(out).is_dir()


def test_wheel(tmp_path):
    """The wheel carries the folder beside the module of the same name, and its entries are found there."""
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tuning_cache").rglob("*") if p.is_file()}
    assert {f"tritonq/{name}" for name in shipped} <= set(names)
    tuning_cache.store(H100, "quantize", [entry()], tmp_path / "site" / "tritonq" / "tuning_cache")
    code = "from tritonq import tuning_cache as t; print(t.shipped_folder(), len(t.every_entry()) > 0, t.__file__)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    ).stdout.split()  # fmt: skip
    site = tmp_path / "site" / "tritonq"
    assert out == [str(site / "tuning_cache"), "True", str(site / "tuning_cache.py")]


def test_import_is_cheap():
    """Standard library only, and nothing read."""
    code = (
        "import sys, builtins, importlib.util as u, types\n"
        "sys.modules['tritonq'] = package = types.ModuleType('tritonq'); package.__path__ = [sys.argv[1]]\n"
        "import tritonq.tuning_cache\n"
        "third = {m.split('.')[0] for m in sys.modules} & {'torch', 'triton', 'numpy', 'rich', 'typer'}\n"
        "print(sorted(third))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "tritonq")], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
