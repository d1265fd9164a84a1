"""Where a checkpoint comes from: a folder of safetensors, a model of the hub, or a GGUF file.

Tensors are read through memory maps: a weight that is looked at costs page cache, not memory of the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What a hub download needs: weights as safetensors, configs, tokenizers, chat templates.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.md", "LICENSE*")

# Names that the safetensors format gives to element types.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64,
}  # fmt: skip


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name))


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint, known from its file's header alone."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Source:
    """An opened checkpoint.

    Attributes:
        name: how a model card calls it: the hub id, or the name of the folder or file.
        folder: holds the files.
        tensors: every tensor by name, in natural order.
        config: content of config.json, {} where there is none.
        stamp: (name, size, modification time in ns) of every file that the result depends on.
    """

    name: str
    folder: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    stamp: list[tuple[str, int, int]]
    _files: dict[Path, Any]

    def load(self, name: str) -> Tensor:
        """The tensor, backed by the mapped file; copy before writing to it."""
        return self._files[self.tensors[name].file].get_tensor(name)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


@contextlib.contextmanager
def open_source(src: str | Path, scratch: Path, dtype: torch.dtype | None) -> Iterator[Source]:
    """Open `src`; a GGUF file is first written as dense safetensors to `scratch`, which is removed at the end.

    Raises:
        FileNotFoundError: nothing there, or no safetensors in it. ValueError: damaged or incomplete files.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        yield _open_folder(path, path.resolve().name, _stamp(path))
    elif path.suffix == ".gguf" and path.is_file():
        import shutil

        try:
            _convert_gguf(path, scratch, dtype or torch.bfloat16)
            yield _open_folder(scratch, path.stem, [_stamp_of(path)])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    elif path.exists():
        raise ValueError(f"{src} is neither a folder nor a GGUF file; pass the folder that holds model.safetensors")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(src)) and str(src)[0] not in "./~" and path.suffix != ".gguf":
        folder = _download(str(src))
        yield _open_folder(folder, str(src), _stamp(folder))
    else:
        raise FileNotFoundError(f"{src} does not exist; pass a folder, a GGUF file or a hub id such as org/model")


def _stamp_of(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def _stamp(folder: Path) -> list[tuple[str, int, int]]:
    return [_stamp_of(path) for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]


def _download(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{repo} is no folder here and could not be fetched from the hub: {reason}") from None


def _convert_gguf(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Dense safetensors, config and tokenizer of a GGUF file; the whole model is in memory meanwhile."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError:
        raise ValueError(
            f"{path.name}: reading GGUF files needs transformers and gguf; pip install 'tritonq[hf]'"
        ) from None

    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path.name} could not be read as a GGUF language model: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file with an object in it. ValueError names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__} instead of an object; fetch it again")
    return content


def _open_folder(folder: Path, name: str, stamp: list[tuple[str, int, int]]) -> Source:
    files: dict[Path, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for file, wanted in _shards(folder).items():
        files[file] = handle = _open_file(file)
        present = set(handle.keys())
        for missing in sorted((wanted or set()) - present):
            raise ValueError(
                f"{INDEX} says that {missing} is in {file.name}, which does not hold it; fetch the model again"
            )
        for key in wanted or present:
            part = handle.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise ValueError(f"{file.name}: tensor {key} has type {part.get_dtype()}, which cannot be read here")
            tensors[key] = TensorInfo(key, file, DTYPES[part.get_dtype()], tuple(part.get_shape()))
    if not tensors:
        raise ValueError(f"{folder} holds no tensors")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return Source(name, folder, {key: tensors[key] for key in sorted(tensors, key=natural)}, config, stamp, files)


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files that make up the model, each with the tensors that the index places there (None: all)."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if (folder / INDEX).is_file():
        placed: dict[Path, set[str]] = {}
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{INDEX} has no weight_map; fetch it again")
        for key, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{INDEX} places {key} in {file!r}, which is not the name of a file beside it")
            placed.setdefault(folder / file, set()).add(key)
        for file in placed:
            if not file.is_file():
                raise FileNotFoundError(f"{INDEX} names {file.name}, which is missing; fetch the model again")
        return dict(sorted(placed.items()))
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise FileNotFoundError(f"{folder} holds {len(found)} safetensors files but no {INDEX}; fetch the index too")
    raise FileNotFoundError(
        f"{folder} holds no safetensors; save the model with save_pretrained(..., safe_serialization=True) first"
    )


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a safetensors file or is cut short ({error}); fetch it again") from None
