"""`tritonq.Calibration`: which data, which algorithm, in which memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tritonq import memory, scheduler, streams
from tritonq.calibrate import blocks as structure
from tritonq.calibrate import data as samples
from tritonq.calibrate.cache import ActivationCache
from tritonq.calibrate.methods import resolve
from tritonq.calibrate.pipeline import Run, Storage
from tritonq.calibrate.report import CalibrationReport
from tritonq.calibrate.task import Method
from tritonq.nn.quantize import check_values, find_targets, mark_quantized
from tritonq.nn.schemes import Scheme

MICRO_BATCH = 8  # samples in a call
ON_DEVICE = (
    1 << 30
)  # bytes of activations: from pinned memory they come while the device computes, so more buys nothing
Methods = str | Method | Sequence[str | Method]


@dataclass
class Calibration:
    """Sample data for `tritonq.quantize_(model, scheme, calibration=...)`, and what is done with it.

    Blocks are quantized one after the other, each on what the quantized ones before it put out.

    Attributes:
        data: a path to a text, a hub id, texts, tensors of token ids [S] or [B, S], dicts of arguments of the model, a
            data loader, or what `calibrate.record` recorded; None is the text of the standard library's topics.
            Texts need a tokenizer.
        method: "signround", "gptq", "awq", "smoothquant", "imatrix" (importance for the scale search), "bias"
            (correction), "rtn", a Method, or several that follow each other.
        samples, seqlen: how many are taken, and the tokens of each, where the data is text.
        batch: samples of an iteration, and most that are put into one call of a block; None leaves the first to the
            method and the second at 8.
        iters, lr: of methods that iterate; None is the method's own.
        options: more arguments of the methods, by method: {"gptq": {"damping": 0.01}}.
        blocks: names or modules, where the structure of the model does not tell; "all" takes towers, too.
        inputs: "dynamic", or static scales of inputs of schemes that quantize them: "minmax", "percentile" or "mse".
        devices: where blocks are computed, several share the samples; None is `device` of `quantize_`, or where the
            model lies.
        cache: bytes of host memory for what blocks put out, a number or a text such as "16GiB"; more goes to files in
            `disk`, a folder, or a temporary one.
        seed: of whatever is random: the same bytes come out again.
        report: a folder for `report.json` and `report.html`.

    After a run `result` holds the `CalibrationReport`.
    """

    data: Any = None
    method: Methods = "signround"
    samples: int = 128
    seqlen: int = 2048
    batch: int | None = None
    iters: int | None = None
    lr: float | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocks: str | Sequence[str | nn.Module] | None = None
    inputs: str = "dynamic"
    tokenizer: Any = None
    devices: Sequence[torch.device | str] | None = None
    cache: int | str | None = None
    disk: str | Path | None = None
    seed: int = 0
    report: str | Path | None = None
    result: CalibrationReport | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("samples", "seqlen", "batch"):
            value = getattr(self, name)
            if (value is not None or name != "batch") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a number >= 1, got {value!r}")
        resolve(self)  # errors now rather than after the first block

    def quantize(
        self,
        model: nn.Module,
        scheme: Scheme,
        *,
        ignore: Iterable[str] = (),
        group_size: int | None = None,
        search: str | bool = "mse",
        device: scheduler.Devices | None = None,
        progress: bool = True,
        storage: Storage | None = None,
    ) -> nn.Module:
        """Called by `tritonq.quantize_`, whose arguments these are. Layers outside of blocks are rounded to
        nearest."""
        for method in resolve(self):
            if hasattr(method, "check"):
                method.check(scheme, search)
        targets = find_targets(model, ignore, values=storage is None)
        if storage is None:
            check_values(targets.weights)  # before anything is changed
        devices = self._devices(model, device)
        calls = samples.samples(
            self.data, model, tokenizer=self.tokenizer, count=self.samples, seqlen=self.seqlen, seed=self.seed
        )
        _check_numbers(calls)
        options = {key: value for key, value in vars(self).items() if key not in ("result", "tokenizer", "report")}
        report = self.result = CalibrationReport(_called(self.method), scheme.name, type(model).__name__, options)
        try:
            cache = ActivationCache(self._budget(), self.disk, _room(devices[0]), report.events)
            together = min(self.batch or MICRO_BATCH, len(calls))
            run = Run(
                model, scheme, targets, structure.find(model, self.blocks), resolve(self), calls, devices, cache,
                report, group_size, search, together, self.seed, storage or Storage(), progress,
            )  # fmt: skip
            with contextlib.closing(cache):  # also where the model raises while its calls are looked at
                run()
            mark_quantized(model, scheme, group_size, targets.ignored)
            model.tritonq_calibration = f"{report.method} on {len(calls)} samples"  # type: ignore[assignment]
            report.complete = True
        finally:
            if self.report is not None:
                report.save(self.report)
        return model

    def _budget(self) -> int | None:
        """Bytes of host memory; 0 has everything go to files."""
        return self.cache if self.cache in (None, 0) else memory.parse_size(self.cache, "cache")  # type: ignore

    def _devices(self, model: nn.Module, device: scheduler.Devices | None) -> tuple[torch.device, ...]:
        chosen: Any = self.devices if self.devices is not None else device
        if chosen is None:
            parameter = next((p for p in model.parameters() if not p.is_meta), None)
            return (torch.device("cpu") if parameter is None else parameter.device,)
        several = [chosen] if isinstance(chosen, str | torch.device) else list(chosen)
        if not several:
            raise ValueError("devices names none; leave it out, or name some")
        return tuple(streams.backend(one).device for one in several)  # with their numbers


def _check_numbers(calls: Sequence[samples.Call]) -> None:
    """ValueError for NaN in arguments of the model; infinity is what masks are made of."""
    for number, call in enumerate(calls):
        for leaf in pytree.tree_leaves((call.args, call.kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
                raise ValueError(
                    f"sample {number} of the calibration data has {int(leaf.isnan().sum())} NaN in a tensor of shape "
                    f"{tuple(leaf.shape)}; leave it out, or repair it"
                )


def _room(device: torch.device) -> dict[torch.device, int]:
    """Bytes that activations may take of a GPU: never more than a third of what is free, the rest is for the block."""
    return {device: min(ON_DEVICE, torch.cuda.mem_get_info(device)[0] // 3)} if device.type == "cuda" else {}


def _called(method: Methods) -> str:
    several: list[Any] = [method] if isinstance(method, str) or hasattr(method, "run") else list(method)
    return ", ".join(one if isinstance(one, str) else one.name for one in several)
