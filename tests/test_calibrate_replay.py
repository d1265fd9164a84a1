"""What blocks are called with, rebuilt from what blocks before them have put out.

Expected values are what hooks see in the model's own forward.
"""

import copy
import functools

import block_models
import pytest
import torch
from torch import nn

from tritonq.calibrate import blocks
from tritonq.calibrate.cache import ActivationCache
from tritonq.calibrate.replay import Replay
from tritonq.calibrate.trees import flatten

FAMILIES = block_models.TRANSFORMERS + block_models.WRITTEN
family = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)


def own(model, found, calls):
    """Arguments and outputs of blocks in the model's own forward: {(name, sample): (leaves, output)}."""
    seen, order = {}, []

    def before(name, sample, module, args, kwargs):
        leaves = flatten((args, kwargs))[0]
        seen[name, sample] = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        order.append(name)

    def after(name, sample, module, args, output):
        seen[name, sample] = (seen[name, sample], copy.deepcopy(output))

    for sample, call in enumerate(calls):
        hooks = []
        for name, module in found:
            hooks.append(module.register_forward_pre_hook(functools.partial(before, name, sample), with_kwargs=True))
            hooks.append(module.register_forward_hook(functools.partial(after, name, sample)))
        extra = (
            {"use_cache": False} if "input_ids" in call.kwargs and "bert" not in type(model).__name__.lower() else {}
        )
        with torch.no_grad():
            model(*call.args, **call.kwargs, **extra)
        for hook in hooks:
            hook.remove()
    return seen, list(dict.fromkeys(order))


def check_equal(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert type(one) is type(other)


def marks(model):
    """What may not change in a model: attributes and hooks of its modules, and its configuration."""
    config = model.config.to_dict() if hasattr(model, "config") else None
    return config, {
        name: (sorted(vars(module)), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@family
def test_arguments_are_the_models_own(make):
    model, calls = block_models.build(make)
    found = blocks.find(model)
    wanted, order = own(model, found, calls)
    left = marks(model)
    replay = Replay(model, found, calls, rows=1)
    assert [name for name, _ in replay.blocks] == order
    for index, (name, module) in enumerate(replay.blocks):
        for sample in range(len(calls)):
            for _ in range(2):  # the second time from what is held
                args, kwargs = replay.arguments(index, sample)
                check_equal(flatten((args, kwargs))[0], wanted[name, sample][0])
        if index + 1 < len(replay.blocks):
            replay.advance(index)
            continue
        for sample in range(len(calls)):
            (batch,) = replay.fetch(index, [sample], "cpu")
            with torch.no_grad():
                check_equal(flatten(module(*batch.args, **batch.kwargs))[0], flatten(wanted[name, sample][1])[0])
    assert marks(model) == left


@family
def test_samples_are_put_together(make):
    model, calls = block_models.build(make)
    replay = Replay(model, blocks.find(model), calls)
    together = 0
    for index, (name, module) in enumerate(replay.blocks):
        everything = replay.fetch(index, range(len(calls)), "cpu", True)
        assert sorted(sample for batch in everything for sample in batch.samples) == list(range(len(calls)))
        together += sum(len(batch.samples) > 1 for batch in everything)
        for batch in everything:
            with torch.no_grad():
                outputs = [t for t in flatten(module(*batch.args, **batch.kwargs))[0] if t is not None]
            for target, output in zip(batch.targets, outputs, strict=False):
                torch.testing.assert_close(target, output)
            singles = [replay.fetch(index, [sample], "cpu", True)[0] for sample in batch.samples]
            assert all(single.samples == (sample,) for single, sample in zip(singles, batch.samples, strict=True))
            for number, target in enumerate(batch.targets):
                rows = [single.targets[number] for single in singles]
                if len(rows) == 1 or (make is block_models.t5 and number):  # its position bias is that of all
                    torch.testing.assert_close(target, rows[0])
                else:  # four streams of hidden states; [S, B, H]
                    dim = {"gemma3n": 1, "turned": 1}.get(make.__name__, 0)
                    torch.testing.assert_close(target, torch.cat(rows, dim))
        replay.advance(index)
    assert together >= len(replay.blocks), "no samples were put together"
