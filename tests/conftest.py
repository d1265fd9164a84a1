"""Backends shared by the tests.

`device` runs a test on every backend of this process: "cpu" (tiled torch) and "cuda" where there is one (marker
`gpu`), or, with TRITON_INTERPRET=1 set before the start, "interpret" (the kernels under Triton's interpreter, on CPU
tensors).
"""

import os
import sys

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRET:
    import interpreter

    interpreter.apply()

# Several processes with threads of their own wait for each other more than they compute.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "interpret: runs kernels in Triton's interpreter (TRITON_INTERPRET=1)")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        if INTERPRET:
            backends = [pytest.param("cpu", id="interpret", marks=pytest.mark.interpret)]
        else:
            backends = [pytest.param("cpu", id="cpu")]
        if torch.cuda.is_available() and not INTERPRET:
            backends.append(pytest.param("cuda", id="cuda", marks=pytest.mark.gpu))
        metafunc.parametrize("device", backends)


def pytest_collection_modifyitems(items):
    """Marked `gpu`, tests need one. With `--dist loadgroup`, those of one format share a process, and so the kernels
    that were compiled there."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="takes a GPU"))
        parameters = getattr(item, "callspec", None) and item.callspec.params
        named = [v for k, v in (parameters or {}).items() if k in ("fmt", "name")]
        if named:
            item.add_marker(pytest.mark.xdist_group(str(getattr(named[0], "name", named[0]))))


@pytest.fixture(autouse=True, scope="session")
def few_programs():
    """An interpreted program costs about 3 ms whatever its tile."""
    from tritonq import tuning

    if INTERPRET:
        tuning.TILE = 1 << 16


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, stdout, stderr) of main() in this process."""

    from tritonq import cli

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["tritonq", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def one_thread():
    """For tensors so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
