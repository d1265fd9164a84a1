"""Perplexity against a direct float64 computation, and `tritonq eval` around it."""

import json
import math

import models
import pytest
import torch

from tritonq.calibrate.data import default_text
from tritonq.integrations.perplexity import complete, load, perplexity
from tritonq.io.checkpoint import quantize_checkpoint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(120)]
TEXT = " ".join(WORDS[i * i % 97] for i in range(150))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a tokenizer of whole words."""
    folder = models.save("llama", tmp_path_factory.mktemp("model") / "tiny", torch.float32, num_hidden_layers=1)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["?", *WORDS])}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="?").save_pretrained(folder)
    return folder


def direct(folder, windows, length):
    """exp of the mean of -log p(next token), in float64, one window at a time."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).double()
    ids = [WORDS.index(word) + 1 for word in TEXT.split()]
    total, count = 0.0, 0
    for start in range(0, min(windows * length, len(ids)), length):
        window = ids[start : min(start + length, windows * length)]
        if len(window) < 2:
            continue
        with torch.no_grad():
            log_p = model(torch.tensor([window])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[i, token]) for i, token in enumerate(window[1:]))
        count += len(window) - 1
    return math.exp(total / count)


@pytest.mark.parametrize(("windows", "length"), [(1, 2), (1, 16), (4, 32), (3, 50), (9, 20), (2, 149)])
def test_perplexity(windows, length, folder):
    """Shifted by one, averaged over windows instead of tokens, or context across windows: all differ. The last windows
    may be short (9 x 20 of 150 tokens), and one of a single token predicts nothing (2 x 149)."""
    model, tokenizer = load(folder)
    assert math.isclose(perplexity(model, tokenizer, TEXT, windows, length), direct(folder, windows, length),
                        rel_tol=1e-5)  # fmt: skip


def test_defaults(folder):
    """4 windows of 512 tokens; an untrained model's perplexity is near the size of its vocabulary."""
    model, tokenizer = load(folder)
    assert perplexity(model, tokenizer, TEXT) == perplexity(model, tokenizer, TEXT, 4, 512)
    assert 100 < perplexity(model, tokenizer, TEXT) < 160
    assert len(default_text()) > 100_000
    assert complete(model, tokenizer, "w1 w2").startswith("w1 w2 ")


@pytest.mark.parametrize(("text", "count"), [("", 0), ("w1", 1)])
def test_text_that_is_too_short(text, count, folder):
    """A division by zero tokens."""
    with pytest.raises(ValueError, match=f"has {count} tokens; perplexity needs at least 2"):
        perplexity(*load(folder), text)


def test_cli(folder, tmp_path, run):
    """--json is one document on stdout and nothing else there; the table shows the same number."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ("--text", text, "--windows", 2, "--length", 32, "--prompt", "w1 w2", "--device", "cpu")
    code, out, _ = run("eval", folder, *options, "--json")
    result = json.loads(out)
    assert code == 0 and result["windows"] == 2 and result["length"] == 32 and result["text"].startswith("w1 w2")
    assert math.isclose(result["perplexity"], direct(folder, 2, 32), rel_tol=1e-5)
    code, out, _ = run("eval", folder, *options)
    assert code == 0 and f"perplexity {result['perplexity']:.4f} (2 x 32 tokens)" in out and result["text"] in out


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16_ASYM"])
def test_quantized_checkpoints(scheme, folder, tmp_path):
    """Loaded by transformers alone; asymmetric ones need another loading path."""
    pytest.importorskip("compressed_tensors")
    quantize_checkpoint(folder, tmp_path / "out", scheme, progress=False)
    value = perplexity(*load(tmp_path / "out"), TEXT, 4, 32)
    assert 0 < abs(value / direct(folder, 4, 32) - 1) < 0.05


def test_bad_input(folder, tmp_path, run):
    """One line on stderr that names the culprit, exit code 2."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "nothing").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    for arguments, culprit in (
        ((tmp_path / "missing",), "missing does not exist"), ((tmp_path / "nothing",), "nothing"),
        ((damaged,), "damaged"), ((folder, "--text", tmp_path / "no.txt"), "no.txt"),
        ((folder, "--text", tmp_path / "empty.txt"), "0 tokens"), ((folder, "--text", tmp_path), str(tmp_path)),
        ((folder, "--text", tmp_path / "binary.txt"), "binary.txt is not UTF-8"), ((folder, "--windows", 0), "windows"),
        ((folder, "--length", 1), "length"), ((folder, "--device", "nonsense"), "device nonsense"), ((), "model"),
    ):  # fmt: skip
        code, out, err = run("eval", *arguments)
        line = err.strip().split("\n")[-1]
        assert code == 2 and not out and line.startswith("error: ") and culprit.lower() in line.lower(), (
            arguments,
            err,
        )
        assert "Traceback" not in err and "defect" not in err
