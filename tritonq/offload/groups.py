"""Which modules are fetched together, and which of them fit the budget for good.

A *unit* is a module that is fetched as a whole. Its weights are the frozen parameters of its subtree that nothing
outside of it refers to; what is shared, trained or a buffer stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tritonq.offload.pieces import movable

Groups = str | Sequence[str | nn.Module]
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
ROUNDING = 512  # bytes, of torch's allocator for GPUs


@dataclass
class Unit:
    """A module and its weights."""

    name: str
    module: nn.Module
    weights: list[Tensor]
    owners: list[nn.Module]  # modules of the subtree that hold weights as parameters of their own


def owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def find(model: nn.Module, groups: Groups) -> list[tuple[str, nn.Module]]:
    """Names and modules of the units, in the order of the model.

    Args:
        groups: "block": children of each outermost list, dict or sequence of modules in which at least two have the
            same class, such as the layers of a transformer; models without one are taken as with "leaf". "leaf":
            every module without children that has parameters, and layers of torch that have both
            (`nn.MultiheadAttention` reads its child's weight). Else modules, or their names.

    Raises:
        ValueError: another text, an unknown name, a module that is not part of the model.
    """
    if isinstance(groups, str):
        if groups not in ("block", "leaf"):
            raise ValueError(f"groups is 'block', 'leaf' or a list of modules or their names, got {groups!r}")
        found = list(_blocks(model, "")) if groups == "block" else []
        return found or list(_leaves(model, ""))
    if not isinstance(groups, Iterable):
        raise ValueError(f"groups is 'block', 'leaf' or a list of modules or their names, got {groups!r}")
    names = {module: name for name, module in model.named_modules()}
    chosen: dict[nn.Module, str] = {}
    for entry in groups:
        module = entry
        if isinstance(entry, str):
            try:
                module = model.get_submodule(entry)
            except AttributeError:
                raise ValueError(f"groups names {entry!r}, which the model does not have") from None
        if not isinstance(module, nn.Module) or module not in names:
            raise ValueError(f"groups holds {type(entry).__name__}, which is no module of the model")
        chosen[module] = names[module]
    return [(name, module) for module, name in names.items() if module in chosen]


def _blocks(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    children = [(prefix + name, child) for name, child in module.named_children() if owns(child)]
    classes = [type(child) for _, child in children]
    if isinstance(module, CONTAINERS) and len(set(classes)) < len(classes):
        for name, child in children:
            if isinstance(child, nn.ModuleList | nn.ModuleDict):  # never called
                yield from _blocks(child, name + ".")
            else:
                yield name, child
        return
    for name, child in children:
        yield from _blocks(child, name + ".")


def _leaves(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    if next(module.parameters(recurse=False), None) is not None:
        layer = type(module).__module__.startswith("torch.nn.") and not isinstance(module, CONTAINERS)
        if layer or not any(owns(child) for child in module.children()):
            yield prefix[:-1], module
            return
    for name, child in module.named_children():
        yield from _leaves(child, prefix + name + ".")


def units(model: nn.Module, groups: Groups) -> list[Unit]:
    """The units with the weights that nothing outside of them refers to. Parameters and buffers that share memory are
    left to the caller, who sees them as pieces."""
    chosen = {module: Unit(name, module, [], []) for name, module in find(model, groups)}
    users: dict[int, set[int]] = {}  # units, or 0, in which a parameter is found, also more than once
    _walk(model, None, chosen, users)
    for unit in chosen.values():
        unit.weights = [weight for weight in unit.weights if len(users[id(weight)]) == 1]
    return [unit for unit in chosen.values() if unit.weights]


def _walk(module: nn.Module, unit: Unit | None, chosen: dict[nn.Module, Unit], users: dict[int, set[int]]) -> None:
    unit = chosen.get(module, unit)
    for parameter in module._parameters.values():
        if parameter is None:
            continue
        users.setdefault(id(parameter), set()).add(id(unit) if unit else 0)
        if unit is not None and movable(parameter) and not parameter.requires_grad:
            if not any(parameter is weight for weight in unit.weights):
                unit.weights.append(parameter)
            if module not in unit.owners:
                unit.owners.append(module)
    for child in module.children():
        _walk(child, unit, chosen, users)


def rounded(nbytes: int) -> int:
    return -(-nbytes // ROUNDING) * ROUNDING


def slabs(sizes: Sequence[int], count: int = 2) -> int:
    """Bytes of so many slabs, through which groups of these sizes take turns."""
    return min(count, len(sizes)) * rounded(max(sizes, default=0))


def stay(sizes: Sequence[int], kept: Sequence[int], resident: int, budget: int | None) -> tuple[set[int], int]:
    """Which groups stay on the device, as many as fit, spread over the model; and through how many slabs the others
    take turns.

    With two slabs a copy waits for the group before the last one, so it idles wherever a group that stays computes in
    between: a third slab is worth more than one more group that stays.

    Args:
        sizes: bytes that each group has in a slab; kept: that it takes where it stays.
        resident: bytes on the device in any case. budget: bytes in all, or None for as few as possible.
    """
    if budget is None:
        return set(), 2
    count = len(sizes)
    if resident + sum(kept) <= budget:
        return set(range(count)), 2
    best: set[int] = set()
    turns = 3 if resident + slabs(sizes, 3) <= budget else 2
    for number in range(1, count):
        chosen = {(2 * i + 1) * count // (2 * number) for i in range(number)}
        turning = [size for index, size in enumerate(sizes) if index not in chosen]
        if resident + sum(kept[i] for i in chosen) + slabs(turning, turns) <= budget:
            best = chosen
    return best, turns
