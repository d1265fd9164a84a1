"""The destination folder: written beside its final name, moved there when complete, resumable after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tritonq.io import writer
from tritonq.io.source import INDEX

MANIFEST = "tritonq-manifest.json"

# Files of a source that belong to the quantized model as well; weights in other containers do not.
_COPIED = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".spm", ".bpe", ".vocab"}
_OURS = {INDEX, "config.json", "README.md", MANIFEST}


class Destination:
    """A folder that appears under its name only when everything in it is written.

    Raises:
        FileExistsError: `path` exists and `force` is not given, or it is not a checkpoint that may be replaced.
        PermissionError: nothing can be written there. ValueError: replacing it would remove the source.
    """

    def __init__(self, path: str | Path, force: bool, source: str | Path | None = None) -> None:
        self.path = Path(os.path.abspath(Path(path).expanduser()))
        self.force = force
        self.partial = self._sibling("partial")
        self.scratch = self._sibling("dense")
        self.work = self._sibling("work")  # what calibration decided so far; kept by an exception, too
        self._old = self._sibling("old")
        if source is not None and Path(source).expanduser().exists():
            real = Path(source).expanduser().resolve()
            if self.path.resolve() in (real, *real.parents):
                raise ValueError(f"{path} is or contains the source {source}; choose another destination")
        if os.path.lexists(self._old) and not os.path.lexists(self.path):  # killed between the two renames of `publish`
            self._old.rename(self.path)
        if os.path.lexists(self.path):
            if not force:
                raise FileExistsError(
                    f"{path} already exists; pass --force to replace it, or choose another destination"
                )
            if not _replaceable(self.path):
                raise FileExistsError(
                    f"{path} exists and is not a checkpoint, --force does not remove it; remove it yourself"
                )
        ancestor = next(parent for parent in self.path.parents if parent.exists())
        if not ancestor.is_dir():
            raise PermissionError(f"cannot create {path}: {ancestor} is not a folder; choose another destination")
        if not os.access(ancestor, os.W_OK | os.X_OK):
            raise PermissionError(f"cannot create {path}: {ancestor} is not writable; choose another destination")

    def _sibling(self, what: str) -> Path:
        return self.path.with_name(f".{self.path.name}.tritonq-{what}")

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """The folder to write to; published at the end, removed by an exception, kept by a kill."""
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PermissionError(
                f"cannot create {self.path}: {error.strerror} at {self.path.parent}; choose another destination"
            ) from None
        with _alone(self.partial, self.path):
            try:
                yield self.partial
                self._publish()
                shutil.rmtree(self.work, ignore_errors=True)
            except Exception:
                shutil.rmtree(self.partial, ignore_errors=True)
                raise

    def _publish(self) -> None:
        (self.partial / MANIFEST).unlink(missing_ok=True)
        if os.path.lexists(self.path):
            if not self.force:
                raise FileExistsError(f"{self.path} was created meanwhile; nothing was replaced")
            _remove(self._old)
            self.path.rename(self._old)
        self.partial.rename(self.path)
        _remove(self._old)


@contextlib.contextmanager
def _alone(folder: Path, path: Path) -> Iterator[None]:
    """Keep a second run out of `folder`; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another run is writing {path}; wait for it, or choose another destination"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _replaceable(path: Path) -> bool:
    """Checkpoints and empty folders; --force is not a way to remove a home directory by a typing error."""
    if not path.is_dir():
        return False
    inside = [entry.name for entry in path.iterdir()]
    return not inside or ("config.json" in inside and any(name.endswith(".safetensors") for name in inside))


class Manifest:
    """What a partial folder holds: the fingerprint of source and options, and finished files with their hashes.

    A manifest of another fingerprint, or of none, empties the folder.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self._path = folder / MANIFEST
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self.files: dict[str, dict[str, Any]] = {}
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if isinstance(found, dict) and found.get("fingerprint") == self._fingerprint:
            self.files = found["files"]
        else:
            for path in folder.iterdir():
                _remove(path)
            self._save()

    def finished(self, path: Path) -> dict[str, Any] | None:
        """What was noted about a finished file, None where it is missing or has other bytes."""
        noted = self.files.get(path.name)
        return noted if noted and path.is_file() and writer.digest(path) == noted["sha256"] else None

    def finish(self, path: Path, sha256: str, **notes: Any) -> None:
        self.files[path.name] = {"sha256": sha256, **notes}
        self._save()

    def _save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"fingerprint": self._fingerprint, "files": self.files}), encoding="utf-8")
        temporary.replace(self._path)


def write_shards(
    folder: Path,
    files: dict[str, list[writer.Entry]],
    manifest: Manifest | None = None,
    notes: Callable[[list[writer.Entry]], dict[str, Any]] | None = None,
    restore: Callable[[dict[str, Any]], None] | None = None,
    done: Callable[[writer.Entry], None] | None = None,
) -> None:
    """Write files and their index; those that `manifest` knows are kept, `restore` gets what `notes` said of them."""
    for name, entries in files.items():
        found = manifest.finished(folder / name) if manifest else None
        if found is not None:
            if restore:
                restore(found)
            for entry in entries if done else ():
                done(entry)  # type: ignore[misc]
            continue
        try:
            sha256 = writer.write_file(folder / name, entries, done)
        except OSError as error:
            raise OSError(
                f"cannot write {name} to {folder.parent}: {error.strerror or error}; make room or choose another disk"
            ) from None
        if manifest:
            manifest.finish(folder / name, sha256, **(notes(entries) if notes else {}))
    writer.write_index(folder, files)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, chat template, licence, and the parts of a sentence-transformers model."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name in _OURS or path.name.endswith(".index.json"):
            continue
        if path.suffix in _COPIED or path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            shutil.copyfile(path, folder / path.name)
    modules = source / "modules.json"
    if not modules.is_file():
        return
    for module in json.loads(modules.read_text(encoding="utf-8")):
        name = str(module.get("path", ""))
        if name and Path(name).name == name and (source / name).is_dir():
            shutil.copytree(source / name, folder / name, copy_function=shutil.copyfile, dirs_exist_ok=True)
