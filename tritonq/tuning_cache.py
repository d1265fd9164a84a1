"""Measured kernel choices: `<arch>/<gpu>/<op>.json`, shipped with tritonq and overlaid by the user's own.

An entry stores a `Choice` of knobs, not launch constants; `tritonq.tuning` derives those from the choice and the shape,
so that no entry can configure a kernel wrongly. Nothing is read before the first lookup for a GPU, and no lookup
measures unless `on_missing` is set. A file or an entry that is not right is ignored, with one warning a file.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tritonq.tuning_files import (
    ARCH,
    NAME,
    OPS,
    SLUG,
    Choice,
    Entry,
    Fields,
    Gpu,
    Size,
    locked,
    parse_file,
    render,
    replace,
    slug,
    source_hash,
)

if TYPE_CHECKING:
    import torch

    from tritonq.formats import Format

MOST_GPUS = 64  # of one architecture
FARTHEST = 6  # doublings between a tensor and the nearest entry that still says something about it

Table = dict[Fields, dict[Size, Entry]]
# Takes the arguments of `lookup`; returns whether to ask again at the next lookup.
Missing = Callable[[str, "Format", "torch.dtype", int, int, int, "torch.device"], bool]


class Found(NamedTuple):
    """An entry with where it comes from: "shipped" or "user"."""

    origin: str
    arch: str
    gpu: str
    op: str
    entry: Entry


# ----------------------------------------------------------------------------------------------------------- where


def shipped_folder() -> Path | None:
    """`tritonq/tuning_cache` of a wheel, or `tuning_cache` of a source checkout."""
    package = Path(__file__).resolve().parent
    if (package / "tuning_cache").is_dir():
        return package / "tuning_cache"
    checkout = package.parent
    return checkout / "tuning_cache" if (checkout / "pyproject.toml").is_file() else None


def user_folder() -> Path | None:
    """Under TRITONQ_CACHE_DIR, else LOCALAPPDATA (Windows), XDG_CACHE_HOME or ~/.cache; None without a home."""
    if root := os.environ.get("TRITONQ_CACHE_DIR"):
        return Path(root) / "tuning_cache"
    root = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    if root and os.path.isabs(root):  # the XDG specification: relative paths are ignored
        return Path(root) / "tritonq" / "tuning_cache"
    try:
        return Path.home() / ".cache" / "tritonq" / "tuning_cache"
    except RuntimeError:
        return None


@functools.cache
def _gpu(kind: str, index: int, hip: bool) -> Gpu:
    import torch

    if kind == "xpu":
        found = torch.xpu.get_device_properties(index)
        return Gpu("xpu", slug(found.name), found.name, int(getattr(found, "max_compute_units", 1)))
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    return Gpu(arch, slug(properties.name), properties.name, int(properties.multi_processor_count))


def gpu_of(device: torch.device) -> Gpu:
    import torch

    index = device.index
    if index is None:
        index = torch.xpu.current_device() if device.type == "xpu" else torch.cuda.current_device()
    return _gpu(device.type, index, torch.version.hip is not None)


# ------------------------------------------------------------------------------------------------------------ keys


def layout(rows: int, column_stride: int) -> str:
    if column_stride != 1:
        return "strided"
    return "flat" if rows == 1 else "rows"


def fields(fmt: Format, dtype: torch.dtype, laid_out: str) -> Fields:
    scale = f"{fmt.scale.name}_s{fmt.super_group}" if fmt.super_group else fmt.scale.name
    return Fields(
        str(dtype).removeprefix("torch."), fmt.element.digest, fmt.group, scale, fmt.scale.rule,
        fmt.zero_point, fmt.tensor_scale, laid_out,
    )  # fmt: skip


def size(rows: int, columns: int) -> Size:
    return Size(max(0, rows - 1).bit_length(), max(0, columns - 1).bit_length())


# --------------------------------------------------------------------------------------------------------- lookups

_lock = threading.RLock()
_warned: set[Path] = set()


def _read(path: Path, gpu: str, op: str) -> list[Entry]:
    entries, problem = parse_file(path, gpu, op)
    with _lock:
        new = problem is not None and path not in _warned
        if new:
            _warned.add(path)
    if new:
        warnings.warn(
            f"{path}: {problem}; ignored. Remove the file, or run `tritonq tune` on its GPU to write it again",
            RuntimeWarning,
            stacklevel=2,
        )
    return entries


def _merge(table: Table, entries: Iterable[Entry]) -> Table:
    for entry in entries:
        table.setdefault(entry.fields, {})[entry.size] = entry
    return table


_tables: dict[tuple[str, str, str], Table] = {}
_gpus: dict[str, list[str]] = {}
_found: dict[Any, Choice | None] = {}


def forget() -> None:
    """Drop what was read; the next lookup reads again."""
    with _lock:
        for cache in (_tables, _gpus, _found):
            cache.clear()  # type: ignore[attr-defined]


def remember(gpu: Gpu, op: str, entries: Iterable[Entry]) -> None:
    """Use entries in this process, whether or not they are on disk."""
    with _lock:
        _merge(_table(gpu.arch, gpu.slug, op), entries)
        if gpu.slug not in (known := _gpus_of(gpu.arch)):
            known.append(gpu.slug)
            known.sort()
        _found.clear()


def _folders() -> list[tuple[str, Path]]:
    """The later ones win."""
    named = (("shipped", shipped_folder()), ("user", user_folder()))
    return [(origin, folder) for origin, folder in named if folder is not None]


def _table(arch: str, gpu: str, op: str) -> Table:
    """Entries of one GPU and op, the user's over the shipped ones."""
    with _lock:
        table = _tables.get((arch, gpu, op))
        if table is None:
            table = {}
            for _, folder in _folders():
                _merge(table, _read(folder / arch / gpu / f"{op}.json", gpu, op))
            _tables[(arch, gpu, op)] = table
        return table


def _names(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    """Sorted names in a folder; none where it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            return sorted(one.name for one in found if pattern.match(one.name))[:MOST_GPUS]
    except OSError:
        return []


def _gpus_of(arch: str) -> list[str]:
    with _lock:
        if arch not in _gpus:
            _gpus[arch] = sorted({name for _, folder in _folders() for name in _names(folder / arch, SLUG)})
        return _gpus[arch]


def _nearest(table: Table, key: Fields, wanted: Size) -> tuple[int, Size, Entry] | None:
    """The entry of the fewest doublings away. Where rows are groups, their length is part of the kernel."""
    best = None
    for at, entry in table.get(key, {}).items():
        if key.group == (1, -1) and at.log2_columns != wanted.log2_columns:
            continue
        distance = abs(at.log2_rows - wanted.log2_rows) + abs(at.log2_columns - wanted.log2_columns)
        if distance <= FARTHEST and (best is None or (distance, at) < best[:2]):
            best = (distance, at, entry)
    return best


on_missing: Missing | None = None  # called by the first lookup of what has no exact entry; may `remember` one


def exact(gpu: Gpu, op: str, key: Fields, wanted: Size) -> Entry | None:
    """The entry of this GPU and this size."""
    if op not in OPS or not ARCH.match(gpu.arch):
        return None
    return _table(gpu.arch, gpu.slug, op).get(key, {}).get(wanted)


def find(gpu: Gpu, op: str, key: Fields, wanted: Size) -> Entry | None:
    """Exact, else the nearest size, else the nearest of another GPU of the architecture."""
    if op not in OPS or not ARCH.match(gpu.arch):
        return None
    own = _nearest(_table(gpu.arch, gpu.slug, op), key, wanted)
    if own is not None:
        return own[2]
    others = [_nearest(_table(gpu.arch, name, op), key, wanted) for name in _gpus_of(gpu.arch) if name != gpu.slug]
    near = [one for one in others if one is not None]
    return min(near, key=lambda one: one[:2])[2] if near else None


def lookup(
    op: str, fmt: Format, dtype: torch.dtype, rows: int, columns: int, column_stride: int, device: torch.device
) -> Choice | None:
    """The measured choice for the kernel of `op` on a matrix [rows, columns], or None: the heuristic then decides."""
    if device.type not in ("cuda", "xpu"):
        return None
    wanted, laid_out = size(rows, columns), layout(rows, column_stride)
    asked = (op, fmt, dtype, laid_out, wanted, device)
    try:
        return _found[asked]
    except KeyError:
        gpu, key, again = gpu_of(device), fields(fmt, dtype, laid_out), False
        if on_missing is not None and exact(gpu, op, key, wanted) is None:
            again = on_missing(op, fmt, dtype, rows, columns, column_stride, device)
        entry = find(gpu, op, key, wanted)
        choice = None if entry is None else entry.config
        if not again:
            _found[asked] = choice
        return choice


def every_entry() -> list[Found]:
    """All entries on disk, for any GPU."""
    result = []
    for origin, folder in _folders():
        for arch in _names(folder, ARCH):
            for gpu in _names(folder / arch, SLUG):
                for op in OPS:
                    entries = _read(folder / arch / gpu / f"{op}.json", gpu, op)
                    result += [Found(origin, arch, gpu, op, entry) for entry in entries]
    return result


def entry(
    fmt: Format, dtype: torch.dtype, rows: int, columns: int, column_stride: int, choice: Choice, us: float,
    heuristic_us: float,
) -> Entry:  # fmt: skip
    """A measurement of the present kernels."""
    name = fmt.name if NAME.match(fmt.name) else "unnamed"
    key = fields(fmt, dtype, layout(rows, column_stride))
    return Entry(key, size(rows, columns), choice, round(us, 3), round(heuristic_us, 3), name, source_hash())


def make_folder(gpu: Gpu, root: Path | None = None) -> Path:
    """The folder of a GPU under `root` (default: the user's folder), writable. OSError if it cannot be."""
    root = user_folder() if root is None else root
    if root is None:
        raise OSError("there is no home folder to keep measurements in; set TRITONQ_CACHE_DIR")
    if not ARCH.match(gpu.arch) or not SLUG.match(gpu.slug):
        raise ValueError(
            f"no folder for architecture {gpu.arch!r} and GPU {gpu.slug!r}; known are sm_NN, gfxNNN and xpu"
        )
    folder = root / gpu.arch / gpu.slug
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written; choose another folder, or set TRITONQ_CACHE_DIR")
    return folder


def store(gpu: Gpu, op: str, entries: Iterable[Entry], root: Path | None = None) -> Path:
    """Merge entries into the file of `op` under `root` (default: the user's folder); returns its path.

    Raises:
        OSError: the folder cannot be written, or another process keeps its lock.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    folder = make_folder(gpu, root)
    path = folder / f"{op}.json"
    with locked(folder):
        text = render(gpu, [*_read(path, gpu.slug, op), *entries])
        replace(path, text.encode())
    return path
