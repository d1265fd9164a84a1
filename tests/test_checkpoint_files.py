"""The files of an export: layout on disk, determinism, resuming, memory, what comes along."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from tritonq.formats import get_format
from tritonq.io import compressed_tensors, writer
from tritonq.io.checkpoint import quantize_checkpoint
from tritonq.nn.schemes import Scheme, get_scheme

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return models.save("llama", tmp_path_factory.mktemp("source") / "llama")


# ---------------------------------------------------------------------------------------------------------- layout


def random_parts(fmt, shape, seed=0):
    from tritonq import ops

    generator = torch.Generator().manual_seed(seed)
    return ops.quantize(torch.randn(shape, generator=generator).to(torch.bfloat16), fmt)


@pytest.mark.parametrize("shape", [(5, 96), (33, 128), (64, 384)])
@pytest.mark.parametrize(
    "name", ["int2_g32", "int3_g32", "int4_g32", "int5_g32", "int8_g32", "int3_channel", "int8_channel",
             "int4_g32_asym", "int3_g32_asym"]
)  # fmt: skip
def test_packed_integers_are_what_compressed_tensors_packs(name, shape):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    from tritonq.codecs import pack

    fmt = get_format(name)
    parts = random_parts(fmt, shape)
    codes = pack.unpack(parts["qdata"].view(torch.uint8), fmt.bits, shape[1]) ^ fmt.sign_flip
    made = compressed_tensors.encode({k: v.clone() for k, v in parts.items()}, fmt, None, shape)
    offset = 1 << (fmt.bits - 1)
    unpacked = unpack_from_int32(made["weight_packed"], fmt.bits, torch.Size(shape))
    assert torch.equal(unpacked.int(), codes.int() - offset)
    assert made["weight_shape"].tolist() == list(shape)
    if fmt.zero_point:
        zero = unpack_from_int32(made["weight_zero_point"], fmt.bits, parts["zero_point"].shape, packed_dim=0)
        assert torch.equal(zero.int(), parts["zero_point"].int() - offset)


@pytest.mark.parametrize("scheme", models.EXPORTED)
@pytest.mark.parametrize("shape", [(256, 384), (130, 256)])
def test_specs_describe_what_encode_makes(scheme, shape):
    scheme = get_scheme(scheme)
    fmt = scheme.weight_format(torch.float16)
    made = compressed_tensors.encode(random_parts(fmt, shape), fmt, scheme.input_format, shape)
    wanted = compressed_tensors.specs(fmt, scheme.input_format, shape)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()} == wanted


@pytest.mark.parametrize(
    "name",
    [
        "mxfp6_e3m2",
        "fp8_e5m2_channel",
        "e3m4_g48",
        "int4_tensor",
        "fp8_e4m3_g128",
        "int4_g128_e8m0_floor",
        "mxfp8_e5m2",
    ],
)
def test_formats_without_a_layout_are_refused(name, llama, tmp_path):
    with pytest.raises(ValueError, match=f"no layout for {name}"):
        quantize_checkpoint(llama, tmp_path / "out", Scheme("MINE", name, None, False), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_scheme_of_ones_own(llama, tmp_path):
    pytest.importorskip("compressed_tensors")
    for mine in (Scheme("W6A16", "int6_g64"), Scheme("W4A8", "int4_g64", "int8_channel_f32_absmax")):
        quantize_checkpoint(llama, tmp_path / mine.name, mine, progress=False)
        wanted = models.expected(models.tensors(llama), mine)
        assert models.worst(models.decompressed(tmp_path / mine.name), wanted) == 0.0
        assert models.worst(models.load(tmp_path / mine.name, dequantize=False).state_dict(), wanted) == 0.0


def test_writer_is_read_back_by_safetensors(tmp_path):
    content = {
        "odd": torch.arange(7, dtype=torch.uint8), "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "half": torch.randn(3, 5).half(), "words": torch.arange(6, dtype=torch.int64).view(2, 3),
        "flag": torch.tensor([True, False]),
        "eight": torch.randn(9).to(torch.float8_e4m3fn), "layer.10": torch.ones(3, 3).t()[1:],
        "layer.2": torch.randn(5).bfloat16(),
    }  # fmt: skip
    entries = [writer.Entry(k, {k: (tuple(v.shape), v.dtype)}, lambda k=k, v=v: {k: v}) for k, v in content.items()]
    writer.write_file(tmp_path / "a.safetensors", entries)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == content.keys()
    for name, tensor in content.items():
        assert read[name].dtype is tensor.dtype and torch.equal(read[name].float(), tensor.float())


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("256MiB", 1 << 28), (1000, 1000), ("1.5 kb", 1500), ("10", 10)]
)
def test_sizes(text, size):
    assert writer.parse_size(text) == size


@pytest.mark.parametrize("limit", ["64KB", "150KB", "1MB"])
def test_shards(limit, llama, tmp_path):
    quantize_checkpoint(llama, tmp_path / "whole", "W4A16", progress=False)
    quantize_checkpoint(llama, tmp_path / "parts", "W4A16", max_shard_size=limit, progress=False)
    placed = models.headers(tmp_path / "parts")
    if limit == "1MB":
        assert (
            set(placed.values()) == {"model.safetensors"}
            and not (tmp_path / "parts/model.safetensors.index.json").exists()
        )
    else:
        index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
        assert index["weight_map"] == placed
        assert re.fullmatch(r"model-00001-of-000\d\d\.safetensors", min(placed.values()))
        assert index["metadata"]["total_size"] == sum(
            t.numel() * t.element_size() for t in models.tensors(tmp_path / "parts").values()
        )
    one, other = models.tensors(tmp_path / "whole"), models.tensors(tmp_path / "parts")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------- determinism and resuming


def test_bytes_do_not_depend_on_the_run_or_on_source_shards(tmp_path):
    one = models.save("qwen3moe", tmp_path / "a" / "model")
    many = models.save("qwen3moe", tmp_path / "b" / "model", max_shard_size="300KB")
    for scheme in ("W4A16", "NVFP4"):
        outs = [tmp_path / f"{scheme}-{i}" for i in range(3)]
        for source, out in zip((one, one, many), outs, strict=True):
            quantize_checkpoint(source, out, scheme, max_shard_size="200KB", progress=False)
        assert models.files(outs[0]) == models.files(outs[1]) == models.files(outs[2])


RUN = """
import sys
import torch
torch.set_num_threads(1)
from tritonq.io import checkpoint, writer
original = writer.write_file
count = 0
def slow(path, entries, done=None):
    global count
    count += 1
    if count == 3:
        original(path, entries[:1], done)  # half a file
        print("third", flush=True)
        import time; time.sleep(60)
    return original(path, entries, done)
if sys.argv[3] == "slow":
    writer.write_file = slow
checkpoint.quantize_checkpoint(sys.argv[1], sys.argv[2], "NVFP4", max_shard_size="100KB", progress=False)
"""


def spawn(*arguments, code=RUN):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=env
    )


def test_a_killed_run_resumes_to_the_same_bytes(llama, tmp_path, monkeypatch):
    quantize_checkpoint(llama, tmp_path / "whole", "NVFP4", max_shard_size="100KB", progress=False)
    out = tmp_path / "out"
    process = spawn(llama, out, "slow")
    assert process.stdout.readline() == "third\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    partial = tmp_path / ".out.tritonq-partial"
    assert len(list(partial.glob("*.safetensors"))) == 3

    damaged = min(partial.glob("*.safetensors"))  # a finished file that changed since is written again
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    written = []
    original = writer.write_file
    monkeypatch.setattr(writer, "write_file", lambda path, *rest: (written.append(path.name), original(path, *rest))[1])
    quantize_checkpoint(llama, out, "NVFP4", max_shard_size="100KB", progress=False)
    assert models.files(out) == models.files(tmp_path / "whole")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert written == [shards[0], *shards[2:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_other_options_restart(llama, tmp_path):
    out = tmp_path / "out"
    process = spawn(llama, out, "slow")
    process.stdout.readline()
    process.kill()
    process.wait()
    quantize_checkpoint(llama, out, "W8A16", max_shard_size="100KB", progress=False)
    quantize_checkpoint(llama, tmp_path / "whole", "W8A16", max_shard_size="100KB", progress=False)
    assert models.files(out) == models.files(tmp_path / "whole")


def test_force_replaces_at_the_end_only(llama, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(llama, out, "W4A16", max_shard_size="100KB", progress=False)
    before = models.files(out)
    process = spawn_force(llama, out)
    assert process.stdout.readline() == "second\n"
    process.kill()
    process.wait()
    assert models.files(out) == before
    quantize_checkpoint(llama, out, "W8A16", force=True, progress=False)
    assert (out / "model.safetensors").exists() and not list(out.glob("model-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def spawn_force(*arguments):
    code = (
        RUN.replace("count == 3", "count == 2")
        .replace("third", "second")
        .replace("progress=False", "progress=False, force=True")
    )
    return spawn(*arguments, "slow", code=code)


def test_killed_between_the_renames_of_force(llama, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(llama, out, "W4A16", progress=False)
    before = models.files(out)
    out.rename(tmp_path / ".out.tritonq-old")
    with pytest.raises(FileExistsError):
        quantize_checkpoint(llama, out, "W8A16", progress=False)
    assert models.files(out) == before


# ---------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import re, sys, threading, time
import torch
torch.set_num_threads(1)
import tritonq.io.checkpoint as checkpoint
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
try:
    checkpoint.quantize_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], max_shard_size=sys.argv[4], progress=False)
finally:
    stop = True
thread.join()
print(peak // 1024)
"""


def big_checkpoint(folder, layers, width, shard):
    """A Llama of square bf16 layers and a wide embedding, `shard` layers a file; written without transformers."""
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=width, hidden_size=width, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64, head_dim=64, tie_word_embeddings=True, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    leaves = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    weight = torch.randn(width, width).mul_(0.02).bfloat16()
    ones = torch.ones(width).bfloat16()
    weight_map = {}
    for first in range(0, layers, shard):
        content = {"model.embed_tokens.weight": weight, "model.norm.weight": ones.clone()} if first == 0 else {}
        for layer in range(first, min(layers, first + shard)):
            content.update({f"model.layers.{layer}.{leaf}.weight": weight.clone() for leaf in leaves})
            content.update(
                {
                    f"model.layers.{layer}.{n}.weight": ones.clone()
                    for n in ("input_layernorm", "post_attention_layernorm")
                }
            )
        file = f"model-{first:05d}.safetensors"
        save_file(content, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(content, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4"])
def test_memory_does_not_grow_with_the_checkpoint(scheme, tmp_path):
    peaks = {}
    for layers in (1, 6):
        folder = tmp_path / str(layers)
        folder.mkdir()
        big_checkpoint(folder, layers, width=1024, shard=4)  # 2 MiB a weight, 84 MiB in all
        process = spawn(folder, tmp_path / f"out-{layers}", scheme, "32MB", code=MEASURE)
        peaks[layers] = int(process.communicate()[0])
    assert peaks[6] < 500 and peaks[6] - peaks[1] < 30, peaks


# ------------------------------------------------------------------------------------------------ what comes along


def test_companions_config_and_card(tmp_path):
    folder = models.save("llama", tmp_path / "tiny-llama")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "merges.txt").write_text("a b")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01")
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Dense\n")
    (folder / "pytorch_model.bin").write_bytes(b"no")
    (folder / ".hidden").write_text("no")
    report = quantize_checkpoint(folder, tmp_path / "out", "W4A16", progress=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt", "tokenizer.model", "LICENSE",
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    text = (tmp_path / "out/README.md").read_text()
    assert (
        "base_model: tiny-llama" in text and "license: apache-2.0" in text and "vllm serve" in text and "q_proj" in text
    )
    assert str(tmp_path) not in text
    config = json.loads((tmp_path / "out/config.json").read_text())
    dense = json.loads((folder / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == dense

    content = json.loads(json.dumps(report.to_dict()))
    assert content["quantized"] == 14 and content["dense"] == 7 and 4.1 < content["bits_per_weight"] < 4.2
    assert content["bytes_after"] == sum(
        t.numel() * t.element_size() for t in models.tensors(tmp_path / "out").values()
    )
    assert 18 < content["layers"]["model.layers.0.mlp.up_proj"]["sqnr_db"] < 22 and content["seconds"] > 0


def test_errors_in_the_report_are_those_of_the_weights(llama, tmp_path):
    dense = models.tensors(llama)
    for scheme in ("W4A16_ASYM", "FP8_BLOCK", "FP8", "NVFP4"):
        report = quantize_checkpoint(llama, tmp_path / scheme, scheme, progress=False)
        wanted = models.expected(dense, scheme)
        for name, error in report.layers.items():
            x, y = dense[f"{name}.weight"].double(), wanted[f"{name}.weight"].double()
            assert error.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)


def test_sentence_transformers_modules_come_along(tmp_path):
    folder = models.save("bert", tmp_path / "in")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../outside"}]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    quantize_checkpoint(folder, tmp_path / "out", "W8A16", progress=False)
    assert (tmp_path / "out/1_Pooling/config.json").exists()


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path)
    quantize_checkpoint(path, tmp_path / "out", "W8A16", progress=False)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "tiny.gguf"]
    model = models.load(tmp_path / "out", dequantize=False)
    assert model.config.hidden_size == 64 and model.dtype is torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) >= 8


def write_gguf(gguf, path):
    """A Llama of one layer, in F32, with a vocabulary of single letters."""
    hidden, rows, vocab = 64, 128, 32
    out = gguf.GGUFWriter(str(path), "llama")
    (
        out.add_block_count(1),
        out.add_context_length(64),
        out.add_embedding_length(hidden),
        out.add_feed_forward_length(rows),
    )
    out.add_head_count(2), out.add_head_count_kv(2), out.add_layer_norm_rms_eps(1e-5), out.add_vocab_size(vocab)
    out.add_rope_dimension_count(32)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "▁", ".", ","]
    (
        out.add_tokenizer_model("llama"),
        out.add_token_list(tokens),
        out.add_token_scores([-float(i) for i in range(vocab)]),
    )
    (
        out.add_token_types([2, 3, 3] + [1] * (vocab - 3)),
        out.add_bos_token_id(1),
        out.add_eos_token_id(2),
        out.add_unk_token_id(0),
    )
    torch.manual_seed(0)
    shapes = {
        "token_embd": (vocab, hidden),
        "output": (vocab, hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
    }
    shapes |= {"blk.0.ffn_norm": (hidden,), "blk.0.ffn_down": (hidden, rows)}
    shapes |= {f"blk.0.attn_{x}": (hidden, hidden) for x in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{x}": (rows, hidden) for x in ("gate", "up")}
    for name, shape in shapes.items():
        out.add_tensor(f"{name}.weight", torch.randn(shape).mul_(0.1).numpy())
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()


def test_hub_id(llama, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fake(repo, allow_patterns):
        asked[repo] = allow_patterns
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    quantize_checkpoint("someone/some-model", tmp_path / "out", "W4A16", progress=False)
    assert "*.safetensors" in asked["someone/some-model"] and "*.bin" not in asked["someone/some-model"]
    assert "base_model: someone/some-model" in (tmp_path / "out/README.md").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", models.EXPORTED)
def test_bytes_do_not_depend_on_the_device(scheme, tmp_path):
    folder = models.save("qwen3moe", tmp_path / "in")
    for device in ("cpu", "cuda"):
        quantize_checkpoint(folder, tmp_path / device, scheme, device=device, progress=False)
    one, other = models.files(tmp_path / "cpu"), models.files(tmp_path / "cuda")
    assert one["model.safetensors"] == other["model.safetensors"] and one["config.json"] == other["config.json"]
