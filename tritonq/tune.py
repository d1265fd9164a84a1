"""The tuner: run every candidate of a kernel, check its bits, time it, keep the best (`tritonq tune`).

With TRITONQ_AUTOTUNE=1 in the environment when tritonq is imported, `tune_on_first_use` has been called.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonq import ops as engine
from tritonq import plans, tiling, timing, tuning, tuning_cache
from tritonq.formats import FORMATS, Format, Shape, get_format
from tritonq.launch import as_integers
from tritonq.reference import Parts
from tritonq.tuning_files import DTYPES, OPS, Choice, Entry, Gpu

QUICK_FORMATS = ("int4_g128", "int8_channel", "fp8_e4m3_channel", "mxfp8", "mxfp4", "nvfp4")
QUICK_OPS = ("quantize", "qdq", "dequantize")
SHAPES: tuple[Shape, ...] = ((1024, 1024), (4096, 4096), (4096, 14336), (16384, 16384))
QUICK_SHAPES: tuple[Shape, ...] = ((4096, 14336),)
TIE = 1.02  # an earlier candidate wins within 2%
_busy = threading.Lock()  # held while measuring: the tuner's own calls look choices up and must not tune

Call = Callable[[], Parts]
Timer = Callable[[Sequence[Call]], float]  # equal calls on buffers of their own to microseconds of one
Progress = Callable[[int, int, str], None]  # cases done, cases in all, the next one


@dataclass(frozen=True)
class Case:
    """A kernel (`tuning_cache.OPS`) for one format, shape and dtype."""

    op: str
    fmt: Format
    shape: Shape
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.fmt.name} {'x'.join(map(str, self.shape))} {dtype}"

    @property
    def matrix(self) -> tiling.Matrix:
        """What the kernel sees of a contiguous tensor."""
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        whole = self.op == "keys" and (self.fmt.tensor_scale or self.fmt.group[0] == -1)
        return plans._geometry(self.shape, strides, plans._ONE_GROUP if whole else self.fmt)[0]


@dataclass
class Outcome:
    """What became of a case: its choice, or an error; candidates that were left out, and why."""

    op: str
    format: str
    shape: Shape
    dtype: str
    choice: Choice | None = None
    us: float | None = None
    heuristic_us: float | None = None
    tried: int = 0
    skipped: list[str] = field(default_factory=list)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _known(kind: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    names, known = list(dict.fromkeys(names)), list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return names


def cases(
    ops: Sequence[str] | None = None,
    formats: Sequence[str | Format] | None = None,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Case]:
    """What there is to tune; kernels that a format does not use are left out.

    Raises:
        ValueError: an unknown op, format or dtype, or a shape that a format cannot take.
    """
    chosen = _known("op", ops or (QUICK_OPS if quick else OPS), OPS)
    types = [getattr(torch, name) for name in _known("dtype", dtypes or ("bfloat16",), DTYPES)]
    found = [get_format(f) for f in formats or (QUICK_FORMATS if quick else FORMATS)]
    result = []
    for fmt, shape, dtype, op in itertools.product(found, shapes or (QUICK_SHAPES if quick else SHAPES), types, chosen):
        if not shape or min(shape) < 1:
            raise ValueError(f"a shape has positive extents, got {shape}; write it as 4096x14336")
        fmt.scale_shape(tuple(shape))  # raises where the format cannot share scales over this shape
        if tuning.serves(op, fmt, shape[-1]):
            result.append(Case(op, fmt, tuple(shape), dtype))
    return result


# --------------------------------------------------------------------------------------------------------- measuring


def _quick_time(calls: Sequence[Call]) -> float:
    return timing.device_us(calls, samples=(7, 7))


def _copies(case: Case, device: torch.device) -> int:
    """Buffers that together exceed the L2 cache three times."""
    if device.type != "cuda":
        return 1
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    moved = math.prod(case.shape) * case.dtype.itemsize + case.fmt.nbytes(case.shape)
    return min(64, max(2, math.ceil(3 * cache / moved)))


def _call(case: Case, x: Tensor) -> Call:
    """The op that launches this kernel on x, and as little else as possible."""
    fmt, shape, op = case.fmt, case.shape, case.op
    tensor_scale = engine.tensor_scale(x, fmt) if fmt.tensor_scale else None
    if op == "keys" and fmt.tensor_scale:
        return lambda: {"tensor_scale": engine.tensor_scale(x, fmt)}
    if op in ("quantize", "row_quantize", "scale", "keys"):
        return lambda: engine.quantize(x, fmt, tensor_scale=tensor_scale)
    if op in ("qdq", "row_qdq"):
        return lambda: {"y": engine.qdq(x, fmt, tensor_scale=tensor_scale)}
    parts = engine.quantize(x, fmt, tensor_scale=tensor_scale)
    if op == "dequantize":
        return lambda: {"y": engine.dequantize(parts, fmt, shape, case.dtype)}
    scale, zero_point = parts["scale"], parts.get("zero_point")
    if op == "apply":
        return lambda: engine.quantize(x, fmt, scale=scale, zero_point=zero_point, tensor_scale=tensor_scale)
    return lambda: {"y": engine.qdq(x, fmt, scale=scale, zero_point=zero_point, tensor_scale=tensor_scale)}


def _same(a: Parts, b: Parts) -> bool:
    """Equal bits."""
    return a.keys() == b.keys() and all(torch.equal(as_integers(a[k]), as_integers(b[k])) for k in a)


@contextlib.contextmanager
def _choosing(op: str, choice: Choice) -> Iterator[None]:
    plans.forget()
    try:
        with tuning.forced(op, choice):
            yield
    finally:
        plans.forget()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}"


def _recover(device: torch.device) -> None:
    """After a candidate that failed; raises where it took the GPU's context with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def best_of(times: Sequence[float]) -> int:
    """Index of the first time within 2% of the shortest."""
    limit = min(times) * TIE
    return next(i for i, time in enumerate(times) if time <= limit)


def tune_case(case: Case, device: torch.device, timer: Timer, quick: bool = False) -> Outcome:
    """Measure the candidates of a case. The heuristic's output is checked against the CPU path, every other's against
    the heuristic's, before its time counts; candidates that fail are skipped."""
    dtype = str(case.dtype).removeprefix("torch.")
    outcome = Outcome(case.op, case.fmt.name, case.shape, dtype)
    try:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(case.shape, generator=generator, device=device).to(case.dtype)
        with _choosing(case.op, {}):
            calls = [_call(case, x.clone()) for _ in range(_copies(case, device))]
            expected = calls[0]()
            if not _same({k: v.cpu() for k, v in expected.items()}, _call(case, x.cpu())()):
                outcome.error = f"GPU and CPU differ on {case}; this is a defect, please report it"
                return outcome
    except Exception as error:
        outcome.error = f"{case}: {_reason(error)}"
        _recover(device)
        return outcome
    m, times, kept = case.matrix, [], []
    for choice in tuning.candidates(case.op, case.fmt, m.batch * m.rows, m.columns, quick):
        try:
            with _choosing(case.op, choice):
                if not _same(calls[0](), expected):
                    raise ArithmeticError("other bits than the heuristic's; this is a defect, please report it")
                time = timer(calls)
            if not 0 < time < math.inf:
                raise ArithmeticError(f"measured {time} us")
        except Exception as error:
            outcome.skipped.append(f"{choice or 'heuristic'}: {_reason(error)}")
            _recover(device)
            continue
        kept.append(choice)
        times.append(time)
    outcome.tried = len(times)
    if not kept or kept[0]:
        outcome.error = f"{case}: {outcome.skipped[0] if outcome.skipped else 'no candidates'}"
        return outcome
    best = best_of(times)
    outcome.choice, outcome.us, outcome.heuristic_us = kept[best], times[best], times[0]
    return outcome


# ------------------------------------------------------------------------------------------------------------ tuning


class _Ranks:
    """Rank 0 of an initialised process group measures and writes; the others take what it found, case by case."""

    def __init__(self) -> None:
        distributed = torch.distributed
        self.several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self.first = not self.several or distributed.get_rank() == 0

    def share(self, make: Callable[[], Any]) -> Any:
        """`make()` of rank 0, on all ranks; its exception too."""
        if not self.several:
            return make()
        box: list[Any] = [None]
        failure: Exception | None = None
        if self.first:
            try:
                box = [(make(), None)]
            except Exception as error:
                failure = error
                box = [(None, _reason(error))]
        torch.distributed.broadcast_object_list(box, src=0)
        if failure is not None:
            raise failure
        value, message = box[0]
        if message is not None:
            raise RuntimeError(f"rank 0 could not tune: {message}")
        return value


def require_gpu(device: str | torch.device | None = None) -> torch.device:
    """The CUDA or ROCm device to tune on. ValueError without one."""
    if not torch.cuda.is_available():
        raise ValueError("no GPU: kernels are tuned on the GPU that they run on; `tritonq tune --list` shows entries")
    found = torch.device("cuda" if device is None else device)
    if found.type != "cuda":
        raise ValueError(f"kernels are tuned on a GPU, got device {str(found)!r}; pass cuda or cuda:N")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())


def tune(
    ops: Sequence[str] | None = None,
    formats: Sequence[str | Format] | None = None,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    quick: bool = False,
    progress: Progress | None = None,
    *,
    folder: Path | None = None,
    timer: Timer | None = None,
    gpu: Gpu | None = None,
) -> list[Outcome]:
    """Tune kernels, write the entries (`tuning_cache.store`) and use them in this process from now on.

    In an initialised process group rank 0 does that and all ranks use its entries.

    Args:
        ops, formats, shapes, dtypes: what to tune; default: every op and format, four shapes, bfloat16.
        quick: fewer candidates, formats and shapes.
        folder: where entries go instead of the user's folder.
        timer, gpu: instead of `timing.device_us` and the GPU of `device`; the device may then be the CPU.

    Raises:
        ValueError: nothing to tune, an unknown name, or no GPU. OSError: the folder cannot be written.
    """
    todo = cases(ops, formats, shapes, dtypes, quick)
    if not todo:
        raise ValueError(f"no kernel of {', '.join(ops or OPS)} serves these formats and shapes; choose others")
    where = require_gpu(device) if timer is None or gpu is None else torch.device(device or "cpu")
    clock = timer or (_quick_time if quick else timing.device_us)
    ranks = _Ranks()

    def begin() -> Gpu:
        found = gpu or tuning_cache.gpu_of(where)
        tuning_cache.make_folder(found, folder)  # an error now, not after minutes of measuring
        return found

    found: Gpu = ranks.share(begin)
    outcomes = []
    with _busy, torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext():
        for number, case in enumerate(todo):
            if progress is not None:
                progress(number, len(todo), str(case))

            outcome, entries = ranks.share(functools.partial(_tune_and_store, case, where, clock, quick, found, folder))
            tuning_cache.remember(found, case.op, entries)
            plans.forget()
            outcomes.append(outcome)
    if progress is not None:
        progress(len(todo), len(todo), "")
    return outcomes


def _tune_and_store(
    case: Case, device: torch.device, timer: Timer, quick: bool, gpu: Gpu, folder: Path | None = None
) -> tuple[Outcome, list[Entry]]:
    outcome = tune_case(case, device, timer, quick)
    entries = _entries(case, outcome)
    if entries:
        tuning_cache.store(gpu, case.op, entries, folder)
    return outcome, entries


def _entries(case: Case, outcome: Outcome) -> list[Entry]:
    """The entry of an outcome, if it has one."""
    if outcome.choice is None or outcome.us is None or outcome.heuristic_us is None:
        return []
    m = case.matrix
    return [
        tuning_cache.entry(
            case.fmt, case.dtype, m.batch * m.rows, m.columns, m.strides[2], outcome.choice, outcome.us,
            outcome.heuristic_us,
        )
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ on first use

_tried: set[tuple[Case, torch.device]] = set()


def tune_on_first_use() -> None:
    """From now on, the first eager call that needs a kernel for which this GPU has no entry of its size tunes it.

    It takes seconds and memory for copies of the tensor, tries the quick candidates on random numbers, and writes to
    the user's folder. Calls that are captured in a CUDA graph or compiled, and tensors whose columns are not
    neighbours, are left to the heuristic; so is what cannot be tuned, with one warning. Of several ranks the first
    tunes alone, without waiting for the others: they read its entries when they start again. Other threads that
    quantize meanwhile may do so in the way of a candidate, with the same bits.
    """
    tuning_cache.on_missing = _tune_missing


def _tunable(case: Case, column_stride: int, device: torch.device) -> bool:
    if device.type != "cuda" or column_stride != 1 or str(case.dtype).removeprefix("torch.") not in DTYPES:
        return False
    if not _Ranks().first or not tuning.serves(case.op, case.fmt, case.shape[-1]):
        return False
    m = case.matrix
    return (m.batch * m.rows, m.columns, m.strides[2]) == (*case.shape, 1)  # else the entry would not be found again


def _tune_missing(
    op: str, fmt: Format, dtype: torch.dtype, rows: int, columns: int, column_stride: int, device: torch.device
) -> bool:
    """`tuning_cache.on_missing`: a later lookup may tune what this one came in the way of."""
    case, problem = Case(op, fmt, (rows, columns), dtype), None
    if (case, device) in _tried or not _tunable(case, column_stride, device):
        return False
    in_the_way = torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()
    if in_the_way or not _busy.acquire(blocking=False):
        return True
    try:
        _tried.add((case, device))
        gpu = tuning_cache.gpu_of(device)
        tuning_cache.make_folder(gpu)  # an error now, not after seconds of measuring
        with torch.cuda.device(device):
            outcome, entries = _tune_and_store(case, device, _quick_time, True, gpu)
        tuning_cache.remember(gpu, op, entries)
        plans.forget()
        problem = outcome.error
    except Exception as error:
        problem = f"{case}: {_reason(error)}"
    finally:
        _busy.release()
    if problem is not None:
        warnings.warn(f"TRITONQ_AUTOTUNE: not tuned, the heuristic is used. {problem}", RuntimeWarning, stacklevel=2)
    return False
