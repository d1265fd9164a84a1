"""`quantize_`: which layers change, into what, and everything about a model that has to stay as it was."""

import copy

import models
import pytest
import torch
from torch import nn

import tritonq as tq
from tritonq import QLinear, QTensor, ops

pytest.importorskip("transformers")

KINDS = ("llama", "llama_tied", "qwen3moe", "bert")
TOLERANCE = {"W2A16": 1.5, "W3A16": 0.8}  # relative error of the outputs of a random model; others 0.4


@pytest.fixture(scope="module")
def built():
    cache = {}

    def build(kind, dtype=torch.float32, device="cpu"):
        if (kind, dtype) not in cache:
            cache[kind, dtype] = models.build(kind, dtype)
        return copy.deepcopy(cache[kind, dtype]).to(device)

    return build


def quantize(model, scheme="W4A16", **options):
    return tq.quantize_(model, scheme, progress=False, **options)


def tokens(device="cpu"):
    return torch.arange(24, device=device).reshape(2, 12) * 5 % 128


def output(model):
    with torch.no_grad():
        return model(tokens(model.device))[0].float()


def weights(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, QTensor)}


def small(**layers):
    torch.manual_seed(0)
    return nn.ModuleDict({name: make() for name, make in layers.items()})


def linear(rows=128, columns=128, **options):
    return nn.Linear(columns, rows, **options)


# ----------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("scheme", tq.SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_scheme(kind, scheme, built, device):
    """Wrong layers, changed names, dense leftovers, weights that are not what quantizing them alone gives."""
    model = built(kind, device=device)
    source, before = {n: p.detach().clone() for n, p in model.named_parameters()}, output(model)
    assert quantize(model, scheme) is model
    found, scheme = weights(model), tq.get_scheme(scheme)
    assert list(dict(model.named_parameters())) == list(source)
    for name, p in model.named_parameters():
        is_expert = ".experts." in name
        assert isinstance(p, QTensor) == (is_expert or models.is_linear(name, source[name])), name
        assert isinstance(p, nn.Parameter) and p.shape == source[name].shape and p.dtype == source[name].dtype
        assert p.device.type == device
        if isinstance(p, QTensor):
            assert p.format == scheme.weight_format(torch.float32) and not p.requires_grad
            given = {"tensor_scale": p.tensor_scale} if p.format.tensor_scale else {}
            alone = tq.quantize(source[name], p.format, **given, search=scheme.search(None))
            assert torch.equal(p.dequantize(), alone.dequantize())
        else:
            assert torch.equal(p, source[name])
    for name, module in model.named_modules():
        if name + ".weight" in found:
            assert type(module) is QLinear and isinstance(module, nn.Linear)
            assert module.input_format == scheme.input_format
    assert not any(word in name for name in found for word in ("embed", "lm_head", "norm", "mlp.gate."))
    after = output(model)
    error = (after - before).norm() / before.norm()
    assert torch.isfinite(after).all() and 0 < error < TOLERANCE.get(scheme.name, 0.4), error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "NVFP4", "MXFP4A16"])
def test_half_precision(scheme, dtype, built, device):
    """Scales follow the dtype of the weight; outputs keep it."""
    model = quantize(built("llama", dtype, device), scheme)
    after = model(tokens(device))[0]
    assert after.dtype is dtype and torch.isfinite(after).all()
    scale = {p.scale.dtype for p in weights(model).values()}
    kept = tq.get_scheme(scheme).scale_follows_weight
    assert scale == ({dtype} if kept else {tq.get_format(tq.get_scheme(scheme).weights).scale.dtype})


def test_generation(built, device):
    """Cache, position ids and greedy search on quantized layers give what the dequantized model gives."""
    model = quantize(built("llama", device=device))
    twin = built("llama", device=device)
    twin.load_state_dict({n: t.dequantize() if isinstance(t, QTensor) else t for n, t in model.state_dict().items()})
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    results = [m.generate(tokens(device), **options) for m in (model, twin)]
    assert results[0].shape[1] > 12 and torch.equal(*results)
    assert torch.equal(output(model), output(twin))


def test_nvfp4_divisors_are_shared_by_fused_layers(built, device):
    """vLLM fuses q/k/v and gate/up and takes one divisor for the result; any other layer has its own."""
    model = built("llama", device=device)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(3)
        model.model.layers[1].mlp.up_proj.weight.mul_(5)
    source = {n: ops.tensor_scale(p.detach(), "nvfp4") for n, p in model.named_parameters() if "proj" in n}
    found = {n: p.tensor_scale for n, p in weights(quantize(model, "NVFP4")).items()}
    for i in range(2):
        layer = f"model.layers.{i}."
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"),
                      ("self_attn.o_proj",), ("mlp.down_proj",)):  # fmt: skip
            names = [f"{layer}{name}.weight" for name in names]
            wanted = torch.stack([source[name] for name in names]).amin(0)
            assert all(torch.equal(found[name], wanted) for name in names)


def test_tied_weights_stay_tied(built, device):
    """Quantizing each use on its own doubles the memory and lets the copies drift apart."""
    model = quantize(built("llama_tied", device=device), ignore=["down_proj"])
    assert model.lm_head.weight is model.model.embed_tokens.weight and not isinstance(model.lm_head.weight, QTensor)
    module = small(a=linear, b=linear, c=linear).to(device)
    module["b"].weight = module["a"].weight
    quantize(module)
    assert module["a"].weight is module["b"].weight is not module["c"].weight
    assert type(module["a"]) is type(module["b"]) and isinstance(module["c"].weight, QTensor)
    assert module["a"].weight.data_ptr() != module["c"].weight.data_ptr()


def test_a_module_in_two_places_stays_one():
    """named_modules names a shared module once, so replacing it by name leaves a dense one in the other place."""
    module = small(a=linear, c=lambda: nn.Sequential(linear()))
    module["b"] = module["a"]
    module["c"].append(module["a"])
    quantize(module)
    assert module["a"] is module["b"] is module["c"][1] and type(module["c"][0]) is QLinear


# ---------------------------------------------------------------------------------------------------------- ignore


@pytest.mark.parametrize(
    ("ignore", "kept"),
    [
        (["down_proj"], r"down_proj"), (["model.layers.1.mlp.up_proj"], r"layers\.1\.mlp\.up_proj"),
        ([r"re:.*\.(q|k)_proj$"], r"\.[qk]_proj"), (["o_proj", "re:model.layers.0.mlp"], r"o_proj|layers\.0\.mlp"),
        ("v_proj", r"v_proj"), (["lm_head", "embed_tokens"], r"$^"), (["model.norm"], r"$^"),
    ],
)  # fmt: skip
def test_ignore(ignore, kept, built):
    """Full names, last names and regular expressions add to the defaults; dense modules may be named."""
    import re

    everything = set(weights(quantize(built("llama"))))
    model = quantize(built("llama"), ignore=ignore)
    assert set(weights(model)) == {name for name in everything if not re.search(kept, name)}
    assert (type(model.model.layers[1].mlp.down_proj) is nn.Linear) == ("down_proj" in ignore)


@pytest.mark.parametrize("ignore", ["model.layers.0.mlp.experts", "re:.*experts", "gate_up_proj"])
def test_ignoring_experts(ignore, built):
    model = quantize(built("qwen3moe"), ignore=[ignore])
    first, second = (model.model.layers[i].mlp.experts for i in range(2))
    assert not isinstance(first.gate_up_proj, QTensor)
    assert isinstance(first.down_proj, QTensor) == (ignore == "gate_up_proj")
    assert isinstance(second.down_proj, QTensor) == (ignore != "re:.*experts")


@pytest.mark.parametrize("ignore", ["no_such", "model.layers.7.mlp.up_proj", "re:.*vision", "proj", "mlp"])
def test_ignore_that_matches_nothing(ignore, built):
    model = built("llama")
    with pytest.raises(ValueError, match="matches no module") as caught:
        quantize(model, ignore=["down_proj", ignore])
    assert repr(ignore) in str(caught.value) and "q_proj" in str(caught.value) and not weights(model)


# ---------------------------------------------------------------------------------------------------------- errors


def test_unknown_scheme_lists_the_known_ones(built):
    model = built("llama")
    with pytest.raises(ValueError, match="unknown scheme 'W5A5'") as caught:
        quantize(model, "W5A5")
    assert all(name in str(caught.value) for name in tq.SCHEMES) and not weights(model)
    assert weights(quantize(built("llama"), "w4a16")) and weights(quantize(model, tq.SCHEMES["W8A16"]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", tq.SCHEMES)
def test_non_finite_weights_are_refused(scheme, value, device):
    """Every scale type has its own NaN; the last layer fails when the others are already quantized."""
    for count in (1, 3):
        module = small(first=linear, last=linear).to(device)
        module["last"].weight.data[5, 7 : 7 + count] = value
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        with pytest.raises(ValueError, match=rf"last .*has {count} non-finite element{'s' * (count > 1)} ") as caught:
            quantize(module, scheme)
        assert "\n" not in str(caught.value)
        assert not weights(module) and all(type(m) is nn.Linear for m in module.values())
        assert all(torch.equal(p, before[n]) or n == "last.weight" for n, p in module.named_parameters())
        assert not hasattr(module, "tritonq_scheme")
        quantize(module, scheme, ignore=["last"])


def test_nothing_to_quantize(built):
    for model, options in ((small(norm=lambda: nn.LayerNorm(8)), {}), (built("llama"), {"ignore": ["re:.*"]})):
        with pytest.raises(ValueError, match="no linear layer to quantize"):
            quantize(model, **options)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantize(built("llama")))
    with pytest.raises(ValueError, match=r"bare nn\.Linear"):
        quantize(linear())


def test_group_size(built):
    model = quantize(built("llama"), "W4A16", group_size=32)
    assert {p.format.group_size for p in weights(model).values()} == {32} and torch.isfinite(output(model)).all()
    ragged = quantize(built("llama"), "W4A16_ASYM", group_size=100)
    assert next(iter(weights(ragged).values())).scale.shape[-1] == 3 and torch.isfinite(output(ragged)).all()
    for scheme, size, word in (("MXFP4", 64, "MXFP4"), ("W8A16", 64, "W8A16"), ("W4A16", 0, "group size")):
        model = built("llama")
        with pytest.raises(ValueError, match=word):
            quantize(model, scheme, group_size=size)
        assert not weights(model)


# --------------------------------------------------------------------------------------------- what has to be kept


def test_flags_hooks_and_biases_are_kept(device):
    """A replacement that forgets which hooks take keywords calls them with the wrong arguments."""
    module, x = small(a=linear, b=lambda: linear(bias=False)).to(device), torch.randn(2, 128, device=device)
    module["a"].eval()
    bias, seen = module["a"].bias, []
    plain = module["a"].register_forward_hook(lambda m, args, out: seen.append("forward"))
    module["a"].register_forward_hook(lambda m, args, kw, out: seen.append("keywords"), with_kwargs=True)
    module["a"].register_forward_pre_hook(lambda m, args, kw: seen.append("pre"), with_kwargs=True)
    module["a"].register_full_backward_hook(lambda m, gi, go: seen.append((m, len(gi), gi[0].shape)))
    quantize(module)
    layer = module["a"]
    assert not layer.training and module["b"].training and module["b"].bias is None and module.training
    assert layer.bias is bias and bias.requires_grad and (layer.in_features, layer.out_features) == (128, 128)
    y = layer(x.requires_grad_())
    assert torch.allclose(y, x @ layer.weight.dequantize().T + bias, atol=1e-5)
    y.sum().backward()
    assert seen == ["pre", "forward", "keywords", (layer, 1, x.shape)] and bias.grad.eq(2).all()
    plain.remove()
    seen.clear()
    layer(x)
    assert seen == ["pre", "keywords"]
    assert "int4_g128" in repr(layer) and "in_features=128" in repr(layer)


def test_device_is_where_it_computes(device):
    """The result goes back to where the weight was."""
    module = quantize(small(a=linear), "NVFP4", device=device)
    assert module["a"].weight.device.type == "cpu" and weights(module)
    assert torch.equal(module["a"].weight.dequantize(), quantize(small(a=linear), "NVFP4")["a"].weight.dequantize())


@pytest.mark.parametrize("scheme", ["W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "MXFP4", "NVFP4"])
def test_inputs_are_quantized(scheme, device):
    """With a dense input the output would be too good; ranks and strides of inputs vary."""
    module = quantize(small(a=linear).to(device), scheme)
    layer, fmt = module["a"], tq.get_scheme(scheme).input_format
    for shape in ((3, 128), (128,), (2, 3, 128), (0, 128)):
        x = torch.randn(shape, device=device)
        given = {"tensor_scale": torch.ones(1, device=device)} if fmt.tensor_scale else {}
        inputs = tq.quantize(x, fmt, **given).dequantize()
        assert torch.equal(layer(x), nn.functional.linear(inputs, layer.weight.dequantize(), layer.bias))
        assert not x.numel() or not torch.equal(inputs, x)
    x = torch.randn(128, 5, device=device).T
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "NVFP4", "MXFP8", "FP8_BLOCK"])
def test_gradients_reach_adapters(scheme, device):
    """LoRA in front of frozen quantized layers: the same gradient as through their dequantized weights."""
    module = quantize(small(a=linear, b=linear).to(device), scheme)
    twin = small(a=linear, b=linear).to(device)
    for name in "ab":
        twin[name].load_state_dict({k: getattr(module[name], k) + 0 for k in ("weight", "bias")})
    grads = []
    for net in (module, twin):
        adapter = torch.eye(128, device=device).requires_grad_()
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).to(device) @ adapter
        for name in "ab":
            given = {"tensor_scale": torch.ones(1, device=device)} if scheme == "NVFP4" else {}
            inputs = tq.get_scheme(scheme).input_format
            x = net[name](x if net is module or inputs is None else tq.qdq(x, inputs, **given))
        x.square().sum().backward()
        grads.append((adapter.grad, net["b"].bias.grad))
        assert module["a"].weight.grad is None
    assert grads[0][0].any() and all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_grad_mode_does_not_change_the_output(device):
    """Adding the bias after the rounded product, in training only, is another result in half precision."""
    module = quantize(small(a=linear).to(device, torch.bfloat16))
    x = torch.randn(64, 128, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = module["a"](x)
    assert torch.equal(module["a"](x.clone().requires_grad_()), wanted)


def test_autocast(device):
    module, x = quantize(small(a=linear).to(device)), torch.randn(3, 128, device=device)
    with torch.autocast(device, torch.bfloat16):
        for y in (module["a"](x), module["a"](x.clone().requires_grad_())):
            assert y.dtype is torch.bfloat16 and torch.isfinite(y).all()


def test_state_dict_of_a_model_comes_back(built, device):
    """Through torch.save with weights_only, into a model built on the meta device."""
    import io

    model, file = quantize(built("qwen3moe", device=device), "NVFP4"), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = quantize(built("qwen3moe", device=device), "NVFP4").to("meta")
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    other.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    assert torch.equal(output(other.eval()), output(model)) and weights(other).keys() == weights(model).keys()


def test_attention_that_reads_its_weights_directly(device):
    """nn.MultiheadAttention never calls its out_proj; its fused path would read the wrapper's null pointer."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, device=device).eval()
    x = torch.randn(2, 5, 128, device=device)
    with torch.no_grad():
        before = encoder(x)
        assert 0 < (quantize(encoder, "W8A16")(x) - before).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3moe"])
def test_unpatched_accelerate(kind, built, device):
    """cpu_offload rebuilds parameters with type(p)(value, requires_grad=...) and keys ties by data_ptr()."""
    accelerate = pytest.importorskip("accelerate")
    model = quantize(built(kind, device=device), "W4A16")
    wanted = output(model)
    with torch.no_grad():
        offloaded = accelerate.cpu_offload(model.cpu(), torch.device(device))
        assert torch.equal(offloaded(tokens(device))[0].float(), wanted)
        assert all(p.device.type == "meta" for p in weights(offloaded).values()) and weights(offloaded)
        assert torch.equal(offloaded(tokens(device))[0].float(), wanted)
