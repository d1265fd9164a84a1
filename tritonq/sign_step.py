"""Signed gradient descent inside backward: p -= rate * sign(gradient), clamped, by the kernel that has the gradient.

What SignRound tunes with (Cheng et al. 2023): v starts at 0, min_scale and max_scale at 1, and rates decay linearly to
0. The gradients of v, min_scale and max_scale never exist.
"""

from __future__ import annotations

import math

import torch


class SignStep:
    """Rates and bounds of the update that `tritonq.qdq(..., step=)` makes in backward.

    Args:
        lr: rate of v, and of the ratios unless they have one of their own.
        min_scale_lr: rate of min_scale and max_scale.
        steps: `advance` takes the rates linearly to 0 in so many calls; None leaves them.
        clamp_v, clamp_scale: bounds of v and of the ratios; bf16 parameters are rounded after they were clamped.
        device: of the tensors it serves.

    Rates lie in a tensor on the device, fp32 [2] (v, ratios), so schedules neither wait for the device nor recapture
    a CUDA graph. y has a gradient function even if nothing requires a gradient; parameters keep `grad` None. Every
    backward updates: use x once a step, without accumulation of gradients, without `retain_graph`, on one replica.

    Raises:
        ValueError: a rate that is negative or not finite, no steps, or bounds out of order.
    """

    def __init__(
        self,
        lr: float,
        *,
        min_scale_lr: float | None = None,
        steps: int | None = None,
        clamp_v: tuple[float, float] = (-0.5, 0.5),
        clamp_scale: tuple[float, float] = (0.0, 1.0),
        device: torch.device | str | None = None,
    ) -> None:
        rates = (float(lr), float(lr if min_scale_lr is None else min_scale_lr))
        if not all(0 <= rate < math.inf for rate in rates) or (steps is not None and steps <= 0):
            raise ValueError(f"rates are >= 0 and finite and steps > 0, got lr {rates} and steps {steps}")
        if not (clamp_v[0] <= clamp_v[1] and clamp_scale[0] <= clamp_scale[1]):
            raise ValueError(f"bounds are (lowest, highest), got {clamp_v} and {clamp_scale}")
        self.initial = torch.tensor(rates, dtype=torch.float32, device=device)
        self.rates = self.initial.clone()
        self.count = torch.zeros((), dtype=torch.float32, device=device)  # of calls of `advance`
        self.steps = steps
        self.bounds = (*map(float, clamp_v), *map(float, clamp_scale))
        self.anchor = torch.empty(0, device=device, requires_grad=True)  # makes y part of a graph

    @torch.no_grad()
    def advance(self) -> None:
        """rates = initial * max(0, 1 - calls / steps); once after every step, on the device alone."""
        self.count += 1
        if self.steps is not None:
            self.rates.copy_(self.initial * (1.0 - self.count / self.steps).clamp_(min=0.0))

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the rates of the beginning."""
        self.count.zero_()
        self.rates.copy_(self.initial)
