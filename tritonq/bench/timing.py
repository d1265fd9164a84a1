"""Time of a call with arguments, without and with the host's share (`tritonq.timing`).

Inputs rotate through so many copies that together they exceed the L2 cache, and outputs rotate with them.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tritonq import timing

Call = Callable[..., Any]
Arguments = Sequence[tuple[Any, ...]]

CACHE = 100 << 20  # at least this many bytes of inputs; twice the L2 cache of an H100
MOST_COPIES = 2048  # a 64 KiB tensor reaches CACHE with 1600


def copies(nbytes: int, l2: int = 0) -> int:
    """How many inputs of `nbytes` to rotate through."""
    return max(1, min(MOST_COPIES, -(-max(CACHE, 2 * l2) // max(1, nbytes))))


def _calls(fn: Call, arguments: Arguments) -> list[Callable[[], Any]]:
    return [functools.partial(fn, *given) for given in arguments]


def device_us(fn: Call, arguments: Arguments) -> float:
    """Median microseconds of one call in a CUDA graph, so that no host time counts."""
    return timing.device_us(_calls(fn, arguments))


def event_us(fn: Call, arguments: Arguments) -> float:
    """Median microseconds of one eager call, host time included where it is longer than the device's."""
    calls, count = _calls(fn, arguments), max(timing.CALLS, min(50, len(arguments)))
    return timing.median_us(lambda: timing.take_turns(calls, count), count)


def host_us(fn: Callable[[], Any], calls: int = 300) -> float:
    """Median microseconds of host time a call takes before it returns, the device idle."""
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


def warm_up(seconds: float = 0.3) -> None:
    """Clocks rise under load; the first measurement should not be the one that raises them."""
    x = torch.randn(1 << 26, device="cuda")
    y = torch.empty_like(x)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        y.copy_(x)
        torch.cuda.synchronize()
