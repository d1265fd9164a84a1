"""Which modules are blocks: quantized one after the other, each with the inputs that it gets of those before.

Blocks are the children of the outermost lists in which at least two have the same class, as for offload. Of a model
with a language model inside (`get_decoder`, or a child with such a name) only its blocks are taken: what looks and
listens is small and sensitive, and is chosen by `blocks=` where it is wanted. A list of one module makes a block, too,
where it holds most of what is around it (a model of one layer). Models without lists are taken by their
children that hold linear layers; where there are fewer than two, the whole model is one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from tritonq.offload import groups

Blocks = str | Sequence[str | nn.Module] | None
# Parts of models of several modalities that are no language model; the rest is.
SENSES = ("vision", "visual", "image", "audio", "speech", "video")


def find(model: nn.Module, blocks: Blocks = None) -> list[tuple[str, nn.Module]]:
    """Names and modules of the blocks, in the order of the model (`Replay` finds the order of calls).

    Args:
        blocks: None for those of the language model where the model has one beside others, else all; "all" for those
            of vision and audio towers as well; or modules and names. The name of a list stands for its entries.

    Raises:
        ValueError: another text, an unknown name, a module that is not part of the model, a block within a block.
    """
    if blocks is None or blocks == "all":
        found, alone = groups.find(model, "block"), _alone(model)
        if found == groups.find(model, "leaf"):  # what it gives where there are no lists
            return alone or _children(model)
        if alone and all(any(name.startswith(f"{block}.") for block, _ in alone) for name, _ in found):
            return alone  # the lists are within, of experts for example
        # Projections that are listed beside the blocks (Gemma 3n's altup_projections), unless there is nothing else.
        found = [entry for entry in found if any(map(groups.owns, entry[1].children()))] or found
        if not any(_has_linear(module) for _, module in found) or any(isinstance(m, nn.Linear) for _, m in found):
            return _children(model)  # also where the lists are of convolutions, and linear layers beside them
        found = _with_others(model, found)
        return found if blocks == "all" else _language(model, found)
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise ValueError(f"blocks is None, 'all', or a list of modules and their names, got {blocks!r}")
    return _chosen(model, blocks)


def _alone(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The entries of outermost lists of one module each, that hold most of the linear weights around the list."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != 1 or isinstance(module[0], nn.Linear):
            continue
        around = model.get_submodule(name.rpartition(".")[0])
        within = any(name.startswith(f"{block}.") for block, _ in found)
        if not within and 2 * _linear_weights(module) > _linear_weights(around):
            found.append((f"{name}.0" if name else "0", module[0]))
    return found


def _linear_weights(module: nn.Module) -> int:
    return sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Linear))


def _with_others(model: nn.Module, found: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """And modules of the same classes that are in no list, such as the one between the two halves of U-ViT."""
    classes = {type(module) for _, module in found if not type(module).__module__.startswith("torch.nn.")}
    chosen = {module for _, module in found}
    inside = {module for block in chosen for module in block.modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if module in chosen or (type(module) in classes and module not in inside)
    ]


def _children(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children that hold linear layers, looked for below a single one; else the model. Linear layers are no blocks:
    they are replaced in the module that holds them."""
    prefix, module = "", model
    while True:
        found = [(prefix + name, child) for name, child in module.named_children() if _has_linear(child)]
        if len(found) != 1 or isinstance(found[0][1], nn.Linear):
            break
        prefix, module = found[0][0] + ".", found[0][1]
    found = [(name, child) for name, child in found if not isinstance(child, nn.Linear)]
    return found if len(found) > 1 else [("", model)]


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def _language(model: nn.Module, found: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    senses = [name for name, _ in found if _is_sense(name)]
    if senses and len(senses) < len(found):
        return [(name, module) for name, module in found if name not in senses]
    return found


def _is_sense(name: str) -> bool:
    return any(sense in part.lower() for part in name.split(".") for sense in SENSES)


def _chosen(model: nn.Module, blocks: Iterable[str | nn.Module]) -> list[tuple[str, nn.Module]]:
    names = {module: name for name, module in model.named_modules()}
    chosen: dict[nn.Module, str] = {}
    for entry in blocks:
        module = entry
        if isinstance(entry, str):
            try:
                module = model.get_submodule(entry)
            except AttributeError:
                examples = ", ".join(name for name, _ in find(model, "all")[:3])
                raise ValueError(
                    f"blocks names {entry!r}, which the model does not have; it has blocks such as {examples}"
                ) from None
        if not isinstance(module, nn.Module) or module not in names:
            raise ValueError(f"blocks holds {type(entry).__name__}, which is no module of the model")
        if isinstance(module, nn.Linear):
            raise ValueError(f"blocks holds {names[module]!r}, a linear layer; name the module that it is part of")
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            chosen.update({child: names[child] for child in module.children()})
        else:
            chosen[module] = names[module]
    for name in chosen.values():
        outer = next((o for o in chosen.values() if o != name and (not o or name.startswith(o + "."))), None)
        if outer is not None:
            raise ValueError(f"blocks holds {name!r} and {outer!r}, which contains it; name one of them")
    return [(name, module) for module, name in names.items() if module in chosen]
