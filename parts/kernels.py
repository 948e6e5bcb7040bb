"""Where plain PyTorch would be slow or large: the next-token loss in chunks, attention mass from the log-sum-exp of a
fused kernel, and decoding steps replayed as CUDA graphs.

PyTorch's private operators are called only here. `try_lse` tries them before training starts; if none works in this
version of PyTorch, attention uses the flag channel instead.

    python -m pytest tests/test_kernels.py
"""

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import aia
from parts.settings import first_line

# Legend: B samples, H heads, G key/value heads, T tokens, D head size; R rows and K keys that count; n tokens with a
# label, C channels, V vocabulary.


# ---------------------------------------------------------------------------------------------------------------------
# The loss in chunks
# ---------------------------------------------------------------------------------------------------------------------
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


# In order of preference; `try_lse` takes the first that works. The kernels of CUDA have never been run. Their `more` is
# first_q, first_k, most_q, most_k, seed, offset, which each backward pass takes in another order.
KERNELS = {
    "cpu": (Kernel(
        "flash for CPUs",
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True),
        lambda d_out, *saved: aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out.contiguous(), *saved, 0.0, True), grouped=False),),
    "cuda": (
        Kernel("cudnn",
               lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)[:8],
               lambda d_out, *saved: aten._scaled_dot_product_cudnn_attention_backward(
                   d_out, *saved[:5], *saved[9:], None, *saved[5:9], 0.0, True)),
        Kernel("flash",
               lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)[:8],
               lambda d_out, *saved: aten._scaled_dot_product_flash_attention_backward(
                   d_out, *saved[:9], 0.0, True, *saved[9:])))}
PASSED = {}                                     # (device type, dtype): the kernel that `try_lse` took


def kernel_for(q):
    """The kernel that works for tensors like q, or None."""
    return PASSED.get((q.device.type, q.dtype))


def indices(mask):
    """Where a mask (B, T) is true, in order: (B, n), n the most of any row; shorter rows end in -1."""
    found = mask.sum(1, keepdim=True)                                           # (B, 1)
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :int(found.max())]                # (B, n)
    return order.masked_fill(torch.arange(order.shape[1], device=mask.device) >= found, -1)


FAINT = 1e-18                                   # its square times D is still a float32


class AttentionWithLse(torch.autograd.Function):
    """Causal attention through a fused kernel, q (B, H, T, D), k and v (B, G, T, D) -> out (B, H, T, D), and the
    log-sum-exp of its scores, lse (B, H, T) = log sum_k exp(q.k / sqrt(D)), which has a derivative too.

    As d lse / dS = A, the derivative by the scores is dS = A (dO V^T - (rowsum(dO O) - d_lse)). The kernel's backward
    pass computes rowsum(dO O) from the O it is given, so we give it O' = O - d_lse dO / |dO|^2.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.kernel = kernel_for(q)
        out, lse, *ctx.more = ctx.kernel.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse.flatten(2)[..., :q.shape[2]]                            # kernels may pad it

    @staticmethod
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        # A row whose out is not used has no direction to shift O along: a gradient too faint to matter makes one.
        unused = (aia.at_least_float32(d_out).square().sum(-1) < FAINT**2) & (d_lse != 0)
        d_out = torch.where(unused[..., None], FAINT, d_out)                    # (B, H, T, D)
        wide = aia.at_least_float32(d_out)
        # O' = O - d_lse dO / |dO|^2
        shifted = out - (d_lse / wide.square().sum(-1).clamp(min=FAINT**2))[..., None] * wide   # (B, H, T, D)
        d_q, d_k, d_v = ctx.kernel.backward(d_out, q, k, v, shifted.to(q.dtype), lse, *ctx.more)
        return d_q, d_k, d_v


def mass_from_lse(q, k, lse, rows, keys):
    """The mass of some rows (B, R) of q (B, H, T, D), whose log-sum-exp is lse (B, H, T), on some keys (B, K) of
    k (B, G, T, D); indices padded by -1 -> (B, H, T), 0 in other rows. A row sees the keys up to its own position."""
    # Expanded by hand: take_along_dim would compile anew for each length.
    of_q = rows.clamp(min=0)[:, None].expand(-1, q.shape[1], -1)                # (B, H, R)
    of_k = keys.clamp(min=0)[:, None].expand(-1, k.shape[1], -1)                # (B, G, K)
    some_q = q.gather(2, of_q[..., None].expand(-1, -1, -1, q.shape[3]))        # (B, H, R, D)
    some_k = k.gather(2, of_k[..., None].expand(-1, -1, -1, k.shape[3]))        # (B, G, K, D)
    some_k = some_k.repeat_interleave(q.shape[1] // k.shape[1], 1)              # (B, H, K, D)
    # A(q, k) = exp(q.k / sqrt(D) - lse(q))
    scores = aia.at_least_float32(some_q @ some_k.transpose(-1, -2)) * q.shape[3] ** -0.5       # (B, H, R, K)
    seen = (keys >= 0)[:, None] & (keys[:, None] <= rows[:, :, None])           # (B, R, K); no key is before row -1
    share = (scores - lse.gather(2, of_q)[..., None]).masked_fill(~seen[:, None], -math.inf).exp()
    # mass(q) = sum_{k in condition} A(q, k)
    return torch.zeros_like(lse).scatter_add(2, of_q, share.sum(-1))            # (B, H, T)


def attention_and_mass(q, k, v, rows, keys):
    """Causal attention and the mass of some rows on some keys, as in `mass_from_lse`: q (B, H, T, D), k, v (B, G, T, D)
    -> out (B, H, T, D), mass (B, H, T). No map is kept: the part that counts is computed again in the backward pass."""
    if not kernel_for(q).grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out, lse = AttentionWithLse.apply(q, k, v)
    mass = checkpoint(mass_from_lse, q, k, lse, rows, keys, use_reentrant=False, preserve_rng_state=False)
    return out, mass


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
    keys, rows = torch.arange(tokens, device=device).expand(2, -1).split([n, tokens - n], 1)

    def with_flag(q, k, v):
        flag = F.pad(torch.ones_like(v[:, :, :n, :1]), (0, 0, 0, tokens - n))
        out = F.scaled_dot_product_attention(q, k, torch.cat([v, flag], -1), is_causal=True, enable_gqa=True)
        return out[..., :-1], out[..., -1]
    exact = outputs_and_gradients(with_flag, [x.double() for x in inputs], n)
    faults = []
    for kernel in KERNELS[device_type]:
        PASSED[device_type, dtype] = kernel
        try:
            found = outputs_and_gradients(lambda q, k, v: attention_and_mass(q, k, v, rows, keys), inputs, n)
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
    if step.startswith("AttentionWithLse"):
        return f"fused, {node.kernel.name} kernel and its log-sum-exp"
    for kernel in ("Flash", "Cudnn", "Efficient"):
        if f"{kernel}Attention" in step:
            return f"fused, {kernel.lower()} kernel"
    return "fused, but on the slow math fallback: no fast kernel takes heads of this size and type here"


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------
def attend_columns(q, k, v, visible):
    """New tokens q (B, H, T, D) look at all columns of a cache k, v (B, G, U, D), visible (B, 1, T, U) -> (B, H, T, D).
    Heads that share a key become rows of one head, as not every kernel supports groups."""
    group = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], group)).flatten(2, 3)                    # (B, G, H / G T, D)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible.repeat(1, 1, group, 1))
    return out.unflatten(2, (group, -1)).flatten(1, 2)                          # (B, H, T, D)


def no_planning(device_type):
    """Avoid cuDNN's attention on CUDA: it makes a plan for each new length, which in decoding means for each token."""
    if device_type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Recorded:
    """step(x), recorded as a CUDA graph for each shape of x and then replayed: one launch instead of a thousand. The
    step must keep its position in the tensors of `state`. If recording fails, steps are run as usual."""

    def __init__(self, step, state):
        self.step, self.state, self.graphs = step, state, {}

    def __call__(self, x):
        if x.shape not in self.graphs:
            self.graphs[x.shape] = self.record(x.clone())
        graph, given, out = self.graphs[x.shape]
        if graph is None:
            return self.step(x)
        given.copy_(x)
        graph.replay()
        return out

    def record(self, x):
        """(graph, its input, its output); the graph is None if recording fails. The state is left as it was."""
        before = [part.clone() for part in self.state]
        graph = out = None
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):                # a failed recording leaves its own
                self.step(x)                        # lets libraries allocate memory outside the recording
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = self.step(x)
        except (RuntimeError, AssertionError) as error:         # AssertionError: a torch without CUDA
            graph = None
            print(f"the decoding step cannot be recorded ({first_line(error)}): plain steps", file=sys.stderr)
        for part, value in zip(self.state, before, strict=True):
            part.copy_(value)
        return graph, x, out
