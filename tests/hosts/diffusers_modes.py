"""diffusers: group offload in every mode, offload of pipelines, layerwise casting."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tritonq as tq

from .registry import (
    IN_SAFETENSORS,
    Setting,
    Tiny,
    check_contents,
    contents,
    equal,
    mode,
    qtensors,
    same_outputs,
    save_refused,
)  # fmt: skip

HOST = "diffusers"


@functools.cache
def tiny() -> type[nn.Module]:
    """Tiny as a model of diffusers."""
    from diffusers import ConfigMixin, ModelMixin

    class TinyModel(ModelMixin, Tiny, ConfigMixin):
        config_name = "config.json"
        _repeated_blocks = ["Block"]

    return TinyModel


@functools.cache
def shallow() -> type[nn.Module]:
    return type("ShallowModel", (tiny(),), {"depth": 1})


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def call_flux(at: Setting, model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(at.device, torch.bfloat16)

    return model(
        hidden_states=random(1, 8, 16), encoder_hidden_states=random(1, 4, 64), pooled_projections=random(1, 32),
        timestep=torch.tensor([0.5], device=at.device), img_ids=torch.zeros(8, 3, device=at.device),
        txt_ids=torch.zeros(4, 3, device=at.device), return_dict=False,
    )[0]  # fmt: skip


LEVELS: dict[str, dict[str, Any]] = {
    "leaf_level": {"offload_type": "leaf_level"},
    "block_level": {"offload_type": "block_level", "num_blocks_per_group": 1},
}
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "non_blocking": {"non_blocking": True},
    "use_stream": {"use_stream": True},
    "use_stream, record_stream": {"use_stream": True, "record_stream": True},
    "use_stream, low_cpu_mem_usage": {"use_stream": True, "low_cpu_mem_usage": True},
    "use_stream, record_stream, low_cpu_mem_usage": {
        "use_stream": True, "record_stream": True, "low_cpu_mem_usage": True,
    },
}  # fmt: skip


def group_offload(at: Setting, build: Any = None, call: Any = None, **options: Any) -> None:
    def apply(model: nn.Module) -> None:
        model.enable_group_offload(onload_device=torch.device(at.device), **options)

    same_outputs(at, apply, build=build or tiny(), call=call)


for _level, _options in LEVELS.items():
    for _way, _more in WAYS.items():
        mode(
            HOST,
            ", ".join(filter(None, ("enable_group_offload", _level, _way))),
            devices=("cuda",) if "use_stream" in _more else ("cpu", "cuda"),
        )(functools.partial(group_offload, **_options, **_more))


@mode(HOST, "enable_group_offload, leaf_level, FluxTransformer2DModel")
def group_offload_flux(at: Setting) -> None:
    group_offload(at, flux, lambda model: call_flux(at, model), offload_type="leaf_level")


@mode(HOST, "enable_group_offload, block_level, use_stream, FluxTransformer2DModel", devices=("cuda",))
def group_offload_flux_streams(at: Setting) -> None:
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True}
    group_offload(at, flux, lambda model: call_flux(at, model), **options)


@functools.cache
def bare() -> type[nn.Module]:
    """Of dense parameters only biases, which backward does not need."""

    class BareModel(tiny()):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block.experts(block.down(nn.functional.gelu(block.up(x))))
            return self.proj_out(x)

    return BareModel


@mode(
    HOST, "enable_group_offload, leaf_level, gradients through quantized layers",
    note="dense parameters that backward needs, as of norms, have left the device by then, as in any dense model",
)  # fmt: skip
def group_offload_gradients(at: Setting) -> None:
    """Weights that were offloaded after forward are needed again in backward."""

    def made() -> nn.Module:
        return at.model(bare(), inputs=False).requires_grad_(False)

    def gradient(model: nn.Module) -> Tensor:
        x = at.input().requires_grad_()
        model(x).square().sum().backward()
        return x.grad

    wanted, model = gradient(made().to(at.device)), made()
    before = contents(model)
    with at.nothing_left(model):
        model.enable_group_offload(onload_device=torch.device(at.device), offload_type="leaf_level")
        for step in range(3):
            assert equal(gradient(model), wanted), f"gradients differ in step {step}"
    check_contents(model, before, "cpu")


# ------------------------------------------------------------------------------------------------------------ pipelines


@functools.cache
def pipeline_class() -> type:
    from diffusers import DiffusionPipeline

    class TinyPipeline(DiffusionPipeline):
        """An encoder once, a transformer in each of three steps."""

        model_cpu_offload_seq = "encoder->transformer"

        def __init__(self, encoder: nn.Module, transformer: nn.Module) -> None:
            super().__init__()
            self.register_modules(encoder=encoder, transformer=transformer)

        @torch.no_grad()
        def __call__(self, x: Tensor) -> Tensor:
            x = self.encoder(x)
            for _ in range(3):
                x = self.transformer(x)
            self.maybe_free_model_hooks()
            return x

    return TinyPipeline


def pipeline(at: Setting) -> Any:
    made = pipeline_class()(at.model(tiny()), at.model(tiny()))
    made.set_progress_bar_config(disable=True)
    return made


def same_images(at: Setting, apply: Any, rests_on: str) -> Any:
    x = at.input()
    wanted = pipeline(at).to(at.device)(x)
    made = pipeline(at)
    before = contents(made.transformer)
    with at.nothing_left(made.encoder, made.transformer):
        apply(made)
        for step in range(2):
            found = made(x)
            assert equal(found.to(at.device), wanted), f"outputs differ in call {step}"
            del found
    for model in (made.encoder, made.transformer):
        check_contents(model, before, rests_on)
    return made


@mode(HOST, "enable_model_cpu_offload", devices=("cuda",))
def model_cpu_offload(at: Setting) -> None:
    same_images(at, lambda made: made.enable_model_cpu_offload(device=at.device), "cpu")


@mode(HOST, "enable_sequential_cpu_offload", devices=("cuda",))
def sequential_cpu_offload(at: Setting) -> None:
    made = same_images(at, lambda made: made.enable_sequential_cpu_offload(device=at.device), "meta")
    made.remove_all_hooks()
    check_contents(made.transformer, contents(at.model(tiny())), "cpu")


@mode(HOST, "DiffusionPipeline.enable_group_offload")
def pipeline_group_offload(at: Setting) -> None:
    def apply(made: Any) -> None:
        made.enable_group_offload(onload_device=torch.device(at.device), offload_type="leaf_level")

    same_images(at, apply, "cpu")


# ----------------------------------------------------------------------------------------------------------------- disk


def group_offload_disk(at: Setting, **options: Any) -> None:
    """The files hold the bytes of quantized weights; on the CPU nothing of them stays in memory."""

    def apply(model: nn.Module) -> None:
        tq.payload_data_(model)
        model.enable_group_offload(
            onload_device=torch.device(at.device), offload_to_disk_path=str(at.folder), **options
        )
        size = sum(path.stat().st_size for path in at.folder.glob("*.safetensors"))
        quantized = sum(q._buf.numel() for q in qtensors(model).values())
        others = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if not_quantized(t))
        assert quantized + others <= size < quantized + others + 4096 * len(list(model.modules()))

    def load(model: nn.Module) -> None:  # what rests in memory has no values
        for module in model.modules():
            hooks = getattr(module, "_diffusers_hook", None)
            hook = hooks and hooks.get_hook("group_offloading")
            if hook:
                hook.group.onload_()
        at.wait()
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.cpu()

    same_outputs(at, apply, build=tiny(), release=load)


def not_quantized(tensor: Tensor) -> bool:
    return not isinstance(tensor, tq.QTensor)


for _level, _options in LEVELS.items():
    for _way in ("", "use_stream", "use_stream, record_stream"):
        mode(
            HOST, ", ".join(filter(None, ("enable_group_offload", _level, "offload_to_disk_path", _way))),
            devices=("cuda",) if _way else ("cpu", "cuda"),
            note="after `tritonq.payload_data_(model)`",
        )(functools.partial(group_offload_disk, **_options, **WAYS[_way]))  # fmt: skip


@mode(
    HOST, "enable_group_offload, offload_to_disk_path, without payload_data_",
    error=RuntimeError, message=IN_SAFETENSORS,
)  # fmt: skip
def group_offload_disk_refused(at: Setting) -> None:
    """Nothing is written that a later run would take for the weights of this one."""
    model = at.model(tiny())
    before = contents(model)
    try:
        model.enable_group_offload(
            onload_device=torch.device(at.device), offload_type="leaf_level", offload_to_disk_path=str(at.folder)
        )
    finally:
        check_contents(model, before, "cpu")
        written = [load_file(path) for path in at.folder.glob("*.safetensors")]
        sizes = {q.numel() for q in qtensors(model).values()}
        assert not [tensor for tensors in written for tensor in tensors.values() if tensor.numel() in sizes]


# ---------------------------------------------------------------------------------------------------------- other modes


@mode(HOST, "add_adapter (LoRA) under enable_group_offload, leaf_level")
@torch.no_grad()
def group_offload_lora(at: Setting) -> None:
    from peft import LoraConfig

    def adapted() -> nn.Module:
        model = at.model(flux)
        torch.manual_seed(2)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
        return model.to(torch.bfloat16)

    wanted, plain = (call_flux(at, model.to(at.device)) for model in (adapted(), at.model(flux)))
    assert not torch.equal(wanted, plain)
    model = adapted()
    before = contents(model)
    with at.nothing_left(model):
        model.enable_group_offload(onload_device=torch.device(at.device), offload_type="leaf_level")
        for step in range(3):
            assert equal(call_flux(at, model), wanted), f"outputs differ in step {step}"
    check_contents(model, before, "cpu")


@mode(HOST, "save_pretrained", error=RuntimeError, message=IN_SAFETENSORS)
def saved(at: Setting) -> None:
    save_refused(at, lambda model, folder: model.save_pretrained(folder), tiny())


LAYERWISE = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}


@mode(
    HOST, "enable_layerwise_casting", error=TypeError, message="the data of a QTensor is a QTensor, got",
    note="8-bit floats without scales would be all that is left of quantized weights",
)  # fmt: skip
def layerwise_casting(at: Setting) -> None:
    model = at.model(tiny()).to(at.device)
    before = contents(model)
    try:
        model.enable_layerwise_casting(**LAYERWISE)
    finally:
        check_contents(model, before, at.device)


@mode(HOST, "enable_layerwise_casting, skip_modules_classes=(QLinear,)")
def layerwise_casting_others(at: Setting) -> None:
    """Layers that are not quantized are rounded to 8-bit floats, quantized ones stay."""
    from tritonq.nn.linear import QLinear

    def rounded(model: nn.Module) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not isinstance(module, QLinear) and "norm" not in name:
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
        return call_flux(at, model)

    model = at.model(flux).to(at.device)
    before = contents(model)
    with torch.no_grad():
        wanted, plain = rounded(at.model(flux).to(at.device)), call_flux(at, model)
        model.enable_layerwise_casting(**LAYERWISE, skip_modules_classes=(QLinear,), skip_modules_pattern=("norm",))
        assert not torch.equal(wanted, plain) and equal(call_flux(at, model), wanted)
    check_contents(model, before, at.device)


# ------------------------------------------------------------------------------------------------------------- compiled


@contextmanager
def one_compilation() -> Iterator[None]:
    """Graphs are made by the first call alone."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@mode(HOST, "compile_repeated_blocks(fullgraph=True)", slow=True)
def compiled(at: Setting) -> None:
    def apply(model: nn.Module) -> None:
        model.to(at.device).compile_repeated_blocks(fullgraph=True, backend="aot_eager")

    with one_compilation():
        same_outputs(at, apply, build=tiny(), release=lambda model: model.to("cpu"))


@mode(HOST, "compile_repeated_blocks(fullgraph=True) under enable_model_cpu_offload", devices=("cuda",))
def compiled_offload(at: Setting) -> None:
    def apply(made: Any) -> None:
        made.enable_model_cpu_offload(device=at.device)
        for model in (made.encoder, made.transformer):
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")

    with one_compilation():
        same_images(at, apply, "cpu")


@mode(
    HOST, "torch.compile under enable_group_offload, leaf_level",
    note="with graph breaks at the hooks, which the host keeps out of graphs, as with dense weights",
    devices=("cuda",),
)  # fmt: skip
def compiled_group_offload(at: Setting) -> None:
    def apply(model: nn.Module) -> Any:
        model.enable_group_offload(onload_device=torch.device(at.device), offload_type="leaf_level")
        return torch.compile(model, backend="aot_eager")

    torch._dynamo.reset()
    same_outputs(at, apply, build=shallow())
    torch._dynamo.reset()
