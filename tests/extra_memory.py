"""Peak memory of a call beyond its result: from the allocator's statistics on a GPU, from its log on the CPU."""

import torch
from torch.profiler import ProfilerActivity, profile


def nbytes(result):
    """Bytes of the tensors of a result, storages that several share counted once."""
    storages, stack = {}, [result]
    while stack:
        found = stack.pop()
        if isinstance(found, torch.Tensor):
            own = getattr(found, "_buf", found).untyped_storage()
            storages[own.data_ptr()] = own.nbytes()
        elif isinstance(found, dict):
            stack += found.values()
        elif isinstance(found, list | tuple):
            stack += found
    return sum(storages.values())


def extra(function, device):
    """(result of function(), bytes that were allocated at a time beyond those of the result).

    On the CPU every allocation that torch reports counts, intermediates inside of its operators as well.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before - _in_blocks(result)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        result = function()
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return result, peak - nbytes(result)


def _in_blocks(result):
    """Bytes of a result on a GPU as the allocator counts them, in blocks of 512."""
    return -(-nbytes(result) // 512) * 512
