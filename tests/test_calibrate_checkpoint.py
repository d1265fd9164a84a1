"""Calibration file to file: what is decided arrives in files that transformers loads, a run that was killed goes on to
the same bytes, and no more than one block has values at a time."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import models
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import tritonq as tq
from tritonq import ops
from tritonq.calibrate import checkpoint
from tritonq.io import writer
from tritonq.io.checkpoint import quantize_checkpoint
from tritonq.nn.schemes import Scheme

ROOT = Path(__file__).parents[1]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SCHEMES = {"W4A16": Scheme("W4A16", "int4_g32"), "FP8": "FP8", "W8A16": "W8A16", "NVFP4": "NVFP4"}


def ids(rows=4, tokens=12):
    return torch.randint(0, 128, (rows, tokens), generator=torch.Generator().manual_seed(0))


def calibration(method, **options):
    return tq.Calibration(**{"data": ids(), "method": method, "samples": 4, "seqlen": 12, "batch": 2, **options})


def quantize(source, out, scheme, method, device="cpu", search=False, **options):
    """Without the search of scales, which takes most of the time, unless `search` is None."""
    keys = ("ignore", "force", "max_shard_size", "dtype")
    own = {key: options.pop(key) for key in keys if key in options}
    return quantize_checkpoint(
        source, out, SCHEMES[scheme], progress=False, device=device, search=search,
        calibration=calibration(method, **options), **own,
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folders of tiny models, made once."""
    made = {}

    def get(kind, **shape):
        key = kind, *sorted(shape.items())
        if key not in made:
            small = {} if kind == "bert" else {**SMALL, "moe_intermediate_size": 64} if kind == "qwen3moe" else SMALL
            made[key] = models.save(kind, tmp_path_factory.mktemp("source") / kind, **small, **shape)
        return made[key]

    return get


class Rule:
    """Decides that some layers take the scale rule of the format and not the search: the result is known."""

    name = "rule"

    def __init__(self, *leaves):
        self.leaves = leaves

    def run(self, task):
        for layer in task.layers:
            assert not layer.weight.is_meta
            if layer.name.rpartition(".")[2] in self.leaves:
                layer.result = ops.quantize(layer.weight.detach(), layer.fmt)


@pytest.mark.parametrize(
    ("kind", "leaves"), [("llama", ("up_proj", "q_proj")), ("qwen3moe", ("gate_up_proj",)), ("mixtral", ("down_proj",))]
)
def test_what_was_decided_arrives(kind, leaves, source, tmp_path):
    """The files load as the weights that the method chose, in transformers without tritonq; others are rounded to
    nearest."""
    dense = models.tensors(source(kind))
    report = quantize(source(kind), tmp_path / "out", "W4A16", Rule(*leaves), search=None)
    chosen = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj", "w2")}
    named = {leaf for group in leaves for leaf in chosen.get(group, (group,))}
    wanted, other = (models.expected(dense, SCHEMES["W4A16"], search=search) for search in (None, False))
    for name in wanted:
        if name.split(".")[-2] in named:
            assert not torch.equal(wanted[name], other[name])
            wanted[name] = other[name]
    assert models.worst(models.decompressed(tmp_path / "out"), wanted) == 0.0
    model = models.load(tmp_path / "out", dequantize=False)
    assert models.worst(model.state_dict(), models.fuse(wanted)) == 0.0
    assert report.quantized == sum(models.is_linear(name, tensor) for name, tensor in dense.items())
    for name, error in report.layers.items():
        x, y = dense[f"{name}.weight"].double(), wanted[f"{name}.weight"].double()
        assert error.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    assert "Calibrated with rule on 4 samples" in (tmp_path / "out/README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("kind", "scheme"), [("llama", "W4A16"), ("qwen3moe", "NVFP4"), ("bert", "W8A16")])
def test_same_bytes_as_in_memory(kind, scheme, source, tmp_path, device):
    method = ["signround"] if device == "cuda" else [Rule("q_proj", "query", "down_proj")]
    report = quantize(source(kind), tmp_path / "file", scheme, method, device, iters=1, max_shard_size="100KB")
    import transformers

    auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(source(kind), dtype="auto").to(device)
    own = calibration(method, iters=1)
    tq.quantize_(model, SCHEMES[scheme], calibration=own, search=False, progress=False)
    tq.save_pretrained(model, tmp_path / "memory", max_shard_size="100KB")
    one, other = models.tensors(tmp_path / "file"), models.tensors(tmp_path / "memory")
    assert one.keys() == other.keys()
    assert [
        n for n in one if not torch.equal(one[n].reshape(-1).view(torch.uint8), other[n].reshape(-1).view(torch.uint8))
    ] == []
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("file", "memory")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    # Blocks got the same inputs: embeddings, and buffers that no checkpoint holds.
    assert [(row["name"], row["loss_before"]) for row in report.calibration["blocks"]] == [
        (row.name, row.loss_before) for row in own.result.blocks
    ]


class Scaled:
    """Doubles what a norm puts out and halves the weights that read it: powers of two, so nothing is rounded."""

    name = "scaled"

    @torch.no_grad()
    def run(self, task):
        task.block.input_layernorm.weight.mul_(2)
        for layer in task.layers:
            if layer.name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj"):
                layer.weight.div_(2)


def test_changed_dense_tensors_arrive(source, tmp_path):
    """Norms that AWQ and SmoothQuant change are written as they became, also by a run that goes on."""
    changed = models.tensors(source("llama"))
    for name in changed:
        leaf = name.split(".")[-2]
        factor = {"input_layernorm": 2.0, "q_proj": 0.5, "k_proj": 0.5, "v_proj": 0.5}.get(leaf, 1.0)
        changed[name] = changed[name] * factor
    wanted = models.expected(changed, SCHEMES["W4A16"], search=False)
    report = quantize(source("llama"), tmp_path / "out", "W4A16", Scaled())
    assert models.worst(models.decompressed(tmp_path / "out"), wanted) == 0.0
    x, y = (t["model.layers.0.self_attn.q_proj.weight"].double() for t in (changed, wanted))
    error = report.layers["model.layers.0.self_attn.q_proj"]  # of the weight that was rounded
    assert error.relative == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    assert models.tensors(source("llama")).keys() == changed.keys()


class Static:
    """Gives inputs of linear layers a static scale, a quarter."""

    name = "static"

    def run(self, task):
        for layer in task.layers:
            layer.inputs = {"scale": torch.tensor([0.25])} if layer.input_format else {}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_static_scales_arrive(kind, source, tmp_path):
    """In the files, in what readers are told, and in the reader; layers in no block keep scales of each call."""
    quantize(source(kind), tmp_path / "out", "FP8", Static())
    found = models.tensors(tmp_path / "out")
    scales = {name: tensor for name, tensor in found.items() if name.endswith("input_scale")}
    quantized = [name for name in found if name.endswith("weight_scale")]
    assert len(scales) == len(quantized) - (kind == "bert") > 0
    assert all(tensor.tolist() == [0.25] for tensor in scales.values())
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["input_activations"]["dynamic"] is False and ("group_1" in groups) == (kind == "bert")
    model = models.load(tmp_path / "out", False, "AutoModel" if kind == "bert" else "AutoModelForCausalLM")
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    assert len(layers) == len(quantized)
    for name, module in layers.items():
        outside = name == "pooler.dense"
        assert module.quantization_scheme.input_activations.dynamic is outside
        assert outside or module.input_scale.tolist() == [0.25]
    assert "static scales" in (tmp_path / "out/README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- resuming

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_calibrate_checkpoint as test
from tritonq.calibrate import checkpoint
from tritonq.io import writer
original, block = checkpoint.Files.keep, int(sys.argv[5])
def keep(self, index, *rest):
    if index == block and sys.argv[6] == "within":
        write = writer.write_file
        def half(path, entries):
            write(path, entries[:1])
            os.kill(os.getpid(), signal.SIGKILL)
        writer.write_file = half
    original(self, index, *rest)
    if index == block:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Files.keep = keep
test.quantize(sys.argv[2], sys.argv[3], sys.argv[4], [test.Scaled(), test.Rule("q_proj", "down_proj")])
"""


def killed(source, out, scheme, block, where):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    arguments = [ROOT / "tests", source, out, scheme, block, where]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, arguments)], env=environment, capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()[-2000:]


@pytest.fixture
def decided(monkeypatch):
    """Numbers of the blocks that were tuned in this process."""
    found, original = [], checkpoint.Files.keep
    monkeypatch.setattr(
        checkpoint.Files, "keep", lambda self, index, *rest: (found.append(index), original(self, index, *rest))[1]
    )
    return found


@pytest.mark.parametrize(
    ("kind", "scheme", "block", "where"), [("llama", "W4A16", 1, "after"), ("qwen3moe", "NVFP4", 1, "within")]
)
def test_a_killed_run_goes_on_to_the_same_bytes(kind, scheme, block, where, source, tmp_path, decided):
    folder, out = source(kind, num_hidden_layers=3), tmp_path / "out"
    killed(folder, out, scheme, block, where)
    assert not out.exists() and (tmp_path / ".out.tritonq-work").is_dir()
    report = quantize(folder, out, scheme, [Scaled(), Rule("q_proj", "down_proj")])
    assert decided == ([2] if where == "after" else [1, 2])
    losses = [(row["name"], row["loss_before"], row["loss_after"]) for row in report.calibration["blocks"]]
    decided.clear()
    whole = quantize(folder, tmp_path / "whole", scheme, [Scaled(), Rule("q_proj", "down_proj")])
    assert decided == [0, 1, 2] and models.files(out) == models.files(tmp_path / "whole")
    assert losses == [(row["name"], row["loss_before"], row["loss_after"]) for row in whole.calibration["blocks"]]
    assert report.layers == whole.layers
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


class Stop(Exception):
    pass


def stopped(monkeypatch, source, out, *arguments, after=0, **options):
    """A run that ends with an exception once a block is written, which keeps what is there as a kill does."""
    original = checkpoint.Files.keep

    def keep(self, index, *rest):
        original(self, index, *rest)
        if index == after:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint.Files, "keep", keep)
        quantize(source, out, *arguments, **options)
    assert not out.exists() and (out.parent / ".out.tritonq-work").is_dir()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"data": ids(4, 10)}, {"method": [Rule("k_proj"), Scaled()]}, {"scheme": "W8A16"}, {"samples": 3}],
)
def test_other_options_start_afresh(change, source, tmp_path, decided, monkeypatch):
    options = {"scheme": "W4A16", "method": [Rule("q_proj")]}
    stopped(monkeypatch, source("llama"), tmp_path / "out", **options)
    decided.clear()
    quantize(source("llama"), tmp_path / "out", **{**options, **change})
    assert decided == [0, 1]


def test_the_same_options_go_on_and_damaged_files_do_not_count(source, tmp_path, decided, monkeypatch):
    for damage in (False, True):
        stopped(monkeypatch, source("llama"), tmp_path / "out", "W4A16", [Scaled()])
        if damage:
            path = tmp_path / ".out.tritonq-work/block-00000.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        decided.clear()
        quantize(source("llama"), tmp_path / "out", "W4A16", [Scaled()])
        assert decided == ([0, 1] if damage else [1])
        found = models.files(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        quantize(source("llama"), tmp_path / "out", "W4A16", [Scaled()])
        assert models.files(tmp_path / "out") == found
        shutil.rmtree(tmp_path / "out")


def test_killed_while_writing(source, tmp_path, decided, monkeypatch):
    """All blocks are done: the model is not run again."""
    original = writer.write_file

    def fail(path, *rest):
        if path.name.startswith("model"):
            raise Stop
        return original(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(writer, "write_file", fail)
        quantize(source("llama"), tmp_path / "out", "W4A16", "rtn")
    decided.clear()
    monkeypatch.setattr(tq.Calibration, "quantize", None)
    report = quantize(source("llama"), tmp_path / "out", "W4A16", "rtn")
    assert not decided and [row["name"] for row in report.calibration["blocks"]] == ["model.layers.0", "model.layers.1"]
    wanted = models.expected(models.tensors(source("llama")), SCHEMES["W4A16"], search=False)
    assert models.worst(models.decompressed(tmp_path / "out"), wanted) == 0.0


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("chosen", [None, ["model.layers.1", "model.layers.3"]])
@pytest.mark.parametrize("kind", ["llama_tied", "qwen3moe"])
def test_one_block_has_values_at_a_time(kind, chosen, source, tmp_path, monkeypatch):
    """Or two, where others come before the blocks that were chosen and are run for what those get; and a head of its
    own has values in the one call that finds out what is called."""
    most, heads = 0, 0
    original = checkpoint.Origins.read

    def read(self, name, device):
        nonlocal most, heads
        result = original(self, name, device)
        filled = [
            index for index, block in enumerate(self.model.model.layers)
            if any(not p.is_meta for p in block.parameters()) or name.startswith(f"model.layers.{index}.")
        ]  # fmt: skip
        most, heads = max(most, len(filled)), heads + (name == "lm_head.weight")
        tied = self.model.lm_head.weight is self.model.model.embed_tokens.weight
        assert tied == (kind == "llama_tied") and (tied or self.model.lm_head.weight.is_meta)
        return result

    monkeypatch.setattr(checkpoint.Origins, "read", read)
    report = quantize(source(kind, num_hidden_layers=4), tmp_path / "out", "W4A16", Rule("q_proj"), blocks=chosen)
    assert most == (2 if chosen else 1) and heads == (kind != "llama_tied")
    assert [row["name"] for row in report.calibration["blocks"]] == (
        chosen or [f"model.layers.{index}" for index in range(4)]
    )


@pytest.mark.parametrize(("kind", "copied"), [("llama", False), ("llama_tied", True)])
def test_large_embeddings_are_looked_up_in_the_file(kind, copied, source, tmp_path, monkeypatch, device):
    """They take no memory of the device, and all comes out as with a copy; a table that is the head's, too, is one."""
    names, original = [], checkpoint.Origins.read
    monkeypatch.setattr(
        checkpoint.Origins, "read", lambda self, name, device: (names.append(name), original(self, name, device))[1]
    )
    table, reports = "model.embed_tokens.weight", []
    for limit in (1 << 40, 0):
        names.clear()
        monkeypatch.setattr(checkpoint, "LARGE", limit)
        reports.append(quantize(source(kind), tmp_path / f"out-{limit}", "W4A16", Rule("q_proj"), device))
        assert (table in names) is (copied or limit > 0)
    assert models.files(tmp_path / "out-0") == models.files(tmp_path / f"out-{1 << 40}")
    one, other = ([(row["loss_before"], row["loss_after"]) for row in r.calibration["blocks"]] for r in reports)
    assert one == other


def test_large_embeddings_in_another_dtype_are_copied(source, tmp_path, monkeypatch):
    names, original = [], checkpoint.Origins.read
    monkeypatch.setattr(
        checkpoint.Origins, "read", lambda self, name, device: (names.append(name), original(self, name, device))[1]
    )
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    quantize(source("llama"), tmp_path / "out", "W4A16", Rule("q_proj"), dtype=torch.float16)
    assert "model.embed_tokens.weight" in names


def test_large_embeddings_that_are_not_finite(source, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    folder = Path(shutil.copytree(source("llama"), tmp_path / "in"))
    content = models.tensors(folder)
    content["model.embed_tokens.weight"][3, 5] = torch.nan
    models.write(folder, content)
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight holds 1 elements that are NaN"):
        quantize(folder, tmp_path / "out", "W4A16", Rule("q_proj"))


MEASURE = """
import re, sys, threading, time
import torch
torch.set_num_threads(1)
from pathlib import Path
import tritonq as tq
import test_checkpoint_files as files
from tritonq.io.checkpoint import quantize_checkpoint
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
data = torch.randint(0, 1024, (2, 16))
for layers in (2, 8):
    folder = Path(sys.argv[1]) / str(layers)
    folder.mkdir()
    files.big_checkpoint(folder, layers, width=1024, shard=4)
    peak = 0
    quantize_checkpoint(folder, Path(sys.argv[1]) / f"out-{layers}", "W8A16", max_shard_size="32MB", progress=False,
                        calibration=tq.Calibration(data=data, method="rtn", samples=2, seqlen=16))
    print(peak // 1024, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Six blocks of 14 MiB more take less than two of them take."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "1048576"  # large tensors go back when they are freed
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    few, many = map(int, done.stdout.split())
    assert many - few < 28, (few, many)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.fixture
def folder(source, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(source("llama"), tmp_path / "in" / "tiny"))


def refused(folder, out, *words, scheme="W4A16", method="rtn", **options):
    before = set(out.parent.iterdir())
    with pytest.raises((ValueError, OSError)) as caught:
        quantize(folder, out, scheme, method, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and all(word in message for word in words), message
    assert set(out.parent.iterdir()) == before


def test_errors(folder, tmp_path):
    out = tmp_path / "out"
    refused(folder, out, "tokenizer", data=None)
    refused(folder, out, "tokenizer", data=["a text"])
    refused(folder, out, "nowhere.txt", data="nowhere.txt")
    refused(folder, out, "vocabulary of 128", data=ids() + 100)
    refused(folder, out, "model.layers.7", blocks=["model.layers.7"])
    content = models.tensors(folder)
    content["model.layers.1.mlp.up_proj.weight"] = content["model.layers.1.mlp.up_proj.weight"].half()
    models.write(folder, content)
    refused(folder, out, "model.layers.1.mlp.up_proj is float16", "--dtype bfloat16")
    quantize(folder, out, "W4A16", "rtn", dtype=torch.bfloat16)


def test_what_the_model_needs_has_to_be_there(folder, tmp_path):
    content = models.tensors(folder)
    del content["model.layers.1.input_layernorm.weight"]
    models.write(folder, content)
    refused(folder, tmp_path / "out", "model.layers.1.input_layernorm.weight", "use tritonq.quantize_")
    content["model.layers.1.input_layernorm.weight"] = torch.full((64,), torch.nan).bfloat16()
    models.write(folder, content)
    refused(folder, tmp_path / "out", "model.layers.1.input_layernorm.weight", "64 elements")
    models.edit_config(folder, model_type="never_heard_of", architectures=["NeverHeardOfForCausalLM"])
    refused(folder, tmp_path / "out", "transformers can build")


class Bias:
    """A bias that this model has no place for."""

    name = "bias"

    def run(self, task):
        layer = task.layers[0]
        layer.module.bias = torch.nn.Parameter(
            torch.ones(layer.weight.shape[0], dtype=layer.weight.dtype), requires_grad=False
        )


def test_tensors_that_the_checkpoint_has_no_place_for(source, tmp_path):
    refused(source("llama"), tmp_path / "out", "q_proj.bias", "another method", method=[Bias()])


# ---------------------------------------------------------------------------------------------------- command line


def test_command_line(run, source, tmp_path):
    """Each option arrives, and losses are printed."""
    rows = tmp_path / "rows.jsonl"
    text = "".join(chr(97 + i % 26) for i in range(50))
    rows.write_text(json.dumps({"text": text}))
    folder = Path(shutil.copytree(source("llama"), tmp_path / "tiny"))
    tokenizer_of_letters(folder)
    arguments = ("quantize", folder, tmp_path / "out", "--scheme", "W4A16", "--group-size", 32, "--search", "rule",
                 "--calibrate", "rtn", "--data", rows, "--samples", 3, "--seqlen", 10, "--batch", 2, "--iters", 2,
                 "--seed", 5, "--report", tmp_path / "report")  # fmt: skip
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    content = json.loads(out)["calibration"]
    assert [row["name"] for row in content["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(row["loss_before"] > 0 and row["loss_after"] > 0 for row in content["blocks"])
    options = content["options"]
    assert (options["samples"], options["seqlen"], options["batch"]) == (3, 10, 2)
    assert (options["iters"], options["seed"]) == (2, 5)
    assert (tmp_path / "report/report.html").is_file()
    code, out, err = run(*arguments, "--force", "--samples", 8)
    assert code == 0 and "loss before" in out and "note: calibration data makes 5 samples" in err


def tokenizer_of_letters(folder):
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({chr(97 + i): i for i in range(26)}, unk_token="a"))
    tokenizer.pre_tokenizer = Split(Regex(""), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a").save_pretrained(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--calibrate", "nonsense"), ("nonsense", "signround")),
        (("--samples", "3"), ("--samples", "--calibrate")),
        (("--calibrate", "rtn", "--data", "nowhere.txt"), ("nowhere.txt",)),
        (("--calibrate", "rtn", "--inputs", "guess"), ("guess", "percentile")),
        (("--calibrate", "rtn", "--samples", "0"), ("--samples",)),
        (("--calibrate", "rtn"), ("tokenizer",)),
    ],
)
def test_command_line_errors(options, words, run, source, tmp_path):
    code, out, err = run("quantize", source("llama"), tmp_path / "out", "--scheme", "W8A16", *options)
    line = err.rstrip("\n").split("\n")[-1]
    assert code == 2 and not out and line.startswith("error: ") and all(word in line for word in words), err
    assert "defect" not in line and not list(tmp_path.iterdir())
