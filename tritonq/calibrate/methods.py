"""The algorithms by name, and how a `Calibration` makes them."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from tritonq.calibrate.task import Method, Task

if TYPE_CHECKING:
    from tritonq.calibrate.calibration import Calibration


class Nearest:
    """Rounding to nearest, which every layer gets that no method decides about; with it, losses are reported."""

    name = "rtn"

    def run(self, task: Task) -> None:
        """Leaves everything open."""


# Modules and classes: loaded when they are asked for, `import tritonq` has no time for them.
METHODS = {
    "signround": ("signround", "SignRound"), "gptq": ("gptq", "GPTQ"), "awq": ("awq", "AWQ"),
    "smoothquant": ("smoothquant", "SmoothQuant"), "imatrix": ("imatrix", "Imatrix"),
    "bias": ("bias", "BiasCorrection"), "rtn": ("methods", "Nearest"), "inputs": ("inputs", "StaticInputs"),
}  # fmt: skip
SCALING = ("smoothquant", "awq")  # change what goes into layers
STATIC_INPUTS = ("minmax", "percentile", "mse")


def resolve(calibration: Calibration) -> list[Method]:
    """The methods of a calibration, in order: static inputs after those that scale what feeds layers and before those
    that round weights for them; bias correction last.

    Raises:
        ValueError: an unknown name, options of a method that is not asked for, or that it does not take.
    """
    chosen: Any = calibration.method
    several = [chosen] if isinstance(chosen, str) or hasattr(chosen, "run") else list(chosen)
    known = [name for name in METHODS if name != "inputs"]
    if not several:
        raise ValueError(f"method names none; known: {', '.join(known)}")
    names = [method for method in several if isinstance(method, str)]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    unused = calibration.options.keys() - set(names)
    if unused:
        raise ValueError(f"options are for {', '.join(sorted(unused))}, which method does not name")
    found = [_made(method, calibration) if isinstance(method, str) else method for method in several]
    if calibration.inputs != "dynamic":
        if calibration.inputs not in STATIC_INPUTS:
            raise ValueError(f"inputs is 'dynamic' or one of {', '.join(STATIC_INPUTS)}, got {calibration.inputs!r}")
        scaling = [i + 1 for i, method in enumerate(found) if method.name in SCALING]
        found.insert(max(scaling, default=0), _class("inputs")(calibration.inputs))
    return sorted(found, key=lambda method: method.name == "bias")


def _made(name: str, calibration: Calibration) -> Method:
    known = inspect.signature(_class(name)).parameters
    given = {"iters": calibration.iters, "lr": calibration.lr, "batch": calibration.batch}
    options = {key: value for key, value in given.items() if value is not None and key in known}
    own = calibration.options.get(name, {})
    if wrong := own.keys() - known.keys():
        raise ValueError(f"{name} takes {', '.join(known) or 'no options'}; got {', '.join(sorted(wrong))}")
    found: Method = _class(name)(**{**options, **own})
    return found


def _class(name: str) -> Any:
    module, kind = METHODS[name]
    return getattr(importlib.import_module(f"tritonq.calibrate.{module}"), kind)
