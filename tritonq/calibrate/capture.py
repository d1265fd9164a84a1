"""The model's own forward, with stand-ins for blocks, up to the block whose arguments are asked for.

Which outputs of earlier blocks, and which modules beside the blocks, the arguments of a block depend on is found on the
first sample of each kind: zeros that require gradients stand in for all of them, and a walk along autograd's graph from
the arguments of block i meets those that it was made of. The arguments that result without the others are then compared
with those of a forward without stand-ins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tritonq.calibrate import dependencies, outputs
from tritonq.calibrate.intercept import Handler, intercepted, without_cache
from tritonq.calibrate.outputs import Outputs
from tritonq.calibrate.trees import tree_map

Ready = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
Use = tuple[int, int]  # block, number of a tensor that it put out
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(BaseException):
    """Ends a forward; no `Exception`, which models catch."""


class Source(Protocol):
    """A call of the model, and what is known of what blocks and modules beside them put out in it."""

    @property
    def samples(self) -> tuple[int, ...]: ...

    def call(self) -> Arguments: ...

    def structure(self, block: int) -> Outputs | None: ...

    def load(self, block: int, numbers: Iterable[int]) -> dict[int, Tensor]: ...

    def beside(self, tower: nn.Module) -> list[Outputs] | None: ...

    def record(self, tower: nn.Module, known: list[Outputs]) -> None: ...


@dataclass
class Scan:
    """What was found out about samples of one kind.

    Attributes:
        order: of the blocks, as they are called.
        uses: for each block, tensors of blocks before that its arguments are made of.
        towers: for each block, numbers of modules beside the blocks that its arguments are made of.
    """

    order: list[int] = field(default_factory=list)
    uses: dict[int, set[Use]] = field(default_factory=dict)
    towers: dict[int, set[int]] = field(default_factory=dict)

    def last_use(self, use: Use) -> int:
        """Position in `order` of the last block that needs a tensor, -1 for none."""
        return max((p for p, block in enumerate(self.order) if use in self.uses[block]), default=-1)


class Capture:
    """Args, as of `Replay`: model, blocks, device, ready.

    Attributes:
        blocks: names and modules in the order in which they are called, after `arrange`.
        towers: modules beside the blocks that may be left out of a forward.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], device: torch.device | str | None, ready: Ready
    ) -> None:
        self.model, self.given, self.ready = model, list(blocks), ready
        chosen = {module for _, module in blocks}
        self.fixed = dependencies.beside(model, chosen)
        self.towers = dependencies.towers(model, chosen)
        self.device = torch.device(device) if device is not None else self._home()
        self.real = False  # stand-ins have memory of their own, for models that write to what blocks put out
        self.writes = False  # the model does so: it gets copies
        self.blocks: list[tuple[str, nn.Module]] = []
        self._quiet = False

    def _home(self) -> torch.device:
        tensors = [t for module in self.fixed for t in (*module._parameters.values(), *module._buffers.values())]
        tensors += list(self.model.parameters())
        found = next((t.device for t in tensors if t is not None and t.device.type != "meta"), None)
        return torch.device("cpu") if found is None else found

    def to(self, value: Any, device: torch.device | str) -> Any:
        """A nested value with its tensors on a device."""
        return tree_map(lambda tensor: tensor.to(device, non_blocking=True), value)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within this, the model is as after `eval()` and keeps no keys and values."""
        if self._quiet:
            yield
            return
        with without_cache(self.model), dependencies.evaluating(self.model):
            self._quiet = True
            try:
                yield
            finally:
                self._quiet = False

    def forward(self, call: Arguments, handlers: Mapping[nn.Module, Handler], grad: bool = False) -> None:
        args, kwargs = self.to(call, self.device)
        if kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        with torch.set_grad_enabled(grad), self.quiet(), intercepted(handlers), contextlib.suppress(_Reached):
            self.model(*args, **kwargs)

    def stand_in(self, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.real:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return torch.zeros((), dtype=dtype, device=self.device).expand(shape)

    def arguments(
        self, index: int, source: Source, order: Sequence[int], uses: Iterable[Use], towers: Iterable[int]
    ) -> Arguments:
        """(args, kwargs) of a block.

        Args:
            order: of the blocks of this call. uses: what is loaded, in place of zeros. towers: that are run.

        Raises:
            ValueError: the forward does not come to the block, or blocks before it have not put out anything yet.
        """
        try:
            return self._arguments(index, source, order, uses, towers)
        except RuntimeError as error:
            if self.real or isinstance(error, torch.OutOfMemoryError):
                raise
            self.real = True  # the model may write to what blocks put out
            return self._arguments(index, source, order, uses, towers)

    def _arguments(
        self, index: int, source: Source, order: Sequence[int], uses: Iterable[Use], towers: Iterable[int]
    ) -> Arguments:
        needed: dict[int, set[int]] = {}
        for block, number in uses:
            needed.setdefault(block, set()).add(number)
        found: list[Arguments] = []

        def stub(block: int) -> Handler:
            def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                structure = source.structure(block)
                if structure is None:
                    raise ValueError(
                        f"arguments of {self.blocks[index][0]!r} are asked for before {self.blocks[block][0]!r} has run"
                    )
                tensors = source.load(block, needed[block]) if block in needed else {}
                return structure.build(args, kwargs, tensors, self.stand_in)

            return handler

        def reach(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            found.append((args, kwargs))
            raise _Reached

        handlers: dict[nn.Module, Handler] = {
            self.blocks[block][1]: stub(block) for block in order[: list(order).index(index)]
        }
        handlers[self.blocks[index][1]] = reach
        handlers.update(self._beside(source, set(towers)))
        self.forward(source.call(), handlers)
        if not found:
            raise ValueError(
                f"a sample does not come to {self.blocks[index][0]!r}, as others whose arguments have the same types "
                "do; which blocks a sample calls must not depend on its values"
            )
        return found[0]

    def _beside(self, source: Source, needed: set[int]) -> dict[nn.Module, Handler]:
        """Handlers of towers: those that are needed run, others put out what has their shapes, if these are known."""
        handlers: dict[nn.Module, Handler] = {}
        for number, tower in enumerate(self.towers):
            known = source.beside(tower)
            if known is None:
                handlers[tower] = self._recorded(source, tower)
            elif number not in needed:
                handlers[tower] = self._repeated(known)
        return handlers

    def _recorded(self, source: Source, tower: nn.Module) -> Handler:
        known: list[Outputs] = []

        def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            returned, structure, _, _ = outputs.observe(original, args, kwargs)
            known.append(structure)
            source.record(tower, known)
            return returned

        return handler

    def _repeated(self, known: list[Outputs]) -> Handler:
        calls = iter(known)

        def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            structure = next(calls, None)
            if structure is None:
                return original(*args, **kwargs)
            return structure.build(args, kwargs, {}, self.stand_in)

        return handler

    # What is found out on the first sample

    def observe(
        self, source: Source, keep: Callable[[int, Outputs, list[Tensor]], None]
    ) -> tuple[list[int], dict[int, list[Any]]]:
        """A forward with all blocks: their order, as positions among those given, and digests of their arguments.

        Args:
            keep: is given what each puts out: keep(position, structure, tensors by number).
        """
        order: list[int] = []
        digests: dict[int, list[Any]] = {}
        last: list[tuple[Tensor, int | None]] = []

        def observed(position: int, name: str, module: nn.Module) -> Handler:
            def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                if position in digests:
                    raise ValueError(
                        f"{name!r} is called more than once in a forward, so its inputs depend on its own outputs; "
                        "name a module that contains all its calls by blocks="
                    )
                self.writes |= any(outputs.version(tensor) != before for tensor, before in last)
                order.append(position)
                digests[position] = dependencies.digests((args, kwargs))
                with self.ready(module):
                    structure, tensors = self.run(name, original, *self._at(module, args, kwargs))[1:]
                tensors = [tensor.to(self.device) for tensor in tensors]
                keep(position, structure, tensors)
                last[:] = [(tensor, outputs.version(tensor)) for tensor in tensors]
                return structure.build(args, kwargs, dict(enumerate(tensors)), self.stand_in)

            return handler

        handlers = {module: observed(n, name, module) for n, (name, module) in enumerate(self.given)}
        handlers.update(self._beside(source, set(range(len(self.towers)))))
        self.forward(source.call(), handlers)
        return order, digests

    def run(
        self, name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Outputs, list[Tensor]]:
        """Call a block: what it returned, the structure of what it put out, and the tensors in that by number."""
        returned, structure, tensors, changed = outputs.observe(call, args, kwargs)
        if changed:
            raise ValueError(
                f"{name!r} writes to the tensors that it is called with, so it cannot be called twice with them; "
                "choose modules that contain it by blocks="
            )
        return returned, structure, tensors

    def _at(self, module: nn.Module, args: Any, kwargs: Any) -> Arguments:
        """Arguments on the device of a block, unless hooks of accelerate move them."""
        device = next((p.device for p in module.parameters()), self.device)
        if device.type == "meta" or device == self.device or hasattr(module, "_hf_hook"):
            return args, kwargs
        return self.to((args, kwargs), device)  # type: ignore[no-any-return]

    def arrange(self, orders: Iterable[Sequence[int]]) -> list[int]:
        """Put the blocks in the order of calls: of the first kind of samples, those of others after what they come
        after. Returns their positions among those given."""
        arranged: list[int] = []
        for order in orders:
            place = 0
            for position in order:
                if position in arranged:
                    place = arranged.index(position) + 1
                else:
                    arranged.insert(place, position)
                    place += 1
        if not arranged:
            names = ", ".join(name for name, _ in self.given[:3])
            raise ValueError(f"no sample calls one of the blocks {names} ...; name those that are called by blocks=")
        self.blocks = [self.given[position] for position in arranged]
        return arranged

    def trace(self, source: Source, order: Sequence[int]) -> Scan:
        """What arguments are made of, by a forward whose stand-ins require gradients. Where the model does not bear
        them, everything."""
        scan = Scan(list(order))
        try:
            self._trace(source, scan)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if not self.real:
                self.real = True
                return self.trace(source, order)
        for position, block in enumerate(order):
            everything = {(b, n) for b in order[:position] for n in range(len(self._known(source, b).specs))}
            scan.uses.setdefault(block, everything)
            scan.towers.setdefault(block, set(range(len(self.towers))))
        return scan

    def _known(self, source: Source, block: int) -> Outputs:
        found = source.structure(block)
        assert found is not None
        return found

    def _trace(self, source: Source, scan: Scan) -> None:
        origins = dependencies.Origins()

        def stub(block: int) -> Handler:
            def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                found = origins.of((args, kwargs))
                scan.uses[block] = {origin for origin in found if isinstance(origin, tuple)}
                scan.towers[block] = {origin for origin in found if isinstance(origin, int)}
                if block == scan.order[-1]:
                    raise _Reached

                def stand_in(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
                    return origins.stand_in((block, number), shape, dtype, self.device, self.real)

                return self._known(source, block).build(args, kwargs, {}, stand_in)

            return handler

        def marked(number: int) -> Handler:
            def handler(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                with torch.no_grad():
                    returned = original(*args, **kwargs)
                return tree_map(lambda tensor: origins.marked(number, tensor), returned)

            return handler

        handlers = {self.blocks[block][1]: stub(block) for block in scan.order}
        handlers.update({tower: marked(number) for number, tower in enumerate(self.towers)})
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda packed: torch.empty(0)):
            self.forward(source.call(), handlers, grad=True)

    def _check_numbers(self, source: Source, order: list[int]) -> None:
        """ValueError where a block has put out NaN, which equals nothing that is computed again."""
        for block in order:
            known = self._known(source, block)
            found = source.load(block, range(len(known.specs)))
            if any(t.is_floating_point() and bool(t.isnan().any()) for t in found.values()):
                raise ValueError(
                    f"{self.blocks[block][0]!r} put out NaN for sample {', '.join(map(str, source.samples))} of the "
                    "calibration data, whose inputs are finite; run the model in bfloat16 or float32, or leave the "
                    "sample out"
                )

    def settle(self, source: Source, scan: Scan, position: int, wanted: list[Any]) -> None:
        """Make sure that the arguments of a block come out as in the forward without stand-ins.

        Raises:
            ValueError: they do not, whatever is loaded.
        """
        block, order = scan.order[position], scan.order

        def right(uses: set[Use], towers: set[int]) -> bool:
            return dependencies.same(dependencies.digests(self.arguments(block, source, order, uses, towers)), wanted)

        if right(scan.uses[block], scan.towers[block]):
            return
        # Through operations that autograd does not see; what can be left out is tried block by block.
        traced, everywhere = scan.uses[block], set(range(len(self.towers)))
        uses = {(b, n) for b in order[:position] for n in range(len(self._known(source, b).specs))}
        if not right(uses, everywhere):
            self._check_numbers(source, order[:position])
            raise ValueError(
                f"arguments of {self.blocks[block][0]!r} come out differently when the model is called again with what "
                "the blocks before it have put out: something random, or kept between calls, or handed "
                "from block to block on another way than arguments and outputs. Choose modules that contain these "
                "blocks by blocks="
            )
        for earlier in order[:position]:
            fewer = {use for use in uses if use[0] != earlier}
            if not traced - fewer and right(fewer, everywhere):
                uses = fewer
        scan.uses[block], scan.towers[block] = uses, everywhere
