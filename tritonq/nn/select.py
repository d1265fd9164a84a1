"""Which modules are quantized, and which of them share one tensor-wide scale.

Both answers are given for module names alone, so that a model in memory and a checkpoint on disk get the same ones.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable

from torch import nn

from tritonq.formats import Format

# Left alone unless a user quantizes them by hand: output heads, embeddings, and the routers of mixtures of experts,
# which are tiny and decide everything.
DEFAULT_IGNORE = (
    "lm_head",
    "embed_out",
    r"re:(^|.*\.)\w*embed\w*(\.|$).*",
    r"re:(^|.*\.)(router|gate|shared_expert_gate|classifier)$",
)

# Layers that runtimes fuse into one matrix multiplication (vLLM's qkv_proj and gate_up_proj).
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
_EXPERT = re.compile(r"^(?P<experts>.*\bexperts)\.\d+\.(?P<leaf>[^.]+)$")


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by name that multiply by a weight of their own: not tied to an embedding or another layer, not
    computed by a parametrization, not read past the layer's forward."""
    owners = collections.Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        # nn.MultiheadAttention reads this weight itself.
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and type(module).forward is nn.Linear.forward
        and "weight" in module._parameters
        and owners[id(module.weight)] == 1
    }


def _matches(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return name == entry or name.rpartition(".")[2] == entry


class Selection:
    """Ignore patterns: a full module name, a last name such as `lm_head`, or `re:` with a regex matched from the start.

    They add to `DEFAULT_IGNORE`.
    """

    def __init__(self, ignore: Iterable[str] = ()) -> None:
        self.entries = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self._used: set[str] = set()
        for entry in self.entries:
            if entry.startswith("re:"):
                try:
                    re.compile(entry[3:])
                except re.error as error:
                    raise ValueError(f"ignore pattern {entry!r} is not a regular expression: {error}") from None

    def ignores(self, name: str) -> bool:
        """Whether the module `name` is left alone."""
        found = [entry for entry in self.entries if _matches(entry, name)]
        self._used.update(found)
        return bool(found) or any(_matches(entry, name) for entry in DEFAULT_IGNORE)

    def check_all_used(self, names: Iterable[str]) -> None:
        """ValueError for an entry that matched none of the modules asked about; `names` serve as examples."""
        for entry in self.entries:
            if entry not in self._used:
                examples = ", ".join(list(names)[:3])
                raise ValueError(f"ignore pattern {entry!r} matches no module; modules are named like {examples}")


def sharing_key(name: str, fmt: Format) -> str | None:
    """Modules with the same key share their tensor-wide scale: NVFP4's divisor over layers that runtimes fuse, and any
    tensor-wide scale over the experts of one layer, which models hold as one parameter. None: the module has its
    own."""
    if not (fmt.tensor_scale or fmt.group[0] == -1):
        return None
    expert = _EXPERT.match(name)
    parent, _, leaf = name.rpartition(".")
    if expert:
        parent, leaf = expert["experts"], expert["leaf"]
    for members in FUSED:
        if leaf in members and (expert or fmt.tensor_scale):
            return f"{parent}.{'+'.join(members)}"
    return f"{parent}.{leaf}" if expert else None
