"""Calibration data: texts, token ids, arguments of the model or recorded calls become samples.

A *sample* is one call of the model. Texts are tokenized, put one after the other and cut into windows of `seqlen`
tokens, of which `count` are chosen with the seed; what the tokenizer puts around a text ([CLS] and [SEP], or a first
token) is put around each window, within its length.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_CHARACTERS = 4 << 20  # texts up to this size are tokenized whole: a second or two


@dataclass
class Call:
    """One call of a model: `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def default_text() -> str:
    """The standard library's language reference topics: 465k characters of English that every Python has."""
    import pydoc_data.topics

    return "\n\n".join(pydoc_data.topics.topics.values())


def samples(
    data: Any,
    model_or_config: Any = None,
    *,
    tokenizer: Any = None,
    count: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
) -> list[Call]:
    """Calls of a model to calibrate it with, at most `count`.

    Args:
        data: None for the standard library's language reference; the path of a text file, or of a .json or .jsonl file
            whose rows are texts or have a field `text`; the id of a data set on the hub; or an iterable (a list, a
            DataLoader, a data set) of texts, of token ids [S] or [B, S], of dicts of keyword arguments, of tuples of
            arguments, or of `Call`.
        model_or_config: the model, or its transformers config: limits lengths and token ids, and names the tokenizer.
        tokenizer: of the model, or where to load it from: a transformers tokenizer, or a function from a text to ids.
        count: of samples. Of a sequence of more, `count` are chosen with the seed; an iterator is read no further than
            is needed. Where there are fewer, a warning says so.
        seqlen: tokens of a window of text; longer rows of token ids are cut into windows, shorter ones are taken as
            they are. No more than the model has positions.

    Returns:
        Token ids are int64 [1, S]. Arguments that a user gave are taken as they are, except that a dict with
        `input_ids` [B, S] and other tensors of B rows becomes B samples: padding keeps its `attention_mask`.

    Raises:
        ValueError: no data, no tokenizer for a text, less than one window of text (the message has the number of
            tokens), ids beyond the vocabulary, or data of another kind.
        FileNotFoundError: no such file or data set.
    """
    if count < 1 or seqlen < 1:
        raise ValueError(f"samples and seqlen are numbers from 1, got {count} and {seqlen}")
    config = getattr(model_or_config, "config", model_or_config)
    seqlen = min(seqlen, _positions(config) or seqlen)
    generator = torch.Generator().manual_seed(seed)
    if data is None:
        data = [default_text()]
    elif isinstance(data, str | Path):
        data = _read(data)
    elif isinstance(data, Tensor):
        data = list(data) if data.ndim > 1 and not data.is_floating_point() else [data]
    elif isinstance(data, Call | Mapping):
        data = [data]
    elif not isinstance(data, Iterable):
        raise ValueError(f"calibration data cannot be {type(data).__name__}; {_KINDS}")
    rows: Iterator[tuple[int, Any]] = enumerate(data)
    sized = isinstance(data, Sequence) or (hasattr(data, "__len__") and hasattr(data, "__getitem__"))
    if sized and len(data) > count:
        rows = ((i, data[i]) for i in torch.randperm(len(data), generator=generator).tolist())
    if (first := next(rows, None)) is None:
        raise ValueError(f"there is no calibration data in an empty {type(data).__name__}; {_KINDS}")
    rows = itertools.chain([first], rows)
    if _text(first[1]) is not None:
        calls = _windows(rows, _tokenizer(tokenizer, model_or_config), count, seqlen, generator)
    else:
        calls = list(itertools.islice(_calls((row for _, row in rows), seqlen), count))
    if len(calls) < count:
        warnings.warn(
            f"calibration data makes {len(calls)} samples of {seqlen} tokens, {count} were asked for; going on with "
            "those: pass more data, or fewer samples",
            stacklevel=2,
        )
    _check_vocabulary(calls, config)
    return calls


_KINDS = (
    "pass a text file, a list of texts, of token ids, of dicts of keyword arguments or of tuples of arguments, or a "
    "DataLoader of these"
)


def _positions(config: Any) -> int | None:
    """How many tokens the model takes, as far as its config says."""
    found = getattr(_text_config(config), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _check_vocabulary(calls: Iterable[Call], config: Any) -> None:
    size = getattr(_text_config(config), "vocab_size", None)
    for call in calls:
        ids = call.kwargs.get("input_ids")
        if isinstance(size, int) and isinstance(ids, Tensor) and ids.numel() and int(ids.max()) >= size:
            raise ValueError(
                f"token id {int(ids.max())} is beyond the model's vocabulary of {size}; pass the model's own tokenizer"
            )


# --------------------------------------------------------------------------------------------------------- texts


def _text(row: Any) -> str | None:
    """The text of a row, None where it is none."""
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping) and "input_ids" not in row:
        strings = {key: value for key, value in row.items() if isinstance(value, str)}
        if "text" in strings or len(strings) == 1:
            return strings.get("text", next(iter(strings.values())))
        if strings:
            raise ValueError(f"rows of calibration data have the fields {', '.join(map(str, row))}, and none is 'text'")
    return None


def _windows(
    rows: Iterable[tuple[int, Any]],
    encode: Callable[[str, bool], list[int]],
    count: int,
    seqlen: int,
    generator: torch.Generator,
) -> list[Call]:
    """`count` windows out of numbered texts, or out of some of them, or of pieces of them, where they are very long."""
    limit = max(_CHARACTERS, 16 * count * seqlen)  # some four times as many tokens as needed
    numbered: list[tuple[int, str]] = []
    characters = 0
    for number, row in rows:
        if (text := _text(row)) is None:
            raise ValueError(f"calibration data mixes texts and {type(row).__name__}; {_KINDS}")
        numbered.append((number, text))
        characters += len(text)
        if characters > limit:
            break
    texts = [text for _, text in sorted(numbered)]
    if characters > limit:
        piece = 16 * seqlen
        pieces = [text[start : start + piece] for text in texts for start in range(0, len(text), piece)]
        order = torch.randperm(len(pieces), generator=generator).tolist()
        texts = [pieces[i] for i in sorted(order[: -(-limit // piece)])]
    bare, whole = encode("a", False), encode("a", True)
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, after = whole[:start], whole[start + len(bare) :]
    if (inner := seqlen - len(before) - len(after)) < 1:
        raise ValueError(f"seqlen {seqlen} leaves no room beside the {len(before) + len(after)} tokens around a text")
    tokens = torch.tensor([token for text in texts for token in encode(text, False)], dtype=torch.int64)
    if len(tokens) < inner:
        raise ValueError(
            f"the calibration text has {len(tokens)} tokens, less than one sample of {inner}; pass more text, or a "
            "smaller seqlen"
        )
    shift = int(torch.randint(len(tokens) % inner + 1, (), generator=generator))
    chosen = torch.randperm(len(tokens) // inner, generator=generator)[:count].tolist()
    around = torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)
    calls = []
    for number in chosen:
        begin = shift + number * inner
        ids = torch.cat([around[0], tokens[begin : begin + inner], around[1]])
        calls.append(Call(kwargs={"input_ids": ids[None]}))
    return calls


def _tokenizer(tokenizer: Any, model_or_config: Any) -> Callable[[str, bool], list[int]]:
    """A function from (text, whether to put special tokens around it) to ids."""
    if tokenizer is None:
        config = getattr(model_or_config, "config", model_or_config)
        tokenizer = getattr(config, "_name_or_path", None) or getattr(model_or_config, "name_or_path", None)
        if not tokenizer:
            raise ValueError("a text needs the model's tokenizer; pass tokenizer=, or token ids instead of a text")
    if isinstance(tokenizer, str | Path):
        tokenizer = _load_tokenizer(str(tokenizer))
    hugging_face = hasattr(tokenizer, "num_special_tokens_to_add")

    def encode(text: str, special: bool) -> list[int]:
        found = tokenizer(text, add_special_tokens=special, verbose=False) if hugging_face else tokenizer(text)
        ids = found["input_ids"] if isinstance(found, Mapping) else found
        return torch.as_tensor(ids, dtype=torch.int64).reshape(-1).tolist()

    return encode


def _load_tokenizer(where: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ValueError("tokenizing a text needs transformers (pip install 'tritonq[hf]'); pass token ids") from None
    try:
        return AutoTokenizer.from_pretrained(where)
    except Exception as error:  # transformers raises its own, the hub's and OS errors
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:120]
        raise ValueError(
            f"{where} has no tokenizer that could be loaded ({reason}); pass tokenizer=, or token ids"
        ) from None


def _read(path: str | Path) -> list[Any] | Iterable[Any]:
    """Rows of a file or of a data set of the hub."""
    file = Path(path).expanduser()
    if file.is_file():
        return _read_file(file)
    if not file.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and str(path)[0] not in "./~":
        return _from_hub(str(path))
    what = "is a folder" if file.exists() else "does not exist"
    raise FileNotFoundError(
        f"calibration data {path} {what}; pass a text, .json or .jsonl file or the id of a data set on the hub, and a "
        "text itself as [text]"
    )


def _read_file(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"calibration data {file} is not UTF-8 text; pass a plain text, .json or .jsonl file"
        ) from None
    except OSError as error:
        raise ValueError(f"calibration data {file} cannot be read ({error.strerror}); pass a text file") from None
    if file.suffix not in (".json", ".jsonl"):
        return [text]
    try:
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        content = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"calibration data {file} is not JSON ({error})") from None
    rows = content[0] if len(content) == 1 and isinstance(content[0], list) else content
    if len(rows) == 1 and isinstance(rows[0], dict) and isinstance(rows[0].get("text"), list):
        rows = rows[0]["text"]
    if not rows or _text(rows[0]) is None:
        raise ValueError(f"calibration data {file} has no texts; its rows have to be texts or objects with 'text'")
    return rows


def _from_hub(name: str) -> Iterable[Any]:
    """Rows of a data set, streamed where `datasets` is installed, otherwise of its first file of text."""
    try:
        try:
            from datasets import load_dataset
        except ImportError:
            return _read_file(_download(name))
        found = load_dataset(name, split="train", streaming=True)
        return found  # type: ignore[no-any-return]
    except ValueError:
        raise
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:160]
        raise FileNotFoundError(
            f"{name} is no file here and could not be fetched from the hub ({reason}); pass a text or .jsonl file"
        ) from None


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    files = [f for f in HfApi().list_repo_files(name, repo_type="dataset") if f.endswith((".jsonl", ".json", ".txt"))]
    if not files:
        raise ValueError(f"{name} has no .txt, .json or .jsonl file; others take `pip install datasets`")
    files.sort(key=lambda file: ("train" not in file, file.endswith(".json"), file))
    return Path(hf_hub_download(name, files[0], repo_type="dataset"))


# --------------------------------------------------------------------------------------------------- other kinds


def _calls(rows: Iterable[Any], seqlen: int) -> Iterator[Call]:
    for row in rows:
        if isinstance(row, Call):
            yield row
        elif isinstance(row, Mapping):
            yield from _of_mapping({str(key): value for key, value in row.items()})
        elif isinstance(row, Tensor):
            if row.is_floating_point():
                yield Call((row,))
            else:
                yield from _of_ids(row, seqlen)
        elif isinstance(row, list | tuple):
            if row and all(isinstance(token, int) and not isinstance(token, bool) for token in row):
                yield from _of_ids(torch.tensor(row), seqlen)
            else:
                yield Call(tuple(row))
        else:
            raise ValueError(f"calibration data holds {type(row).__name__}; {_KINDS}")


def _of_ids(ids: Tensor, seqlen: int) -> Iterator[Call]:
    if ids.ndim not in (1, 2):
        raise ValueError(f"token ids are [S] or [B, S], got shape {list(ids.shape)}")
    for row in ids.to(torch.int64).reshape(-1, ids.shape[-1]):
        pieces = row.split(seqlen) if len(row) else ()
        for piece in pieces:
            if len(piece) == seqlen or len(row) < seqlen:
                yield Call(kwargs={"input_ids": piece[None]})


def _of_mapping(kwargs: dict[str, Any]) -> Iterator[Call]:
    for name, value in kwargs.items():
        if isinstance(value, list) and value and isinstance(value[0], int | float):  # a row of a data set: no batch yet
            kwargs[name] = torch.tensor(value)[None]
    ids = kwargs.get("input_ids")
    found = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    if isinstance(ids, Tensor) and ids.ndim == 1 and all(value.ndim == 1 for value in found.values()):
        kwargs.update({name: value[None] for name, value in found.items()})
        found, ids = {name: kwargs[name] for name in found}, ids[None]
    batch = len(ids) if isinstance(ids, Tensor) and ids.ndim > 1 else 1
    if batch == 1 or any(value.ndim < 1 or len(value) != batch for value in found.values()):
        yield Call(kwargs=kwargs)
        return
    for row in range(batch):
        yield Call(kwargs={**kwargs, **{name: value[row : row + 1] for name, value in found.items()}})


# ------------------------------------------------------------------------------------------------ recorded calls


def record(module: nn.Module, run: Callable[[], Any], *, limit: int, seed: int = 0) -> list[Call]:
    """Calls of a module while `run()` runs, at most `limit` of them, each equally likely: a diffusion transformer in
    its pipeline is called once a step for each prompt, and all steps together do not fit into memory.

    Tensors of calls that are kept are copied to the host at once, each only once where calls share it; of the other
    calls nothing is held.

    Returns:
        The calls in the order in which they were made.

    Raises:
        ValueError: `run` did not call the module, or `limit` is below 1. Whatever `run` raises.
    """
    if limit < 1:
        raise ValueError(f"limit is a number of calls from 1, got {limit}")
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[int, Call]] = []
    seen = 0
    copies: dict[int, tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]]] = {}

    def to_host(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        version = -1 if leaf.is_inference() else leaf._version  # which changes of inference tensors do not count
        if (known := copies.get(id(leaf))) and known[0]() is leaf and known[1] == version != -1:
            host = known[2]()
            if host is not None:
                return host
        host = leaf.detach().to("cpu", copy=True)
        copies[id(leaf)] = weakref.ref(leaf), version, weakref.ref(host)
        return host

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        place, seen = seen, seen + 1
        if place >= limit:  # algorithm R: call n replaces one of those kept with probability limit / (n + 1)
            slot = int(torch.randint(seen, (), generator=generator))
            if slot >= limit:
                return
            kept.pop(slot)  # before its place is taken, so that no more than `limit` are ever held
        for key in [key for key, (leaf, _, _) in copies.items() if leaf() is None]:
            del copies[key]
        copied = pytree.tree_map(to_host, (args, kwargs))
        kept.append((place, Call(tuple(copied[0]), dict(copied[1]))))

    handle = module.register_forward_pre_hook(take, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    if not kept:
        raise ValueError(
            f"{type(module).__name__} was not called while the calibration ran; pass the module that is to be "
            "quantized, and a function that calls it"
        )
    return [call for _, call in sorted(kept, key=lambda pair: pair[0])]


def digest(calls: Iterable[Call]) -> str:
    """SHA-256 of samples: names, shapes, dtypes and values of all tensors, and other arguments as text."""
    found = hashlib.sha256()
    for call in calls:
        leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
        found.update(repr(structure).encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                found.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
                found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                found.update(re.sub(r" at 0x[0-9a-f]+", "", repr(leaf)).encode())
    return found.hexdigest()
