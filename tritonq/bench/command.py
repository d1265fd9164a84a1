"""What `tritonq bench` and `python -m bench.kernels` do once their options are parsed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tritonq.bench import cases, measure, plot, report
from tritonq.bench.measure import Options

SWEEP = (*cases.FORMATS_OF_ISSUE, "e3m4_g48")  # the formats whose sizes are swept


def options(
    formats: list[str] | None,
    shape: str | None,
    sizes: list[str] | None,
    dtypes: list[str] | None,
    peers: list[str] | None,
    budget: float | None,
    command: str,
    workers: int = 0,
) -> Options:
    """Defaults: every format on one shape with every peer; with `sizes` (all where empty), SWEEP without peers.

    Raises:
        ValueError: unknown names or sizes, or fewer than 0 workers.
    """
    if shape and sizes is not None:
        raise ValueError("--shape is one shape and --sizes a sweep; give one of them")
    if workers < 0:
        raise ValueError(f"workers are processes that compile, 0 or more, got {workers}")
    names = list(cases.SIZES) if sizes == [] else sizes or [shape or "112M"]
    labels = peers if peers is not None else [] if sizes is not None else list(measure.peers.LABELS)
    labels = [label for label in labels if label != "none"]
    for kind, given, known in (("peer", labels, measure.peers.LABELS), ("dtype", dtypes or [], measure.DTYPES)):
        for name in given:
            if name not in known:
                raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return Options(
        formats=tuple(formats or (SWEEP if sizes is not None else cases.all_formats())),
        shapes=tuple(cases.parse_shape(name) for name in names),
        dtypes=tuple(dtypes or ("bfloat16",)),
        peers=tuple(labels),
        budget=budget,
        workers=workers,
        command=command,
    )


def execute(
    wanted: Options,
    *,
    out: Path | None = None,
    folder: Path | None = None,
    results: Path | None = None,
    check: Path | None = None,
    tolerance: float = 0.05,
    picture: Path | None = None,
    as_json: bool = False,
) -> int:
    """Measure, or read `results`; write, print, draw, compare. The exit code: 1 for a regression or a wrong result.

    Args:
        out: the JSON file. Left out, `folder`/<gpu>/kernels.json (sweep.json for several shapes) where there is a
            folder and no `check`, so that a comparison does not overwrite what it compares with.
        results: a result file to use instead of measuring; needs no GPU.
        check: committed results to compare with.
        picture: where the roofline picture goes.

    Raises:
        ValueError: no GPU, unknown names, unreadable files.
    """
    committed = report.read(check) if check else None

    def say(line: str) -> None:
        print(line, file=sys.stderr if as_json else sys.stdout, flush=True)

    if results is not None:
        result = report.read(results)
    else:
        measure.require_gpu()
        if out is None and folder is not None and check is None:
            name = "sweep.json" if len(wanted.shapes) > 1 else "kernels.json"
            out = folder / report.slug(measure.gpu_name()) / name
        result = measure.run(wanted, say, lambda partial: report.write(partial, out) if out else None)
        if out is not None:
            report.write(result, out)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        report.print_table(result)
    if out is not None and results is None:
        say(f"wrote {out}")
    _summary(result, say)
    if picture is not None:
        plot.draw(result, picture)
        say(f"wrote {picture}")
    slower = _compare(result, committed, tolerance, say) if committed is not None else []
    return 1 if slower or result.get("failed") else 0


def _summary(result: report.Row, say: measure.Say) -> None:
    shares = [row["of_copy"] for row in result["rows"] if row["format"] in cases.FORMATS_OF_ISSUE]
    if shares:
        say(f"lowest share of a copy among {', '.join(cases.FORMATS_OF_ISSUE)}: {100 * min(shares):.0f}%")
    if result.get("left_out"):
        say(f"out of time (budget {result['budget_s']} s): {len(result['left_out'])} formats and shapes were left out")
    for line in result.get("failed", []):
        say(f"FAILED {line}")


def _compare(result: report.Row, committed: report.Row, tolerance: float, say: measure.Say) -> list[str]:
    slower, missing = report.regressions(result, committed, tolerance)
    if committed.get("gpu") != result.get("gpu"):
        say(f"the committed results are of another GPU, {committed.get('gpu')}")
    if missing:
        say(f"{len(missing)} committed rows were not measured again")
    for line in slower:
        say(f"SLOWER {line}")
    say(f"{len(slower)} regressions beyond {100 * tolerance:g}% of {len(committed['rows']) - len(missing)} rows")
    return slower
