"""Every mode of every host library: the same bits, weights still quantized, nothing left behind; or the error that
docs/hosts.md shows."""

import gc
import re

import pytest

from . import page
from .registry import MODES, SCHEMES, Setting


def runs():
    """On the CPU each mode with two formats (one if it is slow), taking turns; on a GPU with all of them."""
    formats = list(SCHEMES)
    for index, mode in enumerate(MODES):
        for fmt in formats:
            turn = (formats.index(fmt) - index) % len(formats)
            if "cpu" in mode.devices and (turn == 0 or (turn == 3 and not mode.slow)):
                yield pytest.param(mode, fmt, "cpu", id=f"{mode.id}-{fmt}-cpu")
            if "cuda" in mode.devices:
                yield pytest.param(mode, fmt, "cuda", id=f"{mode.id}-{fmt}-cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("mode,fmt,where", runs())
@pytest.mark.filterwarnings("ignore")
def test_mode(mode, fmt, where, tmp_path, record_property):
    for host in {mode.host, "accelerate"}:
        pytest.importorskip(host)
    if where == "cuda":
        gc.collect()
        gc.freeze()  # modules of the hosts take a quarter of a second to walk through, many times a test
    at = Setting(fmt, where, tmp_path)
    if mode.error is None:
        mode.run(at)
    else:
        with pytest.raises(mode.error, match=re.escape(mode.message)):
            mode.run(at)
    if where == "cuda":
        record_property("seen on a GPU", [mode.id, fmt])


def test_modes_are_named_once():
    names = [mode.id for mode in MODES]
    assert len(names) == len(set(names)) and {mode.host for mode in MODES} == set(page.HOSTS)


def test_page_is_current():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `make tables`"
