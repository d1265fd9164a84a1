"""PEFT: low-rank adapters on quantized layers, trained, saved, merged."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .registry import Setting, check_contents, contents, equal, mode, qtensors

HOST = "peft"
TARGETS = ["up", "down", "proj_out"]


def attached(model: nn.Module, kind: str = "LoraConfig", **options: Any) -> nn.Module:
    """`model` with adapters on its linear layers, always the same ones; those of LoRA have rank 4, and are not zero."""
    import peft

    torch.manual_seed(2)
    ranked: dict[str, Any] = {"r": 4, "init_lora_weights": False} if kind == "LoraConfig" else {}
    return peft.get_peft_model(model, getattr(peft, kind)(**{"target_modules": TARGETS, **ranked, **options}))


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with the dense weights that the quantized ones stand for."""
    twin = copy.deepcopy(model)
    for name, q in qtensors(model).items():
        module, _, key = name.rpartition(".")
        setattr(twin.get_submodule(module), key, nn.Parameter(q.dequantize(), requires_grad=False))
    assert not qtensors(twin)
    return twin


def train(at: Setting, model: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """Losses of some steps, the gradients of the last one, and the trained parameters."""
    model.train()
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(hasattr(p, "_buf") for p in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    found = {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(at.input(step, dtype)).float().square().mean()
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        optimizer.step()
    found.update({f"gradient of {name}": p.grad for name, p in trained.items()})
    found.update({name: p.detach() for name, p in trained.items()})
    return found


def under_adapters(before: dict[str, Any], targets: Sequence[str] = TARGETS) -> dict[str, Any]:
    """`contents` by the names that weights have under adapters."""
    wrapped = {name for name in before if name.split(".")[-2] in targets}
    return {name.replace(".weight", ".base_layer.weight") if name in wrapped else name: before[name] for name in before}


def trains_as_dense(at: Setting, base: nn.Module, **options: Any) -> None:
    """Losses, gradients and trained adapters are those over dense weights, bit for bit; the weights stay."""
    before = contents(base)
    wanted = train(at, attached(dense_twin(base), **options))
    found = train(at, attached(base, **options))
    assert found.keys() == wanted.keys() and (options or len(found) > 30)
    different = [name for name, tensor in wanted.items() if not equal(found[name], tensor)]
    assert not different, f"differs from the dense twin: {different}"
    assert all(float(tensor.abs().sum()) > 0 for name, tensor in wanted.items() if "gradient" in name)
    check_contents(base, under_adapters(before), at.device)


@mode(HOST, "LoRA, training")
def lora(at: Setting) -> None:
    trains_as_dense(at, at.model().to(at.device))


@mode(HOST, "LoRA, training with lora_bias and use_rslora")
def lora_options(at: Setting) -> None:
    trains_as_dense(at, at.model().to(at.device), lora_bias=True, use_rslora=True)


@mode(
    HOST, "DoRA, training",
    note="norms are those of the weights in fp32; in a bf16 model the dense ones would be rounded to bf16 first",
)  # fmt: skip
def dora(at: Setting) -> None:
    trains_as_dense(at, at.model().float().to(at.device), use_dora=True)


OTHERS: dict[str, dict[str, Any]] = {
    "AdaLoRA": {"kind": "AdaLoraConfig", "total_step": 10},
    "IA3": {"kind": "IA3Config", "feedforward_modules": ["down"]},
    "LoHa": {"kind": "LoHaConfig", "init_weights": False},
    "OFT": {"kind": "OFTConfig", "r": 0, "oft_block_size": 32, "init_weights": False},
}
for _name, _options in OTHERS.items():

    @mode(HOST, f"{_name}, training")
    def other(at: Setting, options: dict[str, Any] = _options) -> None:
        trains_as_dense(at, at.model().to(at.device), **options)


@mode(HOST, "LoRA under torch.compile(fullgraph=True), training", devices=("cuda",))
def lora_compiled(at: Setting) -> None:
    """Compiled after the optimizer's first step as well, without a second graph."""
    import torch._dynamo

    base = at.model().to(at.device)
    twin = attached(dense_twin(base))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        wanted = train(at, twin)
        model = attached(base)
        model.compile(fullgraph=True, backend="aot_eager")
        found = train(at, model)
    torch._dynamo.reset()
    assert all(equal(found[name], tensor) for name, tensor in wanted.items())


@mode(HOST, "LoRA on fused experts (target_parameters)")
def lora_experts(at: Setting) -> None:
    base = at.model().to(at.device)
    before = contents(base)
    options = {"target_modules": [], "target_parameters": ["experts.weight"]}
    twin, model = attached(dense_twin(base), **options), attached(base, **options)
    with torch.no_grad():
        assert equal(model(at.input()), twin(at.input()))
    wanted, found = train(at, twin), train(at, model)
    assert all(equal(found[name], tensor) for name, tensor in wanted.items())
    names = {name: name.replace("experts.", "experts.base_layer.") for name in before}
    check_contents(base, {names[name]: content for name, content in before.items()}, at.device)


@mode(HOST, "LoRA, several adapters, disable_adapter")
@torch.no_grad()
def several(at: Setting) -> None:
    base = at.model().to(at.device)
    plain = base(at.input())
    twin, model = attached(dense_twin(base)), attached(base)
    for peft in (twin, model):
        torch.manual_seed(3)
        peft.add_adapter("second", peft.peft_config["default"])
        peft.add_weighted_adapter(["default", "second"], [0.5, 0.25], "both", combination_type="linear")
    for name in ("default", "second", "both", "default"):
        twin.set_adapter(name), model.set_adapter(name)
        found = model(at.input())
        assert equal(found, twin(at.input())) and not torch.equal(found, plain)
    with model.disable_adapter():
        assert equal(model(at.input()), plain)
    assert equal(model.unload()(at.input()), plain)


@mode(HOST, "save_pretrained, PeftModel.from_pretrained")
@torch.no_grad()
def saved(at: Setting) -> None:
    from peft import PeftModel

    model = attached(at.model().to(at.device))
    wanted = model(at.input())
    model.save_pretrained(str(at.folder))
    size = sum(path.stat().st_size for path in at.folder.glob("*.safetensors"))
    assert 0 < size < sum(q._buf.numel() for q in qtensors(model).values())  # adapters only
    loaded = PeftModel.from_pretrained(at.model().to(at.device), str(at.folder))
    assert equal(loaded(at.input()), wanted)


@mode(HOST, "prepare_model_for_kbit_training")
def kbit(at: Setting) -> None:
    from peft import prepare_model_for_kbit_training

    base = at.model().to(at.device)
    before = {name: (layout, torch.float32, buffer) for name, (layout, _, buffer) in contents(base).items()}
    base.is_loaded_in_4bit = True  # what makes it cast the rest to fp32
    prepared = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    assert not any(p.requires_grad for p in prepared.parameters())
    check_contents(prepared, before, at.device)


@mode(
    HOST, "LoRA, merged by hand",
    note="`weight.copy_(weight.dequantize() + layer.get_delta_weight(name))` quantizes the sum, by the format's rule",
)  # fmt: skip
@torch.no_grad()
def merged_by_hand(at: Setting) -> None:
    import tritonq as tq

    model = attached(at.model().to(at.device))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 7
    for layer in layers:
        weight = layer.get_base_layer().weight
        total = weight.dequantize() + layer.get_delta_weight("default").to(weight.dtype)
        weight.copy_(total)
        wanted = tq.quantize(total, weight.format)
        assert weight._layout == wanted._layout and torch.equal(weight._buf, wanted._buf)
    assert torch.isfinite(model.unload()(at.input())).all()


# Weights that an adapter is merged into would have to be quantized again. Each of these leaves the model as it was.
ADDS = "would write into a quantized tensor"
ASSIGNS = "the data of a QTensor is a QTensor, got"


def merge_refused(at: Setting, *, merge: str, safe: bool, **options: Any) -> None:
    base = at.model().to(at.device)
    before = contents(base)
    model = attached(base, **options)
    try:
        getattr(model, merge)(safe_merge=safe)
    finally:
        check_contents(base, under_adapters(before), at.device)
        assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))


for _merge in ("merge_adapter", "merge_and_unload"):
    for _safe in (False, True):
        mode(
            HOST, f"LoRA, {_merge}{', safe_merge' if _safe else ''}", error=RuntimeError, message=ADDS,
            note="keep the adapter beside the weights",
        )(functools.partial(merge_refused, merge=_merge, safe=_safe))  # fmt: skip

mode(HOST, "DoRA, merge_and_unload", error=TypeError, message=ASSIGNS)(
    functools.partial(merge_refused, merge="merge_and_unload", safe=False, use_dora=True)
)


def start_refused(at: Setting, start: str) -> None:
    base = at.model().to(at.device)
    before = contents(base)
    try:
        attached(base, init_lora_weights=start)
    finally:
        found = [q._buf.cpu() for q in qtensors(base).values()]
        assert all(torch.equal(buffer, content) for buffer, (_, _, content) in zip(found, before.values(), strict=True))


for _start, _error, _message in (("pissa", TypeError, ASSIGNS), ("olora", RuntimeError, "would write into")):
    mode(HOST, f"LoRA, init_lora_weights={_start!r}", error=_error, message=_message, note="changes the weights")(
        functools.partial(start_refused, start=_start)
    )
