"""`quantize_`: the linear layers and fused experts of a model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tritonq import ops, scheduler
from tritonq.codecs import scale as scales
from tritonq.formats import Format
from tritonq.nn.linear import QLinear
from tritonq.nn.schemes import Scheme, get_scheme
from tritonq.nn.select import Selection, linear_modules, sharing_key
from tritonq.progress import progress_bar
from tritonq.tensor import QTensor, quantize


def expert_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, parameter name, module name) of fused expert weights: floating parameters [E, out, in] of modules that
    are called or classed as experts."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts"):
            if not _rows_are_outputs(module):  # groups would run along the wrong axis
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and parameter.is_floating_point() and not isinstance(parameter, QTensor):
                    yield module, key, f"{name}.{key}" if name else key


def _rows_are_outputs(experts: nn.Module) -> bool:
    """Whether fused weights are [E, out, in]. Llama 4 and gpt-oss hold [E, in, out]; where both projections are there,
    their shapes tell: what one puts out the other takes in."""
    first, second = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim == second.ndim == 3:
        return first.shape[2] == second.shape[1] and first.shape[1] == 2 * second.shape[2]
    return not getattr(experts, "is_transposed", False)


def check_finite(q: QTensor, dense: Tensor, name: str) -> None:
    """ValueError that names the parameter and counts its non-finite elements; a group that holds one has a NaN
    scale."""
    if not bool(torch.isfinite(scales.load(q.scale, q.format)).all()):
        raise _not_finite(dense, name)


def check_values(weights: Iterable[tuple[str, Tensor]]) -> None:
    """The same for weights that nobody has quantized yet."""
    for name, weight in weights:
        if weight.numel() and not bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all()):
            raise _not_finite(weight.detach(), name)


def _not_finite(dense: Tensor, name: str) -> ValueError:
    count = sum(int((~torch.isfinite(row)).sum()) for row in dense.reshape(-1, dense.shape[-1]).split(1024))
    return ValueError(
        f"{name} of shape {tuple(dense.shape)} has {count} non-finite element{'s' if count != 1 else ''} "
        "(NaN or infinity); repair the weights, or leave the layer out with ignore"
    )


Weight = tuple[str, Tensor, Format]  # name, the dense weight, what it is quantized to


def sharing_sets(weights: list[Weight]) -> list[list[Weight]]:
    """The weights that share a tensor-wide divisor with others."""
    sets: dict[str, list[Weight]] = {}
    for name, weight, fmt in weights:
        key = sharing_key(name, fmt)
        if key is not None and fmt.tensor_scale:
            sets.setdefault(key, []).append((name, weight, fmt))
    return list(sets.values())


def smallest_divisor(weights: Iterable[Tensor], fmt: Format, device: scheduler.Devices | None = None) -> Tensor:
    """The tensor-wide divisor that weights share, fp32 [1], computed on `device` or where they are."""
    divisors = [
        ops.tensor_scale(w.detach(), fmt) if device is None else scheduler.tensor_scale(w, fmt, device) for w in weights
    ]
    return torch.stack([divisor.to(divisors[0].device) for divisor in divisors]).amin(0)


def _shared_divisors(weights: list[Weight], device: scheduler.Devices | None) -> dict[str, Tensor]:
    """Divisors by module name where several layers share one."""
    shared = {}
    for members in sharing_sets(weights):
        smallest = smallest_divisor([weight for _, weight, _ in members], members[0][2], device)
        shared.update({name: smallest for name, _, _ in members})
    return shared


@dataclass
class Targets:
    """What a scheme applies to in a model: (name, linear layer), (name, module of experts, parameter name), and the
    names of layers that are left alone."""

    linears: list[tuple[str, nn.Linear]]
    experts: list[tuple[str, nn.Module, str]]
    ignored: list[str]

    @property
    def weights(self) -> list[tuple[str, Tensor]]:
        """Parameters by the name of their linear layer, or by their own among experts."""
        experts = [(name, getattr(module, key)) for name, module, key in self.experts]
        return [(name, module.weight) for name, module in self.linears] + experts

    def formats(self, scheme: Scheme, group_size: int | None) -> list[Weight]:
        return [(name, weight, scheme.weight_format(weight.dtype, group_size)) for name, weight in self.weights]


def find_targets(model: nn.Module, ignore: Iterable[str], *, values: bool = True) -> Targets:
    """The dense linear layers and fused experts that `ignore` leaves. Without `values`, weights may be on the meta
    device.

    Raises:
        ValueError: an ignore entry that matches nothing, nothing to quantize, or weights without values.
    """
    selection = Selection(ignore)
    linears, experts, ignored = [], [], []
    own = linear_modules(model)
    for name, module in model.named_modules():
        if name in own and not isinstance(module.weight, QTensor) and module.weight.is_floating_point():
            if selection.ignores(name):
                ignored.append(name)
            else:
                linears.append((name, module))
        elif next(module.parameters(recurse=False), None) is not None:
            selection.ignores(name)  # stays as it is anyway; an entry that names it counts as used
    for module, key, name in expert_parameters(model):
        left_alone = selection.ignores(name) or selection.ignores(name.rpartition(".")[0])
        if not left_alone and not hasattr(module, "fake_keys"):  # which fake-quantized experts have
            experts.append((name, module, key))
    selection.check_all_used([name for name, _ in linears])
    if any(not name for name, _ in linears):
        raise ValueError("a bare nn.Linear cannot be replaced in place; put it into a module")
    if not linears and not experts:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize (all ignored, or quantized already)")
    meta = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if values and meta is not None:
        raise ValueError(f"{meta} is on the meta device and has no values; load the weights first")
    return Targets(linears, experts, ignored)  # type: ignore[arg-type]


def quantize_targets(
    model: nn.Module,
    targets: Targets,
    scheme: Scheme,
    *,
    group_size: int | None,
    search: str | bool,
    device: scheduler.Devices | None,
    progress: bool,
) -> dict[int, QLinear]:
    """Quantize what was found; the new layers by the identity of those that they replace. Raises, with the model
    unchanged, where a weight has NaN or infinity."""
    jobs = targets.formats(scheme, group_size)
    divisors = _shared_divisors(jobs, device)
    quantized: dict[int, nn.Parameter] = {}  # by identity: tied weights stay tied
    with progress_bar(progress) as bar:
        task = bar.add_task(f"quantizing to {scheme.name}", total=len(jobs))
        for name, weight, fmt in jobs:
            if id(weight) not in quantized:
                divisor = divisors.get(name)
                divisor = None if divisor is None else divisor.to(weight.device)
                q = quantize(
                    weight, fmt, tensor_scale=divisor, search=search, device=device, output_device=weight.device
                )
                check_finite(q, weight.detach(), name)
                quantized[id(weight)] = nn.Parameter(q, requires_grad=False)
            bar.advance(task)
    layers = {id(m): QLinear.adopt(m, quantized[id(m.weight)], scheme.input_format) for _, m in targets.linears}
    replace_layers(model, layers)
    for _, module, key in targets.experts:
        setattr(module, key, quantized[id(getattr(module, key))])
    mark_quantized(model, scheme, group_size, targets.ignored)
    return layers


def replace_layers(model: nn.Module, layers: dict[int, QLinear]) -> None:
    """Put new layers in place of those whose identities these are; one module may sit in several places."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in layers:
                parent._modules[key] = layers[id(child)]


def mark_quantized(model: nn.Module, scheme: Scheme, group_size: int | None, ignored: Iterable[str]) -> None:
    """What exports ask a model for."""
    model.tritonq_scheme = scheme  # type: ignore[assignment]
    model.tritonq_group_size = group_size  # type: ignore[assignment]
    model.tritonq_ignored = tuple(ignored)  # type: ignore[assignment]


class Calibrates(Protocol):
    """What quantizes with data: `tritonq.Calibration`, which layers further up hold."""

    def quantize(self, model: nn.Module, scheme: Scheme, **options: Any) -> nn.Module: ...


def quantize_(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    ignore: Iterable[str] = (),
    group_size: int | None = None,
    search: str | bool | None = None,
    calibration: Calibrates | None = None,
    device: scheduler.Devices | None = None,
    progress: bool = True,
) -> nn.Module:
    """Quantize the linear layers of `model` in place, fused experts (rank-3 parameters) included; returns the model.

    Output heads, embeddings and MoE routers stay as they are. Layers become `nn.Linear` subclasses whose `.weight` is a
    QTensor parameter; parameter names do not change.

    Args:
        scheme: a name of `SCHEMES`, such as "W4A16", "FP8_DYNAMIC", "MXFP4A16", "NVFP4".
        ignore: more modules to leave alone: full names, last names such as "down_proj", or "re:" with a regex.
        group_size: another group size than the scheme's, for schemes with groups of integers or of a table.
        search: scale search of the weights, as in `tritonq.quantize`; None is "mse" for codes of 4 bits and less, False
            the scale rule of the format.
        calibration: a `tritonq.Calibration`: sample data, and an algorithm that decides with it how weights round.
        device: where to quantize, such as "cuda" or a list of devices, through which weights stream that lie elsewhere;
            the result stays where the weight was.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: unknown scheme, an ignore entry that matches nothing, nothing to quantize, or a weight with NaN or
            infinity (which is named; the model is then unchanged).
    """
    scheme = get_scheme(scheme)
    search = scheme.search(search)
    if calibration is not None:
        if not hasattr(calibration, "quantize"):
            raise TypeError(f"calibration is a tritonq.Calibration, got {type(calibration).__name__}")
        return calibration.quantize(
            model, scheme, ignore=ignore, group_size=group_size, search=search, device=device, progress=progress
        )
    targets = find_targets(model, ignore)
    quantize_targets(model, targets, scheme, group_size=group_size, search=search, device=device, progress=progress)
    return model
