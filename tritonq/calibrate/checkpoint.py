"""File to file: blocks come from the mapped checkpoint, and what is decided about them goes to files of their own.

    skeleton on the meta device
      modules beside the blocks   get their values when they are first called (heads never are)
      large embeddings            look rows up in the mapped file, and are never copied
      block i                     its weights are read, tuned, written to block-<i>.safetensors, and freed
    the writer of `tritonq.io` then streams the checkpoint, with the parts from those files

So in memory are one block, what its tuning takes, and the activations. A run that was killed finds the files of the
blocks that it had finished, and only runs these again for what they put out. An entry of such a file is called
`<layer>/<part>`, `<layer>/input/<part>` or `<tensor>/dense`, by names of the model.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tritonq.calibrate import blocks
from tritonq.calibrate import data as samples
from tritonq.calibrate.calibration import Calibration
from tritonq.calibrate.methods import resolve
from tritonq.calibrate.pipeline import Run, Storage
from tritonq.calibrate.report import CalibrationReport, as_json
from tritonq.calibrate.task import Layer
from tritonq.formats import Format
from tritonq.io import folder, structure, writer
from tritonq.io.plan import Plan, Weight
from tritonq.io.quantizer import check_finite
from tritonq.io.report import LayerError, measure
from tritonq.io.source import Source, read_json
from tritonq.io.structure import Piece, Role, Structure
from tritonq.nn.quantize import find_targets
from tritonq.nn.schemes import Scheme
from tritonq.reference import Parts
from tritonq.tensor import QTensor

LARGE = 1 << 27  # bytes of a table that an embedding looks up in the file; what is smaller lies on the device
_WAY_OUT = "load the model with transformers and use tritonq.quantize_ and tritonq.save_pretrained"


@dataclass
class Job:
    """A calibration of a checkpoint, checked and ready to run.

    Attributes:
        fingerprint: of everything that the result depends on besides the source and the scheme.
    """

    calibration: Calibration
    scheme: Scheme
    plan: Plan
    origins: Origins
    ignore: list[str]
    options: dict[str, Any]
    fingerprint: dict[str, Any]

    def run(self, work: Path, fingerprint: dict[str, Any]) -> Results:
        """Tune all blocks; what was decided is kept in `work`, where a run with the same fingerprint goes on."""
        work.mkdir(parents=True, exist_ok=True)
        manifest, own = folder.Manifest(work, fingerprint), self.calibration
        done = work / "report.json"
        if manifest.finished(done):
            own.result = CalibrationReport.from_dict(read_json(done))
            if own.report is not None:
                own.result.save(own.report)
            return Results(self, work, manifest)
        storage = Files(self, work, manifest)
        try:
            with storage.lazily():
                own.quantize(self.origins.model, self.scheme, ignore=self.ignore, storage=storage, **self.options)
        except BaseException:
            if not manifest.files:
                shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            self.origins.release("", self.origins.model)
        assert own.result is not None
        writer.write_json(done, own.result.to_dict())
        manifest.finish(done, writer.digest(done))
        return Results(self, work, manifest)


def prepare(
    calibration: Calibration,
    source: Source,
    found: Structure,
    plan: Plan,
    scheme: Scheme,
    *,
    group_size: int | None,
    search: str | bool,
    device: torch.device,
    progress: bool,
) -> Job:
    """Check that a checkpoint can be calibrated file to file, and get its samples.

    Raises:
        ValueError: a model that transformers does not know, tensors of blocks that it arranges in ways of its own,
            weights of several dtypes, or what `data.samples` and the methods refuse.
    """
    try:
        model = structure.skeleton(source)
    except Exception as error:  # whatever a foreign config makes transformers raise
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:120]
        raise ValueError(
            f"calibrating {source.name} file to file takes a model that transformers can build ({reason})"
        ) from None
    dtype = plan.weights[0].dtype
    other = next((weight for weight in plan.weights if weight.dtype is not dtype), None)
    if other is not None:
        raise ValueError(
            f"{other.name} is {str(other.dtype)[6:]} and {plan.weights[0].name} is {str(dtype)[6:]}; calibration runs "
            f"the model in one dtype: pass --dtype {str(dtype)[6:]}"
        )
    origins = Origins(model, source, found, dtype, device)
    for weight in plan.weights:
        _, piece = origins.place(weight)
        if piece is not None and weight.fmt.group[0] > 1 and piece.start % weight.fmt.group[0]:
            raise ValueError(
                f"{weight.name} begins at row {piece.start} of a fused parameter, inside a block of "
                f"{weight.fmt.group[0]} rows; use a format with one scale a row"
            )
    # What the model in memory would quantize and files do not hold is left alone in both.
    planned = {origins.place(weight)[0] for weight in plan.weights}
    ignore = [name for name, _ in find_targets(model, (), values=False).weights if name not in planned]
    tokenizer = calibration.tokenizer if calibration.tokenizer is not None else source.folder
    calls = samples.samples(
        calibration.data, model, tokenizer=tokenizer, count=calibration.samples, seqlen=calibration.seqlen,
        seed=calibration.seed,
    )  # fmt: skip
    fingerprint = {
        "methods": [_described(method) for method in resolve(calibration)],
        "calibration": _described(calibration, "method", "data", "result", "tokenizer", "report", "cache", "disk"),
        "data": samples.digest(calls),
    }
    own = replace(calibration, data=calls, samples=len(calls), result=None)
    options = {"group_size": group_size, "search": search, "device": device, "progress": progress}
    return Job(own, scheme, plan, origins, ignore, options, fingerprint)


def _described(value: Any, *without: str) -> list[Any]:
    """Name and attributes of an object as text that is the same in every process."""
    return [
        type(value).__name__,
        *(f"{k}={re.sub(' at 0x[0-9a-f]+', '', repr(v))}" for k, v in sorted(vars(value).items()) if k not in without),
    ]


class Origins:
    """Where the tensors of a skeleton come from: every parameter and buffer can be read, and freed again.

    Parameters that are tied stay so. Floating tensors are read in the dtype of the model, as transformers does, except
    those that the model wants in fp32.
    """

    def __init__(self, model: Any, source: Source, found: Structure, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.source, self.dtype, self.device = model, source, dtype, device
        self._fp32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        self._roles = found.roles
        self._pieces: dict[str, Piece] = {}  # by checkpoint tensor
        self._keys: dict[str, list[str]] = {}  # checkpoint tensors of each tensor of the model
        for key, role in found.roles.items():
            if role.tensor:
                self._keys.setdefault(role.tensor, []).append(key)
        state = model.state_dict(keep_vars=True)
        for name, keys in self._keys.items():
            if found.roles[keys[0]].kind == "expert":
                self._find_pieces(name, keys, tuple(state[name].shape))
        names: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names.setdefault(id(tensor), []).append(name)
            if tensor.is_floating_point():
                tensor.data = torch.empty_like(tensor.data, dtype=self._wanted(name))
        self._aliases = {name: group for group in names.values() for name in group}
        self._fill_buffers(set(state))

    def _wanted(self, name: str) -> torch.dtype:
        return torch.float32 if any(part in name.split(".") for part in self._fp32) else self.dtype

    def _find_pieces(self, name: str, keys: list[str], shape: tuple[int, ...]) -> None:
        """Which rows of a fused parameter each checkpoint tensor is."""
        pieces = {f"{piece.name}.weight": piece for piece in structure.fused_pieces(self.model, name, shape)}
        if pieces.keys() != set(keys):  # saved under other names than the ones it had: by number and last name
            short = {_short(key): piece for key, piece in pieces.items()}
            pieces = {key: short[_short(key)] for key in keys if _short(key) in short}
        self._pieces.update(pieces)

    def place(self, weight: Weight) -> tuple[str, Piece | None]:
        """The layer (or parameter of experts) of the model that a weight belongs to, and which rows of it it is."""
        role: Role = self._roles[weight.source]
        if role.kind == "linear":
            return role.module, None
        piece = weight.piece or self._pieces.get(weight.source)
        if piece is None:
            raise ValueError(f"{weight.source} is part of {role.module} in a way that is not known here; {_WAY_OUT}")
        return role.module, piece

    def key(self, name: str) -> str | None:
        """The one checkpoint tensor that a tensor of the model comes from, None where it is not one."""
        keys = [key for alias in self.aliases(name) for key in self._keys.get(alias, ())]
        return keys[0] if len(keys) == 1 else None

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """The values of a tensor of the model, in memory of their own.

        Raises:
            ValueError: the checkpoint does not hold it, or holds it in a form that transformers converts, or NaN.
        """
        like = self.like(name)
        result = torch.empty(like.shape, dtype=like.dtype, device=device)
        keys = next((self._keys[alias] for alias in self._aliases[name] if alias in self._keys), [])
        filled = 0
        for key in keys:
            values, piece = self.source.load(key), self._pieces.get(key)
            if values.is_floating_point():
                check_finite(values, key, result.dtype)
            part = result if piece is None else result[piece.expert, piece.start : piece.stop]
            if part.shape == values.shape:
                part.copy_(values)
                filled += part.numel()
        if filled != result.numel() or not keys:
            held = f"as {keys[0]}, which is converted on loading" if keys else "not, or in a form that is converted"
            raise ValueError(f"the checkpoint holds {name} {held}; {_WAY_OUT}")
        return result

    def mapped(self, name: str) -> str | None:
        """The checkpoint tensor that a tensor of the model is byte by byte, None where nothing or another one is it,
        or where several tensors of the model are."""
        key, like = self.key(name), self.like(name)
        if key is None or len(self.aliases(name)) > 1:
            return None
        info = self.source.tensors[key]
        return key if (info.dtype, info.shape) == (like.dtype, tuple(like.shape)) else None

    def __contains__(self, name: str) -> bool:
        return name in self._aliases

    def aliases(self, name: str) -> list[str]:
        """All names of a tensor of the model; several where it is tied."""
        return self._aliases.get(name, [name])

    def like(self, name: str) -> Tensor:
        """The tensor of the model, wherever it is now."""
        place, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(place)
        found: Tensor | None = owner._parameters.get(leaf)
        found = owner._buffers[leaf] if found is None else found
        assert found is not None
        return found

    def tensor(self, key: str) -> str:
        """The tensor of the model that a checkpoint tensor is, "" where it is none as it lies."""
        return self._roles[key].tensor

    def materialize(self, prefix: str, module: nn.Module, recurse: bool = True) -> None:
        """Give parameters and buffers that are on the meta device their values."""
        for name, owner, key, tensor in list(_tensors(prefix, module, recurse)):
            if tensor.is_meta:
                self._put(name, owner, key, self.read(name, self.device))

    def _put(self, name: str, owner: nn.Module, key: str, values: Tensor) -> None:
        if key in owner._buffers:
            owner._buffers[key] = values
            return
        old = owner._parameters[key]
        new = nn.Parameter(values, requires_grad=False)
        for alias in self.aliases(name):
            place, _, leaf = alias.rpartition(".")
            other = self.model.get_submodule(place)
            if other._parameters.get(leaf) is old:
                other._parameters[leaf] = new

    def release(self, prefix: str, module: nn.Module) -> None:
        """Back to the meta device, what `materialize` gave and what was put in its place."""
        for name, owner, key, tensor in list(_tensors(prefix, module, True)):
            if not tensor.is_meta and (name in self._aliases or isinstance(tensor, QTensor)):
                self._put(name, owner, key, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def _fill_buffers(self, stored: set[str]) -> None:
        """Buffers that no checkpoint holds, such as frequencies of rotary embeddings: as the model initialises them."""
        for prefix, module in self.model.named_modules():
            empty = {
                key: torch.full(buffer.shape, torch.nan if buffer.is_floating_point() else -77, dtype=buffer.dtype)
                for key, buffer in module._buffers.items()
                if buffer is not None and buffer.is_meta and (f"{prefix}.{key}" if prefix else key) not in stored
            }
            if not empty:
                continue
            module._buffers.update({key: buffer.to(self.device) for key, buffer in empty.items()})
            self._owner(prefix)._init_weights(module)
            for key in empty:
                now = module._buffers[key]
                if now is None or (
                    now.numel() and bool((now.isnan() if now.is_floating_point() else now == -77).all())
                ):
                    raise ValueError(f"buffer {prefix}.{key} is not in the checkpoint; {_WAY_OUT}")

    def _owner(self, name: str) -> Any:
        """The innermost pretrained model around a module: each initialises its own kinds."""
        while name:
            name = name.rpartition(".")[0]
            module = self.model.get_submodule(name)
            if hasattr(module, "_init_weights"):
                return module
        return self.model


def _short(key: str) -> tuple[str, ...]:
    """Number of the expert and last name: `3.w1` of `model.layers.0.block_sparse_moe.experts.3.w1.weight`."""
    return tuple(key.split(".")[-3:-1])


def _tensors(prefix: str, module: nn.Module, recurse: bool) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(name, its module, its name there, tensor) of persistent buffers and parameters."""
    for name, owner in module.named_modules(prefix=prefix) if recurse else [(prefix, module)]:
        for key, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and key not in owner._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, owner, key, tensor


class Files(Storage):
    """Blocks come from a checkpoint, and what was decided about them goes to files in a folder."""

    def __init__(self, job: Job, work: Path, manifest: folder.Manifest) -> None:
        self._job, self._origins, self._work, self._manifest = job, job.origins, work, manifest
        self._names = {module: name for name, module in self._origins.model.named_modules()}
        self._weights: dict[str, list[tuple[Weight, Piece | None]]] = {}  # by layer
        for weight in job.plan.weights:
            layer, piece = job.origins.place(weight)
            self._weights.setdefault(layer, []).append((weight, piece))

    @contextlib.contextmanager
    def lazily(self) -> Iterator[None]:
        """Within this, modules beside the blocks get their values when they are first called. A head of its own is as
        large as an embedding and not called for a block, so its values go again, as do those of blocks that were not
        chosen. A large embedding, of which few rows are asked for, gets none."""
        model = self._origins.model
        inside = {module for _, block in blocks.find(model, self._job.calibration.blocks) for module in block.modules()}

        def arrive(module: nn.Module, args: Any) -> None:
            self._origins.materialize(self._names[module], module, recurse=False)

        outside = [module for module in self._names if module not in inside]
        tables = {module: key for module in outside if (key := self._table(module)) is not None}
        handles = [module.register_forward_pre_hook(arrive) for module in outside if module not in tables]
        for module, key in tables.items():
            handles += _looked_up(module, functools.partial(self._read_table, key), self._origins.device)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name, block in blocks.find(model, "all"):
            if not any(module in inside for module in block.modules()):  # read again for the next sample
                handles.append(block.register_forward_hook(functools.partial(self._part, name)))
        if head is not None and len(self._origins.aliases(f"{self._names[head]}.weight")) == 1:
            handles.append(head.register_forward_hook(lambda *_: self._origins.release(self._names[head], head)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _part(self, name: str, block: nn.Module, args: Any, outputs: Any) -> None:
        self._origins.release(name, block)

    def _table(self, module: nn.Module) -> str | None:
        """The checkpoint tensor that an embedding can look its rows up in, None where it has to be copied: subclasses
        compute with more than the table."""
        if type(module) is not nn.Embedding or module.max_norm is not None or module.weight.nbytes < LARGE:
            return None
        return self._origins.mapped(f"{self._names[module]}.weight")

    def _read_table(self, key: str) -> nn.Parameter:
        values = self._origins.source.load(key)
        check_finite(values, key, values.dtype)
        return nn.Parameter(values, requires_grad=False)

    @contextlib.contextmanager
    def ready(self, block: nn.Module) -> Iterator[None]:
        name = self._names[block]
        self._origins.materialize(name, block)
        try:
            yield
        finally:
            self._origins.release(name, block)

    def enter(self, index: int, name: str, block: nn.Module) -> None:
        self._origins.materialize(name, block)

    def _path(self, index: int) -> Path:
        return self._work / f"block-{index:05d}.safetensors"

    def restore(self, index: int, name: str, block: nn.Module, layers: Sequence[Layer]) -> bool:
        noted = self._manifest.finished(self._path(index))
        if noted is None or noted["block"] != name:
            return False
        with safe_open(self._path(index), "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        for layer in layers:
            device = layer.weight.device
            own = {
                key.removeprefix(f"{layer.name}/"): v.to(device) for key, v in found.items() if _of(key) == layer.name
            }
            layer.inputs = {key.removeprefix("input/"): v for key, v in own.items() if key.startswith("input/")}
            layer.result = {key: v for key, v in own.items() if not key.startswith("input/")}
            layer.notes.update(noted["notes"].get(layer.name, {}))
        for tensor_name, owner, key, tensor in list(_tensors(name, block, True)):
            if (changed := found.get(f"{tensor_name}/dense")) is not None:
                self._origins._put(tensor_name, owner, key, changed.to(tensor.device))
        self._tell(name, noted["losses"])
        return True

    def keep(self, index: int, name: str, block: nn.Module, layers: Sequence[Layer]) -> None:
        tensors: dict[str, Tensor] = {}
        errors: dict[str, list[float]] = {}
        for layer in layers:
            assert layer.result is not None
            tensors.update({f"{layer.name}/{part}": tensor for part, tensor in layer.result.items()})
            tensors.update({f"{layer.name}/input/{part}": tensor for part, tensor in layer.inputs.items()})
            for weight, piece in self._weights.get(layer.name, ()):
                dense = layer.weight if piece is None else layer.weight[piece.expert, piece.start : piece.stop]
                parts = layer.result if piece is None else cut(layer.result, layer.fmt, piece)
                error = measure(dense.detach(), parts, layer.fmt)
                errors[weight.name] = [error.signal, error.noise]
        quantized = {id(layer.weight) for layer in layers}
        for tensor_name, _, _, tensor in _tensors(name, block, True):
            if id(tensor) in quantized or isinstance(tensor, QTensor):
                continue
            if tensor_name not in self._origins or not torch.equal(
                tensor.detach().cpu(), self._origins.read(tensor_name, "cpu")
            ):
                if self._origins.key(tensor_name) is None:
                    raise ValueError(
                        f"calibration changed {tensor_name}, of which there is no tensor in this model's checkpoints; "
                        "take another method, or ignore the layer"
                    )
                tensors[f"{tensor_name}/dense"] = tensor.detach()
        path, aside = self._path(index), self._work / "aside"
        entries = [_entry(key, tensor) for key, tensor in tensors.items()]
        sha256 = writer.write_file(aside, entries)
        aside.replace(path)
        notes = {layer.name: {key: as_json(value) for key, value in layer.notes.items()} for layer in layers}
        self._manifest.finish(path, sha256, block=name, errors=errors, notes=notes, losses=self._losses(name))

    def _losses(self, block: str) -> dict[str, float | None]:
        """What the report was told about a block when it was quantized."""
        report = self._job.calibration.result
        told = [event for event in (report.events if report else ()) if event.what == "quantized"]
        mine = [event.details for event in told if event.details["block"] == block]
        return {key: mine[-1].get(key) for key in ("loss_before", "loss_after")} if mine else {}

    def _tell(self, block: str, losses: dict[str, float | None]) -> None:
        if self._job.calibration.result is not None:
            self._job.calibration.result.events("quantized", block=block, **losses, restored=True)

    def leave(self, index: int, name: str, block: nn.Module, layers: Sequence[Layer]) -> None:
        for layer in layers:
            if layer.key in layer.module._parameters:  # of the layer that has been replaced
                shape, dtype = layer.weight.shape, layer.weight.dtype
                layer.module._parameters[layer.key] = nn.Parameter(
                    torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False
                )
            layer.result, layer.inputs = None, {}
        self._origins.release(name, block)

    def rest(self, run: Run) -> None:
        """The writer rounds what is in no block."""


def _looked_up(module: nn.Module, read: Callable[[], nn.Parameter], device: torch.device) -> list[RemovableHandle]:
    """Have an embedding look up rows in host memory, and put them out where the numbers came from. Between calls a NaN
    stands in for its table on the device, where models that ask for the device of their first parameter expect it."""
    like: Any = module.weight
    table, home = functools.cache(read), device

    def stand_in() -> nn.Parameter:
        nothing = torch.full((), torch.nan, dtype=like.dtype, device=home)
        return nn.Parameter(nothing.expand(like.shape), requires_grad=False)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal home
        home, module._parameters["weight"] = args[0].device, table()
        return args[0].cpu(), *args[1:]

    def after(module: nn.Module, args: Any, rows: Tensor) -> Tensor:
        module._parameters["weight"] = stand_in()  # a new one: what has been moved takes memory
        return rows.to(home)

    module._parameters["weight"] = stand_in()
    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _entry(key: str, tensor: Tensor) -> writer.Entry:
    return writer.Entry(key, {key: (tuple(tensor.shape), tensor.dtype)}, lambda: {key: tensor})


def _of(key: str) -> str:
    """The layer of an entry of a file."""
    return key.rpartition("/")[0].removesuffix("/input")


def cut(parts: Parts, fmt: Format, piece: Piece) -> Parts:
    """The parts of rows of one expert, from those of the fused parameter [E, N, K]."""
    height = max(1, fmt.group[0])
    groups = slice(piece.start // height, -(-piece.stop // height))
    found = {"qdata": parts["qdata"][piece.expert, piece.start : piece.stop]}
    for name in ("scale", "zero_point"):
        if name in parts:
            found[name] = parts[name] if fmt.group[0] == -1 else parts[name][piece.expert, groups]
    if "tensor_scale" in parts:
        found["tensor_scale"] = parts["tensor_scale"]
    return found


class Results:
    """What was decided, from the files of the blocks: `Decided` of `io.quantizer`.

    Attributes:
        errors: of the weights. report: the calibration's.
    """

    def __init__(self, job: Job, work: Path, manifest: folder.Manifest) -> None:
        self._job, self.report = job, job.calibration.result
        self.errors: dict[str, LayerError] = {}
        self._files: dict[str, Any] = {}  # by entry
        self._layers: dict[str, list[str]] = {}
        for name, noted in manifest.files.items():
            if "errors" in noted:
                file = safe_open(work / name, "pt")
                self._files.update(dict.fromkeys(file.keys(), file))
                self.errors.update({weight: LayerError(*pair) for weight, pair in noted["errors"].items()})
        for key in self._files:
            self._layers.setdefault(_of(key), []).append(key)

    def parts(self, weight: Weight) -> Parts | None:
        layer, piece = self._job.origins.place(weight)
        keys = [key for key in self._layers.get(layer, ()) if not key.startswith(f"{layer}/input/")]
        if not keys:
            return None
        found = {key.rpartition("/")[2]: self._files[key].get_tensor(key) for key in keys}
        found = found if piece is None else cut(found, weight.fmt, piece)
        return {name: tensor.clone() for name, tensor in found.items()}

    def inputs(self, weight: Weight) -> Parts:
        layer, _ = self._job.origins.place(weight)
        keys = [key for key in self._layers.get(layer, ()) if key.startswith(f"{layer}/input/")]
        return {key.rpartition("/")[2]: self._files[key].get_tensor(key) for key in keys}

    def dense(self, name: str) -> Tensor | None:
        key = f"{self._job.origins.tensor(name)}/dense"
        return self._files[key].get_tensor(key) if key in self._files else None
