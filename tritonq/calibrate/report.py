"""What a calibration did: events as they happen, and the report that is made of them.

    events("quantized", block="model.layers.3", loss_before=2.1e-4, loss_after=9.8e-5)
    events("out of memory", block="model.layers.3", where="backward", micro_batch=4)

| what | details | kind |
|---|---|---|
| `quantized` | `block`, `loss_before` (rounded to nearest), `loss_after`: mean of (y - t)^2, see `task` | |
| `tuned`, or any other text | where nobody tells of `quantized`: the first loss before and the last loss after | |
| `out of memory` | `block`, `where`, and what was changed for it: `micro_batch=4`, `device="cpu"` | memory step |
| `activations go to ...`, `block to ...` | `bytes`, ... | memory step |
| `fallback` | `layer`, `experts` that saw too few tokens, `reason` | fallback |

Any text and any details are kept. Memory steps and fallbacks are warnings of the logger `tritonq.calibrate`, all else
is its info. `CalibrationReport` collects one row a block (losses, seconds, peak memory by device) and what layers note:
`layer.notes["tokens"]`, a count for each expert in order or by its number, and `layer.notes["fallback"]`, the experts
or the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.calibrate.report_page import page
from tritonq.calibrate.task import Layer

logger = logging.getLogger("tritonq.calibrate")

VERSION = 1  # of report.json
HOST = "host"  # memory of this process that is no mapped file, among peaks by device
_MEMORY_STEPS = ("out of memory", "activations go to ", "block to ")
_LONG = 16  # options with more entries are told by their number
_LARGE = 4096  # tensors with more elements are told by their extremes
_INTERVAL = 0.1  # seconds between looks at the memory of the host


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened, `seconds` after the start; details as JSON holds them."""

    seconds: float
    what: str
    details: dict[str, Any]

    @property
    def is_memory_step(self) -> bool:
        return self.what.startswith(_MEMORY_STEPS)

    @property
    def is_fallback(self) -> bool:
        return self.what == "fallback"

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 3), "what": self.what, "details": self.details}

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.what, ", ".join(f"{key} {_text(v)}" for key, v in self.details.items()))))


class Events:
    """Collects what happened, from any thread; iterates over a copy. Reading a tensor among details waits for its
    device."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._lock = threading.Lock()
        self._happened: list[Event] = []

    def __call__(self, what: str, **details: Any) -> None:
        event = Event(time.monotonic() - self.began, what, {key: as_json(value) for key, value in details.items()})
        with self._lock:
            self._happened.append(event)
        logger.log(logging.WARNING if event.is_memory_step or event.is_fallback else logging.INFO, "%s", event)

    def __iter__(self) -> Iterator[Event]:
        with self._lock:
            return iter(list(self._happened))


@dataclasses.dataclass
class Row:
    """A block, or another part of the work such as capturing inputs.

    Attributes:
        loss_before, loss_after: of the outputs beside those of the dense block, None where nobody measured it.
        peak_bytes: of torch's allocator by device, and of the process (`HOST`) at ten looks a second.
        layers: what was noted about each layer, by name.
    """

    name: str
    seconds: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


class CalibrationReport:
    """Everything about one calibration.

    Attributes:
        method, scheme, model: names. options: as JSON holds them; long ones by their length.
        events: where to tell what happens. blocks, parts: rows that are done.
        static_scales: static parts of inputs by layer and name. tokens_by_expert: by the module of experts.
        fallbacks: by layer, the experts or the reason.
        complete: whether the calibration came to its end.
    """

    def __init__(self, method: str, scheme: str, model: str, options: Mapping[str, Any] | None = None) -> None:
        self.method, self.scheme, self.model = method, scheme, model
        self.options = {key: _briefly(value) for key, value in (options or {}).items()}
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.events = Events()
        self.blocks: list[Row] = []
        self.parts: list[Row] = []
        self.static_scales: dict[str, dict[str, Any]] = {}
        self.tokens_by_expert: dict[str, list[int]] = {}
        self.fallbacks: dict[str, Any] = {}
        self.complete = False

    @contextlib.contextmanager
    def part(self, name: str, devices: Iterable[torch.device] = ()) -> Iterator[Row]:
        """Measures what happens within: a row of `parts`, such as "capture" or "writing"."""
        with self._measured(name, devices) as row:
            yield row
        self.parts.append(row)

    @contextlib.contextmanager
    def block(self, name: str, layers: Sequence[Layer], devices: Iterable[torch.device] = ()) -> Iterator[Row]:
        """Measures the quantization of a block; at the end its losses are those that events told and that nobody set,
        and what is noted about layers comes into the report.

        Peak memory of GPUs is that of torch's allocator within, whose statistics are reset at the start.
        """
        first = len(list(self.events))
        with self._measured(name, devices) as row:
            yield row
        events = [event for event in list(self.events)[first:] if event.details.get("block") == name]
        told = [event.details for event in [one for one in events if one.what == "quantized"] or events]
        before = [details["loss_before"] for details in told if "loss_before" in details]
        after = [details["loss_after"] for details in told if "loss_after" in details]
        row.loss_before = before[0] if row.loss_before is None and before else as_json(row.loss_before)
        row.loss_after = after[-1] if row.loss_after is None and after else as_json(row.loss_after)
        for layer in layers:
            self._take(layer, row)
        self.blocks.append(row)

    def _take(self, layer: Layer, row: Row) -> None:
        notes = {key: as_json(value) for key, value in layer.notes.items()}
        row.layers[layer.name] = {"format": layer.fmt.name, **notes}
        if layer.inputs:
            self.static_scales[layer.name] = {key: as_json(value) for key, value in layer.inputs.items()}
        counts = layer.notes.get("tokens")
        if isinstance(counts, Mapping):
            counts = [counts.get(expert, 0) for expert in range(max(counts, default=-1) + 1)]
        if isinstance(counts := as_json(counts), list):
            # Parameters of the same experts see the same tokens.
            self.tokens_by_expert[layer.name.rpartition(".")[0] or layer.name] = counts
        if fallback := notes.get("fallback"):
            self.fallbacks[layer.name] = fallback

    @contextlib.contextmanager
    def _measured(self, name: str, devices: Iterable[torch.device]) -> Iterator[Row]:
        row = Row(name)
        gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        for device in gpus:
            torch.cuda.reset_peak_memory_stats(device)
        with _HostPeak() as host:
            began = time.monotonic()
            yield row
            row.seconds = round(time.monotonic() - began, 3)
        row.peak_bytes = {str(device): torch.cuda.max_memory_allocated(device) for device in gpus}
        if host.peak:
            row.peak_bytes[HOST] = host.peak

    @property
    def seconds(self) -> float:
        """Of all rows, those of a run before a resume included."""
        return round(sum(row.seconds or 0.0 for row in (*self.parts, *self.blocks)), 3)

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The largest of all rows, by device."""
        found: dict[str, int] = {}
        for row in (*self.parts, *self.blocks):
            for device, nbytes in row.peak_bytes.items():
                found[device] = max(found.get(device, 0), nbytes)
        return found

    @property
    def memory_steps(self) -> list[Event]:
        """What was done because memory did not suffice, in order."""
        return [event for event in self.events if event.is_memory_step]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it: finite numbers, keys always the same and in the same order."""
        events = list(self.events)
        return {
            "version": VERSION,
            "model": self.model,
            "scheme": self.scheme,
            "method": self.method,
            "options": self.options,
            "started": self.started,
            "seconds": self.seconds,
            "complete": self.complete,
            "peak_bytes": self.peak_bytes,
            "parts": [dataclasses.asdict(row) for row in self.parts],
            "blocks": [dataclasses.asdict(row) for row in self.blocks],
            "tokens_by_expert": self.tokens_by_expert,
            "fallbacks": self.fallbacks,
            "static_scales": self.static_scales,
            "memory_steps": [event.to_dict() for event in events if event.is_memory_step],
            "events": [event.to_dict() for event in events],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CalibrationReport:
        """The report of a run that was cut short, to go on with; times of new events follow those of the old ones.

        Raises:
            ValueError: no report, or one of another version.
        """
        try:
            if content["version"] != VERSION:
                raise ValueError(f"the report has version {content['version']}, this one reads {VERSION}; start anew")
            report = cls(content["method"], content["scheme"], content["model"])
            report.options, report.started = dict(content["options"]), content["started"]
            report.parts = [Row(**row) for row in content["parts"]]
            report.blocks = [Row(**row) for row in content["blocks"]]
            report.tokens_by_expert = dict(content["tokens_by_expert"])
            report.fallbacks, report.static_scales = dict(content["fallbacks"]), dict(content["static_scales"])
            report.events._happened = [Event(**event) for event in content["events"]]
            report.complete = content["complete"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no calibration report ({error!r}); start anew without it") from None
        if report.events._happened:
            report.events.began -= report.events._happened[-1].seconds
        return report

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and `report.html` (see `report_page`) to a folder, each under its name when complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = self.to_dict()
        _write(folder / "report.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        _write(folder / "report.html", page(content))


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class _HostPeak:
    """The most anonymous memory of this process while open, looked at by a thread; 0 where the system does not tell.
    Pages of mapped files, such as a checkpoint's, do not count."""

    def __enter__(self) -> _HostPeak:
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="tritonq-host-peak", daemon=True)
        if self.peak:
            self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """RssAnon of this process, 0 where there is no /proc."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def as_json(value: Any) -> Any:
    """What JSON can hold of a value: NaN and infinities become None, small tensors numbers, large ones their extremes,
    everything else its name."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Tensor):
        return _tensor(value.detach())
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(entry) for entry in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, os.PathLike):
        return str(value)
    if callable(getattr(value, "item", None)):  # numbers of numpy
        return as_json(value.item())
    if isinstance(name := getattr(value, "name", None), str):  # methods, formats
        return name
    plain = isinstance(value, nn.Module) or type(value).__repr__ is object.__repr__
    return type(value).__name__ if plain else getattr(value, "__qualname__", str(value))


def _tensor(value: Tensor) -> Any:
    if value.is_floating_point() and value.dtype.itemsize == 1:
        value = value.float()  # 8-bit floats have no extremes of their own
    if value.numel() > _LARGE:
        low, high = value.aminmax()
        return {"shape": list(value.shape), "min": as_json(low.item()), "max": as_json(high.item())}
    return as_json(value.item() if value.numel() == 1 else value.tolist())


def _briefly(value: Any) -> Any:
    """An option; data are not copied into the report, only what they are and how many."""
    if isinstance(value, Tensor):
        return f"tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping) and len(value) <= _LONG:
        return {str(key): _briefly(entry) for key, entry in value.items()}
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        short = len(value) <= _LONG and all(map(_is_plain, value))
        return [_briefly(entry) for entry in value] if short else f"{type(value).__name__} of {len(value)}"
    found = as_json(value)
    return found[:197] + "..." if isinstance(found, str) and len(found) > 200 else found


def _is_plain(entry: Any) -> bool:
    """Whether an entry of a list says what it is in a word: a number, a name, or what has a name."""
    plain = (type(None), bool, int, float, str, os.PathLike, torch.device, nn.Module)
    return isinstance(entry, plain) or isinstance(getattr(entry, "name", None), str)


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
