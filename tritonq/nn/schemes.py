"""Schemes: which Format the weights and the inputs of linear layers take, under the names deployers know."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tritonq.formats import Format, ScaleType, get_format

_SCALES_BY_DTYPE = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class Scheme:
    """What happens to a linear layer.

    Attributes:
        name: as vLLM and compressed-tensors know it.
        weights: format of weights.
        inputs: format of activations, quantized on the fly; None leaves them alone.
        scale_follows_weight: store weight scales in the dtype of the weight they belong to. transformers casts the
            floating scales of a compressed-tensors checkpoint to the dtype of the model, so any other type would be
            rounded again.
    """

    name: str
    weights: str
    inputs: str | None = None
    scale_follows_weight: bool = True

    def weight_format(self, dtype: torch.dtype, group_size: int | None = None) -> Format:
        """Format of a weight of `dtype`, with another group size than the scheme's own where one is given.

        Raises:
            ValueError: the scheme has no group size to change.
        """
        fmt = get_format(self.weights)
        if group_size is not None and group_size != fmt.group_size:
            if not self.takes_group_size:
                raise ValueError(
                    f"{self.name} fixes its groups ({self.weights}); leave the size out, or take one of integers"
                )
            if group_size < 1:
                raise ValueError(f"the group size is a number of elements >= 1, got {group_size}")
            fmt = get_format(self.weights.replace(f"_g{fmt.group_size}", f"_g{group_size}"))
        scale = _SCALES_BY_DTYPE.get(dtype, "f32")
        if self.scale_follows_weight and scale != fmt.scale.name:
            fmt = _with_scale(fmt, scale)
        return fmt

    @property
    def takes_group_size(self) -> bool:
        """Groups of integers and of tables may have any size; MX, NVFP4 and formats with super-groups define theirs."""
        fmt = get_format(self.weights)
        fixed = fmt.scale.is_exponent or fmt.tensor_scale or fmt.super_group
        return fmt.group[0] == 1 and fmt.group_size > 0 and not fixed

    def search(self, wanted: str | bool | None) -> str | bool:
        """The scale search of weights: what is wanted, by default "mse" for codes of 4 bits and less, where it lowers
        the error by a tenth and more at next to no time; False is the format's rule.

        Raises:
            ValueError: anything but None, False and "mse".
        """
        if wanted not in (None, False, "mse"):
            raise ValueError(f"search is None (the scheme's default), 'mse' or False (the scale rule), got {wanted!r}")
        return ("mse" if get_format(self.weights).bits <= 4 else False) if wanted is None else wanted

    @property
    def input_format(self) -> Format | None:
        return None if self.inputs is None else get_format(self.inputs)


def _with_scale(fmt: Format, scale: str) -> Format:
    """fmt with another scale type, by its parametric name: `int4_g128` and `f16` give `int4_g128_f16`."""
    found = get_format(f"{fmt.name}_{scale}")
    assert found == replace(fmt, name=found.name, scale=ScaleType(scale, fmt.scale.rule))
    return found


def _scheme(name: str, weights: str, inputs: str | None = None) -> Scheme:
    scale = get_format(weights).scale.name
    return Scheme(name, weights, inputs, scale in _SCALES_BY_DTYPE.values())


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _scheme("W4A16", "int4_g128"),
        _scheme("W4A16_ASYM", "int4_g128_asym"),
        _scheme("W8A16", "int8_channel"),
        _scheme("W3A16", "int3_g128"),
        _scheme("W2A16", "int2_g128"),
        _scheme("W8A8", "int8_channel", "int8_channel_f32_absmax"),
        _scheme("FP8", "fp8_e4m3_tensor", "fp8_e4m3_tensor"),
        _scheme("FP8_DYNAMIC", "fp8_e4m3_channel", "fp8_e4m3_channel"),
        _scheme("FP8_BLOCK", "fp8_e4m3_b128x128", "fp8_e4m3_g128"),
        _scheme("MXFP8", "mxfp8", "mxfp8"),
        _scheme("MXFP8A16", "mxfp8"),
        _scheme("MXFP4", "mxfp4_even", "mxfp4_even"),
        _scheme("MXFP4A16", "mxfp4_even"),
        _scheme("NVFP4", "nvfp4", "nvfp4"),
        _scheme("NVFP4A16", "nvfp4"),
        _scheme("NF4A16", "nf4_g64"),
    )
}


def get_scheme(scheme: str | Scheme) -> Scheme:
    """The Scheme of a name (in any case); ValueError that lists the known ones."""
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(f"a scheme is a Scheme or its name, got {type(scheme).__name__}")
    found = SCHEMES.get(scheme.upper())
    if found is None:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    return found
