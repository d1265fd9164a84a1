"""Tiny random models of real architectures, and what an export of them has to load as."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tritonq import ops, reference
from tritonq.io import compressed_tensors
from tritonq.nn.schemes import SCHEMES, get_scheme
from tritonq.nn.select import Selection, sharing_key

EXPORTED = [name for name, scheme in SCHEMES.items() if compressed_tensors.holds(scheme)]  # those that files hold
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
}
MOE = {
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def build(kind: str, dtype: torch.dtype = torch.bfloat16, **overrides):
    """llama | llama_tied | qwen3moe | mixtral | bert | gpt2 | gpt_oss, with random weights, always the same ones."""
    import transformers as hf

    torch.manual_seed(0)
    tied = kind == "llama_tied"
    shape = {**SHAPE, **overrides}
    if kind in ("llama", "llama_tied"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, tie_word_embeddings=tied))
    elif kind == "qwen3moe":
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**SHAPE, **MOE, **overrides}, tie_word_embeddings=False))
    elif kind == "mixtral":
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2))
    elif kind == "gpt_oss":
        model = hf.GptOssForCausalLM(hf.GptOssConfig(**shape, num_local_experts=4, num_experts_per_tok=2))
    elif kind == "bert":
        small = {
            name: shape[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")
        }
        model = hf.BertModel(hf.BertConfig(**small, intermediate_size=512, max_position_embeddings=64))
    elif kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=128, n_embd=256, n_layer=1, n_head=4, n_positions=64))
    else:
        raise ValueError(kind)
    return model.to(dtype).eval()


def save(
    kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "1GB", **overrides
) -> Path:
    build(kind, dtype, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def write(folder: Path, content: dict[str, torch.Tensor]) -> None:
    """Replace the tensors of a single-file checkpoint."""
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Weights that every scheme quantizes in the models above (GPT-2 and gpt_oss apart)."""
    module = name.removesuffix(".weight")
    if not name.endswith(".weight") or tensor.ndim != 2 or "embeddings." in name:
        return False
    return not Selection().ignores(module)


def expected(
    source: dict[str, torch.Tensor], scheme: str, group_size: int | None = None, search: str | bool | None = None
) -> dict[str, torch.Tensor]:
    """Dequantized weights by checkpoint name, from the torch reference; tensor-wide scales over all that share them.
    Where `search` (None: the scheme's default) asks for it, under the scales that a search of each weight finds."""
    search = get_scheme(scheme).search(search)
    members: dict[str, list[torch.Tensor]] = collections.defaultdict(list)
    formats = {}
    for name, tensor in source.items():
        if is_linear(name, tensor):
            fmt = formats[name] = get_scheme(scheme).weight_format(tensor.dtype, group_size)
            if key := sharing_key(name.removesuffix(".weight"), fmt):
                members[key].append(tensor.reshape(-1))
    shared = {}
    result = dict(source)
    for name, fmt in formats.items():
        key, given = sharing_key(name.removesuffix(".weight"), fmt), {}
        if key is not None:
            if key not in shared:
                whole = reference.quantize(torch.cat(members[key]), fmt)
                kept = ("tensor_scale",) if fmt.tensor_scale else ("scale",)
                shared[key] = {part: whole[part] for part in kept}
            given = shared[key]
        if search and "scale" not in given:
            found = ops.quantize(source[name], fmt, **given, search=search)
            given = {part: tensor for part, tensor in found.items() if part != "qdata"}
        parts = reference.quantize(source[name], fmt, **given)
        result[name] = reference.dequantize(parts, fmt, tuple(source[name].shape), source[name].dtype)
    return result


def fuse(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint names to those of a loaded mixture of experts."""
    result, experts = {}, collections.defaultdict(lambda: collections.defaultdict(dict))
    for name, tensor in state.items():
        name = name.replace("block_sparse_moe", "mlp")
        head, found, tail = name.partition(".experts.")
        if not found or not tail[0].isdigit():
            result[name] = tensor
            continue
        number, leaf, _ = tail.split(".")
        leaf = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
        experts[head + ".experts"][leaf][int(number)] = tensor
    for name, leaves in experts.items():
        order = sorted(leaves["down_proj"])
        result[f"{name}.down_proj"] = torch.stack([leaves["down_proj"][i] for i in order])
        both = [torch.cat([leaves["gate_proj"][i], leaves["up_proj"][i]]) for i in order]
        result[f"{name}.gate_up_proj"] = torch.stack(both)
    return result


def decompressed(folder: Path) -> dict[str, torch.Tensor]:
    """Dense tensors of an export, by the compressor classes of compressed-tensors, module by module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    modules: dict[str, dict[str, torch.Tensor]] = collections.defaultdict(dict)
    found = tensors(folder)
    for name, tensor in found.items():
        module, _, leaf = name.rpartition(".")
        modules[module][leaf] = tensor
    result = {}
    for module, state in modules.items():
        if "weight_scale" in state:
            state.pop("input_global_scale", None)
            bias = state.pop("bias", None)
            result[f"{module}.weight"] = compressor.decompress(dict(state), scheme)["weight"]
            state = {} if bias is None else {"bias": bias}
        result.update({f"{module}.{leaf}" if module else leaf: tensor for leaf, tensor in state.items()})
    return result


def load(folder: Path, dequantize: bool, auto: str = "AutoModelForCausalLM"):
    """The export through transformers, with dense weights: decompressed after, or dequantized while loading."""
    import transformers as hf

    options = {"quantization_config": hf.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = getattr(hf, auto).from_pretrained(folder, **options)
    if not dequantize:
        model.hf_quantizer.compressor.decompress_model(model)
    return model.eval()


def worst(state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference over all wanted tensors; every one has to be there, in its shape."""
    assert not wanted.keys() - state.keys(), sorted(wanted.keys() - state.keys())
    assert all(state[name].shape == wanted[name].shape for name in wanted)
    return max(float((state[name].float() - wanted[name].float()).abs().max()) for name in wanted)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def headers(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the files themselves."""
    placed = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            placed.update(dict.fromkeys(handle.keys(), path.name))
    return placed
