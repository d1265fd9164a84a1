"""What block i is called with, for each sample, from the outputs of blocks before it and the model's own forward.

    arguments of block i = what the model calls it with, after
        block j < i          has put out what the cache holds of it, else zeros without memory
        modules beside them  have run, or put out zeros where no argument of block i depends on them
        block i              ends the forward

Masks, rotary embeddings, per-layer inputs and features that are injected between layers are made again and not kept.
Of what block j put out, the cache keeps what arguments of later blocks are made of, until the last of them has run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tritonq.calibrate import dependencies, merge
from tritonq.calibrate.cache import ActivationCache, Key
from tritonq.calibrate.capture import Arguments, Capture, Ready, Scan, Use
from tritonq.calibrate.held import Held
from tritonq.calibrate.merge import Rule
from tritonq.calibrate.outputs import Outputs
from tritonq.calibrate.task import Batch
from tritonq.calibrate.task import tensors as floating
from tritonq.calibrate.trees import Tree, flatten, unflatten

TARGETS, MADE = -1, -2  # in place of a block in the keys of the cache: of the block that is worked on
STATE = "replay.pickle"
Result = TypeVar("Result")


class Replay:
    """The arguments of blocks, rebuilt sample by sample. Nothing of it stays in the model.

    Blocks are gone through in order: arguments of block i need what the blocks before it have put out, which `advance`
    runs and keeps.

        for index, (name, block) in enumerate(replay.blocks):
            task = Task(name, block, ..., fetch=functools.partial(replay.fetch, index))
            ...
            replay.advance(index, device)

    Args:
        model: whose own forward is the only description of what blocks get; it runs as in evaluation.
        blocks: names and modules, as `blocks.find` gives them.
        calls: one for each sample, with `args` and `kwargs` of the model.
        device: of what is beside the blocks; where its forward runs. Default: of its parameters there.
        cache: of the outputs, default a new one in host memory.
        ready: a context within which a block can be called, for blocks that are not in place, e.g. on the meta device:
            `ready(module)`. It is entered once for each block, with the first sample of each kind. Otherwise only
            `fetch(..., targets=True)` and `advance` call a block, the one that is asked for.
        rows: samples in one call of a block that `fetch` and `advance` make; halved where memory runs out.
        keep_targets: what the dense block puts out is kept in the cache for as long as the block is worked on.
        resume: a folder that `save` wrote, in place of finding out what it says.
        events: is told of what happened, see `task.Events`.

    Attributes:
        blocks: names and modules in the order in which they are called. uncalled: those that no sample calls.
        device: see above; the CPU where memory ran out.

    Raises:
        ValueError: no samples; a block that is called more than once in a forward; no block is called; arguments that
            are not made of outputs of blocks and of the sample alone; a block that writes to its arguments.
        torch.OutOfMemoryError: with everything on the host, too.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        calls: Sequence[Any],
        device: torch.device | str | None = None,
        cache: ActivationCache | None = None,
        ready: Ready | None = None,
        rows: int = 8,
        keep_targets: bool = True,
        resume: str | Path | None = None,
        events: Callable[..., None] | None = None,
    ) -> None:
        if not calls:
            raise ValueError("calibration takes at least one sample, got none")
        self.model, self.calls, self.rows, self.keep_targets = model, calls, rows, keep_targets
        self.cache = ActivationCache(events=events) if cache is None else cache
        self._events = events if events is not None else (lambda what, **details: None)
        self._capture = Capture(model, blocks, device, ready or (lambda module: contextlib.nullcontext()))
        self._outputs: dict[Key, Outputs] = {}  # by block, sample
        self._beside: dict[tuple[int, int], list[Outputs]] = {}  # by tower, sample; one a call
        self._dims: dict[Any, merge.Dims] = {}  # of arguments, by class of the block and their types
        self._rules: dict[Any, Rule | None] = {}  # by block and types of its arguments
        self._splits: dict[int, merge.Dims] = {}  # of what blocks put out
        self._held = Held(len(calls))
        self._index = -1  # of the block that is worked on
        self._collected = False  # whether nothing else was left to do when memory ran out last
        self._common: dict[Any, int] = {}  # samples whose outputs others have in common with them
        self._described: dict[int, list[Any]] = {}  # arguments of the block by sample, see `merge.describe`
        self._moved: dict[nn.Module, torch.device] = {}
        self._kinds = [dependencies.kind(call.args, call.kwargs) for call in calls]
        self._scans: dict[Any, Scan] = {}
        if resume is None:
            self._find_out()
        else:
            self._load(Path(resume))
        self.blocks = self._capture.blocks
        self.uncalled = [entry for entry in blocks if not any(entry[1] is module for _, module in self.blocks)]
        for name, _ in self.uncalled:
            self._events("block is not called", block=name)

    @property
    def device(self) -> torch.device:
        return self._capture.device

    @property
    def nbytes(self) -> int:
        """Bytes of activations that are kept: outputs of blocks and what arguments have in common."""
        return sum(self.cache.nbytes.values()) + self._held.nbytes

    def scan(self, sample: int) -> Scan:
        """What was found out about samples of this kind."""
        return self._scans[self._kinds[sample]]

    def calls_block(self, index: int, sample: int) -> bool:
        """Whether the forward of a sample comes to a block."""
        return index in self.scan(sample).order

    # What blocks are called with

    def arguments(self, index: int, sample: int) -> Arguments:
        """(args, kwargs) of a block for a sample, on the device of what is beside the blocks; not to be written to.

        Raises:
            ValueError: the sample does not come to this block, or a block before it has not been run by `advance`.
        """
        leaves, tree = self._leaves(index, sample)
        return unflatten(leaves, tree)  # type: ignore[no-any-return]

    def fetch(
        self, index: int, samples: Sequence[int], device: torch.device | str, targets: bool = False
    ) -> list[Batch]:
        """Inputs of a block, see `Task.fetch`; samples that do not come to it are left out.

        Args:
            targets: with what the block puts out for them. That is found the first time that it is asked for, when the
                block has to be dense, and kept until the next block if `keep_targets`.
        """
        with torch.no_grad():
            found = []
            for group, rule in self._groups(index, samples):
                batch = self._batch(index, group, rule, device)
                if targets:
                    self._add_targets(index, batch, rule)
                found.append(batch)
            return found

    def advance(
        self,
        index: int,
        device: torch.device | str | None = None,
        watch: Callable[[Batch, list[Tensor]], None] | None = None,
    ) -> None:
        """Run a block, as it is now, on all samples, and keep what later blocks need of what it puts out, in place of
        what they do not need any more.

        Args:
            device: of the block. watch: is given each batch, with its targets where all of them are kept, and the
                floating outputs.
        """
        with self._capture.quiet(), torch.no_grad():
            device = self.device if device is None else device
            self._common = {}
            for group, rule in self._groups(index, range(len(self.calls))):
                self._in_rows(group, functools.partial(self._advance, index, rule, device, watch), index)
            for sample in range(len(self.calls)):
                self.cache.drop((TARGETS, sample))
                self.cache.drop((MADE, sample))

    def _advance(
        self,
        index: int,
        rule: Rule | None,
        device: torch.device | str,
        watch: Callable[[Batch, list[Tensor]], None] | None,
        samples: Sequence[int],
    ) -> None:
        batch = self._batch(index, samples, rule, device)
        returned, structure, tensors = self._run(index, batch)
        if watch is not None:
            if all((TARGETS, sample) in self.cache for sample in samples):
                self._add_targets(index, batch, rule)
            watch(batch, floating(returned))
        for number, sample in enumerate(samples):
            dims = rule.outputs if rule else [None] * len(tensors)
            parts = [merge.part(t, dim, number, len(samples)) for t, dim in zip(tensors, dims, strict=True)]
            self._keep(index, sample, structure.of(parts), parts, {n for n, dim in enumerate(dims) if dim is None})

    def _run(self, index: int, batch: Batch) -> tuple[Any, Outputs, list[Tensor]]:
        name, module = self.blocks[index]
        with self._capture.quiet():
            return self._capture.run(name, module, batch.args, batch.kwargs)

    def _keep(self, index: int, sample: int, structure: Outputs, tensors: Sequence[Tensor], common: set[int]) -> None:
        """Args: common: tensors that may be the same for other samples."""
        scan = self.scan(sample)
        position = scan.order.index(index)
        for earlier in scan.order[:position]:
            numbers = self.cache.numbers((earlier, sample))
            self.cache.drop((earlier, sample), {n for n in numbers if scan.last_use((earlier, n)) > position})
        self.cache.drop((MADE, sample))
        self.cache.drop((TARGETS, sample))
        self._outputs[index, sample] = structure
        live = {n: tensor for n, tensor in enumerate(tensors) if scan.last_use((index, n)) > position}
        self.cache.drop((index, sample))
        for n in common & live.keys() if len(live) > 1 else ():  # a block's only output is a sample's own
            mark = (n, live[n].shape, live[n].dtype, dependencies.fingerprint(live[n]))
            other = self._common.setdefault(mark, sample)
            if n in self.cache.numbers((index, other)) and other != sample:
                self.cache.share((index, sample), (index, other), n)
                del live[n]
            else:
                self._common[mark] = sample
        self.cache.put((index, sample), live)

    # Arguments of a sample

    def _leaves(self, index: int, sample: int) -> tuple[list[Any], Tree]:
        scan = self.scan(sample)
        if index not in scan.order:
            raise ValueError(f"sample {sample} does not call {self.blocks[index][0]!r}")
        if index != self._index:
            self._index, self._described = index, {}
            for other in range(len(self.calls)):
                self.cache.drop((TARGETS, other))
                self.cache.drop((MADE, other))
        self._held.at(index)
        known = self._held.give(
            sample, lambda use: self._loaded(use, sample), lambda p: self._loaded((MADE, p), sample)
        )
        if known is not None:
            return known
        return self._reacting(lambda: self._made(index, sample, scan))

    def _loaded(self, use: Use, sample: int) -> Tensor:
        return self._reacting(lambda: self.cache.get((use[0], sample), self.device, [use[1]])[use[1]])

    def _made(self, index: int, sample: int, scan: Scan) -> tuple[list[Any], Tree]:
        """Leaves by a forward, held as far as that takes no memory."""
        source = _Sample(self, sample)
        uses = scan.uses[index]
        leaves, tree = flatten(self._capture.arguments(index, source, scan.order, uses, scan.towers[index]))
        leaves, marks, new, over = self._held.take(sample, leaves, tree, source.loaded)
        for other, made in over:
            self.cache.drop((MADE, other), self.cache.numbers((MADE, other)) - {made})
        self._described[sample] = merge.describe(leaves, marks)
        if new is None:
            return leaves, tree
        # Outputs that only this block needs, and not as they are, make room for what was made of them.
        passed = {source.loaded[id(leaf)][0] for leaf in leaves if id(leaf) in source.loaded}
        position = scan.order.index(index)
        gone = {use for use in uses - passed if scan.last_use(use) == position}
        room = sum(source.sizes[use] for use in gone)
        nbytes = sum(leaves[p].nbytes for p in new)
        if not new or not uses or nbytes <= room or self.cache.spare(self.device) >= nbytes:
            if new:
                for block in {block for block, _ in gone}:
                    numbers = self.cache.numbers((block, sample))
                    self.cache.drop((block, sample), {n for n in numbers if (block, n) not in gone})
                self.cache.replace((MADE, sample), {p: leaves[p] for p in new})
            self._held.keep(sample)
        return leaves, tree

    # Samples put together

    def _groups(self, index: int, samples: Iterable[int]) -> list[tuple[list[int], Rule | None]]:
        """Samples that can be put together to one call of a block, and how."""
        groups: list[tuple[list[int], list[Any], Rule | None]] = []
        for sample in samples:
            if not self.calls_block(index, sample):
                continue
            if index != self._index or sample not in self._described:
                self._leaves(index, sample)
            leaves = self._described[sample]
            for number, (group, first, rule) in enumerate(groups):
                if self._kinds[group[0]] != self._kinds[sample] or not merge.alike(first, leaves):
                    continue
                if rule is None:
                    rule = self._rule(index, group[0], sample, leaves)
                    groups[number] = (group, first, rule)
                if rule is not None and merge.agree(first, leaves, rule.arguments):
                    group.append(sample)
                    break
            else:
                groups.append(([sample], leaves, None))
        return [(group, rule) for group, _, rule in groups]

    def _batch(self, index: int, samples: Sequence[int], rule: Rule | None, device: torch.device | str) -> Batch:
        found = [self._leaves(index, sample) for sample in samples]
        tree = found[0][1]
        leaves = merge.join([leaves for leaves, _ in found], rule.arguments if rule else [])
        args, kwargs = self._capture.to(unflatten(leaves, tree), device)
        return Batch(tuple(samples), args, kwargs)

    def _rule(self, index: int, one: int, other: int, described: list[Any]) -> Rule | None:
        """How calls of a block are put together, which is found out with two samples; None: they are not."""
        leaves = tuple((len(entry[0]), str(entry[1])) if len(entry) == 3 else type(entry[0]) for entry in described)
        if (index, leaves) not in self._rules:
            (a, tree), (b, _) = self._leaves(index, one), self._leaves(index, other)
            find = functools.partial(self._find_rule, index, (one, a), (other, b), tree, leaves)
            rule = self._rules[index, leaves] = self._reacting(find)
            if rule is None:
                self._events("samples are not put together", block=self.blocks[index][0])
            else:
                self._splits[index] = rule.outputs
        return self._rules[index, leaves]

    def _find_rule(
        self, index: int, one: tuple[int, list[Any]], other: tuple[int, list[Any]], tree: Tree, leaves: Any
    ) -> Rule | None:
        """The dimensions are those of blocks of the same class with such arguments, else of a call of the model with
        both samples, else the first; if this block bears them out."""
        tried: list[merge.Dims] = []
        key = (type(self.blocks[index][1]).__qualname__, leaves)
        for dims in self._candidates(index, one, other, key):
            if dims not in tried and any(dim is not None for dim in dims):
                tried.append(dims)
                rule = self._checked(index, one, other, dims, tree)
                if rule is not None:
                    self._dims[key] = dims
                    return rule
        return None

    def _candidates(
        self, index: int, one: tuple[int, list[Any]], other: tuple[int, list[Any]], key: Any
    ) -> Iterator[merge.Dims]:
        if key in self._dims:
            yield self._dims[key]
        scan, real = self.scan(one[0]), self._capture.real
        for call in merge.joined_calls(self.calls[one[0]], self.calls[other[0]]):
            source = _Pair(self, one[0], other[0], call)
            try:
                found = self._capture.arguments(index, source, scan.order, scan.uses[index], scan.towers[index])
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the model does not take two such samples at a time
                self._capture.real = real
                continue
            both = flatten(found)[0]
            dims = merge.dims_of(one[1], other[1], both, None if source.complete else [False] * len(both))
            if dims is not None:
                yield dims
        yield merge.guessed(one[1], other[1])

    def _checked(
        self, index: int, one: tuple[int, list[Any]], other: tuple[int, list[Any]], dims: merge.Dims, tree: Tree
    ) -> Rule | None:
        """Whether a call with both gives what single ones give, and along which dimensions."""
        name, module = self.blocks[index]
        device = self._device_of(index, self.device)
        results = []
        for leaves in (one[1], other[1], merge.join([one[1], other[1]], dims)):
            args, kwargs = self._capture.to(unflatten(leaves, tree), device)
            try:
                with self._capture.quiet(), torch.no_grad():
                    results.append(self._capture.run(name, module, args, kwargs))
            except Exception as error:
                if len(results) < 2:
                    raise
                if isinstance(error, torch.OutOfMemoryError):
                    self._events("out of memory", where="forward", reaction="samples are not put together", block=name)
                return None
        (one_returned, a, a_tensors), (other_returned, b, b_tensors), (returned, c, c_tensors) = results
        if not (a.like(c) and b.like(c)):
            return None
        live = [self.scan(one[0]).last_use((index, n)) >= 0 for n in range(len(c_tensors))]
        found = merge.dims_of(a_tensors, b_tensors, c_tensors, live)
        targets = merge.dims_of(floating(one_returned), floating(other_returned), floating(returned))
        if found is None or targets is None:
            return None
        return Rule(dims, found, targets)

    def _device_of(self, index: int, default: torch.device) -> torch.device:
        """Where a block runs: `default` where it has no weights, or none in place."""
        device = next((p.device for p in self.blocks[index][1].parameters()), default)
        return default if device.type == "meta" else device

    def _in_rows(self, samples: Sequence[int], function: Callable[[Sequence[int]], None], index: int) -> None:
        """Call it with some samples at a time, fewer where memory runs out; inputs of the block for the next ones are
        copied meanwhile."""
        done = 0
        while done < len(samples):
            rows = samples[done : done + self.rows]
            try:
                following = samples[done + len(rows) : done + 2 * len(rows)]
                used = {block for sample in following for block, _ in self.scan(sample).uses[index]} | {MADE}
                self.cache.prefetch([(block, sample) for sample in following for block in used], self.device)
                function(rows)
            except torch.OutOfMemoryError as error:
                if len(rows) > 1:
                    self.rows = len(rows) // 2
                    self._events("out of memory", where="forward", reaction="fewer samples at a time", rows=self.rows)
                else:
                    self._react(error)
                continue
            self._collected = False
            done += len(rows)

    # Targets

    def _add_targets(self, index: int, batch: Batch, rule: Rule | None) -> None:
        batch.targets = self._targets(index, batch, rule)
        dims = rule.targets if rule else [0] * len(batch.targets)
        batch.masks = [
            self._mask(index, batch.samples, target, dim) for target, dim in zip(batch.targets, dims, strict=True)
        ]

    def _targets(self, index: int, batch: Batch, rule: Rule | None) -> list[Tensor]:
        dims = rule.targets if rule else []
        missing = [sample for sample in batch.samples if (TARGETS, sample) not in self.cache]
        leaves, _ = flatten((batch.args, batch.kwargs))
        device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), self.device)
        home = self._device_of(index, device)
        found: dict[int, list[Tensor]] = {}

        def run(rows: Sequence[int]) -> None:
            whole = tuple(rows) == batch.samples and device == home
            part = batch if whole else self._batch(index, rows, rule, home)
            tensors = floating(self._run(index, part)[0])
            for number, sample in enumerate(rows):
                parts = [
                    merge.part(tensor, dims[n] if dims else None, number, len(rows)) for n, tensor in enumerate(tensors)
                ]
                if self.keep_targets:
                    self.cache.replace((TARGETS, sample), dict(enumerate(parts)))
                else:
                    found[sample] = [part.to(device) for part in parts]

        self._in_rows(missing, run, index)
        for sample in batch.samples:
            if sample not in found:
                kept = self._reacting(functools.partial(self.cache.get, (TARGETS, sample), device))
                found[sample] = [kept[n] for n in sorted(kept)]
        return merge.join([found[sample] for sample in batch.samples], dims)

    def _mask(self, index: int, samples: Sequence[int], target: Tensor, dim: int | None) -> Tensor | None:
        """Which elements of a target count, bool [B, S, 1, ...]; None for all."""
        rows = [self._mask_of(index, sample, target, len(samples)) for sample in samples]
        shape = next((row.shape for row in rows if row is not None), None)
        if shape is None or (dim != 0 and len(samples) > 1):
            return None
        whole = torch.cat([torch.ones(shape, dtype=torch.bool) if row is None else row.cpu() for row in rows])
        if whole.all():
            return None
        return whole.reshape(*whole.shape, *([1] * (target.ndim - 2))).to(target.device)

    def _mask_of(self, index: int, sample: int, target: Tensor, count: int) -> Tensor | None:
        """The mask of tokens in a sample's call that has the first two dimensions of its part of a target."""
        call = self.calls[sample]
        names: dict[str, Any] = dict(call.kwargs)
        if call.args:
            with contextlib.suppress(TypeError, ValueError):
                names = {**inspect.signature(self.model.forward).bind_partial(*call.args).arguments, **names}
        found = [name for name in names if name.endswith(("attention_mask", "hidden_states_mask"))]
        decoder = "decoder" in self.blocks[index][0]
        found.sort(key=lambda name: name.startswith("decoder") != decoder)
        for name in found:
            mask = names[name]
            if not isinstance(mask, Tensor) or mask.ndim != 2 or target.ndim < 2:
                continue
            if (mask.shape[0] * count, mask.shape[1]) == tuple(target.shape[:2]):
                return mask != 0
        return None

    # Memory

    def _reacting(self, function: Callable[[], Result]) -> Result:
        while True:
            try:
                found = function()
                self._collected = False
                return found
            except torch.OutOfMemoryError as error:
                self._react(error)

    def _react(self, error: torch.OutOfMemoryError) -> None:
        """Make room on devices, or raise."""
        moved = self.cache.to_host()
        if moved:
            self._events("out of memory", where="activations", reaction="moved to the host", bytes=moved)
        elif self.device.type != "cpu" and self._to_cpu():
            self._events("out of memory", where="beside the blocks", reaction="moved to the CPU")
        elif not self._collected:  # what others hold comes and goes
            self._collected = True
            gc.collect()
            self._events("out of memory", where="forward", reaction="tried again after a garbage collection")
        else:
            sizes = ", ".join(f"{size} bytes on the {tier}" for tier, size in self.cache.nbytes.items())
            raise torch.OutOfMemoryError(
                f"{error}\nActivations take {sizes}, and {self.rows} samples are run at a time. Shorter samples "
                "(seqlen=), fewer of them (samples=), or files for activations (cache=, disk=) take less memory"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _to_cpu(self) -> bool:
        """Move what is beside the blocks to the host; False where accelerate has a say in it."""
        if any(hasattr(module, "_hf_hook") for module in self._capture.fixed):
            return False
        for module in self._capture.fixed:
            tensor = next((t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None), None)
            if tensor is not None and tensor.device.type != "meta":
                self._moved[module] = tensor.device
                module._apply(lambda t: t.to("cpu"), recurse=False)
        self._capture.device = torch.device("cpu")
        self._held.to(self.device)
        return True

    def close(self) -> None:
        """Free the activations, and put back on its device what had to leave it."""
        self.cache.close()
        self._held.at(-1)
        for module, device in self._moved.items():
            module._apply(lambda t, device=device: t.to(device), recurse=False)
        self._moved = {}

    # Finding out, saving

    def _find_out(self) -> None:
        first: dict[Any, int] = {}
        for sample, kind in enumerate(self._kinds):
            first.setdefault(kind, sample)
        found = {kind: self._reacting(functools.partial(self._observe, sample)) for kind, sample in first.items()}
        arranged = self._capture.arrange(order for order, _ in found.values())
        place = {position: index for index, position in enumerate(arranged)}
        self._outputs = {(place[position], sample): entry for (position, sample), entry in self._outputs.items()}
        self.cache.rename({(position, sample): (place[position], sample) for position, sample in self.cache})
        for kind, (order, digests) in found.items():
            sample, indices = first[kind], [place[position] for position in order]
            source = _Sample(self, sample)
            scan = self._reacting(functools.partial(self._capture.trace, source, indices))
            self._scans[kind] = scan
            for p, position in enumerate(order):
                self._reacting(functools.partial(self._capture.settle, source, scan, p, digests[position]))
            for index in indices:
                self.cache.drop((index, sample))
                del self._outputs[index, sample]

    def _observe(self, sample: int) -> tuple[list[int], dict[int, list[Any]]]:
        def keep(position: int, structure: Outputs, tensors: list[Tensor]) -> None:
            self._outputs[position, sample] = structure
            self.cache.replace((position, sample), dict(enumerate(tensors)))

        return self._capture.observe(_Sample(self, sample), keep)

    def save(self, folder: str | Path) -> None:
        """Write what is kept and what was found out to a folder, between two blocks; `resume` takes it.

        The folder is written aside and renamed. It holds a pickle, which is to be read from nowhere else.
        """
        names = [name for name, _ in self.blocks]
        state = {
            "blocks": names,
            "scans": self._scans,
            "outputs": self._outputs,
            "beside": self._beside,
            "rules": (self._dims, self._rules, self._splits),
            "flags": (self._capture.real, self._capture.writes, self.rows),
        }
        self.cache.save(folder, {STATE: pickle.dumps(state)})

    def _load(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # pytree's specs meet one of their own
            state = pickle.loads((folder / STATE).read_bytes())
        given = dict(self._capture.given)
        missing = [name for name in state["blocks"] if name not in given]
        if missing:
            raise ValueError(f"{folder} was written for blocks that the model does not have, such as {missing[0]!r}")
        self._capture.blocks = [(name, given[name]) for name in state["blocks"]]
        self._scans, self._outputs, self._beside = state["scans"], state["outputs"], state["beside"]
        unknown = set(self._kinds) - self._scans.keys()
        if unknown:
            raise ValueError(f"{folder} was written for other samples; resume with the same data")
        self._dims, self._rules, self._splits = state["rules"]
        self._capture.real, self._capture.writes, self.rows = state["flags"]
        self.cache.load(folder)


class _Sample:
    """A sample as the source of a forward.

    Attributes:
        loaded: what came out of the cache, by `id`, and where it lies there. sizes: its bytes.
    """

    def __init__(self, replay: Replay, sample: int) -> None:
        self._replay, self._sample = replay, sample
        self.loaded: dict[int, tuple[Use, tuple[int, int]]] = {}
        self.sizes: dict[Use, int] = {}
        self._alive: list[Tensor] = []

    def call(self) -> Arguments:
        call = self._replay.calls[self._sample]
        return tuple(call.args), dict(call.kwargs)

    @property
    def samples(self) -> tuple[int, ...]:
        return (self._sample,)

    def structure(self, block: int) -> Outputs | None:
        return self._replay._outputs.get((block, self._sample))

    def load(self, block: int, numbers: Iterable[int]) -> dict[int, Tensor]:
        replay, numbers = self._replay, set(numbers)
        if numbers - replay.cache.numbers((block, self._sample)):
            raise ValueError(
                f"what {replay.blocks[block][0]!r} has put out for sample {self._sample} is not kept any more: blocks "
                "are gone through in order, and each is left for good by `advance`"
            )
        found = replay.cache.get((block, self._sample), replay.device, numbers)
        self.sizes.update({(block, n): tensor.nbytes for n, tensor in found.items()})
        if replay._capture.writes:
            return {n: tensor.clone() for n, tensor in found.items()}
        for n, tensor in found.items():
            self.loaded[id(tensor)] = (block, n), replay.cache.place((block, self._sample), n)
        self._alive += found.values()
        return found

    def beside(self, tower: nn.Module) -> list[Outputs] | None:
        return self._replay._beside.get((self._replay._capture.towers.index(tower), self._sample))

    def record(self, tower: nn.Module, known: list[Outputs]) -> None:
        self._replay._beside[self._replay._capture.towers.index(tower), self._sample] = known


class _Pair:
    """Two samples put together as the source of a forward."""

    def __init__(self, replay: Replay, one: int, other: int, call: Arguments) -> None:
        self._replay, self._samples, self._call = replay, (one, other), call
        self.complete = True  # outputs were there; else only shapes come out right

    def call(self) -> Arguments:
        return self._call

    @property
    def samples(self) -> tuple[int, ...]:
        return tuple(self._samples)

    def structure(self, block: int) -> Outputs | None:
        one = self._replay._outputs[block, self._samples[0]]
        return one.doubled(self._dims(block))

    def _dims(self, block: int) -> merge.Dims:
        return self._replay._splits[block]

    def load(self, block: int, numbers: Iterable[int]) -> dict[int, Tensor]:
        numbers, dims = list(numbers), self._dims(block)
        cache, device = self._replay.cache, self._replay.device
        if any(set(numbers) - cache.numbers((block, sample)) for sample in self._samples):
            self.complete = False
            return {}
        one, other = (cache.get((block, sample), device, numbers) for sample in self._samples)
        pairs = [[one[n] for n in numbers], [other[n] for n in numbers]]
        return dict(zip(numbers, merge.join(pairs, [dims[n] for n in numbers]), strict=True))

    def beside(self, tower: nn.Module) -> list[Outputs] | None:
        return []

    def record(self, tower: nn.Module, known: list[Outputs]) -> None:
        pass
