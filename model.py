"""Two unified multimodal models around one decoder, with the attention that AIA looks at in plain view.

Emu3 (arXiv 2409.18869) has one vocabulary for text and picture codes; Janus-Pro (arXiv 2501.17811) sees pictures with
SigLIP and draws them as codes of its own tokenizer. Every layer also returns its attention mass: the share that each
token spends on the keys of the other modality (the I_l of aia.py, before averaging).

    python -m pytest tests/test_model.py
"""

import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import aia
from parts import kernels
from parts.decoding import Decoding, attend_columns, visibility
from parts.loss import next_token_loss
from parts.pictures import to_picture, to_tensor
from parts.settings import InputError
from parts.text import SPECIAL
from parts.vision import Emu3VQ, JanusVQ, SigLIP

# Legend: B samples, T tokens, C channels (width), H heads, G key/value heads, D head size, L layers, V vocabulary,
# N image tokens of one picture, K codebook rows, S side of a picture in pixels; h, w: sides of a code grid; U keys,
# cached ones included; R rank of LoRA; n any number of pictures or labels.


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: presets differ by numbers only
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every size and id of a model. No module below knows a preset."""

    kind: str                            # "emu3" or "janus"
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    theta: float                         # base of the rotary frequencies
    norm_eps: float
    codebook: int                        # picture tokenizer: rows K of the codebook ...
    code_dim: int                        # ... and their size
    vq_width: int                        # channels of its first level, a multiple of 32 (group norm has 32 groups)
    vq_mult: tuple                       # channel multiplier per level; each level after the first halves the sides
    vq_blocks: int                       # residual blocks per encoder level; the decoder has one more
    vq_attention: tuple                  # levels (0 = full resolution) with attention after each block
    vq_latent: int                       # channels between encoder and quantizer
    image_size: int                      # side of a drawn picture, and of one that SigLIP sees, in pixels
    context: int                         # longest sequence in tokens
    min_pixels: int = 0                  # Emu3: smallest and largest area that a picture is resized to
    max_pixels: int = 0
    min_side: int = 1                    # Janus-Pro: a picture's short side never shrinks below this
    vit_width: int = 0                   # Janus-Pro: SigLIP
    vit_layers: int = 0
    vit_heads: int = 0
    vit_ffn: int = 0
    vit_patch: int = 16
    guidance: float = 3.0                # defaults of drawing
    top_k: int = 0                       # 0 keeps all codes
    suffix: str = ""                     # Emu3: added to every prompt when drawing
    negative: str = ""                   # Emu3: prompt of the unconditional branch when drawing
    system: str = ""                     # Janus-Pro: what stands before a conversation, except in training
    init_std: float = 0.02               # of fresh weights; small widths learn many times faster from larger ones ...
    embed_std: float = 0.02              # ... and from embeddings that the first layers do not drown
    attention: str = "auto"              # a key of ATTENTION
    lora_rank: int = 0                   # of what is trained beside the decoder's frozen projections; 0: nothing
    fork_layer: int = 0                  # UniFork: from this layer on each task has layers of its own; 0: all shared
    see: str = "both"                    # Janus-Pro: "both": it looks at what an answer has drawn; "codes": it does not
    rope_bf16: bool = False              # round the rotary frequencies to bfloat16, as the published scripts do
    checkpoint_activations: bool = False         # recompute each layer in the backward pass
    ids: dict = field(default_factory=dict)      # special token ids by role, see SPECIAL

    @property
    def factor(self):
        """Pixels per side that one picture code stands for."""
        return 2 ** (len(self.vq_mult) - 1)

    @property
    def picture_tokens(self):
        """Image tokens of a picture in a question: SigLIP's patches, or codes of a picture as large as drawn ones."""
        return (self.image_size // (self.vit_patch if self.kind == "janus" else self.factor)) ** 2

    @property
    def grid(self):
        """Sides (h, w) of the code grid of a drawn square picture."""
        return (self.image_size // self.factor,) * 2


EMU3_8B = Config(
    kind="emu3", layers=32, width=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=184622, theta=1e6,
    norm_eps=1e-5, codebook=32768, code_dim=4, vq_width=256, vq_mult=(1, 2, 2, 4), vq_blocks=2, vq_attention=(3,),
    vq_latent=4, image_size=720, context=9216, min_pixels=512 * 512, max_pixels=1024 * 1024, guidance=3.0, top_k=2048,
    suffix=" masterpiece, film grained, best quality.",
    negative="lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
             "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.",
    ids={"pad": 151643, "placeholder": 151646, "eol": 151846, "eof": 151847, "bos": 151849, "eos": 151850,
         "img": 151851, "boi": 151852, "eoi": 151853, "visual": 151854},
)
JANUS_PRO_7B = Config(
    kind="janus", layers=30, width=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=102400, theta=1e4,
    norm_eps=1e-6, codebook=16384, code_dim=8, vq_width=128, vq_mult=(1, 1, 2, 2, 4), vq_blocks=2, vq_attention=(4,),
    vq_latent=256, image_size=384, context=16384, min_side=14, vit_width=1024, vit_layers=24, vit_heads=16,
    vit_ffn=4096, vit_patch=16, guidance=5.0,
    system="You are a helpful language and vision assistant. You are able to understand the visual content that the "
           "user provides, and assist the user with a variety of tasks using natural language.",
    ids={"bos": 100000, "eos": 100001, "pad": 100015, "boi": 100016, "eoi": 100593, "placeholder": 100594},
)
JANUS_PRO_1B = replace(
    JANUS_PRO_7B, layers=24, width=2048, ffn=5632, heads=16, kv_heads=16,
    ids={"bos": 100000, "eos": 100001, "pad": 100002, "boi": 100003, "eoi": 100580, "placeholder": 100581},
)
# The tiny models: 480 text tokens, then the special tokens in the order of SPECIAL, then (Emu3) the picture codes.
TINY_TEXT = 480
TINY_EMU3 = Config(
    kind="emu3", layers=4, width=96, ffn=256, heads=3, kv_heads=3, head_dim=32, vocab=TINY_TEXT + 73, theta=1e4,
    norm_eps=1e-5, codebook=64, code_dim=8, vq_width=32, vq_mult=(1, 1, 1), vq_blocks=0, vq_attention=(2,),
    vq_latent=8, image_size=16, context=256, min_pixels=16 * 16, max_pixels=16 * 16, guidance=1.2, top_k=2,
    init_std=0.1, embed_std=1.0, ids={role: TINY_TEXT + i for i, role in enumerate(SPECIAL["emu3"])},
)
TINY_JANUS = replace(
    TINY_EMU3, kind="janus", vocab=TINY_TEXT + 8, norm_eps=1e-6, code_dim=8, vq_latent=64, min_pixels=0, max_pixels=0,
    vit_width=96, vit_layers=2, vit_heads=4, vit_ffn=192, vit_patch=8,
    ids={role: TINY_TEXT + i for i, role in enumerate(SPECIAL["janus"])},
)
TINY_UNIFORK = replace(TINY_EMU3, fork_layer=2)      # half of the layers are shared, as in the authors' code
# For text and pictures in turn.
TINY_MIXED, TINY_MIXED_JANUS, TINY_MIXED_FORK = (replace(config, context=320) for config in (
    TINY_EMU3, TINY_JANUS, TINY_UNIFORK))
TINY_MIXED_CODES = replace(TINY_MIXED_JANUS, see="codes")
# For comparisons: as many parameters as tiny-unifork, all shared; half and double width.
TINY_WIDE, TINY_HALF, TINY_DOUBLE = (replace(TINY_EMU3, **sizes) for sizes in (
    {"ffn": 448}, {"width": 48, "ffn": 128, "head_dim": 16}, {"width": 192, "ffn": 512, "heads": 6, "kv_heads": 6}))
# For one GPU: 15.6 M parameters, and a world of larger cells, which have 2 x 2 codes as those of the tiny models. Its
# weights begin as theirs do, at 1 / sqrt(width).
SMALL_EMU3 = replace(
    TINY_EMU3, layers=8, width=384, ffn=1024, heads=6, kv_heads=6, head_dim=64, vocab=TINY_TEXT + 9 + 256, codebook=256,
    vq_width=64, vq_mult=(1, 1, 1, 1), vq_attention=(3,), image_size=32, min_pixels=32 * 32, max_pixels=32 * 32,
    init_std=0.05)
PRESETS = {"tiny-emu3": TINY_EMU3, "tiny-janus": TINY_JANUS, "tiny-unifork": TINY_UNIFORK, "tiny-wide": TINY_WIDE,
           "tiny-half": TINY_HALF, "tiny-double": TINY_DOUBLE, "tiny-mixed": TINY_MIXED,
           "tiny-mixed-janus": TINY_MIXED_JANUS, "tiny-mixed-codes": TINY_MIXED_CODES,
           "tiny-mixed-fork": TINY_MIXED_FORK, "small-emu3": SMALL_EMU3, "emu3-8b": EMU3_8B,
           "janus-pro-1b": JANUS_PRO_1B, "janus-pro-7b": JANUS_PRO_7B}


# ---------------------------------------------------------------------------------------------------------------------
# Attention: three bodies, one meaning
# ---------------------------------------------------------------------------------------------------------------------
# q (B, H, T, D); k, v (B, G, U, D), where U >= T counts cached keys too, and G heads are shared by H / G queries each.
# visible (B or 1, 1, T, U) bool, or None: causal where T = U, everything where T = 1.
# condition (B, U) bool, or None if nobody asks; or K of them (1 to 8), (K, B, U), and then a tuple of K rectangles.
# rectangle: (first row, end, first key, end), beyond which no row is asked for and no key is in the condition; or None.
# All return out (B, H, T, D) and mass, (B, H, T) or (K, B, H, T): the attention each token spends on a condition.
def attend_explicit(q, k, v, visible=None, condition=None, rectangle=None):
    """softmax(Q K^T / sqrt(D)) V written out: the one to read, and the reference of the tests."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)         # (B, H, U, D)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                      # (B, H, T, U)
    if visible is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    # A = softmax(Q K^T / sqrt(D)), in float32 as both models do
    scores = aia.at_least_float32(scores).masked_fill(~visible, -math.inf)
    attention = scores.softmax(-1)                                              # (B, H, T, U)
    out = attention.to(v.dtype) @ v                                             # (B, H, T, D)
    if condition is None:
        return out, None
    # mass(q) = sum_{k in condition} A(q, k)
    return out, (attention * condition[..., None, None, :]).sum(-1)             # ([K,] B, H, T)


def attend_fused(q, k, v, visible=None, condition=None, rectangle=None):
    """The same through one fused kernel, without ever keeping a T x U map.

    Attention is a weighted mean of values. Give condition keys the value 1 in one more channel and all others 0, and
    that channel's mean *is* the weight spent on the condition: exact, differentiable, and nearly free on a CPU. A GPU's
    kernels are made for a few head sizes: there 128 + 8 channels cost as much as 192. Each condition has a channel.
    """
    # One query sees every cached key; more of them need the causal mask. `True if ... else False`, since torch.compile
    # with varying lengths makes a bare comparison a symbol, which no kernel accepts.
    causal = True if visible is None and q.shape[2] > 1 else False
    grouped = True if q.shape[1] != k.shape[1] else False
    shape = {"attn_mask": visible, "is_causal": causal, "enable_gqa": grouped}
    if condition is None:
        return F.scaled_dot_product_attention(q, k, v, **shape), None
    conditions = condition if condition.dim() == 3 else condition[None]         # (K, B, U)
    flags = conditions.movedim(0, -1)[:, None].to(v.dtype).expand(-1, v.shape[1], -1, -1)       # (B, G, U, K)
    v = F.pad(torch.cat([v, flags], -1), (0, 8 - len(conditions)))              # (B, G, U, D + 8), kernels like 8s
    scale = q.shape[-1] ** -0.5
    q, k = F.pad(q, (0, 8)), F.pad(k, (0, 8))                                   # zeros leave the scores unchanged
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, **shape)         # (B, H, T, D + 8)
    mass = out[..., -8:][..., :len(conditions)].movedim(-1, 0).contiguous()     # (K, B, H, T)
    return out[..., :-8], mass if condition.dim() == 3 else mass[0]             # (B, H, T, D), ([K,] B, H, T)


def attend_lse(q, k, v, visible=None, condition=None, rectangle=None):
    """The same through a kernel of plain attention: rows of the rectangle get their mass from its log-sum-exp
    (kernels.AttentionWithMass), the others 0, which Eq. 1 does not read. Under a mask, and where no kernel has been
    tried and found right (kernels.try_lse), it is `attend_fused`."""
    if condition is None or visible is not None or q.shape[2] != k.shape[2] or not kernels.kernel_for(q):
        return attend_fused(q, k, v, visible, condition)
    # mass(q) = sum_{k in condition} exp(q.k / sqrt(D) - lse(q))
    return kernels.attention_and_mass(q, k, v, condition, rectangle)            # (B, H, T, D), ([K,] B, H, T)


LSE_FROM = {"cuda": 5000}                       # tokens from which it is the faster one; on other devices it never is


def attend_auto(q, k, v, visible=None, condition=None, rectangle=None):
    """The faster of the two on this device. With short samples a GPU waits for the many small operations of log-sum-exp
    unless they are compiled; with long ones the wider heads of the flag channel cost more (assets/gpu.json). Several
    conditions take flag channels always: their rectangles cover most of the map, and each would be computed again."""
    least = None if condition is not None and condition.dim() == 3 else LSE_FROM.get(q.device.type)
    faster = least is not None and (torch.compiler.is_compiling() or q.shape[2] >= least)
    return (attend_lse if faster else attend_fused)(q, k, v, visible, condition, rectangle)


ATTENTION = {"auto": attend_auto, "explicit": attend_explicit, "fused": attend_fused, "lse": attend_lse}


# ---------------------------------------------------------------------------------------------------------------------
# The decoder of both models
# ---------------------------------------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in float32, cast back *before* the weight, as the public models do."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = aia.at_least_float32(x)
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x, rope):
    """Turn each pair (x_i, x_{i + D/2}) by its angle: x (B, H, T, D) -> same."""
    cos, sin = rope
    # x_i cos - x_{i + D/2} sin  and  x_{i + D/2} cos + x_i sin; the sine brings its sign
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def positions(mask):
    """Positions (B, T), counted from the first real token of a mask (B, T)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


LORA_ALPHA = 16.0                               # the low-rank branch is scaled by 16 / R


class LoRA(nn.Linear):
    """A frozen projection W, which keeps its name, and beside it one of low rank that learns (arXiv 2106.09685). B is
    zero at first, so the model begins as it was."""

    def __init__(self, inputs, outputs, rank):
        super().__init__(inputs, outputs, bias=False)
        self.lora_a, self.lora_b = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x):
        # y = W x + (alpha / R) B (A x)
        low = F.linear(x, self.lora_a.to(x.dtype))                              # (B T, R)
        return super().forward(x) + LORA_ALPHA / len(self.lora_a) * F.linear(low, self.lora_b.to(x.dtype))


def projection(inputs, outputs, rank):
    """A linear layer of the decoder."""
    return LoRA(inputs, outputs, rank) if rank else nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; also returns the mass on the condition."""

    def __init__(self, config, index):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.attend = ATTENTION[config.attention]
        inner, shared = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = projection(config.width, inner, config.lora_rank)
        self.k_proj = projection(config.width, shared, config.lora_rank)
        self.v_proj = projection(config.width, shared, config.lora_rank)
        self.o_proj = projection(inner, config.width, config.lora_rank)

    def forward(self, x, batch, rope, visible, condition, rectangle, cache):
        """x (B T, C), batch = B, rope two of (B or 1, 1, T, D), the rest as in attend_explicit -> x (B T, C), mass."""
        split = (batch, len(x) // batch, -1, self.head_dim)
        q = self.q_proj(x).view(split).transpose(1, 2)                          # (B, H, T, D)
        k = self.k_proj(x).view(split).transpose(1, 2)                          # (B, G, T, D)
        v = self.v_proj(x).view(split).transpose(1, 2)                          # (B, G, T, D)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.add(self.index, k, v)                                  # (B, G, U, D)
        if cache is not None and cache.whole:
            out, mass = attend_columns(q, k, v, visible), None          # (B, H, T, D)
        else:
            out, mass = self.attend(q, k, v, visible, condition, rectangle)     # (B, H, T, D), (B, H, T)
        return self.o_proj(out.transpose(1, 2).reshape(len(x), -1)), mass       # (B T, C), (B, H, T)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width, ffn, lora_rank):
        super().__init__()
        self.gate_proj = projection(width, ffn, lora_rank)
        self.up_proj = projection(width, ffn, lora_rank)
        self.down_proj = projection(ffn, width, lora_rank)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer: x (B T, C) -> x (B T, C) and the attention mass (B, H, T) or None. Only attention knows which
    rows of x belong together."""

    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = FeedForward(config.width, config.ffn, config.lora_rank)

    def forward(self, x, batch, rope, visible=None, condition=None, rectangle=None, cache=None):
        attended, mass = self.self_attn(self.input_layernorm(x), batch, rope, visible, condition, rectangle, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), mass


class Decoder(nn.Module):
    """Token embedding, L layers, final norm. Dropout (0.1 in Emu3's configuration file) is left out on purpose.

    With fork_layer (UniFork, arXiv 2506.17202) generation has upper layers and a final norm of its own; a whole sample
    takes the branch of its task.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        if config.fork_layer:
            if config.fork_layer >= config.layers:
                raise InputError(f"--fork-layer {config.fork_layer}: the model has {config.layers} layers, give less")
            # In a cache they come behind all others: what is both text and pictures runs through both branches.
            self.gen_layers = nn.ModuleList(Layer(config, config.layers + i)
                                            for i in range(config.layers - config.fork_layer))
            self.gen_norm = RMSNorm(config.width, config.norm_eps)

    def path(self, task):
        """The L layers and the final norm that samples of a task run through."""
        if task == "gen" and self.config.fork_layer:
            return [*self.layers[:self.config.fork_layer], *self.gen_layers], self.gen_norm
        return [*self.layers], self.norm

    def all_layers(self):
        """The layers of both tasks."""
        return [*self.layers, *(self.gen_layers if self.config.fork_layer else ())]

    def rotations(self, positions):
        """Cosine and signed sine of RoPE for positions (B, T), in the type of activations: two tensors (B, 1, T, D).

        The frequencies are made here each time, in float32: a buffer would be rounded by model.to(bfloat16), which at
        theta 1e6 and position 9216 is wrong by 10 radians. rope_bf16 repeats that slip, to match published scripts.
        """
        c = self.config
        dtype = self.embed_tokens.weight.dtype
        device = positions.device.type
        if torch.is_autocast_enabled(device):         # else q and k would become float32 again, twice the traffic
            dtype = torch.get_autocast_dtype(device)
        steps = torch.arange(0, c.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequency = c.theta ** (-steps / c.head_dim)                            # (D / 2,)
        if c.rope_bf16:
            frequency = frequency.bfloat16().float()
        angle = positions[:, None, :, None].float() * frequency                 # (B, 1, T, D / 2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)        # (B, 1, T, D) each

    def forward(self, x, mask=None, condition=None, queries=None, rectangle=None, cache=None, moving=None, hidden=False,
                task="und"):
        """Run embeddings x (B, T, C) through all layers of a task.

        mask (B, T) bool: True = real token; None: no padding, or padding on the right; a cache brings its own mask
        condition, queries (B, T) bool: measure the intensity of every layer (aia.py, Eq. 1); rectangle: their spans;
            or K of each, (K, B, T), to measure several in one pass
        moving (B,) bool, with a cache: rows where it is false stand still; None: all go on
        -> x (B, T, C) after the final norm, intensity (B, L) or (K, B, L) or None, hidden states [L + 1 of (B, T, C)]
           or None. Of task "mixed" both branches of a fork: x (2, B, T, C), no states
        """
        frame = cache.enter(x.shape[1], moving) if cache else self.frame(x, mask)
        layers, norm = self.path(task)
        if task == "mixed" and self.config.fork_layer:
            return self.branches(x, frame, (condition, queries, rectangle), cache)
        x, intensities, states = self.through(layers, x, frame, (condition, queries, rectangle), cache)
        return norm(x), torch.stack(intensities, -1) if intensities else None, states if hidden else None

    def through(self, layers, x, frame, asked, cache):
        """Some layers, x (B, T, C) -> x (B, T, C), intensities [(B,) or (K, B)] of these layers, hidden states."""
        condition, queries, rectangle = asked
        intensities, states = [], [x]
        batch = len(x)
        x = x.flatten(0, 1)                                                     # (B T, C)
        for layer in layers:
            x, mass = self.run(layer, x, batch, *frame, condition, rectangle, cache)            # (B T, C), (B, H, T)
            if mass is not None:
                intensities.append(aia.intensity(mass, queries))                # (B,)
            states.append(x.unflatten(0, (batch, -1)))
        return states[-1], intensities, states

    def branches(self, x, frame, asked, cache):
        """The shared layers once, then both branches over all tokens: each gives the intensity of its own task."""
        shared = self.config.fork_layer
        x, below, _ = self.through(self.layers[:shared], x, frame, asked, cache)
        ends, intensities = [], []
        for i, task in enumerate(aia.TASKS):
            layers, norm = self.path(task)
            own = [part if part is None else part[i] for part in asked]
            y, above, _ = self.through(layers[shared:], x, frame, own, cache)
            ends.append(norm(y))
            if above:
                intensities.append(torch.stack([*(both[i] for both in below), *above], -1))     # (B, L)
        return torch.stack(ends), torch.stack(intensities) if intensities else None, None

    def frame(self, x, mask):
        """Rotations of all tokens of x (B, T, C), and which keys each of them sees (see `visibility`)."""
        columns = torch.arange(x.shape[1], device=x.device)
        if mask is None or bool(mask.all()):
            return self.rotations(columns[None]), visibility(None, columns, x.shape[1])
        return self.rotations(positions(mask)), visibility(mask, columns, x.shape[1])

    def run(self, layer, *inputs):
        """A layer; with checkpoint_activations it is recomputed in the backward pass, mass included, and not kept."""
        if self.config.checkpoint_activations:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


# ---------------------------------------------------------------------------------------------------------------------
# The two models
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Output:
    """ntp: sum of the next-token loss over labels; tokens: their number; intensity (B, L); hidden: L + 1 states. Of a
    mixed batch for each task: ntp (2,), tokens two, intensity (2, B, L)."""

    ntp: torch.Tensor
    tokens: int | tuple
    intensity: torch.Tensor | None = None
    hidden: list | None = None


class Unified(nn.Module, Decoding):
    """What Emu3 and Janus-Pro share. Each adds how tokens and pictures enter, and which head reads them out."""

    def __init__(self, config, tokenizer_file=None):
        super().__init__()
        # Convolutions are those of picture tokenizers and SigLIP's patches, which must be exact: by default cuDNN
        # rounds their inputs to 10 bits (TF32), and 2 to 10 % of the codes change. The switch belongs to the whole
        # process and threads share it, so it is set once, not around each call.
        torch.backends.cudnn.allow_tf32 = False
        self.config, self.ids, self.tokenizer_file = config, dict(config.ids), tokenizer_file
        self.lm = Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        self.vq = {"emu3": Emu3VQ, "janus": JanusVQ}[config.kind](config)

    # What Emu3 and Janus-Pro define, each in its way:
    def head(self, task):
        """The layers that turn x (n, C) into logits of what a task predicts: words (V) or, in Janus-Pro, codes (K)."""

    def embed(self, batch):
        """Embeddings (B, T, C) of a data.Batch, pictures included."""

    def embed_text(self, ids, pixels=None, codes=None, drawn=None):
        """Embed ids (B, T) -> (B, T, C); placeholders are filled, in order, with pictures (n, 3, S, S), in Janus-Pro
        those of drawn (B, T) bool with codes (n, N)."""

    def embed_code(self, code, row_end):
        """Embeddings (B, 1 or 2, C) of what follows when code (B,) was drawn, at the end of a row of codes or not."""

    def code_logits(self, x):
        """Logits (..., K) of the picture codes from x (..., C)."""

    def image_logits(self, ids, codes):
        """Teacher-forced logits (B, N, K) of codes after prompts ids (B, T) that end before the first code."""

    def guided_rows(self, ids, mask, negative):
        """Conditional and unconditional prompts in turn, padded on the left: ids and mask, (2 B, T) each."""

    def forward(self, batch, intensity=True, hidden=False):
        """Losses and intensities of one data.Batch: padding on the right, one task or mixed."""
        x = self.embed(batch)                                                   # (B, T, C)
        condition = batch.condition if intensity else None
        x, intensities, states = self.lm(x, None, condition, batch.queries, batch.rectangle, hidden=hidden,
                                         task=batch.task)
        x = x if x.ndim == 4 else [x] * len(batch.tasks)                        # a fork has one for each task
        # Only positions that predict a label meet the head. No other name keeps all of x while the loss needs room.
        x = [end.flatten(0, 1).index_select(0, at)                              # (n, C)
             for end, at in zip(x, batch.predicting.split(batch.labelled), strict=True)]
        ntp = [next_token_loss(rows, self.head(task), targets) for rows, task, targets
               in zip(x, batch.tasks, batch.targets.split(batch.labelled), strict=True)]
        if batch.task == "mixed":
            return Output(torch.stack(ntp), batch.labelled, intensities, states)
        return Output(ntp[0], batch.labelled[0], intensities, states)

    def logits(self, ids, pixels=None, mask=None):
        """Text logits (B, T, V). ids (B, T) hold one placeholder per image token, filled in order from pixels
        (n, 3, S, S); mask (B, T) bool, True = real token, padding on either side."""
        return self.lm_head(self.lm(self.embed_text(ids, pixels), mask)[0])

    def chance_loss(self, task):
        """Next-token loss of a model that finds every word, or code, equally likely."""
        head = self.head(task)
        return math.log((head[-1] if isinstance(head, nn.Sequential) else head).out_features)

    @torch.inference_mode()
    def encode_images(self, pixels):
        """Pixels (B, 3, S, S) in [-1, 1] -> codes: Emu3 (B, h, w), Janus-Pro (B, N) row by row."""
        with torch.autocast(pixels.device.type, enabled=False):                 # the tokenizers stay in float32
            return self.as_codes(self.vq.encode(pixels.float()))

    @torch.inference_mode()
    def decode_images(self, codes):
        """Codes, as encode_images gives them -> pixels (B, 3, S, S), nominally [-1, 1], never clipped here."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.vq.decode(codes if codes.ndim == 3 else codes.unflatten(1, self.config.grid))

    def as_codes(self, grid):
        """Codes (B, h, w) as they are given out: Janus-Pro has them row by row, (B, N)."""
        return grid.flatten(1) if self.config.kind == "janus" else grid


class Emu3(Unified):
    """One vocabulary: picture code c is the token visual + c, and every row of codes ends with a row-end token."""

    def head(self, task):
        return self.lm_head

    def embed(self, batch):
        return self.lm.embed_tokens(batch.tokens)

    def embed_text(self, ids, pixels=None, codes=None, drawn=None):
        """Embed ids; placeholders become the codes of the pictures, with row ends if there is room for them."""
        holes = ids == self.ids["placeholder"]
        wanted = int(holes.sum())
        tokens = ids[:0] if pixels is None else self.block(self.encode_images(pixels))          # (n, h, w + 1)
        if tokens.numel() != wanted:                # no room for row ends
            tokens = tokens[..., :-1]                                           # (n, h, w)
        if tokens.numel() != wanted:
            raise InputError(f"{wanted} placeholders in the text, but {tokens.numel()} image tokens: "
                             "write one placeholder per image token")
        return self.lm.embed_tokens(ids.masked_scatter(holes, tokens) if wanted else ids)

    def block(self, codes):
        """Codes (..., w) -> token ids (..., w + 1): each row followed by its row end."""
        return F.pad(codes + self.ids["visual"], (0, 1), value=self.ids["eol"])

    def embed_code(self, code, row_end):
        """The next input after a drawn code (B,): its token, and at the end of a row the forced row end too."""
        tokens = self.block(code[:, None])                                      # (B, 2)
        return self.lm.embed_tokens(tokens if row_end else tokens[:, :1])

    def code_logits(self, x):
        """Logits (..., K) of the picture codes. Other rows of the head are left out before any top-k, since no other
        token is allowed inside a picture."""
        first = self.ids["visual"]
        return F.linear(x, self.lm_head.weight[first:first + self.config.codebook])

    def image_logits(self, ids, codes):
        """Teacher-forced: prompts ids (B, T) and codes (B, h, w) -> (B, N, K), row ends skipped."""
        tokens = self.block(codes)                                              # (B, h, w + 1)
        visual = (tokens != self.ids["eol"]).flatten(1)[0]                      # (h (w + 1),)
        x = self.lm.embed_tokens(torch.cat([ids, tokens.flatten(1)[:, :-1]], 1))
        x = self.lm(x, task="gen")[0][:, ids.shape[1] - 1:]                     # (B, h (w + 1), C)
        return self.code_logits(x[:, visual])

    def guided_rows(self, ids, mask, negative):
        """Prompts and the negative prompt in turn, padded on the left: (2 B, T), (2 B, T)."""
        if negative is None:
            raise InputError("Emu3 draws with guidance against a negative prompt: give one, or guidance 1")
        negative = negative.expand(len(ids), -1)
        longest = max(ids.shape[1], negative.shape[1])
        pairs = [(ids, mask), (negative, torch.ones_like(negative, dtype=torch.bool))]
        rows = [F.pad(row, (longest - row.shape[1], 0), value=self.ids["pad"]) for row, _ in pairs]
        masks = [F.pad(m, (longest - m.shape[1], 0), value=False) for _, m in pairs]
        return torch.stack(rows, 1).flatten(0, 1), torch.stack(masks, 1).flatten(0, 1)


SEEN_AT_ONCE = 32                               # pictures that pass through SigLIP together


class Janus(Unified):
    """Pictures are seen through SigLIP and an aligner, and drawn as codes with an embedding and a head of their own."""

    def __init__(self, config, tokenizer_file=None):
        super().__init__(config, tokenizer_file)
        c = config.width
        self.vision = SigLIP(config)
        self.aligner = nn.Sequential(nn.Linear(config.vit_width, c), nn.GELU(), nn.Linear(c, c))
        self.gen_embed = nn.Embedding(config.codebook, config.code_dim)         # not the codebook of the VQ
        self.gen_aligner = nn.Sequential(nn.Linear(config.code_dim, c), nn.GELU(), nn.Linear(c, c))
        self.gen_head = nn.Sequential(nn.Linear(c, c), nn.GELU(), nn.Linear(c, config.codebook))

    def head(self, task):
        return self.gen_head if task == "gen" else self.lm_head

    def embed(self, batch):
        features = None if batch.features is None else self.align(batch.features)
        if features is None and batch.pixels is not None:
            features = self.see(batch.pixels)
        return self.fill(batch.tokens, features, batch.codes, batch.drawn)

    def embed_text(self, ids, pixels=None, codes=None, drawn=None):
        holes = int((ids == self.ids["placeholder"]).sum())
        features = None if pixels is None else self.see(pixels)
        given = sum(part.shape[0] * part.shape[1] for part in (features, codes) if part is not None)
        if given != holes:
            raise InputError(f"{holes} placeholders in the text, but {given} image tokens: "
                             "write one placeholder per image token")
        return self.fill(ids, features, codes, drawn)

    def look_again(self, pictures):
        """The second look at pictures that were drawn, codes [(N,), ...] -> (n, N + 2, C) with begin- and end-of-image.
        It sees what is shown to a user: rounded to whole colours."""
        device = self.lm.embed_tokens.weight.device
        pixels = self.decode_images(torch.stack(pictures).to(device))
        seen = self.see(torch.stack([to_tensor(to_picture(one)) for one in pixels]).to(device))
        ends = torch.tensor([[self.ids["boi"]], [self.ids["eoi"]]], device=device).expand(2, len(pictures))
        begin, end = self.lm.embed_tokens(ends)[:, :, None].to(seen.dtype)      # (n, 1, C) each
        return torch.cat([begin, seen, end], 1)

    def see(self, pixels):
        """Pictures (n, 3, S, S) through SigLIP -> (n, N, C)."""
        held, half = self.vision.pos_embed.dtype, self.aligner[0].weight.dtype
        # A frozen SigLIP beside sharded weights is held in float32 and has no autocast: it is given one here.
        alone = held is torch.float32 and half is torch.bfloat16
        with torch.autocast(pixels.device.type, half) if alone else nullcontext():
            return torch.cat([self.align(self.vision(part.to(held))) for part in pixels.split(SEEN_AT_ONCE)])

    def align(self, features):
        """Features of SigLIP (n, N, vit_width) -> (n, N, C). A frozen SigLIP may be more exact than what follows."""
        return self.aligner(features.to(self.aligner[0].weight.dtype))

    def fill(self, ids, features=None, codes=None, drawn=None):
        """Embed ids (B, T); placeholders take features (n, N, C) and codes (n, N) in order. drawn (B, T) bool: those
        that take codes; None: all of them do, if there are codes."""
        x = self.lm.embed_tokens(ids)                                           # (B, T, C)
        holes = ids == self.ids["placeholder"]                                  # (B, T)
        if codes is not None:
            drawn = holes if drawn is None else drawn
            x, holes = self.put(x, drawn, self.embed_codes(codes)), holes & ~drawn
        return x if features is None else self.put(x, holes, features)

    def put(self, x, holes, values):
        """Put values (n, N, C), in order, where holes (B, T) of x (B, T, C) are. Nothing here waits for a GPU."""
        number = (holes.flatten().cumsum(0) - 1).clamp(min=0)                   # (B T,): which value a hole takes
        taken = values.to(x.dtype).flatten(0, 1).index_select(0, number)        # (B T, C)
        return torch.where(holes[..., None], taken.view_as(x), x)

    def embed_codes(self, codes):
        """Codes (B, N) -> (B, N, C)."""
        return self.gen_aligner(self.gen_embed(codes))

    def embed_code(self, code, row_end):
        return self.embed_codes(code[:, None])

    def code_logits(self, x):
        return self.gen_head(x)

    def image_logits(self, ids, codes):
        """Teacher-forced: prompts ids (B, T) that end with begin-of-image and codes (B, N) -> (B, N, K)."""
        x = torch.cat([self.lm.embed_tokens(ids), self.embed_codes(codes[:, :-1])], 1)
        return self.code_logits(self.lm(x, task="gen")[0][:, ids.shape[1] - 1:])

    def guided_rows(self, ids, mask, negative):
        """Prompts in turn with the same prompts blanked: pads between BOS and begin-of-image, which *are* attended."""
        if negative is not None:
            raise InputError("Janus-Pro blanks the prompt for guidance and takes no negative prompt: leave it out")
        first = mask.long().argmax(1, keepdim=True)                             # (B, 1)
        position = torch.arange(ids.shape[1], device=ids.device)                # (T,)
        keep = (position <= first) | (position == ids.shape[1] - 1)             # (B, T)
        blank = torch.where(keep, ids, self.ids["pad"])
        return torch.stack([ids, blank], 1).flatten(0, 1), mask.repeat_interleave(2, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------
MODELS = {"emu3": Emu3, "janus": Janus}


def build(name, tokenizer_file=None, **changes):
    """A preset with fresh weights; changes replace fields of its Config. On the device of torch.device(...)."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
    unknown = set(changes) - {f.name for f in fields(Config)}
    if unknown:
        raise InputError(f"a model has no setting {', '.join(sorted(unknown))}: see model.Config")
    return from_config(replace(PRESETS[name], **changes), tokenizer_file)


def from_config(config, tokenizer_file=None):
    """A model with fresh weights: Normal(0, init_std), embeddings Normal(0, embed_std); the VQ has its own."""
    if config.attention not in ATTENTION:
        raise InputError(f"attention {config.attention!r} is unknown: use one of {', '.join(ATTENTION)}")
    m = MODELS[config.kind](config, tokenizer_file)
    for name, module in m.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and not name.startswith("vq"):
            std = config.init_std if isinstance(module, nn.Linear) else config.embed_std        # words, patches
            if name.endswith(("o_proj", "down_proj")):      # what 2 L branches add up to stays as large as one of them
                std /= math.sqrt(2 * config.layers)
            nn.init.normal_(module.weight, 0.0, std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    m.load_state_dict(fresh_lora(m), strict=False)
    fork(m)
    return m.eval()


@torch.no_grad()
def fork(m):
    """Begin UniFork's generation branch as a copy of the understanding branch; shared layers stay as they are."""
    layers, norm = m.lm.path("gen")
    for copy, source in zip([*layers, norm], [*m.lm.layers, m.lm.norm], strict=True):
        for mine, theirs in zip(copy.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs)


def unforked(name, config):
    """The weight that a weight of UniFork's generation branch begins as."""
    name = re.sub(r"^lm\.gen_layers\.(\d+)", lambda found: f"lm.layers.{int(found[1]) + config.fork_layer}", name)
    return name.replace("lm.gen_norm", "lm.norm")


def fresh_lora(m, device="cpu"):
    """{name: tensor} of what LoRA adds, before training: A normal, B zero. It follows from torch.manual_seed alone, and
    processes that share out the weights make the whole and keep their part: all layouts begin the same."""
    generator = torch.Generator("cpu").manual_seed(torch.initial_seed())
    made = {}
    for name, like in m.state_dict().items():
        if "lora_" in name:
            value = torch.zeros(like.shape, device="cpu")       # as the generator, whatever torch.device says
            if name.endswith("lora_a"):             # A x is as large as x
                value.normal_(0.0, like.shape[1] ** -0.5, generator=generator)
            made[name] = own_part(value.to(device), like)
    return made


def own_part(value, like):
    """A whole tensor, or where `like` is shared out over processes this one's part of it."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).clone()


def held_type(name, dtype):
    """The type of a tensor in a model of type `dtype`: the picture tokenizer stays in float32, and so does what LoRA
    adds, since its updates are too small for bfloat16."""
    return torch.float32 if name.startswith("vq.") or "lora_" in name else dtype


def attention_kernel(m, device, dtype):
    """Which kernels the attention of a model runs on, without AIA and with it."""
    c, attend = m.config, m.lm.layers[0].self_attn.attend
    if attend is attend_explicit:
        return "explicit, every map is kept"
    q, k = (torch.zeros(1, heads, 64, c.head_dim, device=device, dtype=dtype) for heads in (c.heads, c.kv_heads))
    asked = torch.ones(1, 64, dtype=torch.bool, device=device)
    plain, measured = (kernels.kernel_of(attend(q.requires_grad_(), k, k, condition=condition)[0].grad_fn)
                       for condition in (None, asked))
    told = plain if plain == measured else f"{plain}; with AIA {measured}"
    least = LSE_FROM.get(torch.device(device).type) if attend is attend_auto else None
    return told if least is None else f"{told}; from {least:,} tokens on, or compiled, AIA takes log-sum-exp"


def settle_attention(m, device, dtype):
    """Choose the body of attention for a device. Where that is log-sum-exp, try it (kernels.try_lse): in a type for
    which no kernel is right, the flag channel goes on."""
    c = m.config
    for layer in m.lm.all_layers():
        layer.self_attn.attend = ATTENTION[c.attention]
    if c.attention != "lse" and not (c.attention == "auto" and torch.device(device).type in LSE_FROM):
        return
    for tried in dict.fromkeys((dtype, torch.float32)):         # evaluations run in float32
        found, faults = kernels.try_lse(device, tried, c.heads, c.kv_heads, c.head_dim)
        for fault in faults:
            print(f"attention by log-sum-exp in {tried}: {fault}")
        if not found:
            print(f"attention by log-sum-exp is not available in {tried} here: fused, with a flag channel, instead")
