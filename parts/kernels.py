"""What needs more than one line of PyTorch to be fast or lean: here the next-token loss in chunks.

    python -m pytest tests/test_kernels.py
"""

import torch

from aia import at_least_float32

# Legend: n tokens, C channels, V vocabulary.


# ---------------------------------------------------------------------------------------------------------------------
# Next-token loss, without all logits at once
# ---------------------------------------------------------------------------------------------------------------------
CHUNK = {"cpu": 256, "cuda": 1024}              # tokens that meet the vocabulary at once


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of x W^T + b with target: x (n, C), W (V, C), b (V,) or None, target (n,) -> scalar.

    Logits exist for a chunk of tokens at a time. As the loss is one sum, its gradients are known in the same pass, and
    only they are kept; the backward pass scales them. Sums are taken in float32, also those of W's gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, target):
        wide = torch.promote_types(x.dtype, torch.float32)
        d_x, d_weight, d_bias = (
            torch.zeros_like(part, dtype=part.dtype if part is x else wide) if needed else None
            for part, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False))
        total, chunk = x.new_zeros((), dtype=wide), CHUNK.get(x.device.type, CHUNK["cpu"])
        room = x.new_empty(min(chunk, len(x)), len(weight))                     # once: new pages cost a CPU dearly
        for first in range(0, len(x), chunk):
            rows = slice(first, first + chunk)
            part, wanted = x[rows], target[rows, None]
            logits = torch.mm(part, weight.T, out=room[:len(part)])             # (n, V)
            if bias is not None:
                logits += bias
            scores = at_least_float32(logits)                                   # (n, V), in place from here on
            scores -= scores.amax(-1, keepdim=True)
            picked = scores.gather(1, wanted)                                   # (n, 1)
            norm = scores.exp_().sum(-1, keepdim=True)                          # (n, 1)
            # -log p(target) = log sum_v exp(s_v) - s_target
            total += (norm.log() - picked).sum()
            if not any(ctx.needs_input_grad):
                continue
            # d loss / d logits = softmax(logits) - onehot(target)
            error = scores.div_(norm).scatter_add_(1, wanted, -torch.ones_like(picked))         # (n, V)
            if d_bias is not None:
                d_bias += error.sum(0)
            error = error.to(x.dtype)
            if d_x is not None:
                d_x[rows] = error @ weight
            if d_weight is not None and wide is x.dtype:
                d_weight.addmm_(error.T, part)                                  # no second V x C beside the sum
            elif d_weight is not None:
                d_weight += error.T @ part
        ctx.grads = d_x, d_weight, d_bias
        ctx.types = tuple(part if part is None else part.dtype for part in (x, weight, bias))
        return total

    @staticmethod
    def backward(ctx, scale):
        if ctx.grads is None:
            raise RuntimeError("the loss in chunks can be differentiated once: compute it again")
        grads, ctx.grads = ctx.grads, None          # scaled in place: at Emu3's size a copy would be 3 GB
        return (*(grad if grad is None else grad.mul_(scale.to(grad.dtype)).to(dtype)
                  for grad, dtype in zip(grads, ctx.types, strict=True)), None)


def chunked_cross_entropy(x, weight, bias, target):
    """Sum of the cross-entropy of x (n, C) W (V, C)^T + b (V,) with target (n,) -> scalar, at least float32.

    All logits at once would outgrow everything else: at Emu3's size, 8,192 tokens times 184,622 words are 6 GB in
    float32.
    """
    if torch.is_autocast_enabled(x.device.type):    # which knows linear layers, but not this function
        half = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (part if part is None else part.to(half) for part in (x, weight, bias))
    if not torch.is_grad_enabled():                 # a Function is told that gradients are needed even then
        x, weight, bias = (part if part is None else part.detach() for part in (x, weight, bias))
    return ChunkedCrossEntropy.apply(x, weight, bias, target)
