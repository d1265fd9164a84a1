"""Outputs of blocks for all samples, where there is room: on the device, in pinned host memory, in files.

An entry is what a block put out for a sample, some of its tensors by number. Bytes are kept, not tensors: of tensors
that share memory the bytes that they span are kept once, and those that come back share memory, too.

    put --> device (as far as it was given room) --> host (as far as it may) --> files
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tritonq.offload.pool import Buffer, PinnedPool
from tritonq.streams import Backend, Event, backend

Key = tuple[int, int]  # block, sample
TIERS = ("device", "host", "disk")


@dataclass
class View:
    """A tensor in the bytes of an entry: where it begins, in bytes, and its type, shape and strides."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """Args: memory: uint8."""
        found = torch.empty(0, dtype=self.dtype, device=memory.device)
        offset = (memory.storage_offset() + self.start) // self.dtype.itemsize
        return found.set_(memory.untyped_storage(), offset, self.shape, self.strides)  # type: ignore[call-overload]


@dataclass(eq=False)
class Piece:
    """Memory that some tensors of an entry lie in.

    Attributes:
        nbytes: that it has. tier: of `TIERS`.
        memory: uint8 [nbytes], on the device or the host; None while it is in a file.
        buffer: of pinned memory, that `memory` is a part of. path: the file.
        entries: in how many it is.
        copied: the event of the copy to the host. reads: of the last copies from it.
        ahead: copies on their way to a device: the memory and the event.
    """

    nbytes: int
    tier: str
    entries: int = 1
    memory: Tensor | None = None
    buffer: Buffer | None = None
    path: Path | None = None
    copied: Event = None
    reads: dict[Any, Event] = field(default_factory=dict)
    ahead: dict[torch.device, tuple[Tensor, Event]] = field(default_factory=dict)


Part = tuple[Piece, dict[int, View]]  # of an entry: tensors by number, and what they lie in


class ActivationCache:
    """Outputs of blocks by (block, sample).

    Args:
        host: bytes of host memory; None for no limit. What is beyond goes to files.
        folder: of the files; None for a temporary one, which `close` removes.
        room: bytes that entries may take on devices, by device.
        events: is told of the first entry that goes to a file.

    Raises:
        OSError: no space is left for a file.
    """

    def __init__(
        self,
        host: int | None = None,
        folder: str | Path | None = None,
        room: Mapping[torch.device, int] | None = None,
        events: Callable[..., None] | None = None,
    ) -> None:
        self.host, self.room = host, {_indexed(torch.device(device)): size for device, size in (room or {}).items()}
        self._given = None if folder is None else Path(folder)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._entries: dict[Key, list[Part]] = {}
        self._used = dict.fromkeys(TIERS, 0)
        self._on_device: dict[torch.device, int] = {}
        self._pool, self._backends = PinnedPool(), {}  # type: PinnedPool, dict[torch.device, Backend]
        self._events, self._told, self._number = events, False, 0
        self.most = dict(self._used)

    # What is there

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._entries))

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by tier: "device", "host", "disk"; `most` has the most there were."""
        return dict(self._used)

    def numbers(self, key: Key) -> set[int]:
        """Of the tensors of an entry that are kept."""
        return {number for _, views in self._entries.get(key, ()) for number in views}

    def allow(self, device: torch.device | str, nbytes: int) -> None:
        """Let entries that come from now on take so many bytes on a device."""
        self.room[_indexed(torch.device(device))] = nbytes

    def place(self, key: Key, number: int) -> tuple[int, int]:
        """Where a tensor lies: the same for those that share their memory.

        Raises:
            KeyError: it is not there.
        """
        for piece, views in self._entries.get(key, ()):
            if number in views:
                return id(piece), views[number].start
        raise KeyError(f"block {key[0]}, sample {key[1]}: tensor {number} is not kept")

    # In and out

    def put(self, key: Key, tensors: Mapping[int, Tensor]) -> None:
        """Keep tensors of an entry, beside those of other numbers that are there."""
        taken = self.numbers(key) & tensors.keys()
        if taken:
            raise ValueError(f"block {key[0]}, sample {key[1]} has tensors {sorted(taken)} already; drop them first")
        for span, views in _spans(tensors):
            self._entries.setdefault(key, []).append((self._store(span), views))

    def share(self, key: Key, other: Key, number: int) -> None:
        """Let an entry have a tensor of another one, too, in the same memory.

        Raises:
            KeyError: the other one does not have it.
        """
        place, _ = self.place(other, number)
        for piece, views in self._entries[other]:
            if id(piece) == place:
                piece.entries += 1
                self._entries.setdefault(key, []).append((piece, {number: views[number]}))

    def get(self, key: Key, device: torch.device | str, numbers: Iterable[int] | None = None) -> dict[int, Tensor]:
        """Tensors of an entry by number, on a device; not to be written to.

        Raises:
            KeyError: they are not there.
        """
        device = _indexed(torch.device(device))
        wanted = self.numbers(key) if numbers is None else set(numbers)
        missing = wanted - self.numbers(key)
        if missing or key not in self._entries:
            raise KeyError(f"block {key[0]}, sample {key[1]}: tensors {sorted(missing)} are not kept")
        found = {}
        for piece, views in self._entries[key]:
            if wanted & views.keys():
                memory = self._load(piece, device)
                found.update({number: view.of(memory) for number, view in views.items() if number in wanted})
        return found

    def drop(self, key: Key, keep: Iterable[int] = ()) -> None:
        """Free an entry, but for the memory of tensors of these numbers; nothing where it is not there."""
        kept, left = set(keep), []
        for piece, views in self._entries.pop(key, []):
            views = {number: view for number, view in views.items() if number in kept}
            if views:
                left.append((piece, views))
            else:
                piece.entries -= 1
                if not piece.entries:
                    self._free(piece)
        if left:
            self._entries[key] = left

    def replace(self, key: Key, tensors: Mapping[int, Tensor], old: Key | None = None) -> None:
        """Free an entry (default: what is there under this key), then keep its successor."""
        self.drop(key if old is None else old)
        self.put(key, tensors)

    def spare(self, device: torch.device) -> int:
        """Bytes of the room on a device that are not taken."""
        return self.room.get(_indexed(device), 0) - self._on_device.get(_indexed(device), 0)

    def rename(self, names: Mapping[Key, Key]) -> None:
        """Keep entries under other keys."""
        self._entries = {names.get(key, key): pieces for key, pieces in self._entries.items()}

    def prefetch(self, keys: Iterable[Key], device: torch.device | str) -> None:
        """Begin to copy entries to a device, beside what it computes; `get` waits for them."""
        device = _indexed(torch.device(device))
        if device.type != "cuda":
            return
        streams = self._backend(device)
        for key in keys:
            for piece, _ in self._entries.get(key, ()):
                if piece.tier == "device" or device in piece.ahead:
                    continue
                source = self._on_host(piece)
                with streams.current():
                    target = streams.empty(piece.nbytes)
                    copy = functools.partial(streams.copy, target, source)
                    event = streams.submit("in", copy, streams.record(), piece.copied)
                piece.ahead[device] = (target, event)
                piece.reads[device, "ahead"] = event

    # Elsewhere

    def to_host(self) -> int:
        """Move what is on devices to the host, or to files beyond its limit, and put nothing there any more. Returns
        how many bytes that were."""
        self.room = {}
        moved = 0
        for parts in self._entries.values():
            for piece, _ in parts:
                self._forget(piece)
                if piece.tier == "device":
                    assert piece.memory is not None
                    memory = piece.memory
                    self._count(piece, -1)
                    self._settle(piece, memory)
                    moved += piece.nbytes
        return moved

    def save(self, folder: str | Path, others: Mapping[str, bytes] | None = None) -> None:
        """Write all entries to a folder, aside and then renamed, exact bytes.

        Args:
            others: more files, by name.
        """
        folder = Path(folder)
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        index = []
        written: dict[Piece, int] = {}
        for key, parts in self._entries.items():
            described = []
            for piece, views in parts:
                if piece not in written:
                    written[piece] = len(written)
                    memory = self._on_host(piece)
                    self._wait([piece])
                    save_file({"bytes": memory}, aside / f"{written[piece]}.safetensors")
                described.append([written[piece], _described(views)])
            index.append({"key": key, "parts": described})
        (aside / "index.json").write_text(json.dumps(index))
        for name, content in (others or {}).items():
            (aside / name).write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)

    def load(self, folder: str | Path) -> None:
        """Take the entries that `save` wrote, in place of all there are.

        Raises:
            FileNotFoundError: the folder has none.
        """
        folder = Path(folder)
        index = json.loads((folder / "index.json").read_text())
        for key in self:
            self.drop(key)
        pieces: dict[int, Piece] = {}
        for entry in index:
            parts = self._entries.setdefault((entry["key"][0], entry["key"][1]), [])
            for number, views in entry["parts"]:
                if number in pieces:
                    pieces[number].entries += 1
                else:
                    with safe_open(folder / f"{number}.safetensors", "pt") as handle:
                        pieces[number] = self._store(handle.get_tensor("bytes"))
                parts.append((pieces[number], _views(views)))

    def close(self) -> None:
        """Free everything, and remove the files."""
        for key in self:
            self.drop(key)
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    # Tiers

    def _store(self, memory: Tensor) -> Piece:
        """A piece of a copy of this memory, uint8."""
        piece = Piece(memory.nbytes, "device")
        device = memory.device
        if self.room.get(device, 0) >= self._on_device.get(device, 0) + piece.nbytes:
            try:
                piece.memory = memory.clone()
            except torch.OutOfMemoryError:
                self.room = {}
                self._tell("out of memory", where="activations", reaction="kept on the host")
            else:
                self._count(piece, 1)
                return piece
        self._settle(piece, memory)
        return piece

    def _settle(self, piece: Piece, memory: Tensor) -> None:
        """Copy its bytes to the host, or to a file."""
        piece.memory = None
        if self.host is None or self._used["host"] + piece.nbytes <= self.host:
            piece.tier = "host"
            if memory.is_cuda:
                streams = self._backend(memory.device)
                piece.buffer = self._pool.take(streams, piece.nbytes)
                for event in piece.buffer.events:
                    streams.follow(event)
                piece.memory = piece.buffer.bytes[: piece.nbytes]
                # On the stream that computes, whose order keeps the source until then.
                with torch.cuda.device(memory.device):
                    piece.memory.copy_(memory, non_blocking=True)
                piece.copied = streams.record()
            else:
                piece.memory = memory.clone()
        else:
            piece.tier = "disk"
            piece.path = self._write(memory)
        self._count(piece, 1)

    def _tell(self, what: str, **details: Any) -> None:
        if self._events is not None:
            self._events(what, **details)

    def _write(self, memory: Tensor) -> Path:
        if not self._told:
            self._tell("activations go to files", folder=str(self._folder()), host_bytes=self._used["host"])
            self._told = True
        self._number += 1
        path = self._folder() / f"activations-{self._number}.safetensors"
        aside = path.with_suffix(".part")
        save_file({"bytes": memory.cpu()}, aside)
        os.replace(aside, path)
        return path

    def _folder(self) -> Path:
        if self._given is not None:
            self._given.mkdir(parents=True, exist_ok=True)
            return self._given
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="tritonq-")
        return Path(self._temporary.name)

    def _on_host(self, piece: Piece) -> Tensor:
        """Its bytes on the host; those of a copy that is on its way come after `piece.copied`."""
        if piece.path is not None:
            with safe_open(piece.path, "pt") as handle:
                return handle.get_tensor("bytes")  # type: ignore[no-any-return]
        assert piece.memory is not None
        return piece.memory.cpu()

    def _load(self, piece: Piece, device: torch.device) -> Tensor:
        if piece.memory is not None and piece.memory.device == device and piece.buffer is None:
            return piece.memory
        if device in piece.ahead:
            memory, event = piece.ahead.pop(device)
            streams = self._backend(device)
            streams.follow(event)
            streams.borrow(memory)
            return memory
        if piece.tier == "device" or piece.path is not None:
            source = piece.memory if piece.memory is not None else self._on_host(piece)
            return source.to(device)
        assert piece.memory is not None
        if device.type == "cuda":
            with torch.cuda.device(device):
                streams = self._backend(device)
                streams.follow(piece.copied)
                target = piece.memory.to(device, non_blocking=True)
                piece.reads[device] = streams.record()
            return target
        self._wait([piece])
        return piece.memory.clone()  # its buffer is used again, whoever still reads this

    def _wait(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.copied is not None:
                piece.copied.synchronize()
                piece.copied = None

    def _free(self, piece: Piece) -> None:
        self._count(piece, -1)
        self._forget(piece)
        piece.memory = None
        if piece.buffer is not None:
            self._pool.put(piece.buffer, piece.copied, *piece.reads.values())
            piece.buffer = None
        if piece.path is not None:
            piece.path.unlink(missing_ok=True)
            piece.path = None

    def _forget(self, piece: Piece) -> None:
        """Let go of copies on their way; their memory is of a stream that has to wait for them first."""
        for device, (_, event) in piece.ahead.items():
            with self._backend(device).current():
                self._backend(device).follow(event)
        piece.ahead.clear()

    def _count(self, piece: Piece, sign: int) -> None:
        self._used[piece.tier] += sign * piece.nbytes
        if piece.tier == "device" and piece.memory is not None:
            device = piece.memory.device
            self._on_device[device] = self._on_device.get(device, 0) + sign * piece.nbytes
        self.most = {tier: max(self.most[tier], self._used[tier]) for tier in TIERS}

    def _backend(self, device: torch.device) -> Backend:
        if device not in self._backends:
            self._backends[device] = backend(device)
        return self._backends[device]


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the one after its last."""
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + (last + 1) * tensor.itemsize if tensor.numel() else start


def _spans(tensors: Mapping[int, Tensor]) -> list[tuple[Tensor, dict[int, View]]]:
    """Bytes that tensors lie in, uint8 [n], and the tensors in them: those that overlap lie in the same ones."""
    found: list[tuple[Tensor, dict[int, View]]] = []
    storages: dict[Any, list[tuple[int, int, int, Tensor]]] = {}
    dense: dict[Any, Tensor] = {}
    for number, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg()
        start, end = _extent(plain)
        if end - start > plain.nbytes:  # with holes, which may belong to something large
            where = (plain.device, plain.data_ptr(), plain.dtype, plain.shape, plain.stride())
            plain = dense.setdefault(where, plain.contiguous())
            start, end = _extent(plain)
        storages.setdefault((plain.device, plain.untyped_storage()._cdata), []).append((start, end, number, plain))
    for members in storages.values():
        members.sort(key=lambda member: member[:3])
        while members:
            first, end = members[0][:2]
            group: list[tuple[int, int, int, Tensor]] = []
            while members and (not group or members[0][0] < end):
                group.append(members.pop(0))
                end = max(end, group[-1][1])
            first -= first % 16  # elements of any type begin at a multiple of their size
            plain = group[0][3]
            memory = torch.empty(0, dtype=torch.uint8, device=plain.device)
            memory.set_(plain.untyped_storage(), first, (end - first,), (1,))  # type: ignore[call-overload]
            views = {n: View(s - first, t.dtype, tuple(t.shape), t.stride()) for s, _, n, t in group}
            found.append((memory, views))
    return found


def _described(views: Mapping[int, View]) -> dict[str, Any]:
    return {
        str(number): [view.start, str(view.dtype).removeprefix("torch."), list(view.shape), list(view.strides)]
        for number, view in views.items()
    }


def _views(described: Mapping[str, Any]) -> dict[int, View]:
    return {
        int(number): View(start, getattr(torch, dtype), tuple(shape), tuple(strides))
        for number, (start, dtype, shape, strides) in described.items()
    }
