"""Quantization-aware training: layers that compute with what quantization will make of their weights and inputs.

    y = qdq(x) @ qdq(weight).T + bias,   gradients straight through both

`fake_quantize_` changes how layers compute and nothing else: parameters stay the same trainable objects under the same
names, so optimizers, Trainer, checkpoints, `copy.deepcopy` and torch.compile see the model that they saw before.
`convert_` then leaves what `quantize_` would, whose outputs are the same bits; `remove_fake_quantize_` goes back.

Weights are rounded anew in every forward, under the scales (and by default the scale search) of `quantize_`. Inputs are
rounded where the scheme says so: dynamically, with scales of each call, or statically, with scales from the range of
the inputs seen in training mode.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritonq import ops
from tritonq.autograd import qdq, qdq_linear
from tritonq.formats import Format
from tritonq.nn.linear import STATIC, KeepsBuffers
from tritonq.nn.quantize import Targets, find_targets, quantize_targets, sharing_sets, smallest_divisor
from tritonq.nn.schemes import Scheme, get_scheme
from tritonq.nn.select import linear_modules
from tritonq.tensor import QTensor

INPUTS = ("dynamic", "static")


@dataclass(frozen=True, eq=False)
class FakeQuantization:
    """What one call of `fake_quantize_` said; its layers share it.

    Attributes:
        scheme, group_size, search: as `quantize_` takes them.
        averaging: of a static observer: None keeps the extremes, a number a in (0, 1) moves to a * old + (1 - a) * new.
        static: whether the scales of inputs come from an observer.
        formats: of weights, by their dtype.
        input_format: that of the scheme.
    """

    scheme: Scheme
    group_size: int | None
    search: str | bool
    averaging: float | None
    static: bool
    formats: dict[torch.dtype, Format]
    input_format: Format | None

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeQuantization:
        return self

    def weight(self, weight: Tensor) -> Tensor:
        """The values that the quantized weight will have."""
        return qdq(weight, self.formats[weight.dtype], search=self.search)


class FakeQuantLinear(KeepsBuffers):
    """nn.Linear that rounds its weight and, where the scheme says so, its inputs; only made by `fake_quantize_`.

    `input_range`, fp32 [2], is the smallest and the largest input seen in training mode (NaN: none yet) where scales of
    inputs are static; elsewhere there is no such buffer. `observing` False keeps it as it is in training mode, too.
    """

    fake: FakeQuantization
    sharing: tuple[nn.Linear, ...]  # the layers with one tensor-wide divisor, this one too; no submodules
    dense_class: type[nn.Linear]
    input_range: Tensor | None
    observing: bool
    observed: bool

    def forward(self, input: Tensor) -> Tensor:
        fmt = self.fake.input_format
        if fmt is not None:
            if self.input_range is not None and self.training and self.observing and input.numel():
                self.observe(input)
            input = qdq(input, fmt, **self.input_parts(fmt, input.device))
        own = self.fake.formats[self.weight.dtype]
        divisor = None
        if self.sharing:
            divisor = smallest_divisor([layer.weight for layer in self.sharing], own).to(self.weight.device)
        return qdq_linear(input, self.weight, self.bias, own, tensor_scale=divisor, search=self.fake.search)

    @torch.no_grad()
    def observe(self, input: Tensor) -> None:
        """Take the finite range of one input into account."""
        assert self.input_range is not None
        seen = torch.stack(torch.aminmax(input.detach())).to(torch.float32)
        known, a = self.input_range, self.fake.averaging
        seen = torch.where(seen.isfinite().all(), seen, known)
        if a is None:
            found = torch.stack([torch.fmin(known[0], seen[0]), torch.fmax(known[1], seen[1])])
        else:
            found = torch.where(known.isnan(), seen, known * a + seen * (1 - a))
        known.copy_(found)

    def input_parts(self, fmt: Format, device: torch.device) -> dict[str, Any]:
        """The parts that inputs are quantized with; empty where each call computes its own."""
        if self.input_range is None:
            return {"tensor_scale": torch.ones(1, dtype=torch.float32, device=device)} if fmt.tensor_scale else {}
        if not self.observed and not torch.compiler.is_compiling():
            if bool(self.input_range.isnan().any()):  # asked once: the answer has to come from the device
                raise ValueError(
                    "a layer with static scales of inputs has seen no finite ones in training mode; call model.train() "
                    "and run some"
                )
            self.observed = True
        if fmt.tensor_scale:
            return {"tensor_scale": ops.tensor_scale(self.input_range, fmt)}
        return {name: part for name, part in ops.quantize(self.input_range, fmt).items() if name != "qdata"}

    def _load_from_state_dict(self, *args: Any) -> None:
        self.observed = False  # the range of a checkpoint may be that of a model that saw nothing
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        scheme = self.fake.scheme
        inputs = f", inputs={'static' if self.fake.static else 'dynamic'}" if scheme.inputs else ""
        return f"{super().extra_repr()}, fake={scheme.name}{inputs}"


@functools.cache
def _experts_class(kind: Any, keys: tuple[str, ...]) -> type[nn.Module]:
    """`kind` with rounded values in place of the parameters `keys` while it computes, each made once a forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.fake_values = {key: self.fake.weight(self._parameters[key]) for key in keys}
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            self.fake_values = {}

    def value(key: str) -> property:
        return property(lambda self: self.fake_values.get(key, self._parameters[key]))

    members = {"forward": forward, "dense_class": kind, "fake_keys": keys, **{key: value(key) for key in keys}}
    return type(f"FakeQuant{kind.__name__}", (kind,), members)


def _faked(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "fake", None), FakeQuantization):
            yield name, module


def fake_quantize_(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    ignore: Iterable[str] = (),
    group_size: int | None = None,
    search: str | bool | None = None,
    inputs: str = "dynamic",
    averaging: float | None = None,
) -> nn.Module:
    """Have the linear layers and fused experts of `model` compute with quantized values, in place; returns the model.

    The layers are those of `quantize_`, and so are the values: `convert_` changes no output of the model in eval mode.
    Gradients pass straight through, and stop where a value was clipped.

    Args:
        scheme, ignore, group_size: as for `quantize_`.
        search: as for `quantize_`; a search takes longer than the rounding, and False leaves it out, also when the
            model is converted.
        inputs: "dynamic": scales of inputs are computed in each call, as `quantize_` has it. "static": from the range
            of inputs in training mode, kept in a buffer `input_range` of each layer and used as it is in eval mode or
            after `freeze_observers_`; for formats of inputs with one scale (FP8) or a tensor-wide divisor (NVFP4).
        averaging: of static ranges: None keeps the extremes, a number a between 0 and 1 takes a * old + (1 - a) * new.
            Gradient checkpointing observes an input twice, which changes averages and not extremes.

    Raises:
        ValueError: unknown scheme or inputs, an ignore entry that matches nothing, nothing to quantize, static inputs
            of a format without a scale for all of them, or a layer whose forward was replaced.
    """
    scheme = get_scheme(scheme)
    search = scheme.search(search)
    _check_inputs(scheme, inputs, averaging)
    targets = find_targets(model, ignore)
    formats = {dtype: scheme.weight_format(dtype, group_size) for dtype in ops.FLOATS}
    fake = FakeQuantization(scheme, group_size, search, averaging, inputs == "static", formats, scheme.input_format)
    for name, module in targets.linears:
        if "forward" in module.__dict__:
            raise ValueError(f"the forward of {name} was replaced by {module.forward!r}; fake-quantize before that")
    by_name = dict(targets.linears)
    sets = [[by_name[name] for name, _, _ in members] for members in sharing_sets(targets.formats(scheme, group_size))]
    sharing = {id(layer): tuple(layers) for layers in sets for layer in layers}
    for _, module in targets.linears:
        module.dense_class, module.fake = type(module), fake  # type: ignore[assignment]
        module.sharing = sharing.get(id(module), ())  # type: ignore[assignment]
        module.observing, module.observed = True, False  # type: ignore[assignment]
        unknown = torch.full((2,), torch.nan, dtype=torch.float32, device=module.weight.device) if fake.static else None
        module.register_buffer("input_range", unknown)
        module.__class__ = FakeQuantLinear
    keys: dict[int, tuple[Any, list[str]]] = {}
    for _, parent, key in targets.experts:
        keys.setdefault(id(parent), (parent, []))[1].append(key)
    for experts, own in keys.values():
        experts.fake, experts.fake_values = fake, {}
        kind: Any = type(experts)
        experts.__class__ = _experts_class(kind, tuple(own))
    return model


def _check_inputs(scheme: Scheme, inputs: str, averaging: float | None) -> None:
    if inputs not in INPUTS:
        raise ValueError(f"inputs is 'dynamic' or 'static', got {inputs!r}")
    fmt = scheme.input_format
    if inputs == "static" and (fmt is None or not (fmt.group[0] == -1 or fmt.tensor_scale)):
        what = "leaves inputs alone" if fmt is None else f"gives inputs scales of their own, {fmt.name}"
        raise ValueError(f"{scheme.name} {what}; inputs='static' goes with one scale for all, as FP8 and NVFP4 have it")
    if averaging is not None and (inputs != "static" or not 0 < averaging < 1):
        raise ValueError(f"averaging is between 0 and 1, of inputs='static'; got {averaging!r} of inputs={inputs!r}")


def freeze_observers_(model: nn.Module) -> nn.Module:
    """Keep the static ranges of inputs as they are, in training mode too; returns the model."""
    for _, module in _faked(model):
        module.observing = False
    return model


def remove_fake_quantize_(model: nn.Module) -> nn.Module:
    """Undo `fake_quantize_`: the layers as they were, with the parameters that training left; returns the model.

    Raises:
        ValueError: nothing is fake-quantized.
    """
    found = [module for _, module in _faked(model)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no fake-quantized layer; call tritonq.fake_quantize_ first")
    for module in found:
        _restore(module)
    return model


def _restore(module: Any) -> None:
    module.__class__ = module.dense_class
    module._buffers.pop("input_range", None)
    for name in ("fake", "sharing", "dense_class", "observing", "observed", "fake_values"):
        module.__dict__.pop(name, None)


def convert_(model: nn.Module, *, device: torch.device | str | None = None, progress: bool = True) -> nn.Module:
    """Quantize what `fake_quantize_` prepared, in place, as `quantize_` with the same arguments would; returns the
    model. Its outputs are those of the fake-quantized model in eval mode, bit for bit on the CPU.

    Static ranges of inputs become buffers of the layers: `input_scale`, or `input_global_scale` of NVFP4.

    Args:
        device, progress: as for `quantize_`.

    Raises:
        ValueError: nothing is fake-quantized, a layer with static scales has seen no input, or a weight with NaN or
            infinity (which is named; the model is then unchanged).
    """
    found = list(_faked(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no fake-quantized layer; call tritonq.fake_quantize_ first")
    for name, module in found:
        if getattr(module, "input_range", None) is not None and bool(module.input_range.isnan().any()):
            raise ValueError(
                f"{name} has seen no finite input in training mode, which its static scale comes from; run some"
            )
    left_alone = [name for name, layer in linear_modules(model).items() if not isinstance(layer.weight, QTensor)]
    for fake in dict.fromkeys(module.fake for _, module in found):
        own = [(name, module) for name, module in found if module.fake is fake]
        linears = [(name, module) for name, module in own if isinstance(module, FakeQuantLinear)]
        experts = [(f"{n}.{key}" if n else key, m, key) for n, m in own for key in getattr(m, "fake_keys", ())]
        layers = quantize_targets(
            model, Targets(list(linears), experts, left_alone), fake.scheme, group_size=fake.group_size,
            search=fake.search, device=device, progress=progress,
        )  # fmt: skip
        for _, layer in linears:
            if layer.input_range is not None:
                for name, part in layer.input_parts(fake.input_format, layer.weight.device).items():
                    layers[id(layer)].register_buffer(STATIC[name], part)
        for _, module in own:
            if not isinstance(module, FakeQuantLinear):
                _restore(module)
    return model
