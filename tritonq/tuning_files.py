"""The files of the tuning cache: what an entry is, reading with distrust, writing whole.

A file comes from anywhere: what is not exactly an entry is left out, and nothing that a file holds raises.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
Choice = dict[str, int]  # all knobs of a kernel, or none: the heuristic

# Kernel -> knob -> values that a tuner may pick.
KNOBS: dict[str, dict[str, tuple[int, ...]]] = {
    "group": {"TILE": (1024, 2048, 4096, 8192), "PER_THREAD": (16, 32, 64), "SLICES": (1, 2, 4, 8)},
    "row": {"TILE": (2048, 4096, 8192), "PER_THREAD": (8, 16, 32)},
    "flat": {"TILE": (1024, 2048, 4096, 8192), "PER_THREAD": (8, 16, 32, 64), "BLOCK_N": (256, 1024, 2048, 4096, 8192)},
    "keys": {"TILE": (2048, 4096, 8192), "PER_THREAD": (16, 32, 64), "BLOCK_N": (1024, 2048, 4096, 8192)},
}
# Op, which is a kernel in one mode and the name of a file -> kernel.
OPS = {
    "quantize": "group", "qdq": "group", "scale": "group", "row_quantize": "row", "row_qdq": "row", "apply": "flat",
    "apply_qdq": "flat", "dequantize": "flat", "keys": "keys",
}  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32", "float64")
LAYOUTS = ("flat", "rows", "strided")  # one long row; rows of neighbouring elements; anything else

LARGEST_FILE = 4 << 20  # bytes
MOST_ENTRIES = 20_000
LOCK_SECONDS = 30.0

ARCH = re.compile(r"(?:sm_\d{2,3}|gfx[0-9a-f]{3,5}|xpu)\Z")
SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*\Z")
NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}\Z")
_HEX = re.compile(r"[0-9a-f]{8,64}\Z")


class Gpu(NamedTuple):
    """What measurements hold for."""

    arch: str
    slug: str
    name: str
    multiprocessors: int


class Fields(NamedTuple):
    """What shapes a kernel besides sizes; the name of the format does not."""

    dtype: str
    element: str
    group: tuple[int, int]
    scale: str
    rule: str
    zero_point: bool
    tensor_scale: bool
    layout: str


class Size(NamedTuple):
    """Rounded up to powers of two."""

    log2_rows: int
    log2_columns: int


@dataclass(frozen=True)
class Entry:
    """One measurement; `format`, the times (microseconds) and `source` (hash of the kernels then) are for readers."""

    fields: Fields
    size: Size
    config: Choice
    us: float
    heuristic_us: float
    format: str
    source: str

    @property
    def stale(self) -> bool:
        """Whether the kernels have changed since. Still a good hint."""
        return self.source != source_hash()

    def row(self) -> dict[str, Any]:
        """What a line of a file holds."""
        values = {"format": self.format, **self.fields._asdict(), **self.size._asdict(), "config": self.config}
        return {**values, "us": self.us, "heuristic_us": self.heuristic_us, "source": self.source}


def slug(name: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3. Never a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()[:200]).strip("-")[:80].rstrip("-") or "unknown"


# Kernels without knobs, so without measurements.
UNTUNED = ("at_once.py", "cast.py", "grouped.py", "learned.py", "learned_loop.py", "learned_quantize.py")


@functools.cache
def source_hash() -> str:
    """Of the files that tuned device code is written in."""
    import hashlib

    package = Path(__file__).parent
    digest = hashlib.sha256()
    files = [path for path in package.glob("kernels/*.py") if path.name not in UNTUNED]
    for path in sorted([*files, *package.glob("codecs/*_triton.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------- reading


def _shown(value: Any) -> str:
    """Short and printable, whatever it is."""
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _require(good: bool, name: str, value: Any, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} is {_shown(value)} instead of {wanted}")


def _integer(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _text(pattern: re.Pattern[str], value: Any) -> bool:
    return type(value) is str and pattern.match(value) is not None


def _time(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9


_ENTRY = (
    "format", *Fields._fields, *Size._fields, "config", "us", "heuristic_us", "source"
)  # fmt: skip
_HEADER = ("schema", "gpu", "multiprocessors", "triton", "torch", "source", "entries")


def check_choice(op: str, choice: Any) -> None:
    """ValueError unless `choice` is {} or gives every knob of the kernel of `op` one of its values."""
    _require(type(choice) is dict, "config", choice, "an object")
    knobs = KNOBS[OPS[op]]
    if not choice:
        return
    _require(choice.keys() == knobs.keys(), "config", choice, f"one with {', '.join(knobs)}, or an empty one")
    for name, allowed in knobs.items():
        value = choice[name]
        _require(type(value) is int and value in allowed, name, value, f"one of {', '.join(map(str, allowed))}")
    _require(choice.get("BLOCK_N", 0) <= choice["TILE"], "BLOCK_N", choice.get("BLOCK_N"), "TILE or less")


def parse_entry(op: str, raw: Any) -> Entry:
    """ValueError unless `raw` is an entry of `op`."""
    _require(type(raw) is dict, "an entry", raw, "an object")
    _require(raw.keys() == set(_ENTRY), "an entry", sorted(map(str, raw)), "one with " + ", ".join(_ENTRY))
    group = raw["group"]
    whole = (1, -1), (-1, -1)
    good = type(group) is list and len(group) == 2 and all(_integer(n, -1, 1 << 31) for n in group)
    _require(good and (min(group) > 0 or tuple(group) in whole), "group", group, "[rows, columns]")
    _require(raw["dtype"] in DTYPES, "dtype", raw["dtype"], "one of " + ", ".join(DTYPES))
    _require(_text(_HEX, raw["element"]), "element", raw["element"], "a digest")
    _require(_text(NAME, raw["format"]), "format", raw["format"], "a name")
    for name in ("scale", "rule"):
        _require(_text(NAME, raw[name]), name, raw[name], "a name")
    for name in ("zero_point", "tensor_scale"):
        _require(type(raw[name]) is bool, name, raw[name], "true or false")
    _require(raw["layout"] in LAYOUTS, "layout", raw["layout"], "one of " + ", ".join(LAYOUTS))
    for name in Size._fields:
        _require(_integer(raw[name], 0, 60), name, raw[name], "an integer from 0 to 60")
    for name in ("us", "heuristic_us"):
        _require(_time(raw[name]), name, raw[name], "a time in microseconds")
    _require(_text(_HEX, raw["source"]), "source", raw["source"], "a hash")
    check_choice(op, raw["config"])
    values = {**raw, "group": (group[0], group[1])}
    return Entry(
        Fields(*[values[name] for name in Fields._fields]), Size(*[raw[name] for name in Size._fields]),
        dict(raw["config"]), float(raw["us"]), float(raw["heuristic_us"]), raw["format"], raw["source"],
    )  # fmt: skip


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _content(path: Path) -> Any:
    """Parsed JSON of a regular file of a sane size; ValueError or OSError otherwise."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)  # a pipe would block
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"more than {LARGEST_FILE >> 20} MiB")
    try:
        return json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_file(path: Path, gpu: str, op: str) -> tuple[list[Entry], str | None]:
    """Entries of a file, and what is wrong with it, if anything. Raises nothing; a missing file has no entries."""
    try:
        content = _content(path)
        _require(type(content) is dict, "the content", content, "an object")
        _require(content.keys() == set(_HEADER), "the header", sorted(map(str, content)), ", ".join(_HEADER))
        _require(content["schema"] == SCHEMA and type(content["schema"]) is int, "schema", content["schema"],
                 str(SCHEMA))  # fmt: skip
        name = content["gpu"]
        _require(type(name) is str and len(name) <= 200 and slug(name) == gpu, "gpu", name, f"the name of {gpu}")
        _require(
            _integer(content["multiprocessors"], 1, 1 << 16), "multiprocessors", content["multiprocessors"], "a count"
        )
        for key in ("triton", "torch"):
            _require(type(content[key]) is str and len(content[key]) <= 100, key, content[key], "a version")
        _require(_text(_HEX, content["source"]), "source", content["source"], "a hash")
        raws = content["entries"]
        _require(type(raws) is list, "entries", raws, "a list")
        _require(len(raws) <= MOST_ENTRIES, "the number of entries", len(raws), f"at most {MOST_ENTRIES}")
    except (FileNotFoundError, NotADirectoryError):
        return [], None
    except OSError as error:
        return [], f"cannot be read ({error.strerror or error})"
    except (ValueError, TypeError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        return [], str(error)
    entries, problems = [], []
    for raw in raws:
        try:
            entries.append(parse_entry(op, raw))
        except (ValueError, TypeError) as error:
            problems.append(str(error))
    return entries, f"{len(problems)} of {len(raws)} entries: {problems[0]}" if problems else None


# --------------------------------------------------------------------------------------------------------- writing


def render(gpu: Gpu, entries: Iterable[Entry]) -> str:
    """The text of a file: a header, then one entry a line, sorted."""
    header = {
        "schema": SCHEMA, "gpu": gpu.name[:200], "multiprocessors": gpu.multiprocessors, **_versions(),
        "source": source_hash(),
    }  # fmt: skip
    return _render(header, entries)


def _render(header: dict[str, Any], entries: Iterable[Entry]) -> str:
    kept = {(entry.fields, entry.size): entry for entry in entries}.values()
    rows = [json.dumps(entry.row()) for entry in sorted(kept, key=lambda e: (e.format, e.fields, e.size))]
    lines = [f"{json.dumps(k)}: {json.dumps(v)}," for k, v in header.items()]
    return "\n".join(["{", *lines, '"entries": [', *([",\n".join(rows)] if rows else []), "]", "}"]) + "\n"


def is_canonical(text: str, entries: Iterable[Entry]) -> bool:
    """Whether a file's text is what a writer makes of its entries, under its own header."""
    header = {k: v for k, v in json.loads(text).items() if k != "entries"}
    return text == _render(header, entries)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("triton", "torch"):
        try:
            found[name] = version(name)[:100]
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def replace(path: Path, data: bytes) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _until(attempt: Callable[[], bool], folder: Path) -> None:
    """Try again for a while."""
    end = time.monotonic() + LOCK_SECONDS
    while not attempt():
        if time.monotonic() > end:
            raise TimeoutError(f"{folder} has been locked by another process for {LOCK_SECONDS:.0f} s; try again later")
        time.sleep(0.01)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time: a lock on the folder itself, or a lock file where that does not exist."""
    if fcntl is not None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if _flock(descriptor, folder):
                yield
                return
        finally:
            os.close(descriptor)  # and unlock
    with _lock_file(folder):
        yield


def _flock(descriptor: int, folder: Path) -> bool:
    """Whether the file system has such locks."""

    def attempt() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        _until(attempt, folder)
    except TimeoutError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _lock_file(folder: Path) -> Iterator[None]:
    path = folder / ".lock"

    def attempt() -> bool:
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            with contextlib.suppress(OSError):  # left by a writer that died: they take milliseconds
                if time.time() - path.stat().st_mtime > 2 * LOCK_SECONDS:
                    path.unlink()
            return False
        return True

    _until(attempt, folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
