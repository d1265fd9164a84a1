"""The short way into the driver hands over what Triton's own launcher would."""

from types import SimpleNamespace

import pytest
import torch

from tritonq import launch, memory

triton = pytest.importorskip("triton")
from triton.backends.nvidia import driver as nvidia  # noqa: E402


@pytest.fixture
def launcher(monkeypatch):
    """Triton's launcher of a kernel without scratch memory, and the calls that it hands over."""
    calls = []
    found = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    found.launch = lambda *arguments: calls.append(arguments)
    found.global_scratch_size = found.profile_scratch_size = 0
    found.global_scratch_align = found.profile_scratch_align = 1
    found.num_ctas, found.launch_cooperative_grid, found.launch_pdl = 1, False, False
    found.gsan_enabled, found.arg_annotations, found.kernel_signature = False, object(), object()
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace()))
    return found, calls


def test_arguments(launcher):
    found, calls = launcher
    into_driver = launch._into_driver(found)
    assert into_driver is not None, f"Triton {triton.__version__} is not known: look at its launcher, and add it"
    into_driver(7, "stream", "function", "metadata", (1, 2, None, "constant"))
    found(7, 1, 1, "stream", "function", "metadata", None, None, None, 1, 2, None, "constant")
    assert calls[0] == calls[1] and len(calls[0]) > 10


def test_scratch_memory_is_left_to_triton(launcher):
    found, _ = launcher
    found.global_scratch_size = 16
    assert launch._into_driver(found) is None


def test_other_versions_are_left_to_triton(launcher, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    assert launch._into_driver(launcher[0]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_allocation(dtype):
    y = memory.empty_on_gpu((3, 5), (5, 1), dtype)
    assert y.shape == (3, 5) and y.dtype is dtype and y.is_contiguous()
    assert y.device == torch.device("cuda", torch.cuda.current_device())
