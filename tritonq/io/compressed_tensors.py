"""The compressed-tensors layout of a Format: which tensors a weight becomes, and the config that describes them.

transformers and vLLM read it without tritonq. Everything follows from the fields of a Format:

| format | element, scale | tensors for a weight [N, K] |
|---|---|---|
| pack-quantized | int2..8, floating | weight_packed i32 [N, ceil(K b / 32)], weight_scale [N, K/g], weight_shape [2] |
| | with zero points | + weight_zero_point i32 [ceil(N b / 32), K/g], packed along rows |
| int-quantized | int8 a row with integer inputs | weight i8, weight_scale [N, 1] |
| float-quantized | e4m3, floating | weight f8, weight_scale [1], [N, 1] or [N/r, K/c] |
| mxfp8-quantized | e4m3, e8m0 by 32 | weight f8, weight_scale u8 [N, K/32] |
| mxfp4-pack-quantized | e2m1, e8m0 by 32 | weight_packed u8 [N, K/2], weight_scale u8 [N, K/32] |
| nvfp4-pack-quantized | e2m1, e4m3 by 16 | the same, weight_scale f8 [N, K/16], weight_global_scale [1] a divisor |

Inputs with static scales add input_scale [1] (and input_zero_point [1]) where all of them share one, or
input_global_scale [1], a divisor, where groups have scales of their own below it.

Codes are dense and LSB-first, offset-binary for integers: apart from padding rows to whole words, tritonq's own bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonq.codecs import pack as bits
from tritonq.formats import Format, Shape
from tritonq.nn.schemes import Scheme
from tritonq.reference import Parts

Spec = tuple[Shape, torch.dtype]

_PACKED_INTEGERS, _INTEGERS, _FLOATS = "pack-quantized", "int-quantized", "float-quantized"
_MXFP8, _MXFP4, _NVFP4 = "mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"


def _strategy(fmt: Format) -> str:
    rows, cols = fmt.group
    if rows == -1:
        return "tensor"
    if rows > 1:
        return "block"
    return "channel" if cols == -1 else "group"


def _is_integer(fmt: Format) -> bool:
    return fmt.element.codec.offset_binary and not fmt.element.fraction


def _is_e2m1(fmt: Format) -> bool:
    return (fmt.element.ebits, fmt.element.mbits, fmt.element.special) == (2, 1, "")


def layout(fmt: Format, inputs: Format | None = None) -> str:
    """The compressed-tensors format that holds weights of `fmt`.

    Raises:
        ValueError: none does.
    """
    strategy, e4m3 = _strategy(fmt), fmt.element.dtype is torch.float8_e4m3fn
    plain_scale = fmt.scale.dtype in (torch.float16, torch.bfloat16, torch.float32) and not fmt.tensor_scale
    if _is_integer(fmt) and plain_scale and strategy in ("channel", "group"):
        integer_inputs = inputs is not None and _is_integer(inputs)
        bytes_a_row = fmt.bits == 8 and not fmt.zero_point and strategy == "channel"
        return _INTEGERS if integer_inputs and bytes_a_row else _PACKED_INTEGERS
    if e4m3 and plain_scale and strategy in ("tensor", "channel", "block"):
        return _FLOATS
    if fmt.scale.is_exponent and fmt.group == (1, 32) and not fmt.tensor_scale and (e4m3 or _is_e2m1(fmt)):
        return _MXFP8 if e4m3 else _MXFP4
    if fmt.tensor_scale and fmt.scale.dtype is torch.float8_e4m3fn and fmt.group == (1, 16) and _is_e2m1(fmt):
        return _NVFP4
    raise ValueError(
        f"compressed-tensors has no layout for {fmt.name}; it holds integers with floating scales a row or a group, "
        "fp8_e4m3 with one scale a tensor, row or block, mxfp8, mxfp4 and nvfp4; take a scheme with one of them, or "
        "quantize the model in memory (quantize_) and keep its state_dict"
    )


def holds(scheme: Scheme) -> bool:
    """Whether there is a layout for the weights of a bf16 model in this scheme."""
    try:
        layout(scheme.weight_format(torch.bfloat16), scheme.input_format)
    except ValueError:
        return False
    return True


def specs(fmt: Format, inputs: Format | None, shape: Shape, static: bool = False) -> dict[str, Spec]:
    """Suffix -> (shape, dtype) of the tensors of a weight [N, K]; `static` if its inputs have static scales."""
    rows, columns = shape
    parts = fmt.storage(shape)
    scale_shape, scale_dtype = parts["scale"]
    tensors: dict[str, Spec] = {"weight_scale": (scale_shape, torch.uint8 if fmt.scale.is_exponent else scale_dtype)}
    if layout(fmt, inputs) == _PACKED_INTEGERS:
        tensors["weight_packed"] = (rows, -(-columns * fmt.bits // 32)), torch.int32
        tensors["weight_shape"] = (2,), torch.int64
    else:
        tensors["weight_packed" if fmt.bits < 8 else "weight"] = parts["qdata"]
    if fmt.zero_point:
        tensors["weight_zero_point"] = (-(-rows * fmt.bits // 32), scale_shape[1]), torch.int32
    if fmt.tensor_scale:
        tensors["weight_global_scale"] = (1,), torch.float32
    if inputs is not None and inputs.tensor_scale:
        tensors["input_global_scale"] = (1,), torch.float32
    elif inputs is not None and static:
        # Readers cast floating scales to the dtype of the model, which is the one of the weight's scale.
        tensors["input_scale"] = (1,), scale_dtype if scale_dtype.itemsize > 1 else inputs.scale.dtype
        if inputs.zero_point:
            tensors["input_zero_point"] = (1,), torch.int8
    return tensors


def holds_static(inputs: Format | None) -> bool:
    """Whether there is a layout for static scales of inputs: one for all of them, or a divisor of all."""
    return inputs is not None and (inputs.group[0] == -1 or inputs.tensor_scale) and inputs.bits <= 8


def encode(
    parts: Parts, fmt: Format, inputs: Format | None, shape: Shape, static: Parts | None = None
) -> dict[str, Tensor]:
    """The tensors that `specs` lists from the parts of a weight [N, K] and the static parts of its inputs. May
    overwrite `parts`.

    Without calibration data nothing is known about the range of the inputs: their tensor scale, where the layout wants
    one, is 1.
    """
    static = static or {}
    scale = parts["scale"]
    tensors = {"weight_scale": scale.view(torch.uint8) if fmt.scale.is_exponent else scale}
    if layout(fmt, inputs) == _PACKED_INTEGERS:
        codes = parts["qdata"].view(torch.uint8)
        tensors["weight_packed"] = _words(codes.bitwise_xor_(fmt.sign_flip) if fmt.sign_flip else codes)
        tensors["weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    else:
        tensors["weight_packed" if fmt.bits < 8 else "weight"] = parts["qdata"]
    if fmt.zero_point:
        tensors["weight_zero_point"] = (
            _words(bits.pack(parts["zero_point"].t().contiguous(), fmt.bits)).t().contiguous()
        )
    if fmt.tensor_scale:
        tensors["weight_global_scale"] = parts["tensor_scale"]
    if inputs is not None and inputs.tensor_scale:
        tensors["input_global_scale"] = static["tensor_scale"].reshape(1) if static else torch.ones(1)
    elif inputs is not None and static:
        tensors["input_scale"] = static["scale"].reshape(1)
        if inputs.zero_point:  # from 0..2^b - 1 to the signed codes of the reader
            zero_point = static["zero_point"].reshape(1).int() - (1 << inputs.bits - 1)
            tensors["input_zero_point"] = zero_point.to(torch.int8)
    return tensors


def _words(rows: Tensor) -> Tensor:
    """Bytes [n, m] as little-endian int32 [n, ceil(m / 4)], rows padded with zeros."""
    if rows.shape[-1] % 4:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 4))
    return rows.contiguous().view(torch.int32)


def _arguments(fmt: Format, strategy: str, dynamic: bool | str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "int" if _is_integer(fmt) else "float",
        "symmetric": not fmt.zero_point,
        "strategy": strategy,
        "dynamic": dynamic,
    }
    if strategy in ("group", "tensor_group"):
        arguments["group_size"] = fmt.group_size
    if strategy == "block":
        arguments["block_structure"] = list(fmt.group)
    if fmt.scale.is_exponent or fmt.tensor_scale:  # the reader's default is the dtype of the model
        stored = torch.uint8 if fmt.scale.is_exponent else fmt.scale.dtype
        arguments["scale_dtype"] = arguments["zp_dtype"] = str(stored)
    return arguments


def quantization_config(
    scheme: Scheme, fmt: Format, ignore: list[str], static: bool = False, dynamic: Sequence[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json; `ignore` are the exact names of the modules left dense.

    Without `quantization_status` readers would fill the weights with random numbers.

    Args:
        static: inputs have static scales, except those of the modules named in `dynamic`.
    """
    inputs = scheme.input_format
    name = layout(fmt, inputs)

    def group(targets: list[str], static: bool) -> dict[str, Any]:
        activations = None
        if inputs is not None:
            strategy = "token" if _strategy(inputs) == "channel" else _strategy(inputs)
            if inputs.tensor_scale:  # groups get their scales on the fly, the tensor's is stored
                activations = _arguments(inputs, "tensor_group", "local")
            else:
                activations = _arguments(inputs, strategy, not static)
        return {
            "targets": targets,
            "weights": _arguments(fmt, "tensor_group" if fmt.tensor_scale else _strategy(fmt), False),
            "input_activations": activations,
            "output_activations": None,
            "format": name,
        }

    groups = {"group_0": group(["Linear"], static)}
    if static and dynamic and inputs is not None and not inputs.tensor_scale:  # names come before classes for readers
        groups["group_1"] = group(list(dynamic), False)
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": groups,
    }


def needs_dequantize(fmt: Format) -> bool:
    """Whether transformers loads the layout with CompressedTensorsConfig(dequantize=True) only."""
    return fmt.zero_point


def reader_limits(
    scheme: Scheme, fmt: Format, dtype: torch.dtype, experts: bool, dense_experts: bool = False
) -> list[str]:
    """What transformers' reader (5.x with compressed-tensors 0.20) cannot do with these weights; vLLM can.

    `experts` and `dense_experts`: whether there are quantized experts, and ones left dense.
    """
    name, limits = layout(fmt, scheme.input_format), []
    if needs_dequantize(fmt):
        limits.append("transformers loads asymmetric weights with CompressedTensorsConfig(dequantize=True) only")
    if (fmt.scale.is_exponent or fmt.tensor_scale) and dtype is not torch.bfloat16:
        limits.append(
            f"transformers decompresses these weights to bfloat16, and the model is {str(dtype)[6:]}: load it with "
            "CompressedTensorsConfig(dequantize=True), or quantize with dtype bfloat16"
        )
    if experts and fmt.tensor_scale:
        limits.append("transformers leaves the global scale out of experts and gets them wrong; use vLLM")
    elif experts and (fmt.zero_point or fmt.group[0] > 1 or name in (_MXFP8, _INTEGERS)):
        kind = f"{name} {_strategy(fmt)}{' asymmetric' * fmt.zero_point}"
        limits.append(f"transformers cannot load experts as {kind}; use vLLM")
    if dense_experts and "weight_packed" in specs(fmt, scheme.input_format, (128, 128)):
        limits.append(
            f"transformers cannot load dense experts beside {name} weights; use vLLM, or quantize the experts too"
        )
    return limits
