"""What takes more than a line of PyTorch to be fast or lean: the next-token loss in chunks, attention mass from the
log-sum-exp of a fused kernel, and a decoding step that CUDA replays.

Private operators of PyTorch are used here only. They are tried before training starts (`try_lse`), so that where a
version lacks one, or means something else by it, training goes on without.

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

import aia
from parts.settings import first_line

# Legend: B samples, H heads, G key/value heads, T tokens, D head size; R rows and K keys that count; n tokens with a
# label, C channels, V vocabulary.


# ---------------------------------------------------------------------------------------------------------------------
# The loss in chunks
# ---------------------------------------------------------------------------------------------------------------------
CHUNK = {"cpu": 256, "cuda": 1024}              # tokens that meet the vocabulary at once


@contextlib.contextmanager
def chunks_of(kind):
    """Cut on a CPU as a device of another kind does, to predict what it needs."""
    before = CHUNK["cpu"]
    CHUNK["cpu"] = CHUNK[kind]
    try:
        yield
    finally:
        CHUNK["cpu"] = before


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
            scores = aia.at_least_float32(logits)                               # (n, V), in place from here on
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
        return (*(grad if grad is None else grad.mul_(scale).to(dtype)
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


# ---------------------------------------------------------------------------------------------------------------------
# Attention mass from the log-sum-exp of a fused kernel
# ---------------------------------------------------------------------------------------------------------------------
aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """A fused kernel of causal attention whose backward pass can be called by itself."""

    name: str
    forward: Callable                    # q, k, v -> out, lse, and what else its backward pass wants
    backward: Callable                   # d_out, q, k, v, out, lse, the rest -> d_q, d_k, d_v
    grouped: bool = True                 # takes fewer heads of k, v than of q


def cpu_forward(q, k, v):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


def cpu_backward(d_out, q, k, v, out, lse):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(d_out.contiguous(), q, k, v, out, lse, 0.0, True)


def cudnn_forward(q, k, v):
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)[:8]


def cudnn_backward(d_out, q, k, v, out, lse, first_q, first_k, most_q, most_k, seed, offset):
    return aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, lse, seed, offset, None, first_q, first_k, most_q, most_k, 0.0, True)


def flash_forward(q, k, v):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)[:8]


def flash_backward(d_out, q, k, v, out, lse, first_q, first_k, most_q, most_k, seed, offset):
    return aten._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, lse, first_q, first_k, most_q, most_k, 0.0, True, seed, offset)


def efficient_forward(q, k, v):
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)


def efficient_backward(d_out, q, k, v, out, lse, seed, offset):
    return aten._scaled_dot_product_efficient_attention_backward(
        d_out, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False], True)[:3]


# In order of preference; the first that passes `try_lse` is taken. None of those of CUDA has ever run.
KERNELS = {"cpu": (Kernel("flash for CPUs", cpu_forward, cpu_backward, grouped=False),),
           "cuda": (Kernel("cudnn", cudnn_forward, cudnn_backward), Kernel("flash", flash_forward, flash_backward),
                    Kernel("efficient", efficient_forward, efficient_backward, grouped=False))}
PASSED = {}                                     # (device type, dtype): the kernel that try_lse found to work


def kernel_for(q):
    """The kernel that was tried and found right for tensors like q, or None."""
    return PASSED.get((q.device.type, q.dtype))


def indices(mask):
    """Where a mask (B, T) is true, in order: (B, n), n the most of any row, -1 behind the last of a row."""
    found = mask.sum(1, keepdim=True)                                           # (B, 1)
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :int(found.max())]                # (B, n)
    return order.masked_fill(torch.arange(order.shape[1], device=mask.device) >= found, -1)


def of_heads(x, index):
    """Index (B, n) of tokens of x (B, H, T, ...), for all heads: (B, H, n); -1 becomes the first token."""
    return index.clamp(min=0)[:, None].expand(-1, x.shape[1], -1)


def of_channels(x, index):
    """The same for all channels of x (B, H, T, D): (B, H, n, D)."""
    return of_heads(x, index)[..., None].expand(-1, -1, -1, x.shape[3])


def attention_inside(q, k, lse, rows, keys):
    """The part of the attention map that counts: A(q, k) of q (B, H, R, D), whose lse is (B, H, R), and k (B, G, K, D)
    -> (B, H, R, K). 0 where a key comes after its row, or either is padding: rows (B, R) and keys (B, K) tell."""
    shared = q.shape[1] // k.shape[1] * q.shape[2]                              # rows of a head of k, H / G R
    scores = (q.view(*k.shape[:2], shared, q.shape[3]) @ k.transpose(-1, -2)).view(*q.shape[:3], k.shape[2])
    # A(q, k) = exp(q.k / sqrt(D) - lse(q))
    scores = aia.at_least_float32(scores) * q.shape[3] ** -0.5 - lse[..., None]
    seen = (keys >= 0)[:, None] & (keys[:, None] <= rows[:, :, None])           # (B, R, K); no key is before row -1
    return scores.masked_fill(~seen[:, None], -math.inf).exp()                  # (B, H, R, K)


FAINT = 1e-18                                   # its square times D is still a float32


class MassFromLse(torch.autograd.Function):
    """Causal attention through a fused kernel, and each row's mass on some keys, without a T x T map or one more
    channel: q (B, H, T, D), k, v (B, G, T, D), rows (B, R), keys (B, K) -> out (B, H, T, D), mass (B, H, T).

    The kernel knows lse(q) = log sum_k exp(q.k / sqrt(D)), so A(q, k) = exp(q.k / sqrt(D) - lse(q)) can be had for the
    rows and keys that count alone; nothing of that rectangle is kept. Other rows have mass 0. With dA = dO V^T, plus dm
    on the rectangle, the derivative of softmax is

        dS = A (dA - rowsum(A dA)) = A (dO V^T - (rowsum(dO O) + m dm))  +  A dm on the rectangle

    The first term is the backward pass of the kernel, but for m dm. The kernel takes rowsum(dO O) from the O that it is
    handed, so it is handed one whose sum is right: O' = O + m dm dO / |dO|^2.
    """

    @staticmethod
    def forward(ctx, q, k, v, rows, keys):
        ctx.kernel = kernel_for(q)
        out, lse, *ctx.rest = ctx.kernel.forward(q, k, v)
        plain = lse.flatten(2)[..., :q.shape[2]]                                # (B, H, T); kernels may pad it
        some_q, some_k = q.gather(2, of_channels(q, rows)), k.gather(2, of_channels(k, keys))
        share = attention_inside(some_q, some_k, plain.gather(2, of_heads(q, rows)), rows, keys)
        # mass(q) = sum_{k in condition} A(q, k)
        mass = torch.zeros_like(plain).scatter_add(2, of_heads(q, rows), share.sum(-1))         # (B, H, T)
        ctx.save_for_backward(q, k, v, out, lse, mass, rows, keys)
        return out, mass

    @staticmethod
    def backward(ctx, d_out, d_mass):
        q, k, v, out, lse, mass, rows, keys = ctx.saved_tensors
        lost = mass * d_mass                                                    # (B, H, T)
        # Where nobody uses a row's out there is no direction to shift O in: a gradient too faint to matter makes one.
        unused = (aia.at_least_float32(d_out).square().sum(-1) < FAINT**2) & (lost != 0)
        d_out = torch.where(unused[..., None], FAINT, d_out)                    # (B, H, T, D)
        wide = aia.at_least_float32(d_out)
        # O' = O + m dm dO / |dO|^2
        shifted = out + (lost / wide.square().sum(-1).clamp(min=FAINT**2))[..., None] * wide    # (B, H, T, D)
        d_q, d_k, d_v = ctx.kernel.backward(d_out, q, k, v, shifted.to(q.dtype), lse, *ctx.rest)
        some_q, some_k = q.gather(2, of_channels(q, rows)), k.gather(2, of_channels(k, keys))
        plain = lse.flatten(2)[..., :q.shape[2]].gather(2, of_heads(q, rows))                   # (B, H, R)
        # A dm on the rectangle, and from scores to q and k
        share = attention_inside(some_q, some_k, plain, rows, keys)             # (B, H, R, K)
        d_scores = share * (d_mass.gather(2, of_heads(q, rows)) * q.shape[3] ** -0.5)[..., None]
        shared = q.shape[1] // k.shape[1] * rows.shape[1]
        d_scores = d_scores.to(q.dtype).view(*some_k.shape[:2], shared, some_k.shape[2])        # (B, G, H / G R, K)
        d_q = d_q.scatter_add(2, of_channels(q, rows), (d_scores @ some_k).view_as(some_q))
        some_q = some_q.view(*d_scores.shape[:3], q.shape[3])                   # (B, G, H / G R, D)
        d_k = d_k.scatter_add(2, of_channels(k, keys), d_scores.transpose(-1, -2) @ some_q)
        return d_q, d_k, d_v, None, None


def attention_and_mass(q, k, v, rows, keys):
    """Causal attention and the mass of some rows on some keys, as `MassFromLse` says."""
    if not kernel_for(q).grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return MassFromLse.apply(q, k, v, rows, keys)


def softmax_written_out(q, k, v, rows, keys):
    """What `attention_and_mass` must be, for rows and keys that are all real: with every map in full."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                      # (B, H, T, T)
    after = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    attention = scores.masked_fill(after, -math.inf).softmax(-1)
    mass = attention.gather(3, of_heads(q, keys)[:, :, None].expand(-1, -1, q.shape[2], -1)).sum(-1)
    counts = torch.zeros_like(mass).scatter(2, of_heads(q, rows), 1.0)
    return attention @ v, mass * counts


def try_lse(device, dtype, heads, groups, head_dim, tokens=77):
    """Try the kernels of a device on heads of this size: the first whose outputs and gradients are right is used from
    now on -> its name, or None, and why the ones before it are not used."""
    kind, faults, close = torch.device(device).type, [], 0.03 if dtype.itemsize < 4 else 1e-3
    make = torch.Generator().manual_seed(0)
    # As training lays them out: heads beside each other, and a length that no kernel rounds to by itself.
    inputs = [torch.randn(2, tokens, n, head_dim, generator=make).to(device, dtype).transpose(1, 2)
              for n in (heads, groups, groups)]
    keys, rows = torch.arange(tokens, device=device).expand(2, -1).split([tokens // 3, tokens - tokens // 3], 1)
    results = []
    for kernel in (None, *KERNELS.get(kind, ())):
        PASSED.pop((kind, dtype), None)
        if kernel:
            PASSED[kind, dtype] = kernel
        try:
            given = [x.double() if kernel is None else x for x in inputs]
            given = [x.detach().requires_grad_() for x in given]
            out, mass = (attention_and_mass if kernel else softmax_written_out)(*given, rows, keys)
            loss = out.double().square().sum() + 10 * mass.double().sum()
            results.append([out.detach(), mass.detach(), *torch.autograd.grad(loss, given)])
        except (RuntimeError, AttributeError, TypeError) as error:              # not there, other arguments, refused
            faults.append(f"{kernel.name}: {first_line(error)}")
            continue
        if kernel:
            wrong = max(float((a - b).norm() / b.norm()) for a, b in zip(results.pop(), results[0], strict=True))
            if wrong < close:                       # false for NaN too
                return kernel.name, faults
            faults.append(f"{kernel.name}: wrong by {wrong:.1e}")
    PASSED.pop((kind, dtype), None)
    return None, faults


def kernel_of(node):
    """The kernel behind an output of attention, by the name of the step that will differentiate it."""
    while node and type(node).__name__.startswith(("Slice", "MassFromLse")):
        if "Lse" in type(node).__name__:
            return f"fused, {node.kernel.name} kernel and its log-sum-exp"
        node = node.next_functions[0][0]
    for kernel in ("Flash", "Cudnn", "Efficient"):
        if f"{kernel}Attention" in type(node).__name__:
            return f"fused, {kernel.lower()} kernel"
    return "fused, but on the slow math fallback: no fast kernel takes heads of this size and type here"


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------
def attend_columns(q, k, v, visible):
    """New tokens q (B, H, T, D) against all columns of a cache k, v (B, G, U, D), visible (B, 1, T, U) -> (B, H, T, D).
    Heads that share a key become rows of it, so that the kernel need not know of groups."""
    share = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], share)).flatten(2, 3)                    # (B, G, H / G T, D)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=visible.repeat(1, 1, share, 1))
    return out.unflatten(2, (share, -1)).flatten(1, 2)                          # (B, H, T, D)


def no_planning(kind):
    """Without cuDNN's attention on CUDA, which makes a plan for each new length: in decoding, for each token."""
    if kind != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Recorded:
    """step(x), recorded as a CUDA graph for each shape of x and then replayed: one launch in place of a thousand. It
    must take its place from, and move it in, the tensors of `state`. Where recording fails, the plain step goes on."""

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
        before, usual = [part.clone() for part in self.state], None
        try:
            usual = torch.cuda.current_stream()
            aside = torch.cuda.Stream()
            for graph in (None, None, torch.cuda.CUDAGraph()):                  # twice for libraries to get ready
                aside.wait_stream(usual)
                with torch.cuda.graph(graph) if graph else torch.cuda.stream(aside):
                    out = self.step(x)
                usual.wait_stream(aside)
                self.put_back(before)
            return graph, x, out
        except (RuntimeError, AssertionError) as error:         # the latter of a torch without CUDA
            if usual:                               # a recording that fails leaves its own stream behind
                torch.cuda.set_stream(usual)
            print(f"the decoding step cannot be recorded ({first_line(error)}): plain steps", file=sys.stderr)
            self.put_back(before)
            return None, x, None

    def put_back(self, before):
        for part, value in zip(self.state, before, strict=True):
            part.copy_(value)
