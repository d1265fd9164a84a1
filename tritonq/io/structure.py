"""What the tensors of a checkpoint are: the model that transformers would build, without its memory or its weights.

Shapes alone do not tell: an embedding, a router, GPT-2's transposed layers and a linear layer all hold a 2-D `weight`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tritonq.formats import Shape
from tritonq.nn.select import linear_modules

if TYPE_CHECKING:
    from tritonq.io.source import Source


@dataclass(frozen=True)
class Piece:
    """Rows `start:stop` of one expert of a fused tensor [experts, rows, columns], and their name in a checkpoint."""

    name: str
    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class Role:
    """What a checkpoint tensor is in the loaded model.

    Attributes:
        kind: "linear": weight of an nn.Linear; "expert": one expert's part of a fused parameter; "fused": such a
            parameter as a whole; "other": anything else, left alone.
        module: loaded module (linear, other) or parameter (expert, fused).
        embedding: an embedding's table, which no runtime takes for a linear layer.
        pieces: of a fused tensor.
        tensor: name of the parameter or buffer of the model whose values these are as they lie; for "expert", which it
            is a part of; "" for none.
    """

    kind: str
    module: str
    embedding: bool = False
    pieces: tuple[Piece, ...] = ()
    tensor: str = ""


@dataclass(frozen=True)
class Structure:
    """Roles by checkpoint tensor, and the names of all linear modules of the loaded model.

    `notes` say where names and shapes had to do, and which weights are laid out so that they stay dense.
    """

    roles: dict[str, Role]
    linears: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def of_source(source: Source) -> Structure:
    """Structure of a checkpoint; by names and shapes where transformers is missing or does not know the model."""
    shapes = {name: info.shape for name, info in source.tensors.items()}
    try:
        model = skeleton(source)
    except Exception as error:  # whatever a foreign config makes transformers raise
        reason = (
            str(error).strip().split("\n")[0].replace(str(source.folder), source.name)[:120] or type(error).__name__
        )
        return by_names(shapes, f"linear layers were found by their names and shapes ({reason})")
    return of_model(model, shapes)


def skeleton(source: Source) -> Any:
    """The model of config.json on the meta device; code that comes with a checkpoint is never run."""
    try:
        import transformers
    except ImportError:
        raise LookupError("transformers is not installed") from None
    if not source.config:
        raise LookupError("there is no config.json")
    loggers = [logging.getLogger(name) for name in ("transformers", "transformers.configuration_utils")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        for name in config.architectures or ():
            cls = getattr(transformers, name, None)
            if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
                with torch.device("meta"):
                    return cls._from_config(config)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    raise LookupError(f"transformers does not know {', '.join(config.architectures or ()) or 'the architecture'}")


def of_model(model: Any, shapes: dict[str, Shape]) -> Structure:
    """Roles of checkpoint tensors of these names and shapes in a transformers model.

    Raises:
        ValueError: a tensor whose shape is not the one that the model has.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    merges = {
        pattern
        for entry in converters
        if any(isinstance(operation, MergeModulelist) for operation in entry.operations)
        for pattern in entry.source_patterns
    }
    state, prefix, own = model.state_dict(), model.base_model_prefix, linear_modules(model)
    roles: dict[str, Role] = {}
    rearranged: list[str] = []
    for key, shape in shapes.items():
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        parent, _, leaf = name.rpartition(".")
        if name not in state:
            roles[key] = Role("other", key.rpartition(".")[0])
            continue
        module, target = model.get_submodule(parent), tuple(state[name].shape)
        if pattern in merges and len(target) == 3 and len(shape) == 2 and key.endswith(".weight"):
            roles[key] = Role("expert", name, tensor=name)
        elif pattern is not None:  # cut or joined on loading: names of packed tensors would not be
            roles[key] = Role("other", parent)
            rearranged.append(key)
        elif leaf == "weight" and parent in own:
            _check_shape(key, shape, target)
            roles[key] = Role("linear", parent, tensor=name)
        elif len(target) == 3 and (pieces := fused_pieces(model, name, target)):
            _check_shape(key, shape, target)
            roles[key] = Role("fused", name, pieces=pieces, tensor=name)
        else:
            same = name if tuple(shape) == target else ""
            roles[key] = Role("other", parent, embedding=isinstance(module, nn.Embedding), tensor=same)
            if len(target) == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                rearranged.append(key)
    linears = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return Structure(roles, linears, _left_dense([key for key in rearranged if len(shapes[key]) > 1]))


def _left_dense(keys: list[str]) -> tuple[str, ...]:
    if not keys:
        return ()
    more = f" and {len(keys) - 1} more" if keys[1:] else ""
    return (f"left dense, because no layout holds them as the model arranges them: {keys[0]}{more}",)


def _check_shape(key: str, shape: Shape, expected: Shape) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{key} has shape {list(shape)}, config.json describes a model where it has {list(expected)}")


def checkpoint_tensors(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of a transformers model as its save_pretrained would name and cut them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def fused_pieces(model: Any, name: str, shape: Shape) -> tuple[Piece, ...]:
    """How a checkpoint holds the fused experts [E, N, K] `name`; () where those are not 2-D [rows, K] pieces.

    Asks transformers to undo the fusion of a tensor whose elements are their own row numbers.
    """
    experts, rows, _ = shape
    try:
        cut = checkpoint_tensors(model, {name: torch.arange(experts * rows).view(experts, rows, 1)})
    except Exception:  # an operation that needs more than this one tensor
        return ()
    pieces = []
    for key, numbers in sorted(cut.items()):
        if numbers.ndim != 2 or not key.endswith(".weight"):
            return ()
        first, count = int(numbers[0, 0]), numbers.shape[0]
        expert, start = divmod(first, rows)
        if start + count > rows or not torch.equal(numbers[:, 0], torch.arange(first, first + count)):
            return ()
        pieces.append(Piece(key.removesuffix(".weight"), expert, start, start + count))
    return tuple(sorted(pieces, key=lambda piece: (piece.expert, piece.start)))


# Without a model definition: what common architectures call 2-D weights that are not those of a linear layer, and
# GPT-2's layers, which hold theirs transposed.
_NOT_LINEAR = re.compile(
    r"(emb|wte|wpe|shared$|relative_attention_bias|norm|(^|\.)ln|router|(^|\.)gate$|lm_head|conv|c_attn$|c_fc$|c_proj$|\bpos)",
    re.IGNORECASE,
)


def by_names(shapes: dict[str, Shape], note: str) -> Structure:
    """Structure from names and shapes alone: 2-D `*.weight` that are not called like embeddings, norms or routers."""
    roles = {}
    for key, shape in shapes.items():
        module, _, leaf = key.rpartition(".")
        plausible = leaf == "weight" and len(shape) == 2 and not _NOT_LINEAR.search(module)
        table = bool(re.search(r"emb|wte|wpe|shared$", module, re.IGNORECASE))
        roles[key] = Role("linear" if plausible else "other", module, embedding=table)
    return Structure(roles, ("lm_head",), (note,))
