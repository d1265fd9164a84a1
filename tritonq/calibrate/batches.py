"""Inputs of one block and what the dense block put out for them: `Task.fetch`.

Inputs are made again from the cache whenever they are asked for (`replay`); targets are computed once, before anybody
changes a weight, and kept while the block is tuned, on its device where there is room.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonq.calibrate.cache import ActivationCache
from tritonq.calibrate.replay import Replay
from tritonq.calibrate.task import Batch


class Batches:
    """Samples of a block, numbered without those that do not come to it.

    Args:
        index: of the block. targets: an empty cache for them.

    Attributes:
        samples: numbers of the model's samples.
    """

    def __init__(self, replay: Replay, index: int, targets: ActivationCache) -> None:
        self.replay, self.index, self.targets = replay, index, targets
        self.samples = [s for s in range(len(replay.calls)) if replay.calls_block(index, s)]
        self._masks: dict[int, list[Tensor | None]] = {}

    def keep_targets(self, device: torch.device) -> None:
        """Run the block, which is dense, on all samples."""
        for number, sample in enumerate(self.samples):
            for batch in self.replay.fetch(self.index, [sample], device, True):
                self.targets.put((0, number), dict(enumerate(batch.targets)))
                self._masks[number] = batch.masks

    def fetch(self, samples: Sequence[int], device: torch.device, targets: bool) -> list[Batch]:
        """See `Task.fetch`."""
        found = []
        numbers = {self.samples[number]: number for number in samples}
        for batch in self.replay.fetch(self.index, list(numbers), device, False):
            own = [numbers[sample] for sample in batch.samples]
            batch.samples = tuple(own)
            if targets:
                kept = [self.targets.get((0, number), device) for number in own]
                batch.targets = [torch.cat([each[n] for each in kept]) if kept[1:] else kept[0][n] for n in kept[0]]
                batch.masks = [self._mask(own, n, device) for n in kept[0]]
            found.append(batch)
        return found

    def _mask(self, numbers: Sequence[int], target: int, device: torch.device) -> Tensor | None:
        """Masks of samples that are put together; of those that have none, ones."""
        masks = [self._masks[number][target] for number in numbers]
        if all(mask is None for mask in masks):
            return None
        shape = next(mask.shape for mask in masks if mask is not None)
        return torch.cat(
            [torch.ones(shape, dtype=torch.bool, device=device) if m is None else m.to(device) for m in masks]
        )
