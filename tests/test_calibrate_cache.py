"""The cache of what blocks put out: bytes that come back as they went in, in the tiers that were allowed."""

import pytest
import torch

from tritonq.calibrate.cache import ActivationCache

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64)


def values(shape, dtype=torch.float32, seed=0):
    found = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=torch.Generator().manual_seed(seed))
    return found.float().to(dtype)


def same_bytes(one, other):
    assert one.dtype == other.dtype and one.shape == other.shape
    flat = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    assert torch.equal(*flat)


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_come_back(tier, dtype, device, tmp_path):
    room = {torch.device("cuda", 0) if device == "cuda" else torch.device("cpu"): 1 << 20} if tier == "device" else {}
    cache = ActivationCache(0 if tier == "disk" else None, tmp_path, room)
    tensors = {
        0: values((3, 5), dtype).to(device),
        2: values((5, 4), dtype, 1).to(device).t()[1:],
        5: values((), dtype),
    }
    tensors[5] = tensors[5].to(device)
    cache.put((1, 2), tensors)
    expected = {number: tensor.clone() for number, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    assert cache.numbers((1, 2)) == {0, 2, 5} and (1, 2) in cache and (2, 1) not in cache
    cache.prefetch([(1, 2)], device)
    for _ in range(2):
        found = cache.get((1, 2), device)
        assert found.keys() == expected.keys()
        for number, tensor in found.items():
            assert tensor.device.type == device
            same_bytes(tensor, expected[number])
            assert tensor.stride() == expected[number].stride() or number == 2
    used = cache.nbytes
    assert used[tier] > 0 and sum(used.values()) == used[tier]
    cache.drop((1, 2))
    assert sum(cache.nbytes.values()) == 0 and not list(tmp_path.iterdir())
    with pytest.raises(KeyError, match="block 1, sample 2"):
        cache.get((1, 2), device)


def test_what_shares_memory_is_kept_once():
    cache = ActivationCache()
    whole = values((4, 64))
    cache.put((0, 0), {0: whole, 1: whole[1:3], 2: whole, 3: values((2, 8))})
    assert cache.nbytes["host"] == (4 * 64 + 2 * 8) * 4
    found = cache.get((0, 0), "cpu")
    assert found[0].data_ptr() == found[2].data_ptr() == found[1].data_ptr() - 64 * 4
    assert found[1].untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()
    assert torch.equal(found[1], whole[1:3])


def test_rows_of_a_batch_take_their_own_bytes_only():
    cache, batch = ActivationCache(), values((8, 16))
    for row in range(8):
        cache.put((0, row), {0: batch[row : row + 1]})
    assert cache.nbytes["host"] == batch.nbytes
    wide = batch[:, 3:5]  # with holes
    cache.put((1, 0), {0: wide, 1: wide})
    assert cache.nbytes["host"] == batch.nbytes + 8 * 2 * 4
    assert torch.equal(cache.get((1, 0), "cpu")[1], batch[:, 3:5])


def test_drop_replace_share():
    cache = ActivationCache()
    cache.put((0, 0), {0: values((4,)), 1: values((6,), seed=1)})
    with pytest.raises(ValueError, match=r"has tensors \[1\] already"):
        cache.put((0, 0), {1: values((1,))})
    cache.share((0, 1), (0, 0), 1)
    assert cache.nbytes["host"] == 40
    cache.drop((0, 0), keep={0})
    assert cache.numbers((0, 0)) == {0} and cache.nbytes["host"] == 40
    assert torch.equal(cache.get((0, 1), "cpu")[1], values((6,), seed=1))
    cache.replace((1, 0), {0: values((5,))}, old=(0, 0))
    assert cache.nbytes["host"] == 24 + 20 and (0, 0) not in cache
    cache.drop((0, 1))
    assert cache.nbytes["host"] == 20
    with pytest.raises(KeyError, match="tensor 3"):
        cache.share((1, 1), (1, 0), 3)


def test_tiers_fill_up_in_turn(tmp_path):
    told = []
    cache = ActivationCache(
        256, tmp_path, {torch.device("cpu"): 128}, lambda what, **details: told.append((what, details))
    )
    for sample in range(5):
        cache.put((0, sample), {0: values((32,), torch.float32, sample)})
    assert cache.nbytes == {"device": 128, "host": 256, "disk": 256}
    assert [what for what, _ in told] == ["activations go to files"] and told[0][1]["host_bytes"] == 256
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and not list(tmp_path.glob("*.part"))
    assert cache.to_host() == 128 and cache.nbytes == {"device": 0, "host": 256, "disk": 384}
    for sample in range(5):
        assert torch.equal(cache.get((0, sample), "cpu")[0], values((32,), torch.float32, sample))
    cache.put((1, 0), {0: values((1,))})
    assert cache.nbytes["device"] == 0, "the device is left alone after it was cleared"
    assert cache.most["disk"] >= 384
    cache.close()
    assert not list(tmp_path.iterdir()) and sum(cache.nbytes.values()) == 0


def test_temporary_files_go(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    cache = ActivationCache(0)
    cache.put((0, 0), {0: values((4,))})
    assert list(tmp_path.iterdir())
    cache.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", [None, 100, 0])
def test_saved_and_loaded(budget, tmp_path):
    cache = ActivationCache(budget)
    cache.put((0, 0), {0: values((4, 4)), 3: values((3,), torch.bfloat16)})
    cache.put((0, 1), {0: values((8,), torch.float8_e4m3fn)})
    cache.share((0, 1), (0, 0), 3)
    for _ in range(2):  # the second takes the place of the first
        cache.save(tmp_path / "kept", {"more": b"text"})
    assert (tmp_path / "kept" / "more").read_bytes() == b"text" and len(list(tmp_path.iterdir())) == 1
    other = ActivationCache(budget)
    other.put((7, 7), {0: values((1,))})
    other.load(tmp_path / "kept")
    assert sorted(other) == sorted(cache) and sum(other.nbytes.values()) == sum(cache.nbytes.values())
    for key in cache:
        found = other.get(key, "cpu")
        for number, tensor in cache.get(key, "cpu").items():
            same_bytes(found[number], tensor)
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "nowhere")
    for each in (cache, other):
        each.close()


def test_no_room_on_the_device_after_all(monkeypatch):
    told = []
    cache = ActivationCache(room={torch.device("cpu"): 1 << 20}, events=lambda what, **details: told.append(details))
    clone, failed = torch.Tensor.clone, []

    def failing(tensor, *args, **kwargs):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("none left")
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", failing)
    cache.put((0, 0), {0: values((4,))})
    assert cache.nbytes == {"device": 0, "host": 16, "disk": 0}
    assert told == [{"where": "activations", "reaction": "kept on the host"}]


@pytest.mark.gpu
def test_pinned_buffers_are_used_again_only_after_copies():
    """Entries come and go quickly; each has to come back as it was, prefetched or not."""
    cache = ActivationCache()
    size = 1 << 20
    for turn in range(20):
        for sample in range(4):
            cache.replace((0, sample), {0: torch.full((size,), turn * 10 + sample, device="cuda", dtype=torch.float32)})
        cache.prefetch([(0, 0), (0, 2)], "cuda")
        for sample in range(4):
            assert bool((cache.get((0, sample), "cuda")[0] == turn * 10 + sample).all())
        found = cache.get((0, 1), "cpu")[0]
        cache.replace((0, 1), {0: torch.zeros(size, device="cuda")})
        assert bool((found == turn * 10 + 1).all()), "a view of a buffer that is written to again"
    cache.prefetch([(0, 3)], "cuda")
    assert cache.nbytes["host"] == 4 * size * 4
    cache.close()
    torch.cuda.synchronize()
