"""Time of a call on the device, without and with the host's share.

Inputs rotate through so many copies that together they exceed the L2 cache; outputs rotate with them, because results
stay alive until their turn comes again.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[..., Any]
Arguments = Sequence[tuple[Any, ...]]

CACHE = 100 << 20  # at least this many bytes of inputs; twice the L2 cache of an H100
MOST_COPIES = 2048  # a 64 KiB tensor reaches CACHE with 1600
CALLS = 10  # at least, in one sample
SAMPLE_SECONDS = 0.1  # of device time for all samples of one median
SAMPLES = (10, 50)


def copies(nbytes: int, l2: int = 0) -> int:
    """How many inputs of `nbytes` to rotate through."""
    return max(1, min(MOST_COPIES, -(-max(CACHE, 2 * l2) // max(1, nbytes))))


def _rotate(fn: Call, arguments: Arguments, calls: int) -> list[Any]:
    held: list[Any] = [None] * len(arguments)
    for i, given in zip(range(calls), itertools.cycle(arguments), strict=False):
        held[i % len(held)] = fn(*given)
    return held


def _median_us(run: Callable[[], Any], calls: int) -> float:
    """Median microseconds of a call; `run` makes `calls` of them."""
    samples: list[float] = []
    for wanted in (3, None):  # the first three warm up and say how many samples there is time for
        if wanted is None:
            wanted = int(SAMPLE_SECONDS * 1e6 / max(1e-3, min(samples) * calls))
            wanted = max(SAMPLES[0], min(SAMPLES[1], wanted))
            samples = []
        for _ in range(wanted):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(samples)


def device_us(fn: Call, arguments: Arguments) -> float:
    """Median microseconds of one call, captured in a CUDA graph, so that no host time counts."""
    _rotate(fn, arguments, min(3, len(arguments)))
    torch.cuda.synchronize()
    calls = max(CALLS, len(arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = _rotate(fn, arguments, calls)
    try:
        return _median_us(graph.replay, calls)
    finally:
        del held
        graph.reset()
        torch.cuda.empty_cache()


def event_us(fn: Call, arguments: Arguments) -> float:
    """Median microseconds of one eager call, host time included where it is longer than the device's."""
    calls = max(CALLS, min(50, len(arguments)))
    return _median_us(lambda: _rotate(fn, arguments, calls), calls)


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
