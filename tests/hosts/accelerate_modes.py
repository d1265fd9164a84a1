"""accelerate: offload to host memory and disk, dispatch over devices, tied weights, loading."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.tensor import QTensor

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

HOST = "accelerate"


def restore(model: nn.Module) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)


@mode(HOST, "cpu_offload")
def cpu_offload(at: Setting) -> None:
    from accelerate import cpu_offload

    def rests(model: nn.Module) -> None:
        assert all(q.device.type == "meta" for q in qtensors(model).values())

    model = same_outputs(at, lambda m: cpu_offload(m, torch.device(at.device)), release=rests, rests_on="meta")
    restore(model)
    check_contents(model, contents(at.model()), "cpu")


@mode(HOST, "cpu_offload, offload_buffers")
def cpu_offload_buffers(at: Setting) -> None:
    from accelerate import cpu_offload

    same_outputs(at, lambda m: cpu_offload(m, torch.device(at.device), offload_buffers=True), rests_on="meta")


@mode(HOST, "cpu_offload of a model with LoRA")
def cpu_offload_lora(at: Setting) -> None:
    from accelerate import cpu_offload

    from .peft_modes import attached

    with torch.no_grad():
        wanted = attached(at.model().to(at.device))(at.input())
        model = attached(at.model())
        before = contents(model)
        with at.nothing_left(model):
            cpu_offload(model, torch.device(at.device))
            for step in range(3):
                assert equal(model(at.input()), wanted), f"outputs differ in step {step}"
    check_contents(model, before, "meta")


@mode(HOST, "align_module_device")
def align_module(at: Setting) -> None:
    from accelerate import cpu_offload
    from accelerate.utils import align_module_device

    model = at.model()
    before = contents(model)["proj_out.weight"]
    with at.nothing_left(model):
        cpu_offload(model, torch.device(at.device))
        with align_module_device(model.proj_out, torch.device(at.device)):
            weight = model.proj_out.weight
            assert type(weight) is QTensor and weight.device.type == at.device and weight._layout == before[0]
            assert torch.equal(weight._buf.cpu(), before[2])
            del weight
        assert model.proj_out.weight.device.type == "meta"


@mode(
    HOST, "attach_layerwise_casting_hooks", error=TypeError, message="the data of a QTensor is a QTensor, got",
    note="8-bit floats without scales would be all that is left of quantized weights",
)  # fmt: skip
def layerwise_casting(at: Setting) -> None:
    from accelerate.big_modeling import attach_layerwise_casting_hooks

    model = at.model().to(at.device)
    before = contents(model)
    try:
        attach_layerwise_casting_hooks(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    finally:
        check_contents(model, before, at.device)


@mode(HOST, "cpu_offload, gradients of inputs")
def cpu_offload_gradients(at: Setting) -> None:
    from accelerate import cpu_offload

    def gradient(model: nn.Module) -> Tensor:
        with torch.enable_grad():
            x = at.input().requires_grad_()
            model(x).square().sum().backward()
        return x.grad

    same_outputs(
        at, lambda m: cpu_offload(m.requires_grad_(False), torch.device(at.device)), call=gradient, rests_on="meta"
    )


@mode(HOST, "cpu_offload_with_hook")
def cpu_offload_with_hook(at: Setting) -> None:
    from accelerate import cpu_offload_with_hook

    hooks: list[Any] = []

    def apply(model: nn.Module) -> None:
        hooks.append(cpu_offload_with_hook(model, torch.device(at.device))[1])

    same_outputs(at, apply, release=lambda model: hooks[0].offload())


@mode(HOST, "cpu_offload_with_hook, several models")
def cpu_offload_chain(at: Setting) -> None:
    """Each model leaves the device when the next one runs."""
    from accelerate import cpu_offload_with_hook

    wanted = at.model().to(at.device)(at.input())
    first, second = at.model(), at.model()
    before = contents(first)
    with at.nothing_left(first, second), torch.no_grad():
        device = torch.device(at.device, 0) if at.device != "cpu" else torch.device("cpu")
        _, hook = cpu_offload_with_hook(first, device)
        _, last = cpu_offload_with_hook(second, device, prev_module_hook=hook)
        for _ in range(2):
            assert equal(first(at.input()), wanted) and equal(second(at.input()), wanted)
            check_contents(first, before, "cpu")
            check_contents(second, before, at.device)
        last.offload()
    check_contents(second, before, "cpu")


# ----------------------------------------------------------------------------------------------- dispatch, tied weights


class Tied(Tiny):
    """The last block shares the weights of the first, so that two names mean one parameter each."""

    def tie(self) -> None:
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks[2].experts.weight = self.blocks[0].experts.weight


def tied(at: Setting) -> nn.Module:
    model = at.model(Tied)
    model.tie()
    return model


def dispatched(at: Setting, device_map: dict[str, Any], **options: Any) -> None:
    """Dispatch a model with tied weights, and compare."""
    from accelerate import dispatch_model

    with torch.no_grad():
        wanted = tied(at).to(at.device)(at.input())
        model = tied(at)
        before = contents(model)
        dispatch_model(model, device_map, force_hooks=True, **options)
        for step in range(3):
            assert equal(model(at.input()), wanted), f"outputs differ in step {step}"
    pointers = {q.data_ptr() for q in qtensors(model).values() if q.device.type != "meta"}
    assert len(pointers) > 1  # equal ones are taken for tied
    if "cpu" not in device_map.values():
        assert model.blocks[0].up.weight is model.blocks[2].up.weight
    restore(model)
    check_contents(model, before, None)


@mode(HOST, "dispatch_model, one device, tied weights")
def dispatch_one(at: Setting) -> None:
    with at.nothing_left():
        dispatched(at, {"": at.device})


@mode(HOST, "dispatch_model, device and CPU, tied weights", devices=("cuda",))
def dispatch_cpu(at: Setting) -> None:
    """The first block stays on the device, the last one, which shares its weights, and the middle one do not."""
    with at.nothing_left():
        device_map = {"blocks.0": 0, "blocks.1": "cpu", "blocks.2": "cpu", "gain": 0, "shift": 0, "proj_out": "cpu"}
        dispatched(at, device_map, main_device=0)


@mode(HOST, "find_tied_parameters")
def find_tied(at: Setting) -> None:
    from accelerate.utils import find_tied_parameters

    found = [sorted(group) for group in find_tied_parameters(tied(at))]
    assert sorted(found) == [[f"blocks.{i}.{name}.weight" for i in (0, 2)] for name in ("experts", "up")]


# ----------------------------------------------------------------------------------------------------------------- disk


def dense_after(at: Setting, apply: Any) -> None:
    """Outputs are the same bits; what went over the disk comes back as the dense weights that it stands for."""
    with torch.no_grad():
        wanted = at.model().to(at.device)(at.input())
        model = at.model()
        dense = {name: q.dequantize() for name, q in qtensors(model).items()}
        with at.nothing_left(model):
            apply(model)
            for step in range(3):
                assert equal(model(at.input()), wanted), f"outputs differ in step {step}"
    restore(model)
    for name, weight in dense.items():
        found = model.get_parameter(name)
        assert not isinstance(found, QTensor) and torch.equal(found, weight)


@mode(HOST, "disk_offload", note="the files hold dense weights, and weights stay dense from the first forward on")
def disk_offload(at: Setting) -> None:
    from accelerate import disk_offload

    dense_after(at, lambda model: disk_offload(model, str(at.folder), execution_device=torch.device(at.device)))


def is_mapped(q: QTensor, path: Path) -> bool:
    """Whether the payload lies in a mapping of this file, as Linux knows (elsewhere: True)."""
    if not Path("/proc/self/maps").exists():
        return True
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return any(start <= q._buf.data_ptr() < end for start, end in spans)


@mode(
    HOST, "cpu_offload, state_dict=torch.load(file, mmap=True)",
    note="from the disk with quantized weights, which stay quantized",
)  # fmt: skip
def mapped_offload(at: Setting) -> None:
    from accelerate import cpu_offload

    path = at.folder / "weights.pt"
    torch.save(at.model().state_dict(), path)
    state = torch.load(path, mmap=True, weights_only=True)
    weights = [tensor for tensor in state.values() if isinstance(tensor, QTensor)]
    assert len(weights) == 10 and all(is_mapped(q, path) for q in weights)
    options = {"state_dict": state, "offload_buffers": True}
    model = same_outputs(at, lambda m: cpu_offload(m, torch.device(at.device), **options), rests_on="meta")
    restore(model)
    check_contents(model, contents(at.model()), "cpu")


@mode(HOST, "dispatch_model, disk", note="as disk_offload, for what the map puts on the disk")
def dispatch_disk(at: Setting) -> None:
    from accelerate import dispatch_model

    device_map = {"blocks": "disk", "gain": at.device, "shift": at.device, "proj_out": "disk"}
    dense_after(at, lambda model: dispatch_model(model, device_map, offload_dir=str(at.folder), main_device=at.device))


# -------------------------------------------------------------------------------------------------------------- loading


@mode(HOST, "load_checkpoint_and_dispatch", note="from a file of torch.save; safetensors hold no quantized tensors")
def load_checkpoint(at: Setting) -> None:
    from accelerate import load_checkpoint_and_dispatch

    with torch.no_grad():
        wanted = at.model().to(at.device)(at.input())
        before = contents(at.model())
        torch.save(at.model().state_dict(), at.folder / "pytorch_model.bin")
        with at.nothing_left():
            empty = at.model().to("meta")
            options = {"blocks": at.device, "gain": at.device, "shift": at.device, "proj_out": at.device}
            model = load_checkpoint_and_dispatch(empty, str(at.folder), device_map=options)
            assert equal(model(at.input()), wanted)
            check_contents(model, before, at.device)
            del model, empty


@mode(HOST, "load_checkpoint_in_model, into a model that is not quantized")
def load_checkpoint_dense(at: Setting) -> None:
    """Layers that are still dense get the quantized weights."""
    from accelerate import init_empty_weights, load_checkpoint_in_model

    torch.save(at.model().state_dict(), at.folder / "pytorch_model.bin")
    with init_empty_weights():
        empty = Tiny().to(torch.bfloat16)
    load_checkpoint_in_model(empty, str(at.folder), device_map={"": "cpu"})
    check_contents(empty, contents(at.model()), "cpu")


@mode(HOST, "init_empty_weights")
def init_empty(at: Setting) -> None:
    from accelerate import init_empty_weights

    weight = at.model().proj_out.weight
    with init_empty_weights():
        module = nn.Linear(160, 160)
        module.weight = weight
    assert type(module.weight) is QTensor and isinstance(module.weight, nn.Parameter)
    assert module.weight.device.type == module.weight._buf.device.type == "meta" and weight.device.type == "cpu"
    assert module.weight._layout == weight._layout and not module.weight.requires_grad


@mode(HOST, "set_module_tensor_to_device")
def set_module_tensor(at: Setting) -> None:
    from accelerate.utils import set_module_tensor_to_device

    model = at.model()
    before, name = contents(model), "proj_out.weight"
    kept = model.proj_out.weight.data.clone()
    with at.nothing_left(model):
        for device, value in ((at.device, None), ("meta", None), (at.device, kept), ("cpu", None)):
            set_module_tensor_to_device(model, name, device, value=value)
            assert model.proj_out.weight.device.type == model.proj_out.weight._buf.device.type == device
            assert type(model.proj_out.weight) is QTensor and isinstance(model.proj_out.weight, nn.Parameter)
    check_contents(model, before, "cpu")
    set_module_tensor_to_device(model, name, "cpu", value=kept, dtype=torch.float16)
    assert model.proj_out.weight.dtype is torch.float16 and model.proj_out.weight._layout == kept._layout
    assert torch.equal(model.proj_out.weight._buf, kept._buf)


def under_accelerator(at: Setting, use: Any) -> None:
    """use(accelerator, prepared model) with an Accelerator, whose state is the process's."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        accelerator = Accelerator(cpu=at.device == "cpu")
        use(accelerator, accelerator.prepare(at.model()))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@mode(HOST, "Accelerator.save_state, load_state, safe_serialization=False")
def save_state(at: Setting) -> None:
    def use(accelerator: Any, model: nn.Module) -> None:
        before = contents(model)
        accelerator.save_state(str(at.folder), safe_serialization=False)
        with torch.no_grad():
            for q in qtensors(model).values():
                q.copy_(torch.zeros_like(q))
        accelerator.load_state(str(at.folder))
        check_contents(model, before, at.device)

    under_accelerator(at, use)


@mode(HOST, "Accelerator.save_state, save_model", error=RuntimeError, message=IN_SAFETENSORS)
def save_state_refused(at: Setting) -> None:
    def use(accelerator: Any, model: nn.Module) -> None:
        try:
            accelerator.save_state(str(at.folder))
        except RuntimeError as error:
            assert IN_SAFETENSORS in str(error)
        else:
            raise AssertionError("save_state wrote a quantized model")
        save_refused(at, lambda _, folder: accelerator.save_model(model, folder))

    under_accelerator(at, use)


# ---------------------------------------------------------------------------------------------------------------- sizes


@mode(HOST, "infer_auto_device_map", note="counts dense bytes; `special_dtypes` of accelerate tells it better")
def auto_device_map(at: Setting) -> None:
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype, compute_module_sizes

    model = at.model()
    dense = sum(math.prod(p.shape) * p.dtype.itemsize for p in model.parameters())
    dense += sum(b.numel() * b.dtype.itemsize for b in model.buffers())
    assert compute_module_sizes(model)[""] == dense
    halves = dict.fromkeys(qtensors(model), CustomDtype.INT4)
    less = sum(1.5 * q.numel() for q in qtensors(model).values())
    assert compute_module_sizes(model, special_dtypes=halves)[""] == dense - less
    options: dict[str, Any] = {"max_memory": {0: dense - less + dense // 2, "cpu": 10 * dense}}
    options["no_split_module_classes"] = ["Block"]
    placed = infer_auto_device_map(model, **options)
    better = infer_auto_device_map(model, special_dtypes=halves, **options)
    assert "cpu" in placed.values() and set(better.values()) == {0}, (placed, better)
