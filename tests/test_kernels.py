"""Claims about attention mass from a kernel's log-sum-exp: what is faster is also the same (parts/kernels.py)."""

from dataclasses import replace

import pytest
import torch
from made import off

import aia
import data
import model
from parts.kernels import KERNELS, PASSED, attention_and_mass, span, try_lse

T, C, P, W = 24, data.TEXT, data.PADDING, data.ANSWER
# Roles of three samples: of generation with prompts of different length, the last with an empty prompt; of
# understanding with two turns and padding on the right, and the last without a picture.
ROLES = {"gen": [[C] * 6 + [data.DRAWN] * 18, [C] * 3 + [data.DRAWN] * 15 + [P] * 6, [data.DRAWN] * 20 + [P] * 4],
         "und": [[C] * 2 + [data.IMAGE] * 8 + [C] * 3 + [W] * 4 + [C] * 2 + [W] * 5,
                 [data.IMAGE] * 4 + [W] * 5 + [data.IMAGE] * 4 + [C] * 2 + [W] * 3 + [P] * 6, [C] * 9 + [W] * 15]}


def heads(groups, dtype, device, tokens=T, samples=3):
    """q of 4 heads, k and v of some groups, two random directions, all drawn in float32."""
    found, faults = try_lse(device, dtype, 4, groups, 8, T)
    if not found:                                   # a CPU has one, so there a wrong formula must not pass as its lack
        assert torch.device(device).type != "cpu", faults
        pytest.skip(f"{device} has no kernel with a log-sum-exp for {dtype}")
    g = torch.Generator().manual_seed(0)
    *inputs, w = (torch.randn(samples, n, tokens, 8, generator=g).to(device, dtype) for n in (4, groups, groups, 4))
    return [x.requires_grad_() for x in inputs], w, torch.randn(samples, 4, tokens, generator=g).to(device, dtype)


def result_of(attend, inputs, w, u, condition, queries, rectangle=None):
    """Out, mass of the queries, and gradients of a random function of both."""
    out, mass = attend(*inputs, None, condition, rectangle)
    mass = mass * queries[..., None, :]
    loss = (out * w).to(torch.float64).sum() + 3 * (mass * u).to(torch.float64).sum()
    return [out.detach(), mass.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("task", aia.TASKS)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_mass_from_log_sum_exp_is_that_of_the_written_out_softmax(dtype, close, groups, task, device):
    """Out, mass and gradients in each precision, with shared heads, several turns, padding, and samples without a key;
    in bfloat16 no further off than the flag channel by half."""
    condition, queries = data.spans(torch.tensor(ROLES[task], device=device), task)
    rectangle = *span(queries), *span(condition)
    assert not condition[2].any() and queries[2].any()
    inputs, w, u = heads(groups, dtype, device)
    exact = result_of(model.attend_explicit, [x.detach().double().requires_grad_() for x in inputs], w.double(),
                      u.double(), condition, queries)
    channel = result_of(model.attend_fused, inputs, w, u, condition, queries)
    for name, got, right, rival in zip(("out", "mass", "q", "k", "v"), result_of(
            model.attend_lse, inputs, w, u, condition, queries, rectangle), exact, channel, strict=True):
        assert got.isfinite().all() and off(got, right) < max(close, 1.5 * off(rival, right)), (name, off(got, right))


def two_conditions(device):
    """Two that overlap in part, the first with holes and the second without a key in the last sample, the queries of
    each (2, B, T), and their rectangles, of which the second has keys that come after a row."""
    place = torch.arange(T, device=device).expand(3, -1)
    conditions = torch.stack([(place < 10) & (place % 4 != 1), (place >= 6) & (place < 15)])
    conditions[1, 2] = False
    queries = torch.stack([place >= 12, (place >= 9) & (place < 21)])
    return conditions, queries, tuple((*span(q), *span(c)) for q, c in zip(queries, conditions, strict=True))


def one_by_one(q, k, v, visible, conditions, rectangles):
    """A written-out softmax for each condition, each as if it were alone."""
    results = [model.attend_explicit(q, k, v, visible, condition) for condition in conditions]
    return results[0][0], torch.stack([mass for _, mass in results])


@pytest.mark.parametrize("attend", [model.attend_explicit, model.attend_fused, model.attend_lse])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_two_conditions_in_one_pass_are_those_of_a_pass_each(dtype, close, groups, attend, device):
    """Out, mass and gradients. Each has weights and a rectangle of its own, so that none can pass for the other."""
    conditions, queries, rectangles = two_conditions(device)
    inputs, w, u = heads(groups, dtype, device)
    u = torch.stack([u, u.flip(-1)])                                            # (2, B, H, T)
    exact = result_of(one_by_one, [x.detach().double().requires_grad_() for x in inputs], w.double(), u.double(),
                      conditions, queries)
    found = result_of(attend, inputs, w, u, conditions, queries, rectangles)
    for name, got, right in zip(("out", "mass", "q", "k", "v"), found, exact, strict=True):
        assert got.shape == right.shape and off(got, right) < close, (name, off(got, right))
    assert not found[1][1, 2].any()


@pytest.mark.parametrize("rectangle", [None, (5, 20, 2, 14)])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", model.ATTENTION)
def test_a_stack_of_one_condition_is_that_condition_bit_for_bit(name, groups, rectangle):
    """The same operations, of which one dimension more changes none."""
    conditions, queries, _ = two_conditions("cpu")
    inputs, w, u = heads(groups, torch.float32, "cpu")
    alone = result_of(model.ATTENTION[name], inputs, w, u, conditions[0], queries[0], rectangle)
    stacked = result_of(model.ATTENTION[name], inputs, w, u, conditions[:1], queries[:1], rectangle and (rectangle,))
    assert stacked[1].shape == (1, 3, 4, T)
    for one, other in zip(stacked, alone, strict=True):
        assert torch.equal(one.view_as(other), other)


@pytest.mark.parametrize("attend", [model.attend_explicit, model.attend_fused, model.attend_lse])
def test_the_derivative_by_two_masses_passes_gradcheck(attend):
    """Against differences of the function itself, in float64."""
    inputs, _, _ = heads(1, torch.float64, "cpu", tokens=5, samples=2)
    conditions = torch.tensor([[[1, 1, 0, 1, 0], [0, 1, 0, 0, 0]], [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]]).bool()
    rectangles = (2, 5, 0, 4), (1, 4, 1, 3)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, None, conditions, rectangles), inputs)


def test_two_conditions_share_one_pass_of_the_kernel(monkeypatch):
    """Its forward and its backward pass are most of the cost; a second condition adds its rectangle only."""
    conditions, queries, rectangles = two_conditions("cpu")
    inputs, w, u = heads(4, torch.float32, "cpu")
    kernel, calls = PASSED["cpu", torch.float32], []

    def forward(*args):
        calls.append("forward")
        return kernel.forward(*args)

    def backward(*args):
        calls.append("backward")
        return kernel.backward(*args)
    monkeypatch.setitem(PASSED, ("cpu", torch.float32), replace(kernel, forward=forward, backward=backward))
    result_of(model.attend_lse, inputs, w, u, conditions, queries, rectangles)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("task", aia.TASKS)
def test_a_kernel_that_takes_shared_heads_gives_the_same(task, monkeypatch):
    """As those of GPUs do; here the CPU's, given each head of k and v as often as it is shared."""
    usual, = KERNELS["cpu"]

    def repeated(k, v):
        return (x.repeat_interleave(2, 1) for x in (k, v))

    def backward(d_out, q, k, v, *saved):
        d_q, *grads = usual.backward(d_out, q, *repeated(k, v), *saved)
        return d_q, *(grad.unflatten(1, (-1, 2)).sum(2) for grad in grads)
    shared = replace(usual, forward=lambda q, k, v: usual.forward(q, *repeated(k, v)), backward=backward, grouped=True)
    condition, queries = data.spans(torch.tensor(ROLES[task]), task)
    results = []
    for kernel in (usual, shared):
        monkeypatch.setitem(KERNELS, "cpu", (kernel,))
        inputs, w, u = heads(2, torch.float64, "cpu")
        results.append(result_of(model.attend_lse, inputs, w, u, condition, queries,
                                 (*span(queries), *span(condition))))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right)


def test_rows_that_do_not_count_and_rows_without_a_key_have_no_mass(device):
    """Keys after a row do not count for it; where none is before it, mass and gradients are 0 and not NaN."""
    inputs, _, _ = heads(2, torch.float32, device, samples=1)
    place = torch.arange(T, device=device)[None]
    condition = (place >= 10) & (place < 14) & (place != 12)
    out, mass = attention_and_mass(*inputs, condition, (5, 20, 10, 14))
    expected = model.attend_explicit(*inputs, None, condition)[1]
    torch.testing.assert_close(mass[:, :, 5:20], expected[:, :, 5:20])
    assert mass[:, :, 10:20].all() and mass.count_nonzero() == 10 * 4
    for grad in torch.autograd.grad(mass[:, :, 5:10].sum(), inputs):
        assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_gradient_of_mass_alone_is_exact(dtype, close, device):
    """Nobody uses the rows' outputs, or hardly: a faint dO to shift O along is made, and leaves no trace."""
    condition, queries = data.spans(torch.tensor(ROLES["gen"], device=device), "gen")
    rectangle = *span(queries), *span(condition)
    inputs, w, u = heads(2, dtype, device)
    u = u * queries[:, None]
    mass = model.attend_explicit(*inputs, None, condition)[1]
    right = torch.autograd.grad((mass * u).sum(), inputs, allow_unused=True)
    for share in (0.0, 1e-25):
        out, mass = attention_and_mass(*inputs, condition, rectangle)
        got = torch.autograd.grad((mass * u).sum() + share * (out * w).sum(), inputs)
        assert off(got[0], right[0]) < close and off(got[1], right[1]) < close
        assert right[2] is None and got[2].abs().max() < 1e-15


def test_the_derivative_of_attention_with_mass_passes_gradcheck():
    """Against differences of the function itself, in float64."""
    inputs, _, _ = heads(2, torch.float64, "cpu", tokens=7, samples=2)
    condition = torch.tensor([[1, 1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]]).bool()
    assert torch.autograd.gradcheck(lambda *x: attention_and_mass(*x, condition, (2, 7, 0, 5)), inputs)


@pytest.mark.parametrize("rows, keys", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_rectangle_has_no_mass(rows, keys, device):
    """A micro-batch of nothing but text has no key, one of one-word drawings no query: attention goes on as it is."""
    inputs, w, _ = heads(2, torch.float32, device)
    condition = torch.ones(3, T, dtype=torch.bool, device=device)
    out, mass = attention_and_mass(*inputs, condition, (0, rows, 0, keys))
    expected = model.attend_fused(*inputs)[0]
    assert not mass.any()
    for got, right in zip(torch.autograd.grad((out * w).sum() + mass.sum(), inputs),
                          torch.autograd.grad((expected * w).sum(), inputs), strict=True):
        torch.testing.assert_close(got, right)


def test_a_span_holds_all_that_a_mask_marks():
    """Of all its rows together; a mask of nothing has none."""
    mask = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert span(mask) == (1, 4) and span(mask[:1]) == (2, 3) and span(mask[2:]) == (0, 0)
