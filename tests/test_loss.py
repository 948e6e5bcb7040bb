"""Claims about the loss in chunks: what is leaner is also the same (parts/loss.py)."""

import pytest
import torch
import torch.nn.functional as F

from parts.loss import CHUNK, ChunkedCrossEntropy, chunk_for, chunked_cross_entropy


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
    assert chunk_for(x) == 1 and chunk_for(x.float()) == CHUNK["cpu"]
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
