"""What blocks are called with, rebuilt from what blocks before them have put out.

Expected values are what hooks see in the model's own forward.
"""

import contextlib
import copy
import functools

import block_models
import pytest
import torch
from torch import nn

from tritonq.calibrate import blocks, dependencies
from tritonq.calibrate.cache import ActivationCache
from tritonq.calibrate.replay import Replay
from tritonq.calibrate.trees import flatten, tree_map

FAMILIES = block_models.TRANSFORMERS + block_models.WRITTEN
family = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)


@contextlib.contextmanager
def without_keys(model):
    """transformers keeps keys and values by default, which blocks would be called with."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    yield
    if before:
        config.use_cache = True


def own(model, found, calls):
    """Arguments and outputs of blocks in the model's own forward: {(name, sample): (leaves, output)}."""
    seen, order = {}, []

    def before(name, sample, module, args, kwargs):
        leaves = flatten((args, kwargs))[0]
        seen[name, sample] = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        order.append(name)

    def after(name, sample, module, args, output):
        seen[name, sample] = (seen[name, sample], copy.deepcopy(output))

    for sample, call in enumerate(calls):
        hooks = []
        for name, module in found:
            hooks.append(module.register_forward_pre_hook(functools.partial(before, name, sample), with_kwargs=True))
            hooks.append(module.register_forward_hook(functools.partial(after, name, sample)))
        with without_keys(model), torch.no_grad():
            model(*call.args, **call.kwargs)
        for hook in hooks:
            hook.remove()
    return seen, list(dict.fromkeys(order))


def check_equal(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert type(one) is type(other)


def marks(model):
    """What may not change in a model: attributes and hooks of its modules, and its configuration."""
    config = model.config.to_dict() if hasattr(model, "config") else None
    return config, {
        name: (sorted(vars(module)), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@family
def test_arguments_are_the_models_own(make):
    model, calls = block_models.build(make)
    found = blocks.find(model)
    wanted, order = own(model, found, calls)
    left = marks(model)
    replay = Replay(model, found, calls, rows=1)
    assert [name for name, _ in replay.blocks] == order
    for index, (name, module) in enumerate(replay.blocks):
        for sample in range(len(calls)):
            for _ in range(2):  # the second time from what is held
                args, kwargs = replay.arguments(index, sample)
                check_equal(flatten((args, kwargs))[0], wanted[name, sample][0])
        if index + 1 < len(replay.blocks):
            replay.advance(index)
            continue
        for sample in range(len(calls)):
            (batch,) = replay.fetch(index, [sample], "cpu")
            with torch.no_grad():
                check_equal(flatten(module(*batch.args, **batch.kwargs))[0], flatten(wanted[name, sample][1])[0])
    assert marks(model) == left


@family
def test_samples_are_put_together(make):
    model, calls = block_models.build(make)
    replay = Replay(model, blocks.find(model), calls)
    together = 0
    for index, (_, module) in enumerate(replay.blocks):
        everything = replay.fetch(index, range(len(calls)), "cpu", True)
        assert sorted(sample for batch in everything for sample in batch.samples) == list(range(len(calls)))
        together += sum(len(batch.samples) > 1 for batch in everything)
        for batch in everything:
            with torch.no_grad():
                outputs = [t for t in flatten(module(*batch.args, **batch.kwargs))[0] if t is not None]
            for target, output in zip(batch.targets, outputs, strict=False):
                torch.testing.assert_close(target, output)
            singles = [replay.fetch(index, [sample], "cpu", True)[0] for sample in batch.samples]
            assert all(single.samples == (sample,) for single, sample in zip(singles, batch.samples, strict=True))
            for number, target in enumerate(batch.targets):
                rows = [single.targets[number] for single in singles]
                if len(rows) == 1 or (make is block_models.t5 and number):  # its position bias is that of all
                    torch.testing.assert_close(target, rows[0])
                else:  # four streams of hidden states; [S, B, H]
                    dim = {"gemma3n": 1, "turned": 1}.get(make.__name__, 0)
                    torch.testing.assert_close(target, torch.cat(rows, dim))
        replay.advance(index)
    assert together >= len(replay.blocks), "no samples were put together"


class Told(list):
    """`events` that are kept: (what, details)."""

    def __call__(self, what, **details):
        self.append((what, details))

    def of(self, what):
        return [details for said, details in self if said == what]


def test_only_outputs_that_are_needed_are_kept():
    """Long skips: outputs of the first blocks live until the block that takes them, no longer."""
    model, calls = block_models.build(block_models.long_skips)
    replay = Replay(model, blocks.find(model), calls)
    names = [name for name, _ in replay.blocks]
    assert names == ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    kept = []
    for index in range(5):
        replay.advance(index)
        kept.append(sorted({block for block, _ in replay.cache}))
    assert kept == [[0], [0, 1], [0, 1, 2], [0, 3], []]


def test_dependencies_without_gradients_are_found():
    """`turned` sorts what the first block has put out; the third takes the order."""
    model, calls = block_models.build(block_models.turned)
    replay = Replay(model, blocks.find(model), calls)
    assert replay.scan(0).uses == {0: set(), 1: {(0, 0)}, 2: {(0, 0), (1, 0)}, 3: {(2, 0)}}


def test_digests_tell_values_apart():
    """Factors are those that splitmix64 is known to give for seed 0; values that were put in another order differ."""
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [f % (1 << 64) for f in dependencies._factors(0, 3, torch.device("cpu")).tolist()] == known
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        plain = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
        one = plain.to(dtype)
        assert dependencies.same(dependencies.digests([one, 1, None]), dependencies.digests([one.clone(), 1, None]))
        for other in (plain.roll(1), plain[:7], plain[None], plain.flip(0)):
            assert not dependencies.same(dependencies.digests(one), dependencies.digests(other.to(dtype)))
    words = torch.arange(10)
    whole = sum(int(f * w) for (_, f), w in zip(dependencies._chunks(words, 1), words, strict=True))
    assert whole % (1 << 64) == dependencies.fingerprint(words) % (1 << 64), "chunks go on with the factors"
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    near, far = values * (1 + 1e-7), values + 1e-3
    assert dependencies.fingerprint(values) != dependencies.fingerprint(near)
    assert dependencies.same(dependencies.digests(values), dependencies.digests(near))
    assert not dependencies.same(dependencies.digests(values), dependencies.digests(far))
    assert not dependencies.same(dependencies.digests([1]), dependencies.digests([2]))


class Sees(nn.Module):
    """A tower whose features enter before the first block, and, `deep`, before the second, too."""

    def __init__(self, deep):
        super().__init__()
        self.deep, self.runs = deep, 0
        self.vision = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
        self.vision.register_forward_hook(self.count)
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(block_models.Residual(8, False) for _ in range(3))

    def count(self, *_):
        self.runs += 1

    def forward(self, tokens, image):
        features = self.vision(image)
        x = self.embed(tokens)
        x = x.masked_scatter((tokens == 0)[..., None].expand_as(x), features)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.deep and number == 0:
                x = x + features.mean(0)
        return x


def seen(samples=3):
    tokens = [torch.tensor([[1, 0, 0, 2 + seed]]) for seed in range(samples)]
    return [block_models.call(t, block_models.noise(2, 4, seed=seed)) for seed, t in enumerate(tokens)]


@pytest.mark.parametrize("deep", [False, True])
def test_towers_run_where_they_are_needed(deep):
    torch.manual_seed(0)
    model, calls = Sees(deep).eval(), seen()
    wanted, _ = own(model, blocks.find(model), calls)
    replay = Replay(model, blocks.find(model), calls, rows=1)
    runs = []
    for index, (name, _) in enumerate(replay.blocks):
        model.runs = 0
        for _ in range(3):
            for batch in replay.fetch(index, [0, 2, 1], "cpu"):
                assert batch.samples == (0, 2, 1)
                assert torch.equal(batch.args[0], torch.cat([wanted[name, s][0][0] for s in batch.samples]))
        runs.append(model.runs)
        replay.advance(index)
    # Once a sample, and for the call with two samples by which is found out how they are put together.
    assert runs[0] == 4 and runs[2] == 0
    assert runs[1] == (3 if deep else 0)
    assert replay.nbytes == 0


def test_blocks_are_gone_through_in_order():
    """What was made of outputs takes their place in memory while a block is worked on."""
    model, calls = Sees(True).eval(), seen()
    replay = Replay(model, blocks.find(model), calls)
    replay.advance(0)
    before = replay.nbytes
    replay.fetch(1, range(3), "cpu")
    assert replay.nbytes == before, "features before the second block are added to what the first has put out"
    replay.arguments(0, 0)
    with pytest.raises(ValueError, match=r"'layers\.0' has put out for sample 0 is not kept any more.*in order"):
        replay.arguments(1, 0)


def test_watched_outputs_beside_targets():
    model, calls = block_models.build(block_models.llama_padded)
    replay = Replay(model, blocks.find(model), calls, rows=1)
    wanted = {s: replay.fetch(0, [s], "cpu", True)[0] for s in range(4)}
    with torch.no_grad():
        replay.blocks[0][1].mlp.down_proj.weight.zero_()
    watched = {}
    replay.advance(0, "cpu", lambda batch, outputs: watched.update({batch.samples: (batch, outputs)}))
    assert sorted(watched) == [(0,), (1,), (2,), (3,)]
    for (sample,), (batch, outputs) in watched.items():
        assert torch.equal(batch.targets[0], wanted[sample].targets[0]) and len(batch.masks) == 1
        assert not torch.equal(outputs[0], batch.targets[0])
        (following,) = replay.fetch(1, [sample], "cpu")
        assert torch.equal(following.args[0], outputs[0])


def test_memory_is_that_of_the_hidden_states():
    """Features between layers and arguments by layer are made again; with 24 samples of different lengths."""
    model, _ = block_models.build(block_models.qwen3_vl)
    calls = []
    for seed in range(24):
        calls.append(block_models.picture(seed, 4, 4 + 2 * (seed % 3)))
    hidden = sum(call.kwargs["input_ids"].numel() for call in calls) * model.config.text_config.hidden_size * 4
    replay = Replay(model, blocks.find(model), calls, keep_targets=False)
    most = []
    for index in range(len(replay.blocks)):
        for sample in range(len(calls)):
            replay.fetch(index, [sample], "cpu", True)
            most.append(replay.nbytes)
        replay.advance(index)
        most.append(replay.nbytes)
    assert hidden <= max(most) <= 1.1 * hidden
    assert max(replay.cache.most.values()) <= 1.1 * hidden


@pytest.mark.parametrize("make", [block_models.qwen3_vl, block_models.t5, block_models.long_skips])
def test_nothing_is_kept_twice(make):
    model, calls = block_models.build(make)
    if make is block_models.qwen3_vl:
        calls = [block_models.picture(seed, 4, 4 + 2 * (seed % 2)) for seed in range(16)]
    replay = Replay(model, blocks.find(model), calls)
    for index in range(len(replay.blocks)):
        replay.fetch(index, range(len(calls)), "cpu")
        held = list(replay._held._shared.values())
        places = {}
        for key in replay.cache:
            for number, tensor in replay.cache.get(key, "cpu").items():
                held.append(tensor)
                places.setdefault(tensor.untyped_storage().data_ptr(), []).append((key, number))
        unique = {}
        for tensor in held:
            other = unique.setdefault((tuple(tensor.shape), tensor.numpy().tobytes()), tensor)
            assert other.data_ptr() == tensor.data_ptr(), "two tensors of the same values"
        assert sum({t.untyped_storage().data_ptr(): t.nbytes for t in held}.values()) <= replay.nbytes
        replay.advance(index)


def test_masks_say_which_tokens_count():
    model, calls = block_models.build(block_models.llama_padded)
    replay = Replay(model, blocks.find(model), calls)
    for sample, used in enumerate((9, 6, 6, 9)):
        (batch,) = replay.fetch(0, [sample], "cpu", True)
        if used == 9:
            assert batch.masks == [None]
        else:
            assert batch.masks[0].shape == (1, 9, 1) and batch.masks[0].dtype == torch.bool
            assert batch.masks[0].flatten().tolist() == [True] * used + [False] * (9 - used)
    both = next(batch for batch in replay.fetch(0, range(4), "cpu", True) if 1 in batch.samples)
    assert both.samples == (1, 2) and both.masks[0].shape == (2, 9, 1) and both.count == 2 * 6 * 64
    image, calls = block_models.build(block_models.diffusion)
    batch = Replay(image, blocks.find(image), calls).fetch(0, range(3), "cpu", True)[0]
    assert batch.masks == [None, None] and [t.shape[0] for t in batch.targets] == [3, 3]


def test_targets_are_of_the_block_as_it_was():
    model, calls = block_models.build(block_models.llama)
    replay = Replay(model, blocks.find(model), calls)
    wanted = [replay.fetch(0, [sample], "cpu", True)[0].targets[0].clone() for sample in range(4)]
    with torch.no_grad():
        for parameter in replay.blocks[0][1].parameters():
            parameter.zero_()
    for sample in range(4):
        assert torch.equal(replay.fetch(0, [sample], "cpu", True)[0].targets[0], wanted[sample])
    replay.advance(0)
    (batch,) = replay.fetch(1, [0], "cpu")
    (inputs,) = replay._capture.arguments(0, _source(replay, 0), [0], set(), set())[0]
    assert torch.equal(batch.args[0], inputs), "a block of zeros hands its inputs on"


def _source(replay, sample):
    from tritonq.calibrate.replay import _Sample

    return _Sample(replay, sample)


def test_resume(tmp_path):
    model, calls = block_models.build(block_models.gemma3n)
    found = blocks.find(model)
    replay = Replay(model, found, calls, rows=2)
    for index in range(4):
        replay.fetch(index, range(len(calls)), "cpu")
        replay.advance(index)
    replay.save(tmp_path / "state")
    other = copy.deepcopy(model)
    for name, module in found[:4]:
        other.set_submodule(name, copy.deepcopy(module).to("meta"))
    again = Replay(other, blocks.find(other), calls, resume=tmp_path / "state")
    assert [name for name, _ in again.blocks] == [name for name, _ in replay.blocks] and again.rows == 2
    for index in range(4, len(replay.blocks)):
        for one, two in zip(replay.fetch(index, range(3), "cpu"), again.fetch(index, range(3), "cpu"), strict=True):
            assert one.samples == two.samples
            check_equal(flatten((two.args, two.kwargs))[0], flatten((one.args, one.kwargs))[0])
        replay.advance(index)
        again.advance(index)
    with pytest.raises(ValueError, match="other samples"):
        Replay(other, found, [block_models.text(0)], resume=tmp_path / "state")
    with pytest.raises(ValueError, match=r"does not have, such as 'model\.layers"):
        Replay(other, found[:1], calls, resume=tmp_path / "state")


def test_blocks_that_are_not_in_place():
    """On the meta device but for while they are called; each is asked for once to find out, then block by block."""
    model, calls = block_models.build(block_models.llama)
    found = blocks.find(model)
    wanted, _ = own(model, found, calls)
    weights = {module: {n: p.detach().clone() for n, p in module.named_parameters()} for _, module in found}
    asked = []

    @contextlib.contextmanager
    def ready(module):
        asked.append(module)
        module.to_empty(device="cpu")
        module.load_state_dict(weights[module])
        yield
        module.to("meta")

    for _, module in found:
        module.to("meta")
    replay = Replay(model, found, calls, ready=ready, rows=1)
    assert asked == [module for _, module in found]
    for index, (name, module) in enumerate(replay.blocks):
        with ready(module):
            for sample in range(len(calls)):
                (batch,) = replay.fetch(index, [sample], "cpu")
                check_equal(flatten((batch.args, batch.kwargs))[0], wanted[name, sample][0])
            replay.advance(index)


def test_hooks_of_accelerate_stay():
    accelerate = pytest.importorskip("accelerate")
    model, calls = block_models.build(block_models.llama)
    found = blocks.find(model)
    wanted, _ = own(model, found, calls)
    accelerate.cpu_offload(model, execution_device="cpu")
    left, hooked = marks(model), {name: vars(m).get("_hf_hook") for name, m in model.named_modules()}
    assert sum(hook is not None for hook in hooked.values()) > len(found)
    replay = Replay(model, found, calls, rows=1)
    for index, (name, module) in enumerate(replay.blocks):
        for sample in range(len(calls)):
            check_equal(flatten(replay.arguments(index, sample))[0], wanted[name, sample][0])
        replay.advance(index)
        assert all(p.is_meta for p in module.parameters())
    assert marks(model) == left
    assert {name: vars(m).get("_hf_hook") for name, m in model.named_modules()} == hooked


def out_of_memory(module, when, monkeypatch):
    """Let a module raise where `when(args, kwargs)` says so. Returns how often it did."""
    raised, forward = [], module.forward

    def failing(*args, **kwargs):
        if when(args, kwargs):
            raised.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", failing)
    return raised


def test_out_of_memory_moves_activations(monkeypatch):
    model, calls = block_models.build(block_models.llama)
    found, told = blocks.find(model), Told()
    wanted, _ = own(model, found, calls)
    cache = ActivationCache(room={torch.device("cpu"): 1 << 30})
    replay = Replay(model, found, calls, cache=cache, rows=1, events=told)
    replay.advance(0)
    assert cache.nbytes["device"] > 0 == cache.nbytes["host"]
    raised = out_of_memory(model.model.embed_tokens, lambda args, kwargs: not raised, monkeypatch)
    check_equal(flatten(replay.arguments(1, 2))[0], wanted["model.layers.1", 2][0])
    assert raised == [True] and cache.nbytes["device"] == 0 < cache.nbytes["host"]
    (event,) = told.of("out of memory")
    assert event["reaction"] == "moved to the host" and event["bytes"] == cache.nbytes["host"]


def test_out_of_memory_while_finding_out(monkeypatch):
    model, calls = block_models.build(block_models.llama)
    found, told = blocks.find(model), Told()
    cache = ActivationCache(room={torch.device("cpu"): 1 << 30})
    left = marks(model)
    raised = out_of_memory(model.model.layers[2], lambda args, kwargs: not raised, monkeypatch)
    assert len(Replay(model, found, calls, cache=cache, events=told).blocks) == 3
    assert raised == [True] and len(told.of("out of memory")) == 1
    monkeypatch.undo()
    assert marks(model) == left


def test_out_of_memory_in_a_block_takes_fewer_samples(monkeypatch):
    model, _ = block_models.build(block_models.llama)
    found, told, calls = blocks.find(model), Told(), [block_models.text(seed) for seed in range(8)]
    replay = Replay(model, found, calls, events=told)
    raised = out_of_memory(model.model.layers[0], lambda args, kwargs: len(args[0]) > 2, monkeypatch)
    (batch,) = replay.fetch(0, range(8), "cpu", True)
    assert batch.targets[0].shape == (8, 9, 64) and replay.rows == 2 and len(raised) == 2
    assert [event["rows"] for event in told.of("out of memory")] == [4, 2]
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[0](*batch.args, **batch.kwargs), batch.targets[0])


def test_out_of_memory_for_good_says_what_would_help(monkeypatch):
    model, calls = block_models.build(block_models.llama)
    replay = Replay(model, blocks.find(model), calls)
    replay.advance(0)
    left = marks(model)
    held = sum(replay.cache.nbytes.values())
    out_of_memory(model.model.embed_tokens, lambda args, kwargs: True, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError, match=rf"(?s)injected.*{held} bytes on the host.*seqlen=.*disk="):
        replay.arguments(1, 0)
    monkeypatch.undo()
    assert marks(model) == left


class Loop(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(block_models.Residual(5, False) for _ in range(3))

    def forward(self, x):
        if self.kind == "random":
            return self.layers[2](self.layers[1](nn.functional.dropout(self.layers[0](x), 0.5, training=True)))
        if self.kind == "fails":
            return self.layers[1](self.layers[0](x)) @ torch.zeros(7)
        x = self.layers[1](self.layers[0](x))
        return x if self.kind == "unused" else self.layers[0](x)


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("repeated", ValueError, r"'layers\.0' is called more than once.*blocks="),
        ("random", ValueError, r"arguments of 'layers\.1' come out differently.*blocks="),
        ("fails", RuntimeError, "size mismatch|shapes"),
    ],
)
def test_what_cannot_be_rebuilt_is_an_error(kind, error, text):
    torch.manual_seed(0)
    model = Loop(kind)
    left = marks(model)
    with pytest.raises(error, match=text):
        Replay(model, blocks.find(model), [block_models.call(block_models.noise(2, 5, seed=0))])
    assert marks(model) == left


def test_blocks_that_write_to_their_inputs_are_an_error():
    model, calls = block_models.build(block_models.long_skips)
    forward = model.in_blocks[1].forward
    model.in_blocks[1].forward = lambda x: forward(x.add_(1.0))
    with pytest.raises(ValueError, match=r"'in_blocks\.1' writes to the tensors.*blocks="):
        Replay(model, blocks.find(model), calls)


def test_blocks_that_are_not_called():
    model, told = Loop("unused"), Told()
    calls = [block_models.call(block_models.noise(2, 5, seed=0))]
    replay = Replay(model, blocks.find(model), calls, events=told)
    assert [name for name, _ in replay.blocks] == ["layers.0", "layers.1"]
    assert replay.uncalled == [("layers.2", model.layers[2])] and told.of("block is not called") == [
        {"block": "layers.2"}
    ]
    with pytest.raises(ValueError, match=r"no sample calls one of the blocks layers\.2"):
        Replay(model, [("layers.2", model.layers[2])], calls)
    with pytest.raises(ValueError, match="at least one sample"):
        Replay(model, blocks.find(model), [])
    with pytest.raises(ValueError, match=r"'layers\.1' are asked for before 'layers\.0' has run"):
        replay.arguments(1, 0)


def test_samples_of_several_kinds():
    """Blocks of the vision tower are called by samples with an image only."""
    model, calls = block_models.build(block_models.qwen3_vl)
    found = blocks.find(model, "all")
    wanted, _ = own(model, found, calls)
    replay = Replay(model, found, calls, rows=1)
    assert {replay.calls_block(0, sample) for sample in range(3)} == {True} and not replay.calls_block(0, 3)
    for index, (name, _) in enumerate(replay.blocks):
        samples = [sample for sample in range(4) if replay.calls_block(index, sample)]
        assert samples == [sample for sample in range(4) if (name, sample) in wanted]
        fetched = replay.fetch(index, range(4), "cpu")
        assert sorted(sample for batch in fetched for sample in batch.samples) == samples
        for sample in samples:
            check_equal(flatten(replay.arguments(index, sample))[0], wanted[name, sample][0])
        replay.advance(index)
    with pytest.raises(ValueError, match=r"sample 3 does not call 'model\.visual\.blocks\.0'"):
        replay.arguments(0, 3)


def test_training_mode_and_configuration_come_back():
    model, calls = block_models.build(block_models.bert)
    model.train()
    model.encoder.layer[1].eval()
    left = marks(model)
    replay = Replay(model, blocks.find(model), calls, rows=1)
    replay.advance(0)
    assert marks(model) == left
    model.eval()
    wanted, _ = own(model, blocks.find(model), calls)
    check_equal(flatten(replay.arguments(1, 0))[0], wanted["encoder.layer.1", 0][0])


# Which modules are blocks


def names(make, chosen=None):
    model, _ = block_models.build(make)
    return [name for name, _ in blocks.find(model, chosen)]


def test_blocks_of_families():
    assert names(block_models.llama) == [f"model.layers.{n}" for n in range(3)]
    assert names(block_models.gemma3n) == [f"model.layers.{n}" for n in range(6)]
    assert names(block_models.t5) == [f"{side}.block.{n}" for side in ("encoder", "decoder") for n in range(2)]
    assert names(block_models.qwen3_vl) == [f"model.language_model.layers.{n}" for n in range(4)]
    assert any(name.startswith("model.visual.blocks.") for name in names(block_models.qwen3_vl, "all"))
    assert names(block_models.diffusion) == [f"{kind}_blocks.{n}" for kind in ("double", "single") for n in range(2)]
    assert names(block_models.long_skips) == ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    assert names(block_models.plain) == [""], "linear layers are replaced in the module that holds them"
    assert [name for name, _ in blocks.find(nn.Linear(3, 3))] == [""]


def test_blocks_that_are_chosen():
    model, _ = block_models.build(block_models.diffusion)
    assert [name for name, _ in blocks.find(model, ["single_blocks", model.time])] == [
        "time",
        "single_blocks.0",
        "single_blocks.1",
    ]
    for chosen, text in (
        (["layers.0"], r"names 'layers\.0', which the model does not have; it has blocks such as double_blocks\.0"),
        ([nn.Linear(1, 1)], "holds Linear, which is no module of the model"),
        (["time", "time.1"], r"holds 'time\.1' and 'time', which contains it"),
        (["time.0"], r"holds 'time\.0', a linear layer"),
        ("time", "blocks is None, 'all', or a list of modules and their names, got 'time'"),
        (3, "got 3"),
    ):
        with pytest.raises(ValueError, match=text):
            blocks.find(model, chosen)


@pytest.mark.gpu
@family
def test_arguments_on_a_gpu(make):
    """Outputs in pinned memory and on the device, blocks and what is beside them on the GPU."""
    model, calls = block_models.build(make)
    model = model.cuda()
    parts = blocks.find(model)
    there = [block_models.call(*_cuda(call.args), **_cuda(call.kwargs)) for call in calls]
    wanted, _ = own(model, parts, there)
    for room in ({}, {torch.device("cuda", 0): 1 << 30}):
        replay = Replay(model, parts, calls, cache=ActivationCache(room=room), rows=1)
        for index, (name, _) in enumerate(replay.blocks):
            for sample in range(len(calls)):
                found = flatten(replay.arguments(index, sample))[0]
                for one, other in zip(found, wanted[name, sample][0], strict=True):
                    if isinstance(other, torch.Tensor):  # experts may add up in any order
                        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            replay.fetch(index, range(len(calls)), "cuda", True)
            replay.advance(index)
        replay.close()


def _cuda(value):
    return tree_map(lambda tensor: tensor.cuda(), value)


@pytest.mark.gpu
def test_out_of_memory_on_a_gpu_moves_what_is_beside_the_blocks(monkeypatch):
    model, calls = block_models.build(block_models.llama)
    found, told = blocks.find(model), Told()
    wanted, _ = own(model, found, calls)
    model.cuda()
    replay = Replay(model, found, calls, events=told)
    weight = model.model.embed_tokens.weight
    raised = out_of_memory(model.model.embed_tokens, lambda args, kwargs: args[0].is_cuda, monkeypatch)
    (batch,) = replay.fetch(0, [1], "cuda")
    assert raised and model.model.embed_tokens.weight is weight and weight.device.type == "cpu"
    assert [event["where"] for event in told.of("out of memory")] == ["beside the blocks"]
    assert batch.args[0].is_cuda
    torch.testing.assert_close(batch.args[0].cpu(), wanted["model.layers.0", 1][0][0])
    replay.advance(0, "cuda")
    replay.close()
    assert weight.is_cuda
