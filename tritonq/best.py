"""The best result of a search so far, kept as packed data instead of as copies of its parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.formats import Format, get_format
from tritonq.tensor import QTensor, quantize


class Best:
    """The quantized weight of the smallest loss so far; chosen on the device, which nobody waits for.

    Args:
        x: the weight, floating [..., K].
        fmt: a Format or its name.

    Takes twice the bytes of the packed weight, less than a copy of v. `update` can be part of a CUDA graph.

    Attributes:
        value: QTensor of the smallest loss; codes of x as it is until a loss was smaller than infinity.
        loss: that loss, fp32 [], infinity before.
    """

    def __init__(self, x: Tensor, fmt: Format | str) -> None:
        self.format = get_format(fmt)
        self.value: QTensor = quantize(x, self.format)
        self.loss = torch.full((), torch.inf, device=x.device)
        self._candidate: QTensor = quantize(x, self.format)

    @torch.no_grad()
    def update(
        self,
        loss: Tensor,
        x: Tensor,
        *,
        v: Tensor | None = None,
        min_scale: Tensor | None = None,
        max_scale: Tensor | None = None,
        tensor_scale: Tensor | None = None,
    ) -> None:
        """Keep quantize(x, v=..., min_scale=..., max_scale=...) if `loss`, one element, is smaller than any before; NaN
        is not."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}; reduce it first" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"a loss is a tensor of one element, got {found}")
        quantize(
            x,
            self.format,
            v=v,
            min_scale=min_scale,
            max_scale=max_scale,
            tensor_scale=tensor_scale,
            out=self._candidate,
        )
        loss = loss.detach().to(torch.float32).reshape(())
        better = loss < self.loss
        mine, other = self.value._buf, self._candidate._buf
        mine.copy_(torch.where(better, other, mine))
        self.loss.copy_(torch.where(better, loss, self.loss))
