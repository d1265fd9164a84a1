"""What a calibration tells: events, report.json, and the page with its plots."""

import html.parser
import itertools
import json
import logging
import math
import re
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from tritonq.calibrate import report_page
from tritonq.calibrate.report import HOST, CalibrationReport, Events, Row, anonymous_bytes, as_json
from tritonq.calibrate.task import Layer
from tritonq.formats import get_format

KEYS = ["version", "model", "scheme", "method", "options", "started", "seconds", "complete", "peak_bytes", "parts",
        "blocks", "tokens_by_expert", "fallbacks", "static_scales", "memory_steps", "events"]  # fmt: skip


def layer(name, **notes):
    return Layer(name, nn.Linear(4, 4), "weight", get_format("int4_g128"), notes=notes)


def new(**options):
    return CalibrationReport("signround", "W4A16", "Llama", options)


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects tags and the text that readers see."""

    VOID = {"meta"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(report):
    return Page(report_page.page(report.to_dict()))


def test_events_are_kept_in_order_and_logged(caplog):
    events = Events()
    with caplog.at_level(logging.INFO, "tritonq.calibrate"):
        events("tuned", block="layers.0", loss_before=0.5, loss_after=torch.tensor(0.25))
        events("out of memory", block="layers.0", where="backward", micro_batch=4)
        events("activations go to files", bytes=10)
        events("fallback", layer="experts.down_proj", experts=[3])
    assert [e.what for e in events] == ["tuned", "out of memory", "activations go to files", "fallback"]
    assert next(iter(events)).details == {"block": "layers.0", "loss_before": 0.5, "loss_after": 0.25}
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "WARNING", "WARNING"]
    assert caplog.messages[1] == "out of memory: block layers.0, where backward, micro_batch 4"
    assert [e.is_memory_step for e in events] == [False, True, True, False]


def test_events_from_many_threads():
    events, together = Events(), threading.Barrier(8)

    def tell(number):
        together.wait()
        for step in range(100):
            events("step", thread=number, step=step)

    threads = [threading.Thread(target=tell, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = list(events)
    assert len(found) == 800
    for number in range(8):
        assert [e.details["step"] for e in found if e.details["thread"] == number] == list(range(100))


@pytest.mark.parametrize(
    "value, wanted",
    [
        (math.nan, None), (-math.inf, None), (0.5, 0.5), (True, True), (torch.tensor([1.0, math.inf]), [1.0, None]),
        (torch.tensor(3), 3), (numpy.float32(0.5), 0.5), (torch.arange(5000), {"shape": [5000], "min": 0, "max": 4999}),
        (torch.tensor([2.0]).to(torch.float8_e8m0fnu), 2.0), (get_format("mxfp4"), "mxfp4"), (Path("a/b"), "a/b"),
        (torch.device("cuda", 1), "cuda:1"), (torch.bfloat16, "torch.bfloat16"), ({1: (2, {3})}, {"1": [2, [3]]}),
        (nn.Linear(1, 1), "Linear"), (object(), "object"), (math.sqrt, "sqrt"), (Row, "Row"),
    ],
)  # fmt: skip
def test_what_json_holds(value, wanted):
    assert as_json(value) == wanted
    json.dumps(as_json(value), allow_nan=False)


def test_a_block_takes_the_first_loss_and_the_last():
    report = new()
    report.events("tuned", block="layers.0", loss_before=9.0, loss_after=8.0)  # of an earlier try
    layers = [
        layer("layers.0.q_proj", error=0.25, fallback="its Hessian is singular"),
        layer("layers.0.experts.gate_up_proj", tokens=torch.tensor([5, 0, 7]), fallback=[1]),
        layer("layers.0.experts.down_proj", tokens={2: 7, 0: 5, 1: 0}, fallback=[1]),
        layer("layers.0.o_proj", tokens=12, fallback=[]),
    ]
    layers[0].inputs["scale"] = torch.tensor([0.125])
    with report.block("layers.0", layers):
        report.events("smoothed", block="layers.0", loss_before=4.0, loss_after=3.0)
        report.events("tuned", block="layers.1", loss_before=100.0, loss_after=100.0)
        report.events("tuned", block="layers.0", loss_before=3.0, loss_after=1.0)
    with report.block("layers.1", []) as row:
        row.loss_after = torch.tensor(2.0)
    with report.block("layers.2", []):
        report.events("tuned", block="layers.2", loss_before=4.0, loss_after=3.0)  # of a share of the samples
        report.events("quantized", block="layers.2", loss_before=5.0, loss_after=2.5)
    assert [(row.loss_before, row.loss_after) for row in report.blocks] == [(4.0, 1.0), (None, 2.0), (5.0, 2.5)]
    assert report.blocks[0].layers["layers.0.q_proj"]["error"] == 0.25
    assert report.blocks[0].layers["layers.0.q_proj"]["format"] == "int4_g128"
    assert report.tokens_by_expert == {"layers.0.experts": [5, 0, 7]}
    assert report.fallbacks == {
        "layers.0.q_proj": "its Hessian is singular",
        "layers.0.experts.gate_up_proj": [1],
        "layers.0.experts.down_proj": [1],
    }
    assert report.static_scales == {"layers.0.q_proj": {"scale": 0.125}}


@pytest.mark.parametrize("tokens", [torch.tensor([5, 0, 7]), (5, 0, 7), {2: 7, 0: 5, 1: 0}, {2: 7, 0: 5}], ids=str)
def test_tokens_of_experts(tokens):
    report = new()
    with report.block("layers.0", [layer("layers.0.experts.down_proj", tokens=tokens)]):
        pass
    assert report.tokens_by_expert == {"layers.0.experts": [5, 0, 7]}


def test_a_block_that_fails_is_no_row():
    report = new()
    with pytest.raises(KeyError), report.block("layers.0", []):
        raise KeyError("x")
    assert report.blocks == []


@pytest.mark.skipif(not anonymous_bytes(), reason="no /proc")
def test_peaks_of_the_host_are_seen_though_freed():
    report = new()
    base = anonymous_bytes()
    with report.part("capture"):
        held = torch.ones(48 << 20, dtype=torch.uint8)
        time.sleep(0.35)
        del held
    assert report.peak_bytes[HOST] >= base + (40 << 20)
    assert 0.3 < report.parts[0].seconds < 5 and report.seconds == report.parts[0].seconds


@pytest.mark.gpu
def test_peaks_of_a_gpu_are_those_of_each_block():
    report, device = new(), torch.device("cuda", 0)
    base = torch.cuda.memory_allocated(device)
    for name, mib in (("layers.0", 64), ("layers.1", 16)):
        with report.block(name, [], [device]):
            held = torch.empty(mib << 20, dtype=torch.uint8, device=device)
            del held
    assert [row.peak_bytes["cuda:0"] for row in report.blocks] == [base + (64 << 20), base + (16 << 20)]
    assert report.peak_bytes["cuda:0"] == base + (64 << 20)


def filled(blocks, losses=True, **options):
    report = new(**options)
    for i in range(blocks):
        before, after = (10.0 ** (i % 7 - 6), 0.5 * 10.0 ** (i % 7 - 6)) if losses else (None, None)
        report.blocks.append(Row(f"model.layers.{i}.block", 2.0 + i, before, after, {"cuda:0": (i + 1) << 28}))
    return report


def test_report_json_has_stable_keys_and_finite_numbers(tmp_path):
    given = {
        "data": [torch.zeros(3)] * 2, "lr": math.inf, "methods": ("awq", get_format("mxfp4")), "text": "x" * 1000,
        "ids": torch.arange(3), "many": list(range(17)), "options": {"gptq": {"damping": 0.05}},
        "rows": {"input_ids": torch.zeros(2, 3)}, "devices": [torch.device("cpu")], "nested": [[1, 2], [3]],
    }  # fmt: skip
    report = filled(2, **given)
    report.events("tuned", block="b", loss_before=math.nan, loss_after=torch.tensor(math.inf))
    report.save(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert list(content) == KEYS == list(new().to_dict())
    assert content["options"] == {
        "data": "list of 2", "lr": None, "methods": ["awq", "mxfp4"], "text": "x" * 197 + "...",
        "ids": "tensor of shape [3]", "many": "list of 17", "options": {"gptq": {"damping": 0.05}},
        "rows": {"input_ids": "tensor of shape [2, 3]"}, "devices": ["cpu"], "nested": "list of 2",
    }  # fmt: skip
    assert content["events"][0]["details"] == {"block": "b", "loss_before": None, "loss_after": None}
    assert content["seconds"] == 5.0 and content["peak_bytes"] == {"cuda:0": 2 << 28}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    filled(1).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        filled(5).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_goes_on_after_a_resume():
    first = filled(3, seed=1)
    first.parts.append(Row("capture", 1.0))
    first.tokens_by_expert["e"] = [1, 2]
    first.fallbacks["e.w"] = [0]
    first.static_scales["q"] = {"scale": 0.5}
    first.events("out of memory", where="forward", micro_batch=2)
    first.events.began -= 100
    first.events("tuned")
    content = json.loads(json.dumps(first.to_dict()))
    second = CalibrationReport.from_dict(content)
    assert second.to_dict() == content
    second.events("tuned")
    times = [event.seconds for event in second.events]
    assert times == sorted(times) and times[2] - times[1] < 5
    for damaged in ({}, {**content, "blocks": [{"nme": 1}]}, {**content, "version": 99}):
        with pytest.raises(ValueError, match="start anew"):
            CalibrationReport.from_dict(damaged)


def test_the_page_needs_nothing_and_says_text_as_text():
    report = filled(2, note="<script>alert('options')</script>")
    report.model = "<script>alert(1)</script> & co"
    report.blocks[0].name = '"><img src=x>'
    report.blocks[0].layers['<b>q"'] = {"format": "<i>", "why": "<u>"}
    report.events("<s>", detail="</table>")
    report.fallbacks["<b>"] = "<b>"
    page = page_of(report)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "b>", "i>", "u", "s", "object"}
    assert not [a for _, a in page.tags if {"src", "href", "onload", "style"} & a.keys()]
    assert "url(" not in report_page.page(report.to_dict()) and "http:" not in report_page.page(report.to_dict())
    assert any("<script>alert(1)</script> & co" in text for text in page.text)


def circles(page, colour):
    return [(float(a["cx"]), float(a["cy"])) for a in page.all("circle") if a["class"] == f"f{colour}"]


def test_losses_lie_on_a_log_axis():
    """Points of 1e-6 .. 1 are equally far apart, those after lie log10(2) of that below."""
    report = filled(7)
    for row in report.blocks:
        row.peak_bytes = {}
    page = page_of(report)
    before, after = circles(page, 0), circles(page, 1)
    steps = [before[i][1] - before[i + 1][1] for i in range(6)]
    assert max(steps) - min(steps) <= 0.21 and min(steps) > 20  # coordinates have one digit behind the point
    assert all(
        a[1] - b[1] == pytest.approx(steps[0] * math.log10(2), abs=0.2) for a, b in zip(after, before, strict=True)
    )
    gaps = [before[i + 1][0] - before[i][0] for i in range(6)]
    assert max(gaps) - min(gaps) <= 0.21
    labels = [text for text in page.text if re.fullmatch(r"\d+(\.\d+)?(e-\d+)?", text)]
    assert {"1e-06", "0.0001", "0.01", "1"} <= set(labels)


@pytest.mark.parametrize("count", [0, 1, 2, 12, 320])
@pytest.mark.parametrize("losses", [True, False])
def test_every_plot_has_what_it_shows_inside_of_it(count, losses):
    report = filled(count, losses)
    if losses and count > 2:
        report.blocks[1].loss_after = None
        report.blocks[2].loss_before, report.blocks[2].loss_after = 1e-3, 0.0
    page = page_of(report)
    charts = [a.get("aria-label") for a in page.all("svg")]
    assert len(charts) == (0 if not count else 3 if losses else 2)
    wide, high = report_page.WIDTH, report_page.HEIGHT
    points = [(float(a["cx"]), float(a["cy"])) for a in page.all("circle")]
    points += [(float(a["x"]), float(a["y"])) for a in page.all("text") if "x" in a]
    bars = page.all("rect")
    assert len(bars) == count
    points += [(float(a["x"]) + float(a["width"]), float(a["y"]) + float(a["height"])) for a in bars]
    assert all(0 <= x <= wide and 0 <= y <= high and math.isfinite(x + y) for x, y in points)
    missing = 1 if losses and count > 2 else 0
    assert len(circles(page, 1)) == (count - missing if losses else 0)
    assert "nan" not in report_page.page(report.to_dict()).lower().replace("nano", "")


def test_labels_of_hundreds_of_blocks_do_not_overlap():
    text = report_page.page(filled(320).to_dict())
    for chart in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        labels = re.findall(r'<text x="([\d.]+)" y="221" text-anchor="middle">([^<]+)</text>', chart)
        assert labels[0][1] == "0" and len(labels) > 5
        for (x, a), (next_x, b) in itertools.pairwise(labels):
            assert float(next_x) - float(x) > 6.2 * (len(a) + len(b)) / 2  # 11 px digits are 6.1 wide


def test_short_names_tell_apart():
    assert report_page.short_names(["m.layers.0.experts", "m.layers.10.experts"]) == ["0", "10"]
    assert report_page.short_names(["t.blocks.0", "t.single.0"]) == ["blocks", "single"]
    assert report_page.short_names(["t.blocks.0", "t.single.1"]) == ["blocks.0", "single.1"]
    assert report_page.short_names(["a.b"]) == ["b"] and report_page.short_names([]) == []
    assert report_page.short_names(["a", "a.b"]) == ["a", "a.b"]


def test_experts_are_cells_and_those_that_fell_back_are_outlined():
    report = filled(1)
    report.tokens_by_expert = {"layers.0.mlp.experts": [8, 0, 1, 4], "layers.1.mlp.experts": [0, 0, 0, 0]}
    report.fallbacks = {"layers.0.mlp.experts.down_proj": [1, 2], "layers.0.q": "reason"}
    page = page_of(report)
    paths = page.all("path")
    cells = [cell for path in paths if "stroke" not in path for cell in path["d"].split("z")[:-1]]
    assert len(cells) == len(set(cells)) == 8
    outlined = next(path["d"] for path in paths if "stroke" in path).split("z")[:-1]
    assert len(outlined) == 2 and all(cell.split("h")[0].split()[1] == "0.0" for cell in outlined)
    strong = next(path["d"] for path in paths if path.get("fill-opacity") == "1")
    assert strong.count("z") == 1 and strong.startswith("M68.0 ")  # the first expert saw most
    assert sum(path["d"].count("z") for path in paths if path.get("class") == "cell") == 5  # those that saw nothing
    assert page.text[page.text.index("layers.0.mlp.experts") :][:5] == ["layers.0.mlp.experts", "13", "0", "4", "8"]


def test_words():
    assert [report_page.duration(s) for s in (0.0123, 59.4, 61, 7300, None)] == [
        "0.0123 s", "59.4 s", "1 min 1 s", "2 h 1 min", "",
    ]  # fmt: skip
    assert [report_page.size(n) for n in (2048, 3 << 20, 5 << 30, None)] == ["2 KiB", "3 MiB", "5 GiB", ""]
