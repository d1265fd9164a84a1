"""Sums of gradients in leaves, against autograd's gradients in float64."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional

from tritonq.calibrate.leaves import Leaf, decay, forget, gradient, leaf_of

USES = {
    "linear": lambda x, w: functional.linear(x, w),
    "named": lambda x, w: functional.linear(input=x, weight=w),
    "bias": lambda x, w: functional.linear(x, w, torch.ones(w.shape[0], dtype=w.dtype)),
    "vector": lambda x, w: functional.linear(x[0, 0], w),
    "view": lambda x, w: x @ w.T,
    "both": lambda x, w: functional.linear(x, w) + (x @ w.T).square(),
    "twice": lambda x, w: functional.linear(x, w) * functional.linear(x.flip(0), w),
    "after": lambda x, w: functional.linear(functional.linear(x, w) @ torch.ones(w.shape, dtype=w.dtype), w),
}
SMALL = (6, 5)  # N, K


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sums_are_those_of_autograd(use, intercept, momentum):
    """Three steps of two calls; in the second step the leaf is not used."""
    values = draw(*SMALL)
    leaf, expected = leaf_of(values.clone(), intercept), torch.zeros(SMALL, dtype=torch.float64)
    for step in range(3):
        expected = expected * momentum
        for call in range(2) if step != 1 else ():
            x = draw(3, 4, SMALL[1], seed=10 * step + call)
            own = values.clone().requires_grad_()
            expected = expected + torch.autograd.grad(USES[use](x, own).square().sum(), own)[0]
            y = USES[use](x, leaf)
            assert type(y) is torch.Tensor
            y.square().sum().backward()
        found = gradient(leaf)
        if found is None:
            assert step == 1 and not momentum
        else:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        decay(leaf, momentum)
    forget(leaf)
    assert gradient(leaf) is None


def test_gradients_of_inputs():
    values, x = draw(*SMALL), draw(2, 3, SMALL[1], seed=1)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    functional.linear(one, leaf_of(values.clone())).square().sum().backward()
    functional.linear(other, values).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=0)


def test_experts_decay_as_well():
    values, x = draw(3, *SMALL), draw(4, SMALL[1], seed=1)
    leaf = leaf_of(values.clone())
    for _ in range(2):
        functional.linear(x, leaf[1]).sum().backward()
        found = gradient(leaf).clone()
        decay(leaf, 0.5)
    one = torch.ones(4, SMALL[0], dtype=torch.float64).T @ x
    torch.testing.assert_close(found[1], 1.5 * one, rtol=1e-12, atol=0)
    assert not found[0].any() and not found[2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_is_left_to_autograd(dtype):
    """Its products are of another dtype than a leaf in fp32."""
    leaf, x = leaf_of(draw(*SMALL).float()), draw(4, SMALL[1], seed=1).to(dtype)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = functional.linear(x, leaf)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        found = gradient(leaf).clone()
        decay(leaf, 0.5)
    torch.testing.assert_close(found, 1.5 * torch.ones(4, SMALL[0]).T @ x.float(), rtol=0.02, atol=0.02)


def test_the_first_call_of_a_step_rounds_once_and_later_ones_as_autograd():
    """In bf16: m g + d is rounded once; a second d is rounded before it is added, on whichever device it came to be."""
    leaf, x = leaf_of(draw(*SMALL).bfloat16()), [draw(64, SMALL[1], seed=s).bfloat16() for s in range(3)]
    dy = torch.ones(64, SMALL[0], dtype=torch.bfloat16)
    found = []
    for one in x[:2]:
        functional.linear(one, leaf).sum().backward()
        found.append(gradient(leaf).clone())
        decay(leaf, 0.5)
    exact = 0.5 * found[0].double() + dy.double().T @ x[1].double()
    error = (found[1].double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 1e-5).all())
    functional.linear(x[0], leaf).sum().backward()  # settles: half of it
    before = gradient(leaf).clone()
    functional.linear(x[2], leaf).sum().backward()
    assert torch.equal(gradient(leaf), before + dy.T.mm(x[2]))


def test_leaves_go_with_their_last_reference():
    """The hook does not hold them: they are as large as the weights."""
    leaf = leaf_of(torch.zeros(SMALL))
    functional.linear(torch.ones(2, SMALL[1]), leaf).sum().backward()
    seen = weakref.ref(leaf)
    gc.disable()
    try:
        del leaf
        assert seen() is None
    finally:
        gc.enable()


def test_without_gradients_nothing_is_intercepted():
    leaf = leaf_of(draw(*SMALL))
    with torch.no_grad():
        y = functional.linear(draw(2, SMALL[1], seed=1), leaf)
    assert type(y) is torch.Tensor and not y.requires_grad
    assert isinstance(leaf, Leaf) and type(leaf.detach()) is torch.Tensor
