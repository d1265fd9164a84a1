"""Calls of modules within a model's forward, intercepted and put back.

`nn.Module.__call__` looks for `_compiled_call_impl` first, where `nn.Module.compile` keeps what it made. Nothing lies
further out: hooks, and forwards that accelerate has replaced, are inside and stay as they are. `tritonq.offload` is
called the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]  # (the call itself, args, kwargs)
_MISSING = object()


@contextlib.contextmanager
def intercepted(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Within this, calls of these modules go to their handlers."""
    before = {module: module.__dict__.get("_compiled_call_impl", _MISSING) for module in handlers}
    try:
        for module, handler in handlers.items():
            module.__dict__["_compiled_call_impl"] = _call(module, handler, before[module])
        yield
    finally:
        for module, call in before.items():
            if call is _MISSING:
                module.__dict__.pop("_compiled_call_impl", None)
            else:
                module.__dict__["_compiled_call_impl"] = call


def _call(module: nn.Module, handler: Handler, before: Any) -> Callable[..., Any]:
    original = module._call_impl if before is _MISSING or before is None else before

    def call(*args: Any, **kwargs: Any) -> Any:
        return handler(original, args, kwargs)

    return call


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Within this, configurations of transformers say `use_cache=False`: keys and values of a sample are not needed
    after its forward."""
    configs: list[Any] = []

    def visit(config: Any) -> None:
        if config is None or any(config is other for other in configs) or not hasattr(config, "__dict__"):
            return
        configs.append(config)
        for value in vars(config).values():
            if hasattr(value, "to_diff_dict"):  # a configuration within a configuration
                visit(value)

    for module in model.modules():
        config = module.__dict__.get("config")
        if hasattr(config, "to_diff_dict"):
            visit(config)
    changed = [config for config in configs if vars(config).get("use_cache")]
    try:
        for config in changed:
            config.use_cache = False
        yield
    finally:
        for config in changed:
            config.use_cache = True
