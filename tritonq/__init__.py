"""tritonq: a JIT quantization engine for PyTorch."""

import gc
import importlib
import os
from typing import TYPE_CHECKING, Any

_collected = gc.isenabled()
gc.disable()  # a collection would walk through all that torch has loaded, and take as long as what follows
try:
    from tritonq import (
        offload,
        sharding,  # noqa: F401  registers what collectives do with QTensors
        ste,
        tensor_ops,  # noqa: F401  and what operators do
    )
    from tritonq.autograd import hadamard, qdq
    from tritonq.best import Best
    from tritonq.bulk import BulkBuffer
    from tritonq.bulk_quantize import grouped_quantize
    from tritonq.formats import (
        FORMATS,
        ElementType,
        Format,
        ScaleType,
        get_format,
        integer,
        lookup,
        minifloat,
        register,
    )
    from tritonq.io.checkpoint import quantize_checkpoint
    from tritonq.io.model import save_pretrained
    from tritonq.memory import workspace
    from tritonq.nn.fake_quantize import convert_, fake_quantize_, freeze_observers_, remove_fake_quantize_
    from tritonq.nn.linear import QLinear
    from tritonq.nn.quantize import quantize_
    from tritonq.nn.schemes import SCHEMES, Scheme, get_scheme
    from tritonq.scale_tiles import swizzle, unswizzle
    from tritonq.sign_step import SignStep
    from tritonq.tensor import QTensor, dequantize, payload_data_, quantize, quantize_both
finally:
    if _collected:
        gc.collect(0)  # of what was just made; else the next one goes through everything
        gc.enable()

if TYPE_CHECKING:
    from tritonq import calibrate
    from tritonq.calibrate import Calibration


def __getattr__(name: str) -> Any:
    """`tritonq.calibrate` and `tritonq.Calibration`, loaded when somebody asks for them."""
    if name not in ("calibrate", "Calibration"):
        raise AttributeError(f"module 'tritonq' has no attribute {name!r}")
    found = importlib.import_module("tritonq.calibrate")
    return found if name == "calibrate" else found.Calibration


if os.environ.get("TRITONQ_AUTOTUNE") == "1":
    from tritonq.tune import tune_on_first_use

    tune_on_first_use()

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "SCHEMES",
    "Best",
    "BulkBuffer",
    "Calibration",
    "ElementType",
    "Format",
    "QLinear",
    "QTensor",
    "ScaleType",
    "Scheme",
    "SignStep",
    "calibrate",
    "convert_",
    "dequantize",
    "fake_quantize_",
    "freeze_observers_",
    "get_format",
    "get_scheme",
    "grouped_quantize",
    "hadamard",
    "integer",
    "lookup",
    "minifloat",
    "offload",
    "payload_data_",
    "qdq",
    "quantize",
    "quantize_",
    "quantize_both",
    "quantize_checkpoint",
    "register",
    "remove_fake_quantize_",
    "save_pretrained",
    "ste",
    "swizzle",
    "unswizzle",
    "workspace",
]
