"""Time of a call on the device."""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

CALLS = 10  # at least, in one sample
SAMPLE_SECONDS = 0.1  # of device time for all samples of one median
SAMPLES = (5, 50)  # at least and at most; few where calls are long


def take_turns(calls: Sequence[Callable[[], Any]], count: int) -> deque[Any]:
    """Make `count` calls. As many results stay alive as there are calls, so outputs take turns as inputs do."""
    held: deque[Any] = deque(maxlen=len(calls))
    for call in itertools.islice(itertools.cycle(calls), count):
        held.append(call())
    return held


def median_us(run: Callable[[], Any], calls: int, samples: tuple[int, int] = SAMPLES) -> float:
    """Median microseconds of a call by CUDA events; `run` makes `calls` of them."""
    times: list[float] = []
    for wanted in (3, None):  # the first three warm up and say how many samples there is time for
        if wanted is None:
            wanted = int(SAMPLE_SECONDS * 1e6 / max(1e-3, min(times) * calls))
            wanted = max(samples[0], min(samples[1], wanted))
            times = []
        for _ in range(wanted):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def device_us(calls: Sequence[Callable[[], Any]], samples: tuple[int, int] = SAMPLES) -> float:
    """Median microseconds of one call, captured in a CUDA graph, so that no host time counts.

    Args:
        calls: equal calls on buffers of their own, which take turns; together they should exceed the L2 cache.
        samples: the fewest and the most replays.
    """
    take_turns(calls, min(3, len(calls)))
    torch.cuda.synchronize()
    count = max(CALLS, len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads go on allocating
        held = take_turns(calls, count)
    try:
        return median_us(graph.replay, count, samples)
    finally:
        del held
        graph.reset()
        torch.cuda.empty_cache()
