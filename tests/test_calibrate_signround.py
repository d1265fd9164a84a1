"""SignRound against its definition: values of QDQ and gradients of its parameters by `learned_oracle` (group by group,
float64 autograd), the block in float64, signs and rates written out here."""

import copy
import json

import learned_oracle
import pytest
import torch
from torch import nn

import tritonq as tq
from tritonq import ops
from tritonq.calibrate.leaves import gradient
from tritonq.calibrate.signround import Offsets, SignRound
from tritonq.calibrate.task import Batch, Layer, Task, squared_error
from tritonq.calibrate.trial import Trial
from tritonq.formats import get_format
from tritonq.nn.schemes import get_scheme
from tritonq.nn.select import sharing_key

HIDDEN, TOKENS = 16, 12
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A gated MLP with a residual; `up_proj` and `gate_proj` get the same input."""

    def __init__(self, hidden=HIDDEN, inner=32):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x, scale=1.0):
        h = self.norm(x)
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(h)) * self.up_proj(h)) * scale, "no tensor"


def block(seed=0, dtype=torch.float32, kind=Block, **arguments):
    torch.manual_seed(seed)
    return kind(**arguments).to(dtype).eval()


def inputs(samples=8, seed=1, dtype=torch.float32, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(hidden, hidden, generator=generator) / hidden**0.5 + torch.eye(hidden)
    return [(torch.randn(1, TOKENS, hidden, generator=generator) @ mix).to(dtype) for _ in range(samples)]


def layers(module, fmt, inputs_to=None):
    found = []
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            key = sharing_key(name, get_format(fmt))
            own = None if inputs_to is None else get_format(inputs_to)
            found.append(Layer(name, linear, "weight", get_format(fmt), own, key))
    return found


def task(module, fmt="int4_g16", data=None, masks=None, inputs_to=None, **options):
    """A task over samples that are put together where shapes agree; events are kept in `task.told`."""
    data = inputs(dtype=next(module.parameters()).dtype) if data is None else data
    told = []
    with torch.no_grad():
        targets = [module(x)[0] for x in data]

    def fetch(samples, device, with_targets):
        shapes = {}
        for i in samples:
            shapes.setdefault(tuple(data[i].shape), []).append(i)
        batches = []
        for members in shapes.values():
            own = [None] if masks is None else [torch.cat([masks[i] for i in members]).to(device)]
            batches.append(Batch(
                tuple(members), (torch.cat([data[i] for i in members]).to(device),), {"scale": 1.0},
                [torch.cat([targets[i] for i in members]).to(device)] if with_targets else [], own,
            ))  # fmt: skip
        return batches

    made = Task(
        "block.0", module, layers(module, fmt, inputs_to), len(data), fetch, CPU,
        lambda what, **details: told.append((what, details)), **options,
    )  # fmt: skip
    made.told = told
    return made


def run(method, module, *arguments, **options):
    """The task after `method`; the module is left as it was."""
    given = task(module, *arguments, **options)
    before = copy.deepcopy(module.state_dict())
    method.run(given)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    return given


def codes(given):
    return [{name: part.clone() for name, part in layer.result.items()} for layer in given.layers]


def same(one, other):
    return all(torch.equal(ops._bits(a[n]), ops._bits(b[n])) for a, b in zip(one, other, strict=True) for n in a)


def values(layer, parts=None):
    weight = layer.weight
    return ops.dequantize(parts or layer.result, layer.fmt, tuple(weight.shape), weight.dtype)


def loss_of(given, results=None, samples=None):
    """The mean of squared errors in float64 of the block with these results."""
    copied = copy.deepcopy(given.block)
    for i, layer in enumerate(given.layers):
        parts = layer.result if results is None else results[i]
        copied.get_submodule(layer.name).weight.data.copy_(values(layer, parts))
    copied = copied.double()
    total = count = 0.0
    for batch in given.fetch(range(given.samples) if samples is None else samples, CPU, True):
        with torch.no_grad():
            y = copied(batch.args[0].double())[0]
        difference = y - batch.targets[0].double()
        if batch.masks[0] is not None:
            difference = difference * batch.masks[0]
        total, count = total + float(difference.square().sum()), count + batch.count
    return total / count


# --------------------------------------------------------------------------------------------------------- definition


def definition(given, method, draws):
    """Signed gradient descent: every iteration's values of the weights and its loss, and the last values."""
    module = copy.deepcopy(given.block).double()
    weights = [layer.weight.detach() for layer in given.layers]
    v = [torch.zeros(w.shape, dtype=torch.float32) for w in weights]
    shapes = [layer.fmt.scale_shape(tuple(w.shape)) for layer, w in zip(given.layers, weights, strict=True)]
    low, high = ([torch.ones(shape) for shape in shapes] for _ in range(2))
    divisors = [None] * len(weights)
    if given.layers[0].fmt.tensor_scale:
        own = [float(learned_oracle.oracle.choose_tensor_scale(w.numpy(), given.layers[0].fmt)) for w in weights]
        sets = [layer.shared or layer.name for layer in given.layers]
        divisors = [min(d for d, s in zip(own, sets, strict=True) if s == mine) for mine in sets]

    def qdq(i, dy):
        ratios = {"min_scale": low[i], "max_scale": high[i]} if method.tune_ratios else {}
        return learned_oracle.qdq(
            weights[i], given.layers[i].fmt, dy, v=v[i], tensor_scale=divisors[i], **ratios
        )  # fmt: skip

    history, sums = [], [0.0] * len(weights)
    for step, samples in enumerate([*draws, None]):
        found = [qdq(i, torch.zeros_like(w)).y for i, w in enumerate(weights)]
        if samples is None:
            return history, found
        leaves = []
        for layer, y in zip(given.layers, found, strict=True):
            linear = module.get_submodule(layer.name)
            linear.weight = nn.Parameter(y.clone())
            leaves.append(linear.weight)
        x = torch.cat([given.data[i] for i in samples]).double()
        target = torch.cat([given.targets[i] for i in samples]).double()
        loss = (module(x)[0] - target).square().mean()
        history.append((loss.item(), found))
        gradients = torch.autograd.grad(loss, leaves)
        rate = (1 - step / method.iters) * method.lr
        for i, dy in enumerate(gradients):
            sums[i] = method.momentum * sums[i] + dy
            of = qdq(i, (sums[i] * 1e6).to(torch.float32))
            v[i] = (v[i] - rate * of.v.sign().float()).clamp(-0.5, 0.5)
            if method.tune_ratios:
                low[i] = (low[i] - rate * of.min_scale.sign().float()).clamp(0, 1)
                high[i] = (high[i] - rate * of.max_scale.sign().float()).clamp(0, 1)
    return None


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("fmt", ["int4_g16", "int4_g16_asym", "mxfp4", "nvfp4", "fp8_e4m3_channel", "q4_k"])
def test_codes_are_those_of_the_definition(fmt, momentum):
    """Five iterations over all samples: best and last values are those of the definition; so is what is kept."""
    module, data = block(inner=16), inputs(4)
    given = task(module, fmt, data, search=False)
    method = SignRound(iters=5, lr=0.02, batch=4, momentum=momentum, evaluation=None, start="rule")
    given.data, given.targets = data, [given.fetch([i], CPU, True)[0].targets[0] for i in range(4)]
    history, last = definition(given, method, [[0, 1, 2, 3]] * 5)
    method.run(given)
    ((_, told),) = given.told
    best = min(range(5), key=lambda i: history[i][0])
    assert told["best_iteration"] == best > 0 and told["iterations"] == 5
    assert told["loss_before"] == pytest.approx(history[0][0], rel=1e-4)
    assert told["kept"] in ("best", "last")
    for layer, expected in zip(given.layers, history[best][1] if told["kept"] == "best" else last, strict=True):
        assert torch.equal(values(layer).double(), expected.reshape(layer.weight.shape)), layer.name
    assert told["loss_after"] == pytest.approx(loss_of(given), rel=1e-4)
    assert told["loss_after"] < told["loss_before"]


@pytest.mark.parametrize("fmt", ["int4_g16_asym", "mxfp4_even"])
@pytest.mark.parametrize("v_dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_changes_no_bit(fmt, v_dtype):
    """In tiles of the CPU path sums of groups are the same ones."""
    both = [
        run(SignRound(iters=4, lr=0.02, v_dtype=v_dtype, fused=fused), block(), fmt, search=False)
        for fused in (True, False)
    ]
    assert same(*map(codes, both))
    assert both[0].told[0][1]["kept"] != "nearest"


def test_offsets_alone():
    given = run(SignRound(iters=4, lr=0.02, tune_ratios=False, evaluation=None), block(), search=False)
    for layer in given.layers:
        assert torch.equal(layer.result["scale"], ops.quantize(layer.weight, layer.fmt)["scale"])
    assert loss_of(given) < given.told[0][1]["loss_before"]


def test_bytes_do_not_depend_on_the_run_and_follow_the_seed():
    first, again, other = (
        codes(run(SignRound(iters=4, lr=0.02, batch=2), block(), seed=seed, search=False)) for seed in (3, 3, 4)
    )
    assert same(first, again) and not same(first, other)


def test_samples_are_drawn_without_repetition():
    """Five samples in batches of two: four different ones, then all anew."""
    given = task(block(), data=inputs(5), micro_batch=2)
    asked, fetch = [], given.fetch

    def spy(samples, device, targets):
        asked.append(tuple(samples))
        return fetch(samples, device, targets)

    given.fetch = spy
    SignRound(iters=4, batch=2, evaluation=1, start="rule").run(given)
    drawn = [s for s in asked if len(s) == 2]
    assert len(drawn) == 4
    for pair in (drawn[:2], drawn[2:]):
        assert len({i for s in pair for i in s}) == 4
    assert drawn[:2] != drawn[2:]


def test_samples_of_an_iteration_by_their_tokens():
    """Enough for 4096 tokens, two to eight of them, and never more than there are."""
    for tokens, samples, expected in ((12, 9, 8), (600, 9, 7), (4000, 3, 2), (12, 3, 3)):
        given = run(SignRound(iters=1, evaluation=1), block(), data=[torch.ones(1, tokens, HIDDEN)] * samples)
        assert given.told[-1][1]["batch"] == expected


@pytest.mark.parametrize("ragged", [False, True])
def test_micro_batches_add_up(ragged):
    """Cut into pieces, the gradient is that of the whole batch; of samples of different lengths, and of padding that
    does not count, too."""
    data = inputs(6)
    if ragged:
        data[1], data[4] = data[1][:, :7], data[4][:, :5]
    masks = [torch.ones(1, x.shape[1], 1) for x in data]
    masks[0][:, 6:] = 0
    found = []
    for micro in (6, 4, 1):
        given = run(
            SignRound(iters=3, lr=0.02, batch=6, evaluation=None), block(), data=data, masks=masks, micro_batch=micro
        )
        assert given.told[0][1]["loss_after"] == pytest.approx(loss_of(given), rel=1e-4)
        found.append((given.told[0][1]["loss_before"], given.told[0][1]["loss_after"]))
    for before, after in found[1:]:
        assert before == pytest.approx(found[0][0], rel=1e-5)
        assert after == pytest.approx(found[0][1], rel=0.02)  # a sign of a sum near 0 may differ


def test_padding_does_not_count():
    """What lies under the mask changes nothing, however large."""
    masks = [torch.ones(1, TOKENS, 1) for _ in range(8)]
    for mask in masks:
        mask[:, 8:] = 0
    results = []
    for factor in (1.0, 100.0):
        data = [torch.cat([x[:, :8], x[:, 8:] * factor], 1) for x in inputs()]
        results.append(codes(run(SignRound(iters=3, lr=0.02), block(), data=data, masks=masks, search=False)))
    assert same(*results)


# ------------------------------------------------------------------------------------------------------ what is chosen


def test_never_worse_than_rounding_to_nearest_with_search():
    """A rate that ruins everything: what is left is what a layer without a result would get."""
    method = SignRound(iters=2, lr=0.5, min_scale_lr=0.9, batch=1, evaluation=None)
    given = run(method, block(), "int4_g16")
    ((_, told),) = given.told
    assert told["kept"] == "nearest" and told["loss_after"] == told["loss_nearest"]
    expected = [ops.quantize(layer.weight, layer.fmt, search="mse") for layer in given.layers]
    assert same(codes(given), expected)


def test_losses_that_are_told():
    given = run(SignRound(iters=8, lr=0.04, evaluation=None, start="search"), block(), "int3_g16")
    ((what, told),) = given.told
    assert what == "tuned" and told["block"] == "block.0" and told["seconds"] > 0
    rule = [ops.quantize(layer.weight, layer.fmt) for layer in given.layers]
    nearest = [ops.quantize(layer.weight, layer.fmt, search="mse") for layer in given.layers]
    assert told["loss_before"] == pytest.approx(loss_of(given, rule), rel=1e-4)
    assert told["loss_nearest"] == pytest.approx(loss_of(given, nearest), rel=1e-4)
    assert told["loss_after"] == pytest.approx(loss_of(given), rel=1e-4)
    assert told["loss_after"] < told["loss_nearest"] < told["loss_before"]


@pytest.mark.parametrize("fmt", ["int4_g16", "int4_g16_asym", "mxfp4_even", "nvfp4", "fp8_e4m3_channel"])
def test_starting_where_the_search_ends(fmt):
    """Before the first step the block computes with the searched scales, at least where they are not larger."""
    given = task(block(), fmt)
    method = SignRound(iters=1, start="search", lr=0.0)
    seen = []

    def fetch(samples, device, targets, fetch=given.fetch):
        seen.append([layer.weight for layer in given.layers])
        return fetch(samples, device, targets)

    given.fetch = fetch
    method.run(given)
    ((_, told),) = given.told
    for layer in given.layers:
        rule, searched = (ops.quantize(layer.weight, layer.fmt, search=search)["scale"].float().abs()
                          for search in (None, "mse"))  # fmt: skip
        if told["kept"] != "nearest":
            wanted = torch.minimum(rule, searched)
            assert torch.equal(layer.result["scale"].float().abs(), wanted)
    assert told["kept"] != "nearest" or told["loss_nearest"] <= told["loss_before"]


def test_patience():
    given = run(SignRound(iters=50, lr=1e-7, patience=3, evaluation=1), block(), data=inputs(1))
    ((_, told),) = given.told
    assert told["best_iteration"] == 0 and told["iterations"] == 4


# ------------------------------------------------------------------------------------------------------ out of memory


class Full(torch.autograd.Function):
    """Runs out of memory in backward."""

    @staticmethod
    def forward(ctx, x, check):
        ctx.check = check
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.check()
        return dy, None


class Limited(Block):
    """Takes at most `limit` samples a call, in forward or in backward."""

    def __init__(self, limit=8, where="forward", **arguments):
        super().__init__(**arguments)
        self.limit, self.where, self.calls = limit, where, []

    def forward(self, x, scale=1.0):
        samples = len(x)
        if torch.is_grad_enabled():
            self.calls.append(samples)

        def check():
            if samples > self.limit:
                raise torch.OutOfMemoryError(f"injected: {samples} samples")

        if self.where == "forward":
            check()
        y, *rest = super().forward(x, scale)
        return (Full.apply(y, check) if y.requires_grad else y), *rest


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_the_micro_batch(where):
    """Results have the bytes of a run that began with what fits."""
    method = SignRound(iters=3, lr=0.02, batch=8, evaluation=None)
    expected = run(method, block(), search=False, micro_batch=2)
    module = block(kind=Limited, where=where)
    given = task(module, search=False, micro_batch=8)
    module.limit = 3
    method.run(given)
    assert same(codes(given), codes(expected)) and given.micro_batch == 2
    told = [details for what, details in given.told if what == "out of memory"]
    assert [one["micro_batch"] for one in told] == [4, 2] and told[0]["block"] == "block.0"
    assert given.told[-1][1]["loss_after"] == expected.told[-1][1]["loss_after"]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_out_of_memory_in_the_middle_repeats_the_iteration():
    """Two iterations in pieces of 4 and three in pieces of 2: the same samples, none lost, none twice."""
    module = block(kind=Limited, where="backward")
    given = task(module, search=False, micro_batch=4)
    asked, fetch = [], given.fetch

    def spy(samples, device, targets):
        if len(module.calls) == 5:
            module.limit = 2  # from the second call of the third iteration on
        asked.append(tuple(samples))
        return fetch(samples, device, targets)

    given.fetch = spy
    method = SignRound(iters=5, lr=0.02, batch=8, evaluation=None)
    method.run(given)
    assert [what for what, _ in given.told] == ["out of memory", "tuned"]
    assert module.calls.count(4) == 6 and module.calls.count(2) == 12
    drawn = asked[2:-8]  # between what was judged before and after
    third = drawn[4:6]
    assert third[0] + third[1] == sum(drawn[6:10], ()) and sorted(third[0] + third[1]) == list(range(8))
    reference = run(method, block(), search=False, micro_batch=4)
    assert given.told[-1][1]["loss_after"] == pytest.approx(reference.told[-1][1]["loss_after"], rel=0.05)


def test_out_of_memory_with_one_sample():
    """First what can go to the host goes there, and says so; then the error has the numbers and what would help."""
    module = block(kind=Limited)
    given = task(module, micro_batch=2)
    module.limit = 0
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError, match=r"block\.0 .*GiB.*seqlen.*v_dtype=torch\.bfloat16.*injected: 1"):
        SignRound(iters=2).run(given)
    told = [details for _, details in given.told]
    assert told[0]["micro_batch"] == 1 and "host" in told[1]["reaction"]
    assert all(layer.result is None for layer in given.layers)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_what_was_moved_to_the_host_is_still_the_best():
    module = block(kind=Limited, where="backward")
    given = task(module, search=False, micro_batch=1)
    told, count = given.told, []

    def check(samples, device, targets, fetch=given.fetch):
        if torch.is_grad_enabled():
            count.append(1)
            module.limit = 0 if len(count) == 10 else 8  # once, in the second iteration
        return fetch(samples, device, targets)

    given.fetch = check
    method = SignRound(iters=4, lr=0.02, batch=8, evaluation=None)
    method.run(given)
    assert "host" in told[0][1]["reaction"] and same(
        codes(given), codes(run(method, block(), search=False, micro_batch=1))
    )


# ------------------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("ragged", [False, True])
def test_two_devices_give_the_bytes_of_one(ragged):
    """Two replicas, on the CPU, of an odd number of pieces."""
    data = inputs(6)
    if ragged:
        data[1], data[4] = data[1][:, :7], data[4][:, :5]
    method = SignRound(iters=4, lr=0.02, batch=5, evaluation=None)
    module = block()
    expected = run(method, module, data=data, search=False, micro_batch=2)
    found = run(method, module, data=data, search=False, micro_batch=2, devices=(CPU, CPU))
    assert same(codes(expected), codes(found)) and expected.told[0][1]["kept"] != "nearest"
    assert found.told[0][1]["loss_after"] == expected.told[0][1]["loss_after"]


def test_every_device_has_a_share():
    """Calls are no larger than a device's share of a batch, nor than the batch."""
    for devices, expected in (((), 4), ((CPU, CPU), 2), ((CPU,) * 3, 2)):
        module = block(kind=Limited)
        run(SignRound(iters=2, batch=4, evaluation=1), module, micro_batch=8, devices=devices)
        assert max(module.calls) == expected


def test_replicas_share_what_they_can():
    """A copy of the block on the same device has no copy of a weight."""
    given = task(block(), devices=(CPU, CPU))
    with Trial(given) as trial:
        first, second = trial.replicas
        assert second.block is not first.block
        own = {t.data_ptr() for t in (*first.block.parameters(), *first.leaves)}
        assert {t.data_ptr() for t in (*second.block.parameters(), *second.leaves)} <= own
        assert all(one is not other for one, other in zip(first.leaves, second.leaves, strict=True))


# ------------------------------------------------------------------------------------------------------------- memory


def test_backward_keeps_rounded_weights_and_inputs_of_layers():
    """Beside what the dense block would keep: of the size of a weight the leaves, of the size of outputs one
    difference."""
    module = block(inner=32)
    given = task(module, "int4_g16")
    weights = {layer.weight.numel() for layer in given.layers}
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with Trial(given) as trial:
        for leaf, layer in zip(trial.leaves, given.layers, strict=True):
            leaf.detach().copy_(layer.weight)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            trial.run(range(8), True)
            storages = {t.untyped_storage().data_ptr() for t in kept if t.numel() in weights}
            assert storages <= {leaf.untyped_storage().data_ptr() for leaf in trial.leaves}
            ours = len({t.untyped_storage().data_ptr() for t in kept if t.numel() == 8 * TOKENS * HIDDEN})
        gradients = [leaf.grad for leaf in trial.leaves]
        assert all(g.dtype is torch.float32 and g.shape == leaf.shape
                   for g, leaf in zip(gradients, trial.leaves, strict=True))  # fmt: skip
    kept.clear()
    dense = copy.deepcopy(module).requires_grad_(False)
    for layer in given.layers:
        dense.get_submodule(layer.name).weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dense(torch.cat([given.fetch([i], CPU, False)[0].args[0] for i in range(8)]))
    plain = len({t.untyped_storage().data_ptr() for t in kept if t.numel() == 8 * TOKENS * HIDDEN})
    assert ours == plain + 1


# ------------------------------------------------------------------------------------------------- inputs of layers


@pytest.mark.parametrize("scheme", ["W8A8", "MXFP4", "NVFP4", "FP8"])
def test_inputs_are_rounded_as_at_run_time(scheme):
    """The loss is that of the model that `quantize_` leaves, with the same weights."""
    own = get_scheme(scheme)
    module = block()
    fmt, to = own.weight_format(torch.float32), own.input_format
    given = run(SignRound(iters=2, lr=0.02, evaluation=None), module, fmt.name, inputs_to=to.name, search=False)
    copied = copy.deepcopy(module)
    tq.quantize_(copied, scheme, search=False, progress=False)
    total = 0.0
    for batch in given.fetch(range(8), CPU, True):
        with torch.no_grad():
            total += float(squared_error([copied(*batch.args)[0]], batch)) / batch.count
    assert given.told[0][1]["loss_before"] == pytest.approx(total, rel=1e-3)


def test_layers_with_one_input_round_it_once(monkeypatch):
    count = []
    monkeypatch.setattr("tritonq.calibrate.trial.qdq", lambda x, *a, **k: count.append(x.shape) or x)
    with Trial(task(block(), "nvfp4", inputs_to="nvfp4")) as trial:
        trial.run([0], True)
    assert [shape[-1] for shape in count] == [HIDDEN, 32]


# ------------------------------------------------------------------------------------------------------------ experts


class Experts(nn.Module):
    """Fused weights, picked one by one or multiplied all at once."""

    def __init__(self, picked, experts=4, hidden=HIDDEN, inner=16):
        super().__init__()
        self.picked = picked
        self.up_proj = nn.Parameter(torch.randn(experts, inner, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) / inner**0.5)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if self.picked:
            out = torch.zeros_like(hidden_states)
            for e in top_k_index.unique():
                rows, slots = torch.where(top_k_index == e)
                h = torch.nn.functional.silu(torch.nn.functional.linear(hidden_states[rows], self.up_proj[e]))
                y = torch.nn.functional.linear(h, self.down_proj[e]) * top_k_weights[rows, slots, None]
                out = out.index_add(0, rows, y)
            return out
        h = torch.nn.functional.silu(torch.einsum("tk,enk->ten", hidden_states, self.up_proj.transpose(1, 2).mT))
        y = torch.einsum("ten,ekn->tek", h, self.down_proj)
        gates = torch.zeros(*top_k_index.shape[:1], y.shape[1]).scatter(1, top_k_index, top_k_weights)
        return (y * gates[..., None]).sum(1)


class Mixture(nn.Module):
    """The expert of a token is the largest of its first three numbers; the fourth expert gets only huge ones."""

    def __init__(self, picked=True):
        super().__init__()
        self.experts = Experts(picked)

    def forward(self, x, scale=1.0):
        flat = x.reshape(-1, x.shape[-1])
        index = flat[:, :3].argmax(1, keepdim=True)
        index = torch.where(flat[:, 3:4] > 1e3, 3, index)
        return (x + self.experts(flat, index, torch.ones(len(flat), 1)).reshape(x.shape),)


def mixture(picked=True, **options):
    module = block(kind=Mixture, picked=picked)
    made = task(module, data=inputs(8), search=False, **options)
    made.layers = [Layer(f"experts.{key}", module.experts, key, get_format("int4_g16"))
                   for key in ("up_proj", "down_proj")]  # fmt: skip
    return made


def test_experts_without_tokens_stay_rounded_to_nearest():
    given = mixture()
    SignRound(iters=4, lr=0.02, evaluation=None).run(given)
    index = torch.cat([x.reshape(-1, HIDDEN)[:, :3].argmax(1) for x in inputs(8)])
    expected = [*torch.bincount(index, minlength=3).tolist(), 0]
    assert given.told[0][1]["kept"] != "nearest"
    for layer in given.layers:
        assert layer.notes["tokens"] == expected and layer.notes["fallback"] == [3]
        nearest = ops.quantize(layer.weight, layer.fmt)
        changed = [not torch.equal(layer.result["qdata"][e], nearest["qdata"][e]) for e in range(4)]
        assert changed == [True, True, True, False]
        assert torch.equal(layer.result["scale"][3], nearest["scale"][3])


def test_experts_have_no_momentum():
    """One that no token of the next samples reaches would go on in the direction of the last ones."""
    given = mixture()
    with Trial(given) as trial:
        method = SignRound(iters=4, momentum=0.9)
        one = Offsets(method, given, given.layers[0], trial.leaves[0], None)
        for leaf, layer in zip(trial.leaves, given.layers, strict=True):
            leaf.detach().copy_(layer.weight * 1.1)
        trial.run([0], True)
        one.step(method.rates(CPU), True, method.momentum)
        assert one.leaf.grad is None and one.v.any()


def test_what_overflowed_does_not_stay():
    """In fp16 an infinite gradient costs an iteration, not the rest of them."""
    given = task(block(dtype=torch.float16))
    with Trial(given) as trial:
        method = SignRound(iters=4)
        one = Offsets(method, given, given.layers[0], trial.leaves[0], None)
        for leaf, layer in zip(trial.leaves, given.layers, strict=True):
            leaf.detach().copy_(layer.weight * 1.1)
        trial.run([0], True)
        finite = one.leaf.grad.clone()
        one.leaf.grad[0, 0], one.leaf.grad[1, 1] = torch.inf, torch.nan
        one.step(method.rates(CPU), True, method.momentum)
        left = gradient(one.leaf)
        assert float(left[0, 0]) == float(left[1, 1]) == 0
        assert torch.equal(left[2:], finite[2:] * method.momentum) and finite[2:].any()


def test_experts_picked_one_by_one_and_all_at_once():
    """Gradients by `weight[e]` are those of one product; what autograd keeps of the size of all experts is one leaf
    each."""
    found = []
    for picked in (True, False):
        given = mixture(picked)
        with Trial(given) as trial:
            for leaf, layer in zip(trial.leaves, given.layers, strict=True):
                leaf.detach().copy_(layer.weight * 1.01)
            trial.run(range(8), True)
            found.append([leaf.grad.clone() for leaf in trial.leaves])
    for one, other in zip(*found, strict=True):
        assert float(one[:3].abs().sum()) > 0 and not one[3].any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_experts_on_two_devices():
    one, two = mixture(), mixture(devices=(CPU, CPU))
    for given in (one, two):
        given.micro_batch = 2
        SignRound(iters=3, lr=0.02, batch=6).run(given)
    assert same(codes(one), codes(two)) and two.layers[0].notes == one.layers[0].notes


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "value"),
    [("iters", 0), ("batch", 0), ("patience", 0), ("evaluation", 0), ("v_dtype", torch.float16),
     ("start", "middle"), ("lr", -1.0)],
)  # fmt: skip
def test_options_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{value}"):
        SignRound(**{name: value})


def test_nothing_to_tune():
    given = task(block())
    given.layers = []
    SignRound().run(given)
    assert given.told == []


def test_half_precision():
    """The gradient of a mean would be below what fp16 can hold."""
    module, data = block(dtype=torch.float16), [x * 1e-3 for x in inputs(dtype=torch.float16)]
    module.down_proj.weight.data *= 2e-3
    given = run(SignRound(iters=8, lr=0.02, evaluation=None), module, "int3_g16", data, search=False)
    ((_, told),) = given.told
    assert 2 * told["loss_before"] ** 0.5 / (8 * TOKENS * HIDDEN) < 2.0**-25
    assert told["loss_after"] < 0.97 * told["loss_before"]


def test_benchmark_of_a_block(tmp_path, monkeypatch):
    """`bench.calibrate_block`, tiny and on the CPU, without the package that it compares with."""
    pytest.importorskip("transformers")
    calibrate_block = pytest.importorskip("bench.calibrate_block")
    sizes = {"hidden": 128, "inner": 128, "heads": 4, "samples": 6, "tokens": 8, "iters": 8, "rows": 3}
    words = [word for name, number in sizes.items() for word in (f"--{name}", str(number))]
    monkeypatch.setattr("sys.argv", ["", "--device", "cpu", *words, "--peers", "--out", str(tmp_path / "rows.json")])
    assert calibrate_block.main() == 0
    row, whole = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["batch"] == 6 and 0 < row["loss"] < row["loss_rule"]
    assert row["kept"] == "nearest" or row["loss"] < row["loss_search"]
    assert 0 < whole["loss"] < row["loss_rule"] and whole["seconds_with_passes"] > 0


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """Beside the weight: rounded values, their gradient, offsets of four bytes, codes twice and once more while they
    are chosen."""
    device = torch.device("cuda", torch.cuda.current_device())
    weight = 2 * 8192 * 8192
    module = nn.Linear(8192, 8192, bias=False, dtype=torch.bfloat16, device=device)
    x = torch.randn(4, 8192, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        target = module(x)
    batch = Batch((0,), (x,), {}, [target], [None])
    layer = Layer("", module, "weight", get_format("int4_g128"))
    for iters in (2, 3):  # the first compiles, and has cuBLAS take its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        given = Task("b", module, [layer], 1, lambda *_: [batch], device, lambda what, **d: None, search=False)
        SignRound(iters=iters).run(given)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
        layer.result = None
    assert extra <= 5.1 * weight


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["int4_g32", "mxfp4", "nvfp4"])
def test_on_a_gpu(fmt):
    """bf16, inputs in pinned memory, two replicas on one GPU: the same bytes in every run, on one and on two."""
    device = torch.device("cuda", torch.cuda.current_device())
    results = []
    for devices in ((device,), (device,), (device, device)):
        module = block(dtype=torch.bfloat16, hidden=64, inner=128).to(device)
        data = [x.pin_memory() for x in inputs(16, dtype=torch.bfloat16, hidden=64)]
        with torch.no_grad():
            targets = [module(x.to(device))[0].cpu().pin_memory() for x in data]

        def fetch(samples, device, wanted, data=data, targets=targets):
            x, t = (torch.cat([all_of[i].to(device, non_blocking=True) for i in samples]) for all_of in (data, targets))
            return [Batch(tuple(samples), (x,), {"scale": 1.0}, [t], [None])]

        given = Task(
            "b", module, layers(module, fmt), 16, fetch, device, lambda what, **d: None, devices, micro_batch=2
        )
        SignRound(iters=20, batch=8).run(given)
        results.append([{name: part.cpu() for name, part in parts.items()} for parts in codes(given)])
    assert same(results[0], results[1]) and same(results[0], results[2])
