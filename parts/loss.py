"""The next-token loss in chunks: all logits at once would be larger than everything else.

    python -m pytest tests/test_loss.py
"""

import torch
import torch.nn.functional as F
from torch import nn

# Legend: n tokens with a label, C channels, V vocabulary.
CHUNK = {"cpu": 256, "cuda": 1024}              # tokens whose logits exist at the same time


def chunk_for(x):
    """Tokens of a chunk. Half precision stands for a GPU also where its memory is predicted on a CPU."""
    return CHUNK["cuda" if x.is_cuda or x.element_size() < 4 else "cpu"]


def loss_and_error(scores, target):
    """Summed cross-entropy of scores (n, V) with target (n, 1), and its gradient by the scores, made in their place."""
    scores -= scores.amax(-1, keepdim=True)
    picked = scores.gather(1, target)                                           # (n, 1)
    norm = scores.exp_().sum(-1, keepdim=True)                                  # (n, 1)
    # -log p(target) = log sum_v exp(s_v) - s_target
    loss = (norm.log() - picked).sum()
    # d loss / d scores = softmax(scores) - onehot(target)
    return loss, scores.div_(norm).scatter_add_(1, target, -torch.ones_like(norm))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of x W^T + b with target: x (n, C), W (V, C), b (V,) or None, target (n,) -> scalar.

    Only one chunk of logits exists at a time. The loss is a sum, so the forward pass can compute the gradients too and
    keep only them; the backward pass scales them. The loss and the gradients of W and b are summed in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, target):
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((), dtype=wide)
        d_x, d_weight, d_bias = ctx.grads = [
            torch.zeros_like(part, dtype=part.dtype if part is x else wide) if needed else None
            for part, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False)]
        chunk = chunk_for(x)
        for first in range(0, len(x), chunk):
            rows = slice(first, first + chunk)
            loss, error = loss_and_error(F.linear(x[rows], weight, bias).to(wide), target[rows, None])
            total += loss
            if d_bias is not None:
                d_bias += error.sum(0)
            error = error.to(x.dtype)
            if d_x is not None:
                d_x[rows] = error @ weight
            if d_weight is not None:
                d_weight += error.T @ x[rows]
        return total

    @staticmethod
    def backward(ctx, scale):
        if ctx.grads is None:
            raise RuntimeError("the loss in chunks can be differentiated once: compute it again")
        grads = ctx.grads
        ctx.grads = None                            # scaled in place: at Emu3's size a copy would be 3 GB
        return (*(None if grad is None else grad.mul_(scale) for grad in grads), None)


def chunked_cross_entropy(x, weight, bias, target):
    """Summed cross-entropy of x (n, C) W (V, C)^T + b (V,) with target (n,) -> scalar, at least float32.

    All logits at once would be larger than everything else: at Emu3's size, 8,192 tokens times 184,622 words are 6 GB
    in float32.
    """
    inputs = [x, weight, bias]
    if torch.is_autocast_enabled(x.device.type):    # autocast knows linear layers, but not this function
        half = torch.get_autocast_dtype(x.device.type)
        inputs = [part if part is None else part.to(half) for part in inputs]
    if not torch.is_grad_enabled():                 # needs_input_grad ignores no_grad
        inputs = [part if part is None else part.detach() for part in inputs]
    return ChunkedCrossEntropy.apply(*inputs, target)


def next_token_loss(x, head, target):
    """Sum of the cross-entropy of head(x) with target: x (n, C), target (n,) -> scalar."""
    *before, last = head if isinstance(head, nn.Sequential) else [head]
    for layer in before:
        x = layer(x)
    return chunked_cross_entropy(x, last.weight, last.bias, target)
