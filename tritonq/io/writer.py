"""Writing safetensors without holding them: sizes are known beforehand, so each tensor goes straight to its place.

A file is 8 bytes with the length of a JSON header (little-endian), the header, and the tensors without gaps. Inside a
file tensors are ordered by width of their elements and then by name, so that each starts at a multiple of its width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tritonq import memory
from tritonq.formats import Shape
from tritonq.io.source import DTYPES, INDEX, SINGLE, natural

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TILE = 1 << 22  # elements that are converted at a time


@dataclass(frozen=True)
class Entry:
    """Output tensors that are made together, and stay in one file.

    Attributes:
        name: what it is, for the progress bar and for errors.
        tensors: name -> (shape, dtype) of what `make` returns; floats of another dtype are converted while writing.
    """

    name: str
    tensors: dict[str, tuple[Shape, torch.dtype]]
    make: Callable[[], dict[str, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(shape, dtype) for shape, dtype in self.tensors.values())


def _nbytes(shape: Shape, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def parse_size(size: int | str) -> int:
    """Bytes of a number or of a text such as "2GB" (10^9) or "256MiB" (2^20). ValueError for anything else."""
    return memory.parse_size(size, "max_shard_size")


def split(entries: Iterable[Entry], max_bytes: int) -> dict[str, list[Entry]]:
    """File name -> entries, filled in the given order to at most `max_bytes`; a larger entry has its own file."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(entry)
        room -= entry.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_file(path: Path, entries: Sequence[Entry], done: Callable[[Entry], None] | None = None) -> str:
    """Write one safetensors file; returns the SHA-256 of its bytes. In memory: what one entry makes, and a tile."""
    specs = {name: spec for entry in entries for name, spec in entry.tensors.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: (-specs[name][1].itemsize, natural(name), name)):
        shape, dtype = specs[name]
        offsets[name], start, end = end, end, end + _nbytes(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + end)
        for entry in entries:
            made = entry.make()
            assert made.keys() == entry.tensors.keys(), (entry.name, sorted(made), sorted(entry.tensors))
            for name, tensor in made.items():
                shape, dtype = specs[name]
                assert tuple(tensor.shape) == tuple(shape), (name, tuple(tensor.shape), shape)
                file.seek(begin + offsets[name])
                _write_tensor(file, tensor, dtype)
            del made
            if done is not None:
                done(entry)
    return digest(path)


def _write_tensor(file: BinaryIO, tensor: Tensor, dtype: torch.dtype) -> None:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    step = flat.numel() if flat.dtype is dtype else _TILE
    for start in range(0, flat.numel(), max(1, step)):
        part = flat[start : start + step].to(dtype)
        file.write(part.view(torch.uint8).numpy().data)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: object, *, sort: bool = False) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=sort, ensure_ascii=False) + "\n", encoding="utf-8")


def write_index(folder: Path, files: dict[str, list[Entry]]) -> None:
    """model.safetensors.index.json of more than one file."""
    if len(files) < 2:
        return
    placed = {name: file for file, entries in files.items() for entry in entries for name in entry.tensors}
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    weight_map = {name: placed[name] for name in sorted(placed, key=natural)}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
