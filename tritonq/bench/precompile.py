"""Compile what a run is going to time, in several processes: its kernels and those of compiled peers.

Triton and inductor keep what they compile on disk, where the timed pass finds it. Shapes stay static, one compilation
each: code for dynamic shapes would be slower, and a peer has to be at its best. Nothing here changes what is measured:
which configuration of a peer is fastest is not stored, because many processes share the GPU; the timed pass finds that
out alone.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait

import torch

from tritonq.bench import cases, peers
from tritonq.formats import get_format


def _begin(device: int) -> None:
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # the processes are the threads
    inductor.autotune_local_cache = False
    torch.cuda.set_device(device)


def compile_case(
    name: str, op: str, shape: cases.Shape2, dtype: torch.dtype, labels: Sequence[str], device: str = "cuda"
) -> None:
    """Call `op` of the format `name`, and the peers of `labels`, once on a tensor of zeros; then raise what failed."""
    fmt, x = get_format(name), torch.zeros(shape, dtype=dtype, device=device)
    problem = None
    for one in itertools.chain([peers.ours(fmt, op, x)], peers.peers(fmt, op, x, tuple(labels))):
        try:
            one.call(*one.prepare(x))
        except Exception as error:
            problem = RuntimeError(f"{type(error).__name__}: {error}")  # any exception may come from another process
    del x, one
    torch.cuda.empty_cache()  # other processes need it
    if problem is not None:
        raise problem


def compile_all(
    names: Sequence[str],
    shapes: Sequence[cases.Shape2],
    dtypes: Sequence[torch.dtype],
    labels: Sequence[str],
    workers: int,
    seconds: float | None = None,
) -> tuple[int, int, float]:
    """Compile every operation of the formats in `workers` processes.

    Args:
        seconds: nothing new begins after so many; None for as long as it takes.

    Returns:
        how many operations are compiled, of how many, and the seconds it took.
    """
    begun = time.monotonic()
    todo = [
        (name, op, shape, dtype, tuple(labels))
        for dtype, shape, name in itertools.product(dtypes, shapes, names)
        for op in cases.operations(get_format(name))
    ]
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin, (torch.cuda.current_device(),)
    ) as pool:
        futures = [pool.submit(compile_case, *one) for one in todo]
        wait(futures, seconds)
        pool.shutdown(cancel_futures=True)
    done = sum(not future.cancelled() and future.exception() is None for future in futures)
    return done, len(todo), time.monotonic() - begun
