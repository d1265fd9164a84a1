"""Test-only corrections of Triton's interpreter (3.6 to 3.9): conversions and arithmetic of bf16 and fp8.

As shipped it converts fp32 to bf16 by truncation, gets many fp8 conversions wrong, and adds, multiplies and compares
the raw bits of bf16 numbers; before 3.9 it rounds fused multiply-adds twice. Here every narrow type goes through fp32
and back with ml_dtypes, half to even; fp8 saturates, as on sm_89 and later.
"""

import ml_dtypes
import numpy as np


def apply():
    """Patch the interpreter's builder class; harmless when called twice."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "tritonq_shim", False):
        return
    narrow = {tl.bfloat16: ml_dtypes.bfloat16}
    for name, dtype in (
        ("float8e4nv", ml_dtypes.float8_e4m3fn), ("float8e5", ml_dtypes.float8_e5m2),
        ("float8e4b8", ml_dtypes.float8_e4m3fnuz), ("float8e5b16", ml_dtypes.float8_e5m2fnuz),
    ):  # fmt: skip
        if hasattr(tl, name):
            narrow[getattr(tl, name)] = dtype

    def widen(data, dtype):
        """The numbers behind a handle's data: fp32 where they are stored as the raw bits of a narrow type."""
        return np.asarray(data).view(narrow[dtype]).astype(np.float32) if dtype in narrow else data

    def narrowed(data, dtype):
        """Numbers to the data of a handle of `dtype`."""
        if dtype not in narrow:
            return data.astype(interpreter._get_np_dtype(dtype), copy=False)
        target = narrow[dtype]
        with np.errstate(over="ignore", invalid="ignore"):
            data = np.asarray(data).astype(np.float32)
            if target is not ml_dtypes.bfloat16:
                top = float(ml_dtypes.finfo(target).max)
                data = np.clip(data, -top, top)
            return data.astype(target).view(np.uint16 if dtype == tl.bfloat16 else np.uint8)

    original = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op")}

    def convert(self, src, dst_type):
        return handle(narrowed(widen(src.data, src.dtype.scalar), dst_type.scalar), dst_type.scalar)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar in narrow or dst_type.scalar in narrow:
            return convert(self, src, dst_type)
        with np.errstate(over="ignore", invalid="ignore"):
            return original["cast_impl"](self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode=None, *rest):
        towards_zero = rounding_mode is not None and "RTZ" in str(rounding_mode)
        if not towards_zero and (src.dtype.scalar in narrow or dst_type.scalar in narrow):
            return convert(self, src, dst_type)
        return original["create_fp_to_fp"](self, src, dst_type, rounding_mode, *rest)

    def binary_op(self, lhs, rhs, op):
        dtype = lhs.dtype.scalar
        with np.errstate(all="ignore"):
            if dtype not in narrow:
                return original["binary_op"](self, lhs, rhs, op)
            out = op(widen(lhs.data, dtype), widen(rhs.data, rhs.dtype.scalar))
        return handle(out, tl.int1) if out.dtype == np.bool_ else handle(narrowed(out, dtype), dtype)

    def unary_op(self, arg, op):
        dtype = arg.dtype.scalar
        if dtype not in narrow:
            with np.errstate(all="ignore"):
                return original["unary_op"](self, arg, op)
        return handle(narrowed(op(widen(arg.data, dtype)), dtype), dtype)

    def create_fma(self, x, y, z):
        """Rounded once. An 80-bit product of fp32 numbers is exact, and the sum keeps more bits than fp32 ties need."""
        with np.errstate(all="ignore"):
            wide = [np.asarray(t.data).astype(np.longdouble) for t in (x, y, z)]
            return handle((wide[0] * wide[1] + wide[2]).astype(np.asarray(z.data).dtype), z.dtype.scalar)

    for function in (cast_impl, create_fp_to_fp, binary_op, unary_op, create_fma):
        setattr(builder, function.__name__, function)
    builder.tritonq_shim = True
