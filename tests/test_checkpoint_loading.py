"""Exports of every scheme load through transformers and compressed-tensors as exactly what tritonq dequantizes to."""

import json

import models
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from tritonq.io.checkpoint import quantize_checkpoint
from tritonq.nn.schemes import get_scheme


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folders of tiny models, made once."""
    made = {}

    def get(kind, dtype=torch.bfloat16):
        if (kind, dtype) not in made:
            made[kind, dtype] = models.save(kind, tmp_path_factory.mktemp("source") / kind, dtype)
        return made[kind, dtype]

    return get


def loads(fmt, inputs, experts, dequantize):
    """Whether transformers 5.23 with compressed-tensors 0.20 reads a layout; experts are merged into one parameter."""
    integer = fmt.element.codec.offset_binary
    if fmt.zero_point:
        return dequantize and not experts
    if not experts:
        return True
    mxfp8 = fmt.scale.is_exponent and fmt.bits == 8
    int_quantized = integer and inputs is not None
    return not (fmt.tensor_scale or fmt.group[0] > 1 or mxfp8 or int_quantized)


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3moe"])
@pytest.mark.parametrize("scheme", models.EXPORTED)
def test_weights_load_exactly(scheme, kind, source, tmp_path):
    dense = models.tensors(source(kind))
    wanted = models.expected(dense, scheme)
    report = quantize_checkpoint(source(kind), tmp_path / "out", scheme, progress=False)
    assert report.quantized == sum(models.is_linear(name, tensor) for name, tensor in dense.items())
    assert models.worst(models.decompressed(tmp_path / "out"), wanted) == 0.0

    fmt, experts = get_scheme(scheme).weight_format(torch.bfloat16), kind == "qwen3moe"
    merged = models.fuse(wanted) if experts else wanted
    for dequantize in (False, True):
        if not loads(fmt, get_scheme(scheme).input_format, experts, dequantize):
            assert any("transformers" in note for note in report.notes)
            continue
        model = models.load(tmp_path / "out", dequantize)
        assert models.worst(model.state_dict(), merged) == 0.0
        with torch.no_grad():
            assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W2A16", "MXFP4", "NVFP4"])
def test_scales_of_the_rule_load_exactly(scheme, source, tmp_path):
    """Without the search that these schemes have by default."""
    wanted = models.expected(models.tensors(source("llama")), scheme, search=False)
    quantize_checkpoint(source("llama"), tmp_path / "out", scheme, search=False, progress=False)
    assert models.worst(models.decompressed(tmp_path / "out"), wanted) == 0.0


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8", "FP8_BLOCK", "MXFP4", "W4A16_ASYM"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_load_exactly(scheme, dtype, source, tmp_path):
    wanted = models.expected(models.tensors(source("llama", dtype)), scheme)
    report = quantize_checkpoint(source("llama", dtype), tmp_path / "out", scheme, progress=False)
    fmt = get_scheme(scheme).weight_format(dtype)
    for dequantize in (False, True):
        if loads(fmt, None, False, dequantize):
            assert models.worst(models.load(tmp_path / "out", dequantize).state_dict(), wanted) == 0.0
    assert fmt.scale.is_exponent == any("bfloat16" in note for note in report.notes)


def test_dtype_converts_first(source, tmp_path):
    dense = {name: tensor.to(torch.bfloat16) for name, tensor in models.tensors(source("llama", torch.float32)).items()}
    quantize_checkpoint(source("llama", torch.float32), tmp_path / "out", "W4A16", dtype=torch.bfloat16, progress=False)
    model = models.load(tmp_path / "out", dequantize=False)
    assert model.dtype is torch.bfloat16
    assert models.worst(model.state_dict(), models.expected(dense, "W4A16")) == 0.0


def test_config_dtype_follows_the_weights(source, tmp_path):
    folder = models.save("llama", tmp_path / "in", torch.float32)
    models.edit_config(folder, dtype="bfloat16")
    report = quantize_checkpoint(folder, tmp_path / "out", "W8A16", progress=False)
    assert any("float32" in note for note in report.notes)
    wanted = models.expected(models.tensors(folder), "W8A16")
    assert models.worst(models.load(tmp_path / "out", dequantize=False).state_dict(), wanted) == 0.0


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC", "MXFP4A16"])
def test_mixtral_names(scheme, source, tmp_path):
    wanted = models.fuse(models.expected(models.tensors(source("mixtral")), scheme))
    quantize_checkpoint(source("mixtral"), tmp_path / "out", scheme, progress=False)
    for dequantize in (False, True):
        assert models.worst(models.load(tmp_path / "out", dequantize).state_dict(), wanted) == 0.0


@pytest.mark.parametrize("scheme", ["W8A16", "FP8_DYNAMIC", "W4A16", "NVFP4A16"])
def test_encoder(scheme, source, tmp_path):
    wanted = models.expected(models.tensors(source("bert")), scheme)
    report = quantize_checkpoint(source("bert"), tmp_path / "out", scheme, progress=False)
    assert report.quantized == 13  # six a layer and the pooler
    for dequantize in (False, True):
        model = models.load(tmp_path / "out", dequantize, "AutoModel")
        assert models.worst(model.state_dict(), wanted) == 0.0


@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_group_size(group_size, tmp_path):
    folder = models.save("llama", tmp_path / "in", hidden_size=192, num_attention_heads=3, num_key_value_heads=3)
    wanted = models.expected(models.tensors(folder), "W3A16", group_size)
    quantize_checkpoint(folder, tmp_path / "out", "W3A16", group_size=group_size, progress=False)
    assert models.worst(models.load(tmp_path / "out", dequantize=False).state_dict(), wanted) == 0.0


@pytest.mark.parametrize("ignore", [["down_proj"], ["model.layers.1.mlp.gate_proj", r"re:.*layers\.0\.self_attn.*"]])
def test_ignored_layers_stay_dense(ignore, source, tmp_path):
    dense = models.tensors(source("llama"))
    quantize_checkpoint(source("llama"), tmp_path / "out", "W4A16", ignore=ignore, progress=False)
    listed = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in listed and len(listed) == (3 if len(ignore) == 1 else 6)
    wanted = models.expected(dense, "W4A16")
    wanted.update({f"{name}.weight": dense[f"{name}.weight"] for name in listed})
    for dequantize in (False, True):
        assert models.worst(models.load(tmp_path / "out", dequantize).state_dict(), wanted) == 0.0


def test_nvfp4_scales_are_shared_across_shards(source, tmp_path):
    sharded = tmp_path / "in"
    models.save("llama", sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 4
    quantize_checkpoint(sharded, tmp_path / "out", "NVFP4", max_shard_size="100KB", progress=False)
    placed, found = models.headers(tmp_path / "out"), models.tensors(tmp_path / "out")
    layer = "model.layers.0.self_attn"
    names = [f"{layer}.{leaf}_proj.weight_global_scale" for leaf in "qkv"]
    assert len({placed[name] for name in names}) > 1
    assert len({float(found[name]) for name in names}) == 1
    assert float(found[f"{layer}.o_proj.weight_global_scale"]) != float(found[names[0]])
    gate, up = (float(found[f"model.layers.0.mlp.{leaf}_proj.weight_global_scale"]) for leaf in ("gate", "up"))
    assert gate == up
    assert all(float(found[name]) == 1.0 for name in found if name.endswith("input_global_scale"))
    assert models.worst(models.decompressed(tmp_path / "out"), models.expected(models.tensors(sharded), "NVFP4")) == 0.0


def test_experts_share_a_tensor_wide_scale(source, tmp_path):
    quantize_checkpoint(source("qwen3moe"), tmp_path / "out", "FP8", progress=False)
    found = models.tensors(tmp_path / "out")
    scales = {name: float(scale) for name, scale in found.items() if name.endswith("proj.weight_scale")}
    per_layer = [
        scale for name, scale in scales.items() if ".layers.0.mlp.experts." in name and "down_proj" not in name
    ]
    assert len(per_layer) == 8 and len(set(per_layer)) == 1
    attention = {scale for name, scale in scales.items() if ".layers.0.self_attn." in name}
    assert len(attention) > 1


def fused(folder):
    """Experts of a checkpoint as the loaded model holds them."""
    models.write(folder, models.fuse(models.tensors(folder)))


@pytest.mark.parametrize("kind", ["qwen3moe", "mixtral"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8", "NVFP4A16"])
def test_fused_experts_are_split(scheme, kind, source, tmp_path):
    folder = models.save(kind, tmp_path / "in")
    quantize_checkpoint(folder, tmp_path / "apart", scheme, progress=False)
    fused(folder)
    assert any(tensor.ndim == 3 for tensor in models.tensors(folder).values())
    quantize_checkpoint(folder, tmp_path / "fused", scheme, progress=False)
    one, other = models.tensors(tmp_path / "apart"), models.tensors(tmp_path / "fused")
    renamed = {name.replace("block_sparse_moe.gate", "mlp.gate"): tensor for name, tensor in one.items()}
    assert {name.replace("block_sparse_moe.gate", "mlp.gate") for name in other} == renamed.keys()
    for name, tensor in other.items():
        assert torch.equal(
            tensor.view(torch.uint8), renamed[name.replace("block_sparse_moe.gate", "mlp.gate")].view(torch.uint8)
        )


def test_transposed_layers_stay_dense(source, tmp_path):
    with pytest.raises(ValueError, match="no linear layers"):
        quantize_checkpoint(source("gpt2"), tmp_path / "out", "W8A16", progress=False)
    report = quantize_checkpoint(source("gpt_oss"), tmp_path / "out", "W8A16", progress=False)
    assert report.quantized == 8  # attention; experts are [E, in, out]
    assert any("left dense" in note and "experts" in note for note in report.notes)
    wanted = models.tensors(source("gpt_oss"))
    model = models.load(tmp_path / "out", dequantize=False)
    assert models.worst(model.state_dict(), {name: wanted[name] for name in wanted if "experts" in name}) == 0.0


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_dense_experts(scheme, source, tmp_path):
    report = quantize_checkpoint(source("qwen3moe"), tmp_path / "out", scheme, ignore=["experts"], progress=False)
    assert report.quantized == 8
    packed = scheme == "W4A16"
    assert packed == any("dense experts" in note for note in report.notes)
    dense = models.tensors(source("qwen3moe"))
    wanted = {
        name: dense[name] if "experts" in name else value for name, value in models.expected(dense, scheme).items()
    }
    assert models.worst(models.decompressed(tmp_path / "out"), wanted) == 0.0
    if not packed:
        assert models.worst(models.load(tmp_path / "out", dequantize=False).state_dict(), models.fuse(wanted)) == 0.0


def test_without_a_known_architecture(source, tmp_path):
    folder = models.save("llama", tmp_path / "in")
    quantize_checkpoint(folder, tmp_path / "known", "W4A16", progress=False)
    models.edit_config(folder, model_type="never_heard_of", architectures=["NeverHeardOfForCausalLM"])
    report = quantize_checkpoint(folder, tmp_path / "unknown", "W4A16", progress=False)
    assert any("names and shapes" in note for note in report.notes)
    assert str(tmp_path) not in (tmp_path / "unknown/README.md").read_text()
    one, other = models.files(tmp_path / "known"), models.files(tmp_path / "unknown")
    assert one["model.safetensors"] == other["model.safetensors"]
    assert json.loads(other["config.json"])["quantization_config"]["ignore"] == ["lm_head"]


def test_without_transformers(source, tmp_path, monkeypatch):
    import sys

    folder = source("bert")  # building it takes transformers
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = quantize_checkpoint(folder, tmp_path / "out", "W8A16", progress=False)
    assert report.quantized == 13 and any("transformers is not installed" in note for note in report.notes)
