"""The `tritonq` command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="tritonq",
    help="Quantize models: any format, at memory-copy speed, no full-size intermediate, loads everywhere.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True, highlight=False)


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Search(StrEnum):
    mse = "mse"
    rule = "rule"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Device = Annotated[
    str | None, typer.Option(help="Where to compute, such as cuda or cpu; default: a GPU if there is one.")
]


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1) + "\n")


def _table(columns: Iterable[str], title: str | None = None) -> Table:
    """A table whose cells are folded, never cut."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


@app.command()
def quantize(
    src: Annotated[str, typer.Argument(help="A folder of safetensors, a hub id, or a GGUF file.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write; it appears when it is complete.")],
    scheme: Annotated[
        str, typer.Option(help="Such as W4A16, W8A16, FP8_DYNAMIC, MXFP4A16, NVFP4; see `tritonq formats`.")
    ],
    group_size: Annotated[
        int | None, typer.Option(help="Elements that share a scale, for schemes with groups of integers or of a table.")
    ] = None,
    search: Annotated[
        Search | None,
        typer.Option(help="Scales: mse, the smallest squared error (default up to 4 bits), or rule, the format's own."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Leave a module alone: its full name, its last name, or re:REGEX. Repeatable."),
    ] = None,
    device: Device = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert floating tensors to this first.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of one output file.")] = "2GB",
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it is a checkpoint.")] = False,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Tune on sample data: signround, gptq, awq, smoothquant, imatrix, bias or rtn; several run one after "
            "the other. Comma-separated or repeated. A run that was killed goes on."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Text: a .txt, .json or .jsonl file or a data set of the hub; default: pydoc_data.topics."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples to calibrate with; default 128.")] = None,
    seqlen: Annotated[int | None, typer.Option(min=1, help="Tokens of a sample; default 2048.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples of an iteration; by default as many as the method likes.")
    ] = None,
    iters: Annotated[int | None, typer.Option(min=1, help="Iterations a block, of methods that iterate.")] = None,
    inputs: Annotated[
        str | None, typer.Option(help="Scales of inputs: dynamic, or static by minmax, percentile or mse.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of samples and of all that is random; default 0.")] = None,
    report_to: Annotated[
        Path | None, typer.Option("--report", help="A folder for the calibration's report.json and report.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint, file to file."""
    import resource

    import torch

    from tritonq.io.checkpoint import quantize_checkpoint
    from tritonq.io.report import by_kind

    options = {
        "data": data, "samples": samples, "seqlen": seqlen, "batch": batch, "iters": iters, "inputs": inputs,
        "seed": seed, "report": report_to,
    }  # fmt: skip
    with _notes_of_warnings():
        report = quantize_checkpoint(
            src, dst, scheme, group_size=group_size, search={None: None, Search.mse: "mse", Search.rule: False}[search],
            ignore=tuple(ignore or ()), device=device, force=force,
            dtype=None if dtype is None else getattr(torch, dtype.value), max_shard_size=max_shard_size,
            progress=not as_json, calibration=_calibration(_names(calibrate), options),
        )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if as_json:
        _print_json({**report.to_dict(), "peak_rss_bytes": peak})
        return
    table = _table(("layers", "count", "relative error", "SQNR"), f"{report.scheme}: {report.format}")
    for kind, errors in by_kind(report.layers).items():
        total = sum(errors[1:], errors[0])
        table.add_row(kind, str(len(errors)), f"{total.relative:.4f}", _db(total.sqnr))
    out.print(table)
    if report.calibration is not None:
        _print_losses(report.calibration)
    for note in report.notes:
        out.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    speed = report.bytes_before / max(report.seconds, 1e-9)
    out.print(
        f"{_size(report.bytes_before)} -> {_size(report.bytes_after)}, "
        f"{report.bits_per_weight:.2f} bits a quantized weight, "
        f"{report.quantized} weights quantized, {report.dense} tensors kept, "
        f"{report.seconds:.1f} s ({_size(speed)}/s), "
        f"peak {_size(peak)} resident, mapped files included",
        highlight=False,
        soft_wrap=True,
    )
    out.print(f"wrote {report.path}", markup=False, highlight=False, soft_wrap=True)


def _calibration(methods: list[str] | None, options: dict[str, Any]) -> Any:
    """The `Calibration` of these options, None without a method."""
    given = {name: value for name, value in options.items() if value is not None}
    if methods is None:
        for name in given:
            raise ValueError(f"--{name} is for calibration; pass --calibrate METHOD, such as signround, as well")
        return None
    from tritonq.calibrate.calibration import Calibration

    return Calibration(method=methods, **given)


@contextlib.contextmanager
def _notes_of_warnings() -> Iterator[None]:
    """Warnings as one line each on stderr, without a line of source code."""
    import warnings

    def show(message: Any, *details: Any, **more: Any) -> None:
        err.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _print_losses(calibration: dict[str, Any]) -> None:
    table = _table(("block", "loss before", "after", "seconds"), f"calibrated with {calibration['method']}")
    for row in calibration["blocks"]:
        losses = [row[key] for key in ("loss_before", "loss_after")]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        table.add_row(row["name"], *("" if loss is None else f"{loss:.3e}" for loss in losses), seconds)
    out.print(table)


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="The folder of a checkpoint, quantized or not.")], as_json: Json = False
) -> None:
    """Say what a checkpoint holds: scheme, tensors, sizes."""
    from tritonq.io.inspection import inspect_checkpoint

    content = inspect_checkpoint(path)
    if as_json:
        _print_json(content)
        return
    table = _table(("tensors", "count", "dtype", "example shape", "size"), content["description"])
    for row in content["kinds"]:
        table.add_row(
            row["name"], str(row["count"]), row["dtype"], "x".join(map(str, row["shape"])), _size(row["bytes"])
        )
    out.print(table)
    if content["ignore"]:
        out.print(f"left dense: {', '.join(content['ignore'])}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"{content['files']} file(s), {_size(content['bytes'])}", highlight=False)


@app.command()
def formats(as_json: Json = False) -> None:
    """List schemes and formats."""
    from tritonq.formats import FORMATS
    from tritonq.integrations.tables import format_rows, scheme_rows

    if as_json:
        _print_json({"schemes": scheme_rows(), "formats": format_rows()})
        return
    for title, rows in (("schemes", scheme_rows()), ("formats", format_rows())):
        table = _table(rows[0], title)
        for row in rows:
            table.add_row(*[str(value) for value in row.values()])
        out.print(table)
    out.print(
        f"{len(FORMATS)} formats have their own name; any "
        "<element>_<tensor|channel|gN|bRxC>[_asym][_<scale type>[_sN]][_<rule>] works too, such as int3_g64_asym",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="The folder of a causal language model, dense or quantized, or a hub id.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="A text file; default: the standard library's pydoc_data.topics.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of the text to take.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    prompt: Annotated[str | None, typer.Option(help="Also continue this text, greedily.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a language model, through transformers alone."""
    import torch

    from tritonq.calibrate.data import default_text
    from tritonq.integrations.perplexity import complete, load, perplexity

    content = default_text() if text is None else _read(text)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded, tokenizer = load(model, where)
    result: dict[str, Any] = {"model": model, "windows": windows, "length": length}
    result["perplexity"] = perplexity(loaded, tokenizer, content, windows, length)
    if prompt is not None:
        result["text"] = complete(loaded, tokenizer, prompt)
    if as_json:
        _print_json(result)
        return
    out.print(f"perplexity {result['perplexity']:.4f} ({windows} x {length} tokens)", highlight=False)
    if prompt is not None:
        out.print(result["text"], markup=False, highlight=False, soft_wrap=True)


Names = Annotated[list[str] | None, typer.Option(help="Comma-separated or repeated.")]


def _names(values: list[str] | None) -> list[str] | None:
    """All names of an option that takes lists and may be repeated."""
    return [name for value in values for name in value.split(",") if name] if values else None


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,12}(x[0-9]{1,12})*", text.lower()):
        raise ValueError(f"a shape is written as 4096x14336, got {text!r}")
    return tuple(int(extent) for extent in text.lower().split("x"))


@app.command()
def bench(
    formats: Names = None,
    shape: Annotated[str | None, typer.Option(help="ROWSxCOLUMNS; default 4096x14336.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="64 KiB to 2 GiB instead of one shape.")] = False,
    sizes: Annotated[list[str] | None, typer.Option(help="Some of the sizes, such as 64K,2M,112M,2G.")] = None,
    dtypes: Names = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(help="torch.compile, torchao, bitsandbytes, or none; default: all, none in a sweep."),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds; what would not fit is left out.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that compile everything before it is timed.")] = 0,
    path: Annotated[Path | None, typer.Option("--out", help="Write the results to this JSON file.")] = None,
    results: Annotated[Path | None, typer.Option(help="Use this result file instead of measuring.")] = None,
    check: Annotated[Path | None, typer.Option(help="Compare with this result file; exit code 1 if slower.")] = None,
    tolerance: Annotated[float, typer.Option(help="Allowed loss, of the share of a copy.")] = 0.05,
    plot: Annotated[Path | None, typer.Option(help="Write the roofline picture, .svg or .png.")] = None,
    as_json: Json = False,
) -> None:
    """Time every format on this GPU, beside a copy and beside peers, verified first."""
    from tritonq.bench import command

    wanted = command.options(
        _names(formats), shape, _names(sizes) or ([] if sweep else None), _names(dtypes), _names(peers), budget,
        " ".join(["tritonq", *sys.argv[1:]]), workers,
    )  # fmt: skip
    sys.exit(
        command.execute(
            wanted, out=path, results=results, check=check, tolerance=tolerance, picture=plot, as_json=as_json
        )
    )


@app.command()
def tune(
    formats: Names = None,
    ops: Names = None,
    shapes: Annotated[list[str] | None, typer.Option(help="Such as 4096x14336. Comma-separated or repeated.")] = None,
    dtypes: Names = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer candidates, formats and shapes.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Show the entries there are; measure nothing.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where entries go; default: your cache folder, which tritonq reads.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure kernel configurations on this GPU and keep the best."""
    from tritonq import tune as tuner

    ops, formats, dtypes = _names(ops), _names(formats), _names(dtypes)
    sizes = None if shapes is None else [_shape(text) for text in _names(shapes) or []]
    found = tuner.cases(ops, formats, sizes, dtypes, quick)
    if listing:
        _list_entries(ops, formats, dtypes, as_json)
        return
    where = tuner.require_gpu(device)
    with _tuning_progress(len(found), quiet=as_json) as progress:
        outcomes = tuner.tune(ops, formats, sizes, dtypes, where, quick, progress, folder=folder)
    if as_json:
        _print_json([outcome.to_dict() for outcome in outcomes])
    else:
        table = _table(("op", "input", "us", "before", "choice"))
        for o in outcomes:
            times = ("", "") if o.us is None or o.heuristic_us is None else (f"{o.us:.1f}", f"{o.heuristic_us:.1f}")
            shape = "x".join(map(str, o.shape))
            table.add_row(f"{o.op} {o.format}", f"{shape} {o.dtype}", *times, _choice(o.choice))
        out.print(table)
        for o in outcomes:
            for reason in o.skipped:
                out.print(f"skipped: {o.op} {o.format} {reason}", markup=False, highlight=False, soft_wrap=True)
    errors = [o.error for o in outcomes if o.error]
    if errors:
        raise ValueError(f"{len(errors)} of {len(outcomes)} could not be tuned; the first: {errors[0]}")


def _choice(choice: dict[str, int] | None) -> str:
    if choice is None:
        return "none"
    return " ".join(f"{k}={v}" for k, v in choice.items()) or "heuristic"


@contextlib.contextmanager
def _tuning_progress(total: int, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A bar on stderr."""
    if quiet:
        yield None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=escape(text))


def _list_entries(ops: list[str] | None, formats: list[str] | None, dtypes: list[str] | None, as_json: bool) -> None:
    """The entries on disk, of the ops, formats and dtypes asked for."""
    from tritonq import tuning_cache

    found = [
        one for one in tuning_cache.every_entry()
        if (not ops or one.op in ops)
        and (not formats or one.entry.format in formats)
        and (not dtypes or one.entry.fields.dtype in dtypes)
    ]  # fmt: skip
    if as_json:
        _print_json(
            [
                {"origin": one.origin, "arch": one.arch, "gpu": one.gpu, "op": one.op, **one.entry.row(),
                 "stale": one.entry.stale}
                for one in found
            ]
        )  # fmt: skip
        return
    table = _table(("gpu", "op", "input", "us", "before", "choice", "from"))
    for one in found:
        entry = one.entry
        origin = one.origin + (", stale" if entry.stale else "")
        size = f"{entry.fields.layout} 2^{entry.size.log2_rows}x2^{entry.size.log2_columns}"
        table.add_row(
            f"{one.arch} {one.gpu}", f"{one.op} {entry.format}", f"{size} {entry.fields.dtype}", f"{entry.us:.1f}",
            f"{entry.heuristic_us:.1f}", _choice(entry.config), origin,
        )  # fmt: skip
    out.print(table)
    folders = ", ".join(str(p) for p in (tuning_cache.shipped_folder(), tuning_cache.user_folder()) if p)
    out.print(f"{len(found)} entries in {folders}", markup=False, highlight=False, soft_wrap=True)
    if any(one.entry.stale for one in found):
        out.print("stale: measured with other kernel sources; used all the same", highlight=False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; pass a plain text file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); pass a plain text file") from None


@app.command()
def demo(
    path: Annotated[Path, typer.Option("--out", help="Where the checkpoints go.")] = Path("demo-output"),
    model: Annotated[
        str | None, typer.Option(help="A folder, GGUF file or hub id instead of SmolLM2-135M-Instruct.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens for the perplexity.")] = 4,
) -> None:
    """Quantize a small real model in four ways, load each with transformers, and compare."""
    from tritonq.integrations.demo import run

    rows = run(path, model, lambda line: err.print(line, style="dim"), windows)
    table = _table(("scheme", "size", "bits", "perplexity", "over dense", "SQNR", "seconds"))
    for row in rows:
        cells = (_size(row["bytes"]), f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", f"{row['relative']:.3f}")
        sqnr, seconds = row["sqnr_db"], row["seconds"]
        table.add_row(
            row["scheme"], *cells, "" if sqnr is None else _db(sqnr), "" if seconds is None else f"{seconds:.1f}"
        )
    out.print(table)
    for row in rows:
        out.print(f"{row['scheme']:12} {' '.join(row['text'].split())}", markup=False, highlight=False, soft_wrap=True)
    paths = {row["scheme"]: row["path"] for row in rows}
    last = paths.pop("W4A16")
    for written in (*[p for name, p in paths.items() if name != "dense"], last):
        out.print(f"wrote {written}", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        app(standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error))
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error}\n")
            _fail("no command given (see tritonq --help)")
        if hasattr(error, "format_message"):  # a usage error of the command line's parser
            _fail(f"{error.format_message()} (see tritonq --help)")
        if type(error).__name__ == "Abort":
            sys.exit(130)
        if os.environ.get("TRITONQ_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error} (this is a defect of tritonq; TRITONQ_DEBUG=1 shows where)")


def _fail(message: str) -> None:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
