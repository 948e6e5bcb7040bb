"""Claims about the loss in chunks and attention mass: what is faster or leaner is also the same (parts/kernels.py)."""

import pytest
import torch
import torch.nn.functional as F
from made import off

import aia
import data
import model
from parts.kernels import CHUNK, ChunkedCrossEntropy, attention_and_mass, chunked_cross_entropy, indices, try_lse


def head(n, words, width, dtype, device="cpu", bias=True):
    """x, W, b with gradients, and targets."""
    g = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=g).to(device, dtype).requires_grad_()
                    for shape in ((n, width), (words, width), (words,)))
    return x, weight, b if bias else None, torch.randint(words, (n,), generator=g).to(device)


@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_in_chunks_is_the_cross_entropy_in_float64(bias, monkeypatch, device):
    """Three chunks, the last one short: value and every gradient to the last digits."""
    monkeypatch.setitem(CHUNK, device.type, 8)
    x, weight, b, target = head(20, 30, 5, torch.float64, device, bias)
    inputs = [part for part in (x, weight, b) if part is not None]
    expected = F.cross_entropy(F.linear(x, weight, b), target, reduction="sum")
    got = chunked_cross_entropy(x, weight, b, target)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    for mine, theirs in zip(torch.autograd.grad(0.3 * got, inputs), torch.autograd.grad(0.3 * expected, inputs),
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_the_loss_makes_only_gradients_that_are_asked_for():
    """A frozen head gets none, its sum is not even held; under no_grad nothing is made although weights could learn."""
    x, weight, b, target = head(20, 30, 5, torch.float32)
    frozen = chunked_cross_entropy(x, weight.detach(), b.detach(), target)
    assert [grad is None for grad in frozen.grad_fn.grads] == [False, True, True]
    inputs_frozen = chunked_cross_entropy(x.detach(), weight, None, target)
    assert [grad is None for grad in inputs_frozen.grad_fn.grads] == [True, False, True]
    made, forward = [], ChunkedCrossEntropy.forward
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkedCrossEntropy, "forward",
                      staticmethod(lambda ctx, *args: (forward(ctx, *args), made.extend(ctx.grads))[0]))
        loss = chunked_cross_entropy(x, weight, b, target)
    assert made == [None] * 3 and not loss.requires_grad
    torch.testing.assert_close(loss, frozen.detach())


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32(monkeypatch):
    """1,000 chunks of one token that all pull the same word: a sum in bfloat16 would stop growing at 256."""
    monkeypatch.setitem(CHUNK, "cuda", 1)           # that of half precision everywhere
    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(x, weight, None, torch.zeros(1000, dtype=torch.long)).backward()
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad[:, 0].float(), torch.tensor([-500.0, 500.0]), rtol=4e-3, atol=0)


def test_the_scale_of_a_bfloat16_loss_is_not_rounded():
    """One over the label tokens is no power of two: rounded to bfloat16, every gradient below would be off alike."""
    x, weight, b, target = head(40, 30, 5, torch.bfloat16)
    one, third = (torch.autograd.grad(scale * chunked_cross_entropy(x, weight, b, target), x)[0].float()
                  for scale in (1.0, 1 / 3))
    assert float((one * third).sum() / (one * one).sum()) == pytest.approx(1 / 3, rel=1e-3)


def test_the_loss_in_chunks_cannot_be_differentiated_twice():
    """Its gradients are scaled in place, so a second backward pass would be wrong: it is refused."""
    x, weight, b, target = head(4, 6, 3, torch.float32)
    loss = chunked_cross_entropy(x, weight, b, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Attention mass from log-sum-exp
# ---------------------------------------------------------------------------------------------------------------------
T, C, P, W = 24, data.TEXT, data.PADDING, data.ANSWER
# Roles of three samples: of generation with prompts of different length, the last with an empty prompt; of
# understanding with two turns and padding on the right, and the last without a picture.
ROLES = {"gen": [[C] * 6 + [data.IMAGE] * 18, [C] * 3 + [data.IMAGE] * 15 + [P] * 6, [data.IMAGE] * 20 + [P] * 4],
         "und": [[C] * 2 + [data.IMAGE] * 8 + [C] * 3 + [W] * 4 + [C] * 2 + [W] * 5,
                 [data.IMAGE] * 4 + [W] * 5 + [data.IMAGE] * 4 + [C] * 2 + [W] * 3 + [P] * 6, [C] * 9 + [W] * 15]}


def heads(groups, dtype, device, tokens=T, samples=3):
    """q of 4 heads, k and v of some groups, two random directions, all drawn in float32."""
    if not try_lse(device, dtype, 4, groups, 8, T)[0]:
        pytest.skip(f"{device} has no kernel with a log-sum-exp for {dtype}")
    g = torch.Generator().manual_seed(0)
    *inputs, w = (torch.randn(samples, n, tokens, 8, generator=g).to(device, dtype) for n in (4, groups, groups, 4))
    return [x.requires_grad_() for x in inputs], w, torch.randn(samples, 4, tokens, generator=g).to(device, dtype)


def result_of(attend, inputs, w, u, condition, queries, rectangle=None):
    """Out, mass of the queries, and gradients of a random function of both."""
    out, mass = attend(*inputs, None, condition, rectangle)
    mass = mass * queries[:, None]
    loss = (out * w).to(torch.float64).sum() + 3 * (mass * u).to(torch.float64).sum()
    return [out.detach(), mass.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("task", aia.TASKS)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_mass_from_log_sum_exp_is_that_of_the_written_out_softmax(dtype, close, groups, task, device):
    """Out, mass and gradients in each precision, with shared heads, several turns, padding, and samples without a key;
    in bfloat16 no further off than the flag channel by half."""
    condition, queries = data.spans(torch.tensor(ROLES[task], device=device), task)
    rectangle = indices(queries), indices(condition)
    assert not condition[2].any() and queries[2].any()
    inputs, w, u = heads(groups, dtype, device)
    exact = result_of(model.attend_explicit, [x.detach().double().requires_grad_() for x in inputs], w.double(),
                      u.double(), condition, queries)
    channel = result_of(model.attend_fused, inputs, w, u, condition, queries)
    for name, got, right, rival in zip(("out", "mass", "q", "k", "v"), result_of(
            model.attend_lse, inputs, w, u, condition, queries, rectangle), exact, channel, strict=True):
        assert got.isfinite().all() and off(got, right) < max(close, 1.5 * off(rival, right)), (name, off(got, right))


def test_rows_that_do_not_count_and_rows_without_a_key_have_no_mass(device):
    """Keys after a row do not count for it; where none is before it, mass and gradients are 0 and not NaN."""
    inputs, _, _ = heads(2, torch.float32, device, samples=1)
    place = torch.arange(T, device=device)[None]
    condition, queries = (place >= 10) & (place < 14), torch.tensor([[5, 9, 12, 20]], device=device)
    out, mass = attention_and_mass(*inputs, queries, indices(condition))
    expected = model.attend_explicit(*inputs, None, condition)[1]
    torch.testing.assert_close(mass[:, :, [12, 20]], expected[:, :, [12, 20]])
    assert mass[:, :, 12:].count_nonzero() == 2 * 4 == mass.count_nonzero()
    for grad in torch.autograd.grad(mass[:, :, [5, 9]].sum(), inputs):
        assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_gradient_of_mass_alone_is_exact(dtype, close, device):
    """Nobody uses the rows' outputs, or hardly: a faint dO to shift O along is made, and leaves no trace."""
    condition, queries = data.spans(torch.tensor(ROLES["gen"], device=device), "gen")
    rectangle = indices(queries), indices(condition)
    inputs, w, u = heads(2, dtype, device)
    u = u * queries[:, None]
    mass = model.attend_explicit(*inputs, None, condition)[1]
    right = torch.autograd.grad((mass * u).sum(), inputs, allow_unused=True)
    for share in (0.0, 1e-25):
        out, mass = attention_and_mass(*inputs, *rectangle)
        got = torch.autograd.grad((mass * u).sum() + share * (out * w).sum(), inputs)
        assert off(got[0], right[0]) < close and off(got[1], right[1]) < close
        assert right[2] is None and got[2].abs().max() < 1e-15


def test_the_derivative_of_attention_with_mass_passes_gradcheck():
    """Against differences of the function itself, in float64."""
    inputs, _, _ = heads(2, torch.float64, "cpu", tokens=7, samples=2)
    rows, keys = torch.tensor([[3, 4, 6], [2, 5, -1]]), torch.tensor([[0, 1], [1, -1]])
    assert torch.autograd.gradcheck(lambda *x: attention_and_mass(*x, rows, keys), inputs)


@pytest.mark.parametrize("rows, keys", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_rectangle_has_no_mass(rows, keys, device):
    """A micro-batch of nothing but text has no key, one of one-word drawings no query: attention goes on as it is."""
    inputs, w, _ = heads(2, torch.float32, device)
    index = torch.arange(3, device=device).expand(3, -1)
    out, mass = attention_and_mass(*inputs, index[:, :rows], index[:, :keys])
    expected = model.attend_fused(*inputs)[0]
    assert not mass.any()
    for got, right in zip(torch.autograd.grad((out * w).sum() + mass.sum(), inputs),
                          torch.autograd.grad((expected * w).sum(), inputs), strict=True):
        torch.testing.assert_close(got, right)


def test_indices_list_what_a_mask_marks():
    """In order, as many as the fullest row has, -1 behind; a mask of nothing has none."""
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    assert indices(mask).tolist() == [[1, 3, 4], [4, -1, -1], [-1, -1, -1]]
    assert indices(mask[2:]).shape == (1, 0)
