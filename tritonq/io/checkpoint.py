"""File to file: quantize a checkpoint without holding the model.

Plan all output files from the headers of the input, then stream: read a weight through the memory map, quantize it,
write its tensors to their places. In memory is one weight's output and a tile.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tritonq import ops
from tritonq.io import card, compressed_tensors, folder, structure, writer
from tritonq.io.plan import Plan, make_plan
from tritonq.io.quantizer import Quantizer
from tritonq.io.report import Report
from tritonq.io.source import Source, open_source
from tritonq.nn.schemes import Scheme, get_scheme
from tritonq.nn.select import Selection

if TYPE_CHECKING:
    from tritonq.calibrate.calibration import Calibration


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme,
    *,
    group_size: int | None = None,
    search: str | bool | None = None,
    ignore: Iterable[str] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "2GB",
    force: bool = False,
    progress: bool = True,
    calibration: Calibration | None = None,
) -> Report:
    """Quantize the checkpoint `src` to the folder `dst`, which transformers and vLLM load without tritonq.

    Args:
        src: a folder of safetensors, a hub id, or a GGUF file.
        dst: appears when complete. A run that was killed is resumed by the same call, to the same bytes.
        scheme: a Scheme or its name, such as "W4A16"; `tritonq.SCHEMES` lists them.
        group_size: elements of a row that share a scale, where the scheme leaves that open.
        search: "mse" takes the scale of each group with the smallest squared error, False the one of the format's rule,
            None "mse" for codes of 4 bits and less.
        ignore: modules to leave dense besides the defaults: full names, last names, or `re:` and a regex.
        device: where weights are quantized; by default a GPU if there is one. The bytes do not depend on it.
        dtype: convert floating tensors to this first, as if the source were stored in it.
        max_shard_size: bytes of an output file: a number, or a text such as "2GB".
        force: replace a checkpoint at `dst`.
        progress: show a bar if stderr is a terminal.
        calibration: a `tritonq.Calibration` tunes the blocks of the model, one at a time in memory, on what sample data
            makes of them; texts are tokenized with the tokenizer in `src`. What is in no block is rounded to nearest. A
            run that was killed goes on after the last block that it finished.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError, OSError: one line naming the culprit and
            the way out; `dst` is then as it was before.
    """
    begin = time.perf_counter()
    scheme, limit = get_scheme(scheme), writer.parse_size(max_shard_size)
    search = scheme.search(search)
    compressed_tensors.layout(scheme.weight_format(dtype or torch.bfloat16, group_size), scheme.input_format)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    selection, target = Selection(ignore), _device(device)
    if dtype is not None and dtype not in ops.FLOATS:
        raise ValueError(f"dtype must be bfloat16, float16, float32 or float64, got {dtype}")
    destination = folder.Destination(dst, force, src)
    with open_source(src, destination.scratch, dtype) as source:
        if "quantization_config" in source.config or "compression_config" in source.config:
            raise ValueError(
                f"{source.name} is already quantized (its config.json says so); start from the original model"
            )
        found = structure.of_source(source)
        plan = make_plan(source, found, scheme, selection, group_size, dtype)
        fingerprint: dict[str, Any] = {
            "source": source.stamp,
            "scheme": repr(scheme),
            "options": [group_size, search, list(ignore), str(dtype), limit],
            "version": _version(),
        }
        job = None
        if calibration is not None:
            from tritonq.calibrate import checkpoint as streamed

            job = streamed.prepare(
                calibration, source, found, plan, scheme, group_size=group_size, search=search, device=target,
                progress=progress,
            )  # fmt: skip
            fingerprint["calibration"] = job.fingerprint
        notes = list(plan.notes)
        with destination.writing() as path:
            decided = None
            if job is not None and calibration is not None:
                decided = job.run(destination.work, fingerprint)
                calibration.result = decided.report
            quantizer = Quantizer(source, plan, scheme, dtype, target, search, decided)
            files = writer.split(quantizer.entries(), limit)
            manifest = folder.Manifest(path, fingerprint)
            with _progress(files, progress) as done:
                folder.write_shards(path, files, manifest, quantizer.notes, quantizer.restore, done)
            config, changed = _config(source, found, plan, scheme, dtype, quantizer)
            notes += changed
            folder.copy_companions(source.folder, path)
            writer.write_json(path / "config.json", config)
            report = _report(source, plan, scheme, quantizer, files, notes, str(dst))
            report.calibration = decided.report.to_dict() if decided and decided.report else None
            static = any(quantizer.static(weight) for weight in plan.weights)
            (path / "README.md").write_text(_card(source, plan, scheme, report, static), encoding="utf-8")
    report.seconds = time.perf_counter() - begin
    return report


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return found


def _version() -> str:
    try:
        return metadata.version("tritonq")
    except metadata.PackageNotFoundError:
        return "0"


def _main_dtype(plan: Plan) -> torch.dtype:
    """dtype of most of the quantized elements."""
    counts: collections.Counter[torch.dtype] = collections.Counter()
    for weight in plan.weights:
        counts[weight.dtype] += weight.shape[0] * weight.shape[1]
    return counts.most_common(1)[0][0]


def _config(
    source: Source,
    found: structure.Structure,
    plan: Plan,
    scheme: Scheme,
    dtype: torch.dtype | None,
    quantizer: Quantizer,
) -> tuple[dict[str, Any], list[str]]:
    """config.json of the export. Readers cast scales to its dtype, so that has to be the dtype of the weights."""
    name = str(_main_dtype(plan))[6:]
    config, notes = _with_dtype(source.config, name if dtype else None), []
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) not in (None, name):
        notes.append(f"config.json said {config[key]} and the weights are {name}: it says {name} now")
    config[key] = name
    dynamic = [weight for weight in plan.weights if not quantizer.static(weight)]
    names = [found.roles[w.source].module if found.roles[w.source].kind == "linear" else w.name for w in dynamic]
    config["quantization_config"] = compressed_tensors.quantization_config(
        scheme, plan.weights[0].fmt, list(plan.ignore), len(dynamic) < len(plan.weights), names
    )
    return dict(sorted(config.items())), notes


def _with_dtype(config: Any, name: str | None) -> Any:
    """A copy of a config with the dtypes in it, also those of nested configs, replaced."""
    if not isinstance(config, dict):
        return config
    return {
        key: name if name and key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, name)
        for key, value in config.items()
    }


def _report(
    source: Source,
    plan: Plan,
    scheme: Scheme,
    quantizer: Quantizer,
    files: dict[str, list[writer.Entry]],
    notes: list[str],
    path: str,
) -> Report:
    entries = {entry.name: entry.nbytes for group in files.values() for entry in group}
    elements = sum(weight.shape[0] * weight.shape[1] for weight in plan.weights)
    layers = {weight.name: quantizer.errors[weight.name] for weight in plan.weights}
    return Report(
        path=path,
        scheme=scheme.name,
        format=plan.weights[0].fmt.name,
        quantized=len(plan.weights),
        dense=len(plan.dense),
        bytes_before=source.nbytes,
        bytes_after=sum(entries.values()),
        bits_per_weight=8 * sum(weight.fmt.nbytes(weight.shape) for weight in plan.weights) / max(1, elements),
        layers=layers,
        notes=tuple(notes),
        seconds=0.0,
    )


def _card(source: Source, plan: Plan, scheme: Scheme, report: Report, static: bool) -> str:
    done = report.calibration
    return card.model_card(
        base=source.name,
        scheme=scheme,
        fmt=plan.weights[0].fmt,
        layers=report.layers,
        quantized=report.quantized,
        dense=report.dense,
        bits_per_weight=report.bits_per_weight,
        notes=report.notes,
        causal=any("CausalLM" in name for name in source.config.get("architectures") or ()),
        licence=card.licence(source.folder),
        static=static,
        calibration=None if done is None else f"{done['method']} on {done['options']['samples']} samples",
    )


@contextmanager
def _progress(files: dict[str, list[writer.Entry]], show: bool) -> Iterator[Any]:
    """A callback for finished entries; a bar with the time left where somebody watches."""
    import sys

    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("quantizing", total=sum(entry.nbytes for group in files.values() for entry in group))
        yield lambda entry: bar.update(task, advance=entry.nbytes, description=entry.name[-48:])
