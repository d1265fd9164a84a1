"""A linear layer whose weight is a QTensor: dequantize, then multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritonq import sharding
from tritonq.autograd import qdq
from tritonq.formats import Format
from tritonq.tensor import QTensor

# Parts of a Format that inputs may be given, and the buffers that hold them.
STATIC = {"scale": "input_scale", "zero_point": "input_zero_point", "tensor_scale": "input_global_scale"}


class KeepsBuffers(nn.Linear):
    """A linear layer whose buffers (scales, ranges) keep their dtype when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype is not buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


class QLinear(KeepsBuffers):
    """nn.Linear with a quantized weight [out_features, in_features] and, optionally, inputs quantized on the fly.

    `input_format` is the Format of the inputs (None leaves them alone); with a two-level format `input_global_scale` is
    its tensor-wide divisor, fp32 [1]. Without calibration data that is 1, which covers inputs up to 2688 in magnitude.
    `input_scale` (and `input_zero_point`) are static scales of the inputs where calibration or training found some, in
    the shape and dtype of `Format.storage`; None has each call compute its own.
    """

    input_format: Format | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_global_scale: Tensor | None

    @classmethod
    def adopt(cls, linear: nn.Linear, weight: nn.Parameter, input_format: Format | None) -> QLinear:
        """A QLinear with the bias and flags of `linear` and the given weight."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = weight
        self.register_parameter("bias", linear.bias)
        self.input_format = input_format
        needs_divisor = input_format is not None and input_format.tensor_scale
        divisor = torch.ones(1, dtype=torch.float32, device=weight.device) if needs_divisor else None
        self.register_buffer("input_scale", None)
        self.register_buffer("input_zero_point", None)
        self.register_buffer("input_global_scale", divisor)  # persistent: hosts move the others without asking for None
        self.train(linear.training)
        for name, hook in linear.__dict__.items():
            if "_hook" in name and hook:  # also the flags: which take keywords, always run, see full gradients
                self.__dict__[name] = hook
        return self

    def forward(self, input: Tensor) -> Tensor:
        sharded = type(input).__name__ == "DTensor"
        if self.input_format is not None:
            if sharded:
                sharding.teach_dtensor()
            parts = {name: getattr(self, buffer) for name, buffer in STATIC.items()}
            input = qdq(input, self.input_format, **parts)
        return (sharding.linear if sharded else nn.functional.linear)(input, self.weight, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in STATIC.values():  # of a model whose inputs have static scales
            found = state_dict.get(prefix + name)
            if found is not None and getattr(self, name) is None and self.input_format is not None:
                self.register_buffer(name, torch.empty_like(found, device=self.weight.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        inputs = "" if self.input_format is None else f", inputs={self.input_format.name}"
        weight = self.weight.format.name if isinstance(self.weight, QTensor) else str(self.weight.dtype)
        return f"{super().extra_repr()}, weight={weight}{inputs}"
