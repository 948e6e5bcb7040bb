"""Attention mass from the log-sum-exp of a fused kernel: what a GPU needs beyond plain PyTorch.

PyTorch's private operators are called only here. `try_lse` tries them before training starts; if none works in this
version of PyTorch, attention uses the flag channel instead.

    python -m pytest tests/test_kernels.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from parts.settings import first_line

# Legend: B samples, H heads, G key/value heads, T tokens, D head size; K conditions; R rows and N keys of a rectangle.


# ---------------------------------------------------------------------------------------------------------------------
# Attention mass from the log-sum-exp of a fused kernel
# ---------------------------------------------------------------------------------------------------------------------
aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """A fused kernel of causal attention, with its backward pass."""

    name: str
    forward: Callable                    # q, k, v -> out, lse, and more for the backward pass
    backward: Callable                   # d_out, q, k, v, out, lse, and more -> d_q, d_k, d_v
    grouped: bool = True                 # takes fewer heads of k and v than of q
    half: bool = True                    # takes half precision only


# In order of preference; `try_lse` takes the first that works. Of cuDNN and flash, `more` is first_q, first_k, most_q,
# most_k, seed, offset, which each backward pass takes in another order.
KERNELS = {
    "cpu": (Kernel(
        "flash for CPUs",
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True),
        lambda d_out, *saved: aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out.contiguous(), *saved, 0.0, True), grouped=False, half=False),),
    "cuda": (
        Kernel("cudnn",
               lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)[:8],
               lambda d_out, *saved: aten._scaled_dot_product_cudnn_attention_backward(
                   d_out, *saved[:5], *saved[9:], None, *saved[5:9], 0.0, True)),
        Kernel("flash",
               lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)[:8],
               lambda d_out, *saved: aten._scaled_dot_product_flash_attention_backward(
                   d_out, *saved[:9], 0.0, True, *saved[9:])),
        Kernel("efficient",
               lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True),
               lambda d_out, q, k, v, *saved: aten._scaled_dot_product_efficient_attention_backward(
                   d_out, q, k, v, None, *saved, 0.0, (True, True, True, False), True)[:3], grouped=False, half=False))}
PASSED = {}                                     # (device type, dtype): the kernel that `try_lse` took


def kernel_for(q):
    """The kernel that works for tensors like q, or None."""
    return PASSED.get((q.device.type, q.dtype))


def span(mask):
    """Columns [first, end) of a mask (B, T) outside of which it is false in every row; (0, 0) if it is false
    everywhere."""
    marked = mask.any(0).nonzero()[:, 0].tolist()
    return (marked[0], marked[-1] + 1) if marked else (0, 0)


def shares(q, k, lse, condition, rectangle):
    """A(q, k) = exp(q.k / sqrt(D) - lse(q)) for the rows of q (B, H, T, D), whose log-sum-exp is lse (B, H, T), and the
    keys of k (B, G, T, D) in a rectangle (first row, end, first key, end) -> (B, H, R, N). 0 where a key is not in the
    condition (B, T), or after its row."""
    top, bottom, left, right = rectangle
    rows, keys = (torch.arange(*ends, device=q.device) for ends in ((top, bottom), (left, right)))
    seen = condition[:, None, None, left:right] & (keys <= rows[:, None])       # (B, 1, R, N)
    k = k[:, :, left:right].repeat_interleave(q.shape[1] // k.shape[1], 1)      # (B, H, N, D)
    scores = q[:, :, top:bottom] @ k.transpose(2, 3)                            # (B, H, R, N)
    # A(q, k) = exp(q.k / sqrt(D) - lse(q)), in the precision of lse
    logs = torch.add(-lse[:, :, top:bottom, None], scores, alpha=q.shape[3] ** -0.5)
    return logs.masked_fill_(~seen, -math.inf).exp_()


FAINT = 1e-18                                   # its square times D is still a float32


class AttentionWithMass(torch.autograd.Function):
    """Causal attention through a fused kernel, q (B, H, T, D), k and v (B, G, T, D) -> out (B, H, T, D), and for each
    of the conditions (K, B, T) and its rectangle the mass of the rectangle's rows on its keys, mass (K, B, H, T), 0 in
    other rows; see `shares`. No map is kept: the rectangles are computed again in the backward pass.

    The derivative by the scores is A (dO V^T - rowsum(dO O) - sum_c d_mass_c mass_c), plus d_mass_c A for keys of
    condition c. The kernel's backward pass does the first: as it computes rowsum(dO O) from the O it is given, we give
    it O' = O + sum_c d_mass_c mass_c dO / |dO|^2.
    """

    @staticmethod
    def forward(ctx, q, k, v, conditions, rectangles):
        ctx.kernel, ctx.rectangles = kernel_for(q), rectangles
        out, lse, *ctx.more = ctx.kernel.forward(q, k, v)
        each = lse.flatten(2)[..., :q.shape[2]]                                 # (B, H, T): kernels may pad it
        # mass_c(q) = sum_{k in condition c} A(q, k)
        mass = torch.zeros_like(each.expand(len(conditions), *each.shape))      # (K, B, H, T), laid out as lse
        for c, (top, bottom, _, _) in enumerate(rectangles):
            mass[c, :, :, top:bottom] = shares(q, k, each, conditions[c], rectangles[c]).sum(-1)
        ctx.save_for_backward(q, k, v, out, lse, conditions, mass)
        return out, mass

    @staticmethod
    def backward(ctx, d_out, d_mass):
        q, k, v, out, lse, conditions, mass = ctx.saved_tensors
        # A row whose out is not used has no direction to shift O along: a gradient too faint to matter makes one.
        moved = (d_mass * mass).sum(0)[..., None]                               # (B, H, T, 1)
        size = torch.linalg.vector_norm(d_out, dim=-1, keepdim=True, dtype=mass.dtype)          # (B, H, T, 1)
        unused = (size < FAINT) & (moved != 0)
        d_out = torch.where(unused, FAINT, d_out)                               # (B, H, T, D)
        size = torch.where(unused, FAINT * q.shape[3] ** 0.5, size.clamp(min=FAINT))
        # O' = O + sum_c d_mass_c mass_c dO / |dO|^2
        shifted = torch.addcmul(out, d_out, moved / size.square()).to(q.dtype)
        d_q, d_k, d_v = ctx.kernel.backward(d_out, q, k, v, shifted, lse, *ctx.more)
        each, group = lse.flatten(2)[..., :q.shape[2]], q.shape[1] // k.shape[1]
        for c, (top, bottom, left, right) in enumerate(ctx.rectangles):
            # on a rectangle dS = d_mass A, so with d = d_mass / sqrt(D): dQ = d (A K), dK = A^T (d Q)
            a = shares(q, k, each, conditions[c], ctx.rectangles[c]).to(q.dtype)                # (B, H, R, N)
            d = (d_mass[c, :, :, top:bottom, None] * q.shape[3] ** -0.5).to(q.dtype)            # (B, H, R, 1)
            d_q[:, :, top:bottom] += d * (a @ k[:, :, left:right].repeat_interleave(group, 1))
            d_k[:, :, left:right] += (a.transpose(2, 3) @ (d * q[:, :, top:bottom])).unflatten(1, (-1, group)).sum(2)
        return d_q, d_k, d_v, None, None


def attention_and_mass(q, k, v, condition, rectangle=None):
    """`AttentionWithMass` of one condition (B, T) and its rectangle, mass (B, H, T), or of a stack of conditions
    (K, B, T) and a tuple of K rectangles, mass (K, B, H, T). Without rectangles each is the whole map."""
    if condition.dim() == 2:
        out, mass = attention_and_mass(q, k, v, condition[None], None if rectangle is None else (rectangle,))
        return out, mass[0]
    if rectangle is None:
        rectangle = ((0, q.shape[2], 0, q.shape[2]),) * len(condition)
    if not kernel_for(q).grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return AttentionWithMass.apply(q, k, v, condition, rectangle)


def outputs_and_gradients(attend, inputs, n):
    """Those of attend(q, k, v) -> out, mass, for the mass of rows from n on."""
    given = [x.detach().requires_grad_() for x in inputs]
    out, mass = attend(*given)
    loss = out.double().square().sum() + 10 * mass[..., n:].double().sum()
    return [out.detach(), mass[..., n:].detach(), *torch.autograd.grad(loss, given)]


def try_lse(device, dtype, heads, groups, head_dim, tokens=77):
    """Try the kernels of a device on heads of this size, and use the first one with right outputs and gradients from
    now on -> its name, or None, and what was wrong with those before it."""
    device_type = torch.device(device).type
    if device_type not in KERNELS:
        return None, []
    close = 0.03 if dtype.itemsize < 4 else 1e-3
    draw = torch.Generator().manual_seed(0)
    # As in training: the heads of a token lie side by side, and no kernel has blocks of this length.
    inputs = [torch.randn(2, tokens, n, head_dim, generator=draw).to(device, dtype).transpose(1, 2)
              for n in (heads, groups, groups)]
    n = tokens // 3
    condition = (torch.arange(tokens, device=device) < n).expand(2, -1)

    def with_flag(q, k, v):
        flag = F.pad(torch.ones_like(v[:, :, :n, :1]), (0, 0, 0, tokens - n))
        out = F.scaled_dot_product_attention(q, k, torch.cat([v, flag], -1), is_causal=True, enable_gqa=True)
        return out[..., :-1], out[..., -1]
    exact = outputs_and_gradients(with_flag, [x.double() for x in inputs], n)
    faults = []
    for kernel in KERNELS[device_type]:
        if kernel.half and dtype.itemsize > 2:
            continue
        PASSED[device_type, dtype] = kernel
        try:
            found = outputs_and_gradients(lambda q, k, v: attention_and_mass(q, k, v, condition, (n, tokens, 0, n)),
                                          inputs, n)
        except (RuntimeError, AttributeError, TypeError) as error:              # absent, other arguments, or refused
            faults.append(f"{kernel.name}: {first_line(error)}")
            continue
        wrong = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
        if wrong < close:                           # false for NaN too
            return kernel.name, faults
        faults.append(f"{kernel.name}: wrong by {wrong:.1e}")
    PASSED.pop((device_type, dtype), None)
    return None, faults


def kernel_of(node):
    """The kernel behind an output of attention, by the name of its step in the backward pass."""
    while type(node).__name__.startswith("Slice"):
        node = node.next_functions[0][0]
    step = type(node).__name__
    if step.startswith("AttentionWithMass"):
        return f"fused, {node.kernel.name} kernel and its log-sum-exp"
    for kernel in ("Flash", "Cudnn", "Efficient"):
        if f"{kernel}Attention" in step:
            return f"fused, {kernel.lower()} kernel"
    return "fused, but on the slow math fallback: no fast kernel takes heads of this size and type here"
