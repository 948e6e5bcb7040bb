"""Claims about parts/kernels.py: what is faster or leaner is also the same."""

import pytest
import torch
import torch.nn.functional as F

from parts import kernels


def head(n, words, width, dtype, bias=True):
    """x, W, b with gradients, and targets."""
    g = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=g).to(dtype).requires_grad_()
                    for shape in ((n, width), (words, width), (words,)))
    return x, weight, b if bias else None, torch.randint(words, (n,), generator=g)


@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_in_chunks_is_the_cross_entropy_in_float64(bias, monkeypatch):
    """Three chunks, the last one short: value and every gradient to the last digits."""
    monkeypatch.setitem(kernels.CHUNK, "cpu", 8)
    x, weight, b, target = head(20, 30, 5, torch.float64, bias)
    inputs = [part for part in (x, weight, b) if part is not None]
    expected = F.cross_entropy(F.linear(x, weight, b), target, reduction="sum")
    got = kernels.chunked_cross_entropy(x, weight, b, target)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    for mine, theirs in zip(torch.autograd.grad(0.3 * got, inputs), torch.autograd.grad(0.3 * expected, inputs),
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_the_loss_makes_only_gradients_that_are_asked_for():
    """A frozen head gets none, its sum is not even held; under no_grad nothing is made although weights could learn."""
    x, weight, b, target = head(20, 30, 5, torch.float32)
    frozen = kernels.chunked_cross_entropy(x, weight.detach(), b.detach(), target)
    assert [grad is None for grad in frozen.grad_fn.grads] == [False, True, True]
    inputs_frozen = kernels.chunked_cross_entropy(x.detach(), weight, None, target)
    assert [grad is None for grad in inputs_frozen.grad_fn.grads] == [True, False, True]
    made, forward = [], kernels.ChunkedCrossEntropy.forward
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.ChunkedCrossEntropy, "forward",
                      staticmethod(lambda ctx, *args: (forward(ctx, *args), made.extend(ctx.grads))[0]))
        loss = kernels.chunked_cross_entropy(x, weight, b, target)
    assert made == [None] * 3 and not loss.requires_grad
    torch.testing.assert_close(loss, frozen.detach())


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32(monkeypatch):
    """1,000 chunks of one token that all pull the same word: a sum in bfloat16 would stop growing at 256."""
    monkeypatch.setitem(kernels.CHUNK, "cpu", 1)
    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    kernels.chunked_cross_entropy(x, weight, None, torch.zeros(1000, dtype=torch.long)).backward()
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad[:, 0].float(), torch.tensor([-500.0, 500.0]), rtol=4e-3, atol=0)


def test_the_loss_in_chunks_cannot_be_differentiated_twice():
    """Its gradients are scaled in place, so a second backward pass would be wrong: it is refused."""
    x, weight, b, target = head(4, 6, 3, torch.float32)
    loss = kernels.chunked_cross_entropy(x, weight, b, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()
