"""Two unified multimodal models around one decoder, with the attention that AIA looks at in plain view.

Emu3 (arXiv 2409.18869) has one vocabulary for text and picture codes; Janus-Pro (arXiv 2501.17811) reads pictures with
SigLIP and writes them as codes of another tokenizer. Every layer also returns its attention mass: the share that each
token spends on the keys of the other modality (the I_l of aia.py, before averaging).

    python -m pytest tests/test_model.py
"""

import functools
import hashlib
import json
import math
import re
import shutil
import sys
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import sentencepiece
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

import aia
from aia import InputError
from parts import kernels
from parts.kernels import first_line

# Legend: B samples, T tokens, C channels (width), H heads, G key/value heads, D head size, L layers, V vocabulary,
# N image tokens of one picture, K codebook rows, S side of a picture in pixels; h, w: sides of a code grid.


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: presets differ by numbers only
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    """Every size and id of a model. Nothing in this file knows a preset."""

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
    image_size: int                      # side of a drawn picture, and for Janus-Pro of one that is read, in pixels
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
    ids: dict = field(default_factory=dict)      # special token ids by role, see SPECIAL

    @property
    def factor(self):
        """Pixels per side that one picture code stands for."""
        return 2 ** (len(self.vq_mult) - 1)

    @property
    def grid(self):
        """Sides (h, w) of the code grid of a drawn square picture."""
        return (self.image_size // self.factor,) * 2


def read_json(file):
    """The object in a json file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file} cannot be read ({reason}): is it the right folder, and complete?") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object: is it the right folder, and complete?")
    return content


# Special tokens by role. Ids are looked up by string, never assumed: they differ between Janus-Pro 1B and 7B.
SPECIAL = {
    "emu3": {
        "pad": "<|endoftext|>", "eol": "<|extra_200|>", "eof": "<|extra_201|>", "bos": "<|extra_203|>",
        "eos": "<|extra_204|>", "img": "<|image token|>", "boi": "<|image start|>", "eoi": "<|image end|>",
        "placeholder": "<|extra_0|>", "visual": "<|visual token 000000|>",
    },
    "janus": {
        "bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "pad": "<｜▁pad▁｜>",
        "boi": "<begin_of_image>", "eoi": "<end_of_image>", "placeholder": "<image_placeholder>",
        "user": "<|User|>", "assistant": "<|Assistant|>",
    },
}


TOKENIZERS = ("tokenizer.json", "emu3.tiktoken", "tokenizer.model")             # in this order of preference ...
TOKENIZER_NOTES = ("emu3_vision_tokens.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "chat_template.json")                 # ... and beside them


def find_tokenizer(folder):
    """The tokenizer's file in a folder, or None."""
    return next((folder / name for name in TOKENIZERS if (folder / name).exists()), None)


def special_ids(known, kind, place):
    """{role: id} of the special tokens, from the {token: id} of a tokenizer or a config.json."""
    if "<image>" in known:                           # how transformers calls Emu3's first reserved token
        known = {SPECIAL["emu3"]["placeholder"]: known["<image>"]} | known
    if kind == "janus":                              # the authors add it where it lacks; its embedding is never used
        known = {SPECIAL[kind]["placeholder"]: max(known.values(), default=0) + 1} | known
    missing = [text for text in SPECIAL[kind].values() if text not in known]
    if missing:
        raise InputError(f"tokenizer {place} lacks {', '.join(missing)}: is it the tokenizer of {kind}?")
    return {role: known[text] for role, text in SPECIAL[kind].items()}


def token_ids(file):
    """{token: id} of a tokenizer.json or a sentencepiece .model; of emu3.tiktoken its special tokens."""
    file = Path(file)
    try:
        if file.suffix == ".tiktoken":               # Emu3's own: they follow the ranks of this file, in a fixed order
            visual = file.with_name("emu3_vision_tokens.txt").read_text(encoding="utf-8").splitlines()
            first = sum(1 for line in file.read_bytes().splitlines() if line.strip())
            special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
                       *filter(None, map(str.strip, visual))]
            return {token: first + i for i, token in enumerate(special)}
        if file.suffix == ".model":
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
            added = file.with_name("added_tokens.json")
            return {pieces.id_to_piece(i): i for i in range(len(pieces))} | (read_json(added) if added.exists() else {})
        content = json.loads(file.read_text(encoding="utf-8"))
        return dict(content["model"]["vocab"]) | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"tokenizer {file} cannot be read ({error}): download this file again") from error


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
           "tiny-half": TINY_HALF, "tiny-double": TINY_DOUBLE, "small-emu3": SMALL_EMU3, "emu3-8b": EMU3_8B,
           "janus-pro-1b": JANUS_PRO_1B, "janus-pro-7b": JANUS_PRO_7B}


# ---------------------------------------------------------------------------------------------------------------------
# Attention: three bodies, one meaning
# ---------------------------------------------------------------------------------------------------------------------
# q (B, H, T, D); k, v (B, G, U, D), where U >= T counts cached keys too, and G heads are shared by H / G queries each.
# visible (B or 1, 1, T, U) bool, or None: causal where T = U, everything where T = 1.
# condition (B, U) bool, or None if nobody asks.
# rectangle: indices of rows (B, R) and keys (B, K) that count, -1 for padding; None: all rows and the condition.
# All return out (B, H, T, D) and mass (B, H, T), the attention each token spends on the condition.
def attend_explicit(q, k, v, visible=None, condition=None, rectangle=None):
    """softmax(Q K^T / sqrt(D)) V written out: the one to read, and the reference of the tests."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)         # (B, H, U, D)
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
    return out, (attention * condition[:, None, None]).sum(-1)                  # (B, H, T)


def attend_fused(q, k, v, visible=None, condition=None, rectangle=None):
    """The same through one fused kernel, without ever keeping a T x U map.

    Attention is a weighted mean of values. Give condition keys the value 1 in one more channel and all others 0, and
    that channel's mean *is* the weight spent on the condition: exact, differentiable, and nearly free on a CPU. A GPU's
    kernels are made for a few head sizes: there 128 + 8 channels may cost as much as 192.
    """
    # One query sees every cached key; more of them need the causal mask. Written out, as torch.compile with lengths
    # that vary would take a comparison for a symbol, which no kernel accepts.
    causal = True if visible is None and q.shape[2] > 1 else False
    grouped = True if q.shape[1] != k.shape[1] else False
    shape = {"attn_mask": visible, "is_causal": causal, "enable_gqa": grouped}
    if condition is None:
        return F.scaled_dot_product_attention(q, k, v, **shape), None
    flag = condition[:, None, :, None].to(v.dtype).expand(*v.shape[:3], 1)      # (B, G, U, 1)
    v = F.pad(torch.cat([v, flag], -1), (0, 7))                                 # (B, G, U, D + 8), kernels like 8s
    scale = q.shape[-1] ** -0.5
    q, k = F.pad(q, (0, 8)), F.pad(k, (0, 8))                                   # zeros leave the scores unchanged
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, **shape)         # (B, H, T, D + 8)
    return out[..., :-8], out[..., -8].contiguous()                             # (B, H, T, D), (B, H, T)


def attend_lse(q, k, v, visible=None, condition=None, rectangle=None):
    """The same through a kernel of plain attention: rows of the rectangle get their mass from its log-sum-exp
    (kernels.MassFromLse), the others 0, which Eq. 1 does not read. It is `attend_fused` under a mask, and where no
    kernel has been tried and found right (kernels.try_lse)."""
    if condition is None or visible is not None or q.shape[2] != k.shape[2] or not kernels.kernel_for(q):
        return attend_fused(q, k, v, visible, condition)
    if rectangle is None:
        rectangle = kernels.indices(torch.ones_like(condition)), kernels.indices(condition)
    # mass(q) = sum_{k in condition} exp(q.k / sqrt(D) - lse(q))
    return kernels.attention_and_mass(q, k, v, *rectangle)                      # (B, H, T, D), (B, H, T)


# "auto" is the fused body until training, which knows its device, settles it (train.settle_attention). On CUDA "lse" is
# to follow when a measurement (lab/gpu.py) has shown that the flag channel costs more than 5 % of a step there.
ATTENTION = {"auto": attend_fused, "explicit": attend_explicit, "fused": attend_fused, "lse": attend_lse}
AUTO = {"cuda": "fused"}                        # elsewhere fused too


# ---------------------------------------------------------------------------------------------------------------------
# The decoder of both models
# ---------------------------------------------------------------------------------------------------------------------
class RMSNorm(nn.Module):
    """x / rms(x) * weight; statistics in float32, cast back *before* the weight, as the public models do."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = aia.at_least_float32(x)
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotate(x, rope):
    """Turn each pair (x_i, x_{i + D/2}) by its angle: x (B, H, T, D) -> same."""
    cos, sin = rope
    # x_i cos - x_{i + D/2} sin  and  x_{i + D/2} cos + x_i sin; the sine brings its sign
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Cache:
    """Keys and values of all layers in columns that are allocated once: those of prompts with mask (B, T) bool, then
    `new` more. A step fills the same columns for all rows.

    A row may stand still while others go on: its columns are masked, and its position stays. Column, position and mask
    are tensors, so a step of fixed shape can be recorded and replayed (`recorded`).
    """

    def __init__(self, lm, mask, new):
        c, like, device = lm.config, lm.embed_tokens.weight, mask.device
        self.mask = F.pad(mask, (0, new), value=True)                           # (B, U): who is real in each column
        self.even = bool(mask.all())                # no row has a masked column so far: attention needs no mask
        self.used, self.whole = 0, False            # columns in use; whether a step reads all of them, under the mask
        self.column = torch.zeros((), dtype=torch.long, device=device)          # the next one, where `whole`
        self.position = torch.zeros(len(mask), dtype=torch.long, device=device)         # of each row's next token
        shape = (len(mask), c.kv_heads, self.mask.shape[1], c.head_dim)
        # Zeros: a masked column weighs nothing, but nothing times whatever lay in memory may be NaN.
        self.k, self.v = ([like.new_zeros(shape) for _ in range(c.layers)] for _ in range(2))
        self.rope = lm.rotations(torch.arange(shape[2], device=device)[None])   # (1, 1, U, D) each

    def enter(self, new, moving=None):
        """Take the next `new` columns -> rotations (B or 1, 1, new, D), and who sees whom, as attention takes it.
        Where moving (B,) bool is false, a row stands still."""
        first, self.used = self.used, self.used + new
        end = self.mask.shape[1] if self.whole else self.used
        self.now = first, self.used
        if self.even and moving is None and new == 1:                           # nearly all steps of most answers
            return [part[:, :, first:end] for part in self.rope], None
        self.columns = columns = torch.arange(first, self.used, device=self.mask.device)        # (new,)
        if self.even and moving is None:
            return [part[:, :, first:end] for part in self.rope], visibility(None, columns, end)
        if self.whole:
            self.columns = columns = self.column + columns - first
            self.column += new
        self.leave_even(first)
        if moving is not None:
            self.mask.index_copy_(1, columns, moving[:, None].expand(-1, new))
        real = self.mask.index_select(1, columns)                               # (B, new)
        position = (self.position[:, None] + real.cumsum(1) - 1).clamp(min=0)   # (B, new)
        self.position += real.sum(1)
        rope = [part[0, 0].index_select(0, position.flatten()).view(*position.shape, -1)[:, None] for part in self.rope]
        return rope, visibility(self.mask[:, :end], columns, end)

    def leave_even(self, used):
        """Where all rows were in step so far, their position is the number of columns."""
        if self.even:
            self.position.fill_(used)
        self.even = False

    def add(self, layer, k, v):
        """Write the newest keys and values (rows, G, T, D); return all of this layer so far."""
        if self.whole:
            k, v = k.to(self.k[layer].dtype), v.to(self.v[layer].dtype)         # autocast may give another
            return self.k[layer].index_copy_(2, self.columns, k), self.v[layer].index_copy_(2, self.columns, v)
        first, end = self.now
        self.k[layer][:, :, first:end], self.v[layer][:, :, first:end] = k, v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def recorded(self, step):
        """step(x), which calls the decoder with this cache, as CUDA graphs (kernels.Recorded)."""
        self.leave_even(self.used)
        self.whole = True
        self.column.fill_(self.used)
        return kernels.Recorded(step, (self.column, self.position))


LORA_ALPHA = 16.0                               # with R = 16 the addition counts as it is, with another R by 16 / R


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
        split = (batch, len(x) // batch, -1, self.head_dim)
        q = self.q_proj(x).view(split).transpose(1, 2)                          # (B, H, T, D)
        k = self.k_proj(x).view(split).transpose(1, 2)                          # (B, G, T, D)
        v = self.v_proj(x).view(split).transpose(1, 2)                          # (B, G, T, D)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.add(self.index, k, v)                                  # (B, G, U, D)
        if cache is not None and cache.whole:
            out, mass = kernels.attend_columns(q, k, v, visible), None          # (B, H, T, D)
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
        self.config, self.rope_bf16, self.checkpoint_activations = config, False, False
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        if config.fork_layer:
            if config.fork_layer >= config.layers:
                raise InputError(f"--fork-layer {config.fork_layer}: the model has {config.layers} layers, give less")
            self.gen_layers = nn.ModuleList(Layer(config, i) for i in range(config.fork_layer, config.layers))
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
        c, dtype, kind = self.config, self.embed_tokens.weight.dtype, positions.device.type
        if torch.is_autocast_enabled(kind):         # else q and k would become float32 again, twice the traffic
            dtype = torch.get_autocast_dtype(kind)
        steps = torch.arange(0, c.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequency = c.theta ** (-steps / c.head_dim)                            # (D / 2,)
        if self.rope_bf16:
            frequency = frequency.bfloat16().float()
        angle = positions[:, None, :, None].float() * frequency                 # (B, 1, T, D / 2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)        # (B, 1, T, D) each

    def forward(self, x, mask=None, condition=None, queries=None, rectangle=None, cache=None, moving=None, hidden=False,
                task="und"):
        """Run embeddings x (B, T, C) through all layers of a task.

        mask (B, T) bool: True = real token; None: no padding, or padding on the right; a cache brings its own mask
        condition, queries (B, T) bool: measure the intensity of every layer (aia.py, Eq. 1); rectangle: their indices
        moving (B,) bool, with a cache: rows where it is false stand still; None: all go on
        -> x (B, T, C) after the final norm, intensity (B, L) or None, hidden states [L + 1 of (B, T, C)] or None
        """
        batch, new, _ = x.shape
        if cache:
            rope, visible = cache.enter(new, moving)
        else:
            mask = None if mask is None or bool(mask.all()) else mask
            columns = torch.arange(new, device=x.device)
            rope = self.rotations(columns[None] if mask is None else positions(mask))
            visible = visibility(mask, columns, new)
        x, intensities, states = x.flatten(0, 1), [], [x]                       # (B T, C)
        layers, norm = self.path(task)
        for layer in layers:
            # Recomputed in the backward pass, mass included, instead of kept.
            run = functools.partial(checkpoint, layer, use_reentrant=False) if self.checkpoint_activations else layer
            x, mass = run(x, batch, rope, visible, condition, rectangle, cache)         # (B T, C), (B, H, T)
            if mass is not None:
                intensities.append(aia.intensity(mass, queries))                # (B,)
            if hidden:
                states.append(x.unflatten(0, (batch, new)))
        x = norm(x).unflatten(0, (batch, new))                                  # (B, T, C)
        return x, torch.stack(intensities, 1) if intensities else None, states if hidden else None


def positions(mask):
    """Positions (B, T), counted from the first real token of a mask (B, T)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def visibility(mask, columns, end):
    """Which of `end` keys the tokens in columns (T,) see: (B or 1, 1, T, U) bool, or None: causal where the columns are
    all there are, everything where one token is new. mask (B, U) bool or None: no padding."""
    if mask is None and len(columns) in (1, end):
        return None
    keys = torch.arange(end, device=columns.device)                             # (U,)
    causal = keys <= columns[:, None]                                           # (T, U)
    if mask is None:
        return causal[None, None]
    # A padded row sees at least itself, else its softmax is 0/0 and poisons everything.
    itself = keys == columns[:, None]                                           # (T, U)
    return ((causal & mask[:, None]) | itself)[:, None]                         # (B, 1, T, U)


# ---------------------------------------------------------------------------------------------------------------------
# Picture tokenizers: convolutional encoder, nearest codebook row, convolutional decoder
# ---------------------------------------------------------------------------------------------------------------------
class Norm(nn.GroupNorm):
    """Group norm with 32 groups; takes and ignores the code vectors that SpatialNorm needs."""

    def __init__(self, channels):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x, codes=None):
        return super().forward(x)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift come from the code vectors at the same place (Emu3's decoder)."""

    def __init__(self, channels, code_dim):
        super().__init__()
        self.norm_layer = Norm(channels)
        self.conv_y, self.conv_b = nn.Conv2d(code_dim, channels, 1), nn.Conv2d(code_dim, channels, 1)

    def forward(self, x, codes):
        codes = F.interpolate(codes, size=x.shape[-2:], mode="nearest")
        return self.norm_layer(x) * self.conv_y(codes) + self.conv_b(codes)


class ResBlock(nn.Module):
    """Two normalised 3 x 3 convolutions and a skip."""

    def __init__(self, before, after, norm):
        super().__init__()
        self.norm1, self.conv1 = norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        nn.init.zeros_(self.conv2.weight)           # fresh branches, here and below, begin by adding nothing

    def forward(self, x, codes=None):
        y = self.conv1(F.silu(self.norm1(x, codes)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y, codes)))


class AttnBlock(nn.Module):
    """One attention head over all places of the grid."""

    def __init__(self, channels, norm):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x, codes=None):
        y = self.norm(x, codes)
        q, k, v = (part(y).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))   # (B, 1, hw, C)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]                       # (B, hw, C)
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """The residual blocks of one resolution, with attention after each where the configuration says so."""

    def __init__(self, before, after, blocks, attention, norm):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(before if i == 0 else after, after, norm) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(after, norm) for _ in range(blocks if attention else 0))

    def forward(self, x, codes=None):
        for i, block in enumerate(self.block):
            x = block(x, codes)
            x = self.attn[i](x, codes) if self.attn else x
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels, norm):
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(channels, channels, norm), AttnBlock(channels, norm)
        self.block_2 = ResBlock(channels, channels, norm)

    def forward(self, x, codes=None):
        return self.block_2(self.attn_1(self.block_1(x, codes), codes), codes)


class Encoder(nn.Module):
    """Pixels (B, 3, S, S) -> (B, vq_latent, h, w). Level 0 has the full resolution."""

    def __init__(self, config):
        super().__init__()
        widths = [config.vq_width * m for m in config.vq_mult]
        self.conv_in = nn.Conv2d(3, config.vq_width, 3, padding=1)
        before = [config.vq_width, *widths[:-1]]
        self.down = nn.ModuleList(Level(before[i], widths[i], config.vq_blocks, i in config.vq_attention, Norm)
                                  for i in range(len(widths)))
        self.downsample = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2) for c in widths[:-1])
        self.mid, self.norm_out = Middle(widths[-1], Norm), Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.vq_latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i < len(self.downsample):
                x = self.downsample[i](F.pad(x, (0, 1, 0, 1)))                  # pad right and below only
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PixelDecoder(nn.Module):
    """(B, vq_latent, h, w) and code vectors (B, code_dim, h, w) -> pixels (B, 3, S, S), nominally in [-1, 1]."""

    def __init__(self, config, norm):
        super().__init__()
        widths = [config.vq_width * m for m in reversed(config.vq_mult)]        # lowest resolution first
        top = len(widths) - 1
        self.conv_in = nn.Conv2d(config.vq_latent, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], norm)
        before = [widths[0], *widths[:-1]]
        self.up = nn.ModuleList(Level(before[i], widths[i], config.vq_blocks + 1, top - i in config.vq_attention, norm)
                                for i in range(len(widths)))
        self.upsample = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in widths[:-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x, codes=None):
        x = self.mid(self.conv_in(x), codes)
        for i, level in enumerate(self.up):
            x = level(x, codes)
            if i < len(self.upsample):
                x = self.upsample[i](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x, codes)))


def flatten(latents):
    """(B, code_dim, h, w) -> (B h w, code_dim)."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


class VQ(nn.Module):
    """What both tokenizers share: the codebook. Always float32: half precision flips codes."""

    def __init__(self, config):
        super().__init__()
        self.quantize = nn.Embedding(config.codebook, config.code_dim)
        nn.init.uniform_(self.quantize.weight, -1 / config.codebook, 1 / config.codebook)

    def rows(self):
        """The codebook as it is compared and decoded: (K, code_dim)."""
        return self.quantize.weight

    def nearest(self, flat):
        """Code of the nearest row (squared distance) for flat latents (n, code_dim) -> (n,)."""
        rows = self.rows()
        # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, where |z|^2 does not change the order
        return (rows.square().sum(1) - 2 * flat @ rows.T).argmin(1)

    def vectors(self, codes):
        """Codes (B, h, w) -> rows (B, code_dim, h, w)."""
        return F.embedding(codes, self.rows()).permute(0, 3, 1, 2)

    def encode(self, pixels):
        """Pixels (B, 3, S, S) in [-1, 1] -> codes (B, h, w)."""
        z = self.latents(pixels)                                                # (B, code_dim, h, w)
        return self.nearest(flatten(z)).view(len(z), *z.shape[2:])

    def decode(self, codes):
        """Codes (B, h, w) -> pixels (B, 3, S, S), not clipped."""
        return self.pixels(self.vectors(codes))


class JanusVQ(VQ):
    """VQ-16 of LlamaGen, used by Janus-Pro: latents and codebook rows are compared and decoded at unit length."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder, self.decoder = Encoder(config), PixelDecoder(config, Norm)
        self.quant_conv = nn.Conv2d(config.vq_latent, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.vq_latent, 1)

    def rows(self):
        return F.normalize(self.quantize.weight, dim=1)

    def latents(self, pixels):
        return F.normalize(self.quant_conv(self.encoder(pixels)), dim=1)

    def pixels(self, vectors):
        return self.decoder(self.post_quant_conv(vectors))


class CausalConv3d(nn.Module):
    """3-D convolution over (time, height, width): time padded by two frames in front, whatever the kernel."""

    def __init__(self, channels, kernel, time_stride=1):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, kernel, stride=(time_stride, 1, 1))
        side = [kernel[1] // 2, (kernel[1] - 1) // 2]
        self.padding = (*side, *side, 2, 0)

    def pass_through(self):
        """Start close to the identity on the newest frame: with small random weights the many convolutions over time in
        a row leave no signal, and training from scratch stalls."""
        weight = self.conv.weight.data.mul_(0.1)
        for channel in range(len(weight)):
            weight[channel, channel, -1, weight.shape[3] // 2, weight.shape[4] // 2] += 1.0
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class TimeBlock(nn.Module):
    """Residual block over time. Its batch norm always uses the stored statistics, in training too."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm3d(channels), CausalConv3d(channels, (3, 3, 3))
        self.norm2, self.conv2 = nn.BatchNorm3d(channels), CausalConv3d(channels, (3, 3, 3))

    def train(self, mode=True):
        super().train(mode)
        for norm in (self.norm1, self.norm2):
            norm.eval()
        return self

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Emu3VQ(VQ):
    """Emu3VisionVQ, a video tokenizer: a still picture is four equal frames in, and frame 0 of four out."""

    frames = 4

    def __init__(self, config):
        super().__init__(config)
        z, code_dim = config.vq_latent, config.code_dim
        halvings = range(int(math.log2(self.frames)))
        self.encoder, self.decoder = Encoder(config), PixelDecoder(config, lambda c: SpatialNorm(c, code_dim))
        self.encoder_time_conv = nn.ModuleList(CausalConv3d(z, (4, 3, 3), time_stride=2) for _ in halvings)
        self.encoder_time_blocks = nn.ModuleList(TimeBlock(z) for _ in range(config.vq_blocks))
        self.decoder_time_blocks = nn.ModuleList(TimeBlock(z) for _ in range(config.vq_blocks))
        self.decoder_time_conv = nn.ModuleList(CausalConv3d(z, (3, 3, 3)) for _ in halvings)
        self.quant_conv, self.post_quant_conv = CausalConv3d(z, (3, 1, 1)), CausalConv3d(z, (3, 1, 1))
        for module in [*self.encoder_time_conv, *self.decoder_time_conv, self.quant_conv, self.post_quant_conv]:
            module.pass_through()

    def latents(self, pixels):
        # The four frames are equal, so the 2-D encoder sees one of them; time begins after it.
        x = self.encoder(pixels)[:, :, None].repeat(1, 1, self.frames, 1, 1)    # (B, C, 4, h, w)
        for conv in self.encoder_time_conv:
            x = F.silu(conv(x))
        for block in self.encoder_time_blocks:
            x = block(x)                                                        # (B, C, 1, h, w)
        return self.quant_conv(x)[:, :, 0]                                      # (B, C, h, w)

    def pixels(self, vectors):
        codes = vectors[:, :, None]                                             # (B, C, 1, h, w)
        # Both what is decoded and what the spatial norms read pass through time.
        x = torch.cat([self.post_quant_conv(codes), codes])                     # (2 B, C, 1, h, w)
        for block in self.decoder_time_blocks:
            x = block(x)
        for conv in self.decoder_time_conv:
            x = F.silu(conv(x.repeat_interleave(2, 2)))                         # twice the frames
        x, codes = x[:, :, 0].chunk(2)                                          # frame 0 is the picture
        return self.decoder(x, codes)


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP, the picture reader of Janus-Pro
# ---------------------------------------------------------------------------------------------------------------------
class VitBlock(nn.Module):
    """Pre-norm transformer block: full attention, exact GELU, biases everywhere."""

    def __init__(self, width, heads, ffn):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x):
        split = (*x.shape[:2], 3, self.heads, -1)
        q, k, v = self.qkv(self.norm1(x)).view(split).permute(2, 0, 3, 1, 4)    # (B, H, N, D) each
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SigLIP(nn.Module):
    """Pixels (B, 3, S, S) -> features (B, N, vit_width), N = (S / patch)^2, row by row; final norm applied."""

    def __init__(self, config):
        super().__init__()
        c = config.vit_width
        self.patch_embed = nn.Conv2d(3, c, config.vit_patch, stride=config.vit_patch)
        places = (config.image_size // config.vit_patch) ** 2
        self.pos_embed = nn.Parameter(config.embed_std * torch.randn(1, places, c))
        self.blocks = nn.ModuleList(VitBlock(c, config.vit_heads, config.vit_ffn) for _ in range(config.vit_layers))
        self.norm = nn.LayerNorm(c, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# The two models
# ---------------------------------------------------------------------------------------------------------------------
def next_token_loss(x, head, target):
    """Sum of the cross-entropy of head(x) with target: x (n, C), target (n,) -> scalar."""
    *before, last = head if isinstance(head, nn.Sequential) else [head]
    for layer in before:
        x = layer(x)
    return kernels.chunked_cross_entropy(x, last.weight, last.bias, target)


@dataclass
class Output:
    """ntp: sum of the next-token loss over labels; tokens: their number; intensity (B, L); hidden: L + 1 states."""

    ntp: torch.Tensor
    tokens: int
    intensity: torch.Tensor | None = None
    hidden: list | None = None


ASK_EVERY = 4                                   # tokens between looks whether all answers have ended, on a GPU
REPLAYED, REPLAY_FROM = ("cuda",), 64            # devices on which, and how many steps from which, one is recorded


class Unified(nn.Module):
    """What Emu3 and Janus-Pro share. Each adds how tokens and pictures enter, and which head reads them out."""

    def __init__(self, config):
        super().__init__()
        # Convolutions are those of picture tokenizers and SigLIP's patches, which must be exact: by default cuDNN
        # rounds what goes into them to 10 bits (TF32), and 2 to 10 % of the codes change. The switch belongs to the
        # whole process: threads share it, so it is set once and not around each call.
        torch.backends.cudnn.allow_tf32 = False
        self.config, self.ids, self.tokenizer_file = config, dict(config.ids), None
        self.lm = Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        self.vq = {"emu3": Emu3VQ, "janus": JanusVQ}[config.kind](config)

    def forward(self, batch, intensity=True, hidden=False):
        """Loss and intensities of one data.Batch: padding on the right, one task."""
        x = self.embed(batch)                                                   # (B, T, C)
        condition = batch.condition if intensity else None
        x, intensities, states = self.lm(x, None, condition, batch.queries, (batch.rows, batch.keys), hidden=hidden,
                                         task=batch.task)
        # Only positions that predict a label meet the head.
        x = x.flatten(0, 1).index_select(0, batch.predicting)                   # (n, C)
        ntp = next_token_loss(x, self.head(batch.task), batch.targets)
        return Output(ntp, len(batch.targets), intensities, states)

    def logits(self, ids, pixels=None, mask=None):
        """Text logits (B, T, V). ids (B, T) hold one placeholder per image token, filled in order from pixels
        (n, 3, S, S); mask (B, T) bool, True = real token, padding on either side."""
        return self.lm_head(self.lm(self.embed_text(ids, pixels), mask)[0])

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

    @torch.inference_mode()
    def generate_images(self, ids, mask=None, size=None, negative=None, guidance=None, temperature=1.0, top_k=None,
                        generator=None):
        """Draw: prompts ids (B, T) that end with the token before the first code -> codes, as encode_images gives.

        mask (B, T) bool: padding on the left. size (h, w) of the code grid. guidance 1 is without; Emu3 then needs no
        `negative` (1 or B, T') prompt. temperature 0 takes the likeliest code, top_k 0 keeps all.
        """
        h, w = size or self.config.grid
        guidance = self.config.guidance if guidance is None else guidance
        top_k = self.config.top_k if top_k is None else top_k
        mask, guided = left_padding(ids, mask), guidance != 1
        rows, mask = self.guided_rows(ids, mask, negative) if guided else (ids, mask)
        step, x, codes = self.steps(mask, h * (w + 1), "gen"), self.embed_text(rows), []
        for i in range(h * w):
            logits = self.code_logits(step(x)).float()                          # (rows, K)
            if guided:
                # Rows alternate: conditional, unconditional. s = u + g (c - u)
                given, free = logits[0::2], logits[1::2]
                logits = free + guidance * (given - free)                       # (B, K)
            code = sample(logits, temperature, top_k, 1.0, generator)           # (B,)
            codes.append(code)
            x = self.embed_code(code.repeat_interleave(2) if guided else code, row_end=(i + 1) % w == 0)
        return self.as_codes(torch.stack(codes, 1).view(-1, h, w))

    @torch.inference_mode()
    def generate_text(self, ids, pixels=None, mask=None, max_new_tokens=512, temperature=0.0, top_p=1.0,
                      generator=None, watch=None):
        """Answer: ids (B, T) as in `logits`, padding on the left -> new ids (B, up to max_new_tokens).

        temperature 0 is greedy. A row ends with EOS, then pad; stops when all rows have ended. watch is called with the
        tokens (B,) of each step, as they come.
        """
        step, x = self.steps(left_padding(ids, mask), max_new_tokens, "und"), self.embed_text(ids, pixels)
        done, new = torch.zeros(len(ids), dtype=torch.bool, device=ids.device), []
        ask = 1 if ids.device.type == "cpu" else ASK_EVERY
        while len(new) < max_new_tokens and (len(new) % ask or not done.all()):
            logits = self.lm_head(step(x)).float()                              # (B, V)
            token = sample(logits, temperature, 0, top_p, generator)            # (B,)
            token = token.masked_fill(done, self.ids["pad"])
            new.append(token)
            if watch:
                watch(token)
            done |= token == self.ids["eos"]
            x = self.lm.embed_tokens(token[:, None])                            # (B, 1, C)
        if not new:
            return ids[:, :0]
        tokens = torch.stack(new, 1)
        going = (tokens == self.ids["eos"]).cumsum(1) == 0                      # (B, T): rows that have not ended
        return tokens[:, :int(going.any(0).sum()) + 1]

    def steps(self, mask, new, task):
        """A function of embeddings (rows, T, C), first those of prompts with mask (rows, T) bool, then of up to `new`
        tokens -> the last hidden state (rows, C). After the prompts CUDA replays it: a step is 1,000 small kernels."""
        cache, replayed = Cache(self.lm, mask, new), None

        def step(x):
            return self.lm(x, cache=cache, task=task)[0][:, -1]                 # (rows, C)

        def run(x):
            nonlocal replayed
            if replayed is None and cache.used and new >= REPLAY_FROM:
                replayed = cache.recorded(step)
            with kernels.no_planning(x.device.type):
                return (replayed or step)(x)
        return run if mask.device.type in REPLAYED else step


class Emu3(Unified):
    """One vocabulary: picture code c is the token visual + c, and every row of codes ends with a row-end token."""

    def head(self, task):
        return self.lm_head

    def embed(self, batch):
        return self.lm.embed_tokens(batch.tokens)

    def embed_text(self, ids, pixels=None):
        """Embed ids; placeholders become the codes of the pictures, with row ends if there is room for them."""
        holes = ids == self.ids["placeholder"]
        n = int(holes.sum())
        tokens = ids[:0] if pixels is None else self.block(self.encode_images(pixels))          # (n, h, w + 1)
        tokens = tokens if tokens.numel() == n else tokens[..., :-1]            # (n, h, w)
        if tokens.numel() != n:
            raise InputError(f"{n} placeholders in the text, but {tokens.numel()} image tokens: "
                             "write one placeholder per image token")
        return self.lm.embed_tokens(ids.masked_scatter(holes, tokens) if n else ids)

    def block(self, codes):
        """Codes (..., w) -> token ids (..., w + 1): each row followed by its row end."""
        return F.pad(codes + self.ids["visual"], (0, 1), value=self.ids["eol"])

    def embed_code(self, code, row_end):
        """The next input after a drawn code (B,): its token, and at the end of a row the forced row end too."""
        tokens = self.block(code[:, None])                                      # (B, 2)
        return self.lm.embed_tokens(tokens if row_end else tokens[:, :1])

    def code_logits(self, x):
        """Logits (..., K) of the picture codes: no other row of the head is read, since inside a picture no other token
        is allowed, before any top-k."""
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


READ_AT_ONCE = 32                               # pictures that pass through SigLIP together


class Janus(Unified):
    """Pictures are read through SigLIP and an aligner, written as codes with an embedding and a head of their own."""

    def __init__(self, config):
        super().__init__(config)
        c = config.width
        self.vision = SigLIP(config)
        self.aligner = nn.Sequential(nn.Linear(config.vit_width, c), nn.GELU(), nn.Linear(c, c))
        self.gen_embed = nn.Embedding(config.codebook, config.code_dim)         # not the codebook of the VQ
        self.gen_aligner = nn.Sequential(nn.Linear(config.code_dim, c), nn.GELU(), nn.Linear(c, c))
        self.gen_head = nn.Sequential(nn.Linear(c, c), nn.GELU(), nn.Linear(c, config.codebook))

    def head(self, task):
        return self.gen_head if task == "gen" else self.lm_head

    def embed(self, batch):
        if batch.task == "gen":
            return self.fill(batch.tokens, self.embed_codes(batch.codes))
        if batch.features is not None:
            return self.fill(batch.tokens, self.read(batch.features))
        return self.fill(batch.tokens, None if batch.pixels is None else self.see(batch.pixels))

    def embed_text(self, ids, pixels=None):
        holes, features = int((ids == self.ids["placeholder"]).sum()), None if pixels is None else self.see(pixels)
        given = 0 if features is None else features.shape[0] * features.shape[1]
        if given != holes:
            raise InputError(f"{holes} placeholders in the text, but {given} image tokens: "
                             "write one placeholder per image token")
        return self.fill(ids, features)

    def see(self, pixels):
        """Pictures (n, 3, S, S) through SigLIP -> (n, N, C)."""
        held, half = self.vision.pos_embed.dtype, self.aligner[0].weight.dtype
        # A frozen SigLIP beside sharded weights is held in float32 and has no autocast: it is given one here.
        alone = held is torch.float32 and half is torch.bfloat16
        with torch.autocast(pixels.device.type, half) if alone else nullcontext():
            return torch.cat([self.read(self.vision(part.to(held))) for part in pixels.split(READ_AT_ONCE)])

    def read(self, features):
        """Features of SigLIP (n, N, vit_width) -> (n, N, C). A frozen SigLIP may be more exact than what follows."""
        return self.aligner(features.to(self.aligner[0].weight.dtype))

    def fill(self, ids, features):
        """Embed ids (B, T); placeholders take features (n, N, C) in order. Nothing here waits for a GPU."""
        x = self.lm.embed_tokens(ids)                                           # (B, T, C)
        if features is None:
            return x
        holes = ids == self.ids["placeholder"]                                  # (B, T)
        number = (holes.flatten().cumsum(0) - 1).clamp(min=0)                   # (B T,): which feature a hole takes
        taken = features.to(x.dtype).flatten(0, 1).index_select(0, number)      # (B T, C)
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
        place = torch.arange(ids.shape[1], device=ids.device)                   # (T,)
        keep = (place <= first) | (place == ids.shape[1] - 1)                   # (B, T)
        blank = torch.where(keep, ids, self.ids["pad"])
        return torch.stack([ids, blank], 1).flatten(0, 1), mask.repeat_interleave(2, 0)


def left_padding(ids, mask):
    """The mask of prompts (B, T), checked: generation continues at the last position, so padding must be in front."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not bool(mask[:, -1].all()):
        raise InputError("prompts for generation must be padded on the left: the last token of every row is continued")
    return mask


def sample(logits, temperature, top_k, top_p, generator=None):
    """Draw one id per row of logits (B, V) -> (B,). temperature 0: the largest; top_k 0 and top_p 1: from all."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probability = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probability.sort(-1, descending=True)
        # Keep the fewest ids whose sum reaches top_p; the likeliest one always stays.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probability = torch.zeros_like(probability).scatter(-1, order, ordered)
    # The least of exponential variables with rates p is that of i with odds p_i: what torch.multinomial does, which
    # then waits for the GPU to check its input.
    return (probability / torch.empty_like(probability).exponential_(1.0, generator=generator)).argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Building and reading
# ---------------------------------------------------------------------------------------------------------------------
MODELS = {"emu3": Emu3, "janus": Janus}


def build(name, **changes):
    """A preset with fresh weights; changes replace fields of its Config. On the device of torch.device(...)."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
    unknown = set(changes) - {f.name for f in fields(Config)}
    if unknown:
        raise InputError(f"a model has no setting {', '.join(sorted(unknown))}: see model.Config")
    return from_config(replace(PRESETS[name], **changes))


def from_config(config):
    """A model with fresh weights: Normal(0, init_std), embeddings Normal(0, embed_std); the VQ has its own."""
    if config.attention not in ATTENTION:
        raise InputError(f"attention {config.attention!r} is unknown: use one of {', '.join(ATTENTION)}")
    m = MODELS[config.kind](config)
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
    """Begin UniFork's generation branch as a copy of the understanding branch; nothing without fork_layer."""
    layers, norm = m.lm.path("gen")
    for copy, source in zip([*layers, norm], [*m.lm.layers, m.lm.norm], strict=True):
        for mine, theirs in zip(copy.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs)


def fresh_lora(m, device="cpu"):
    """{name: tensor} of what LoRA adds, before training: A normal, B zero. It follows from torch.manual_seed alone, and
    processes that share out the weights make the whole and keep their part: all layouts begin the same."""
    generator, made = torch.Generator("cpu").manual_seed(torch.initial_seed()), {}
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


@torch.no_grad()
def merged(m):
    """The weights of a model with W + (alpha / R) B A in place of W, A and B; of one without LoRA as they are."""
    state = m.state_dict()
    for name in [name for name in state if name.endswith("lora_a")]:
        a, b, key = state.pop(name), state.pop(name[:-1] + "b"), name.replace("lora_a", "weight")
        state[key] = (state[key].float() + LORA_ALPHA / len(a) * (b.float() @ a.float())).to(state[key].dtype)
    return state


warnings.filterwarnings("ignore", "torch.distributed is disabled")              # one process is no mistake


# A checkpoint of train.py is a folder: shards that torch.distributed.checkpoint wrote as safetensors (nothing is ever
# unpickled), and a manifest.json with what is no tensor and the checksum of every file. It is complete or not there.
new_checksum = functools.partial(hashlib.blake2b, digest_size=16)


def checksum(file):
    with open(file, "rb") as content:
        return hashlib.file_digest(content, new_checksum).hexdigest()


def read_manifest(place):
    """The manifest of a checkpoint folder, after a look at every file."""
    if not (place / "manifest.json").exists():
        raise InputError(f"checkpoint {place} is missing")
    manifest = read_json(place / "manifest.json")
    for name, expected in manifest.get("files", {}).items():
        if not (place / name).exists() or checksum(place / name) != expected:
            raise InputError(f"checkpoint {place} is damaged ({name} is missing or not what was written)")
    return manifest


def checkpoint_places(folder):
    """Finished checkpoints of a run folder, STAGE-STEP, oldest first."""
    return sorted(folder.glob("checkpoints/[0-9]*-" + "[0-9]" * 7))


def newest_checkpoint(folder):
    """(place, manifest) of the newest checkpoint of a run folder that is whole; damaged ones are named."""
    places = checkpoint_places(folder)
    for place in reversed(places):
        try:
            return place, read_manifest(place)
        except InputError as error:
            print(f"{error}: looking for an earlier one", file=sys.stderr)
    whole = "whole " if places else ""
    raise InputError(f"{folder} holds no {whole}checkpoint: give the folder of a run that has saved one")


def tensor_names(place):
    return set(dcp.HuggingFaceStorageReader(str(place)).read_metadata().state_dict_metadata)


def read_tensors(tensors, place):
    """Fill tensors {name: tensor} from a checkpoint folder; each process reads what its shards need."""
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(place)),
             no_dist=not any(isinstance(tensor, DTensor) for tensor in tensors.values()))


def load(folder, dtype=None, device="cpu", vision_tokenizer=None, rope_bf16=False, attention="auto", part="",
         shard=None, lora_rank=None, fork_layer=0):
    """A model in eval mode from a run folder, or a folder (or hub id) of public weights, whose layout is recognised.

    dtype None: as stored; the picture tokenizer is float32 always. vision_tokenizer: folder of Emu3's, where it is not
    beside the language model. rope_bf16 rounds the rotary frequencies as the published scripts do. part: "before" or
    "control" of a run; RUN/before may also be given itself. shard(m), called while the model is empty, may make its
    parameters DTensors.
    lora_rank: begin LoRA on a model without; None: LoRA where the run folder has it. fork_layer: begin UniFork's two
    branches on a model without; 0: a fork where the run folder has it.
    """
    home = folder = find_folder(folder)
    if (folder / "checkpoints").exists() or not (folder.is_file() or (folder / "config.json").exists()):
        if (folder / "manifest.json").exists():     # one checkpoint of a run, RUN/before or RUN/checkpoints/3-0000300
            part, home = ".", next((up for up in folder.absolute().parents if find_tokenizer(up)), folder)
        place, manifest = (folder / part, read_manifest(folder / part)) if part else newest_checkpoint(folder)
        if lora_rank is not None and manifest["config"].get("lora_rank"):
            raise InputError(f"{folder} was trained with LoRA: write it as a plain model with model.save(model.load("
                             f"{str(folder)!r}), 'FOLDER'), and start from that FOLDER")
        if fork_layer and manifest["config"].get("fork_layer"):
            raise InputError(f"{folder} is forked already: leave out --fork-layer")
        m = from_manifest(manifest, place, device, attention, shard, dtype, lora_rank, fork_layer)
        m.tokenizer_file = find_tokenizer(home)
    else:
        added = {"lora_rank": lora_rank or 0, "fork_layer": fork_layer}
        m = load_public(folder, dtype, device, vision_tokenizer, {"attention": attention} | added, shard)
    m.lm.rope_bf16 = rope_bf16
    return m.eval()


def from_manifest(manifest, place, device="cpu", attention="auto", shard=None, dtype=None, lora_rank=None,
                  fork_layer=0):
    """The model of a checkpoint folder: built without memory, then filled, by several processes each its part.
    dtype None: as stored. lora_rank, fork_layer: fresh LoRA or fork, of which the checkpoint knows nothing."""
    changed = {"attention": attention} | ({"lora_rank": lora_rank} if lora_rank else {}) | (
        {"fork_layer": fork_layer} if fork_layer else {})
    with torch.device("meta"):
        m = MODELS[manifest["config"]["kind"]](configured(manifest["config"] | changed))
    for name, parameter in m.named_parameters():
        parameter.data = parameter.data.to(held_type(name, dtype or getattr(torch, manifest["dtype"])))
    if shard:
        shard(m)
    m.to_empty(device=device)
    fresh = fresh_lora(m, device) if lora_rank else {}
    read_tensors({f"model.{name}": value for name, value in m.state_dict().items()
                  if name not in fresh and not (fork_layer and unforked(name, m.config) != name)}, place)
    if fork_layer:
        fork(m)
    m.load_state_dict(fresh, strict=False)
    return m


def configured(values):
    """A Config from plain values, lists where it has tuples."""
    return Config(**values | {key: tuple(values[key]) for key in ("vq_mult", "vq_attention")})


# ---------------------------------------------------------------------------------------------------------------------
# Public checkpoints: names
# ---------------------------------------------------------------------------------------------------------------------
# Ordered rules from our names to those of each layout. "hf" is transformers; decoder levels of Emu3 count from the
# highest resolution there, and `top` is the number of the lowest.
VQ_NAMES = ((r"quantize\.", "quantize.embedding."), (r"(down|up)sample\.(\d)", r"\1.\2.\1sample.conv"))
EMU3_VQ_NAMES = (
    *VQ_NAMES, (r"coder_time_conv\.(\d)", r"coder.time_conv.\1.conv"), (r"coder_time_blocks", "coder.time_res_stack"),
    (r"decoder\.up\.(\d)", lambda found, top: f"decoder.up.{top - int(found[1])}"))
NAMES = {
    ("emu3", "original"): (*EMU3_VQ_NAMES, (r"^vq\.", ""), (r"^lm\.", "model.")),
    ("emu3", "hf"): (
        *EMU3_VQ_NAMES, (r"^vq\.", "model.vqmodel."), (r"^lm\.", "model.text_model."),
        (r"coder\.(down|up)\.", r"coder.\1_block.\1."), (r"\.mid\.", ".middle_block."),
        (r"attn\.(\d)\.norm\.", r"attn_norms.\1."), (r"attn_1\.norm\.", "attn_norm."),
        (r"(attn[._]\d)\.([qkv])\.", r"\1.\2_proj."), (r"(attn[._]\d)\.proj_out", r"\1.out_proj")),
    ("janus", "original"): (
        *VQ_NAMES, (r"^vq\.", "gen_vision_model."), (r"coder\.(down|up)\.", "coder.conv_blocks."),
        (r"(conv_blocks\.\d)\.block\.", r"\1.res."), (r"mid\.block_1", "mid.0"), (r"mid\.attn_1", "mid.1"),
        (r"mid\.block_2", "mid.2"), (r"^lm\.", "language_model.model."), (r"^lm_head", "language_model.lm_head"),
        (r"aligner\.(\d)", r"aligner.layers.\1"), (r"^gen_head\.0", "gen_head.output_mlp_projector"),
        (r"^gen_head\.2", "gen_head.vision_head"), (r"^vision\.", "vision_model.vision_tower."),
        (r"patch_embed\.", "patch_embed.proj."), (r"(blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),
        (r"(blocks\.\d+)\.fc", r"\1.mlp.fc")),
    ("janus", "hf"): (
        *VQ_NAMES, (r"^vq\.", "model.vqmodel."), (r"^lm\.", "model.language_model."), (r"^aligner", "model.aligner"),
        (r"^gen_", "model.generation_"), (r"aligner\.0", "aligner.fc1"), (r"aligner\.2", "aligner.hidden_layers.0"),
        (r"generation_embed", "generation_embeddings"), (r"head\.0", "head.proj_out"),
        (r"head\.2", "head.vision_head"), (r"^vision\.patch_embed", "vision.embeddings.patch_embedding"),
        (r"^vision\.pos_embed", "vision.embeddings.position_embedding.weight"),
        (r"^vision\.norm", "vision.post_layernorm"), (r"^vision\.", "model.vision_model."),
        (r"blocks\.(\d+)\.norm", r"blocks.\1.layer_norm"), (r"blocks\.(\d+)\.fc", r"blocks.\1.mlp.fc"),
        (r"blocks\.(\d+)\.proj", r"blocks.\1.self_attn.projection_layer"),
        (r"blocks\.(\d+)\.qkv", r"blocks.\1.self_attn.qkv"), (r"blocks\.", "encoder.layers.")),
}
# What transformers writes for Emu3 differs from what it holds in memory; it reads both, and so do we.
EMU3_TO_DISK = ((r"^model\.text_model\.", "text_model.model."), (r"^lm_head\.", "text_model.lm_head."),
                (r"^model\.vqmodel\.", "vqmodel."))
EMU3_FROM_DISK = ((r"^text_model\.model\.", "model.text_model."), (r"^text_model\.lm_head\.", "lm_head."),
                  (r"^vqmodel\.", "model.vqmodel."))
UNUSED = r"attn_pool|codebook_used|inv_freq"             # in public files, used by nobody


def renamed(name, rules):
    """A name after all rules, in their order."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def public_names(name, config, layout):
    """The public names of one of our tensors: one, or three where a fused projection is stored apart."""
    top = len(config.vq_mult) - 1
    name = renamed(name, [(pattern, functools.partial(new, top=top) if callable(new) else new)
                          for pattern, new in NAMES[config.kind, layout]])
    return [name.replace("qkv", f"{part}_proj") for part in "qkv"] if layout == "hf" and "qkv" in name else [name]


def to_transformers(name, value, config):
    """One of our tensors as {name: tensor} in memory of transformers."""
    public = public_names(name, config, "hf")
    parts = dict(zip(public, value.chunk(3), strict=True)) if len(public) == 3 else {public[0]: value}
    if config.kind == "emu3":                       # 1 x 1 convolutions are linear there
        return {part: x[:, :, 0, 0] if re.search(r"(q|k|v|out)_proj", part) and x.ndim == 4 else x
                for part, x in parts.items()}
    return {part: x[0] if part.endswith("position_embedding.weight") else x for part, x in parts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Public checkpoints: configuration
# ---------------------------------------------------------------------------------------------------------------------
# Fields of the json files by our names, and what the code takes for granted of the others.
TEXT = {"width": "hidden_size", "ffn": "intermediate_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
        "vocab": "vocab_size", "norm_eps": "rms_norm_eps", "theta": "rope_theta", "context": "max_position_embeddings"}
TEXT_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default",
             "type": "default", "partial_rotary_factor": 1.0}
VQ_HF = {"code_dim": "embed_dim", "vq_latent": "latent_channels", "vq_width": "base_channels",
         "vq_mult": "channel_multiplier", "vq_blocks": "num_res_blocks", "vq_attention": "attn_resolutions"}
VQ_ORIGINAL = {"codebook": "codebook_size", "code_dim": "embed_dim", "vq_latent": "z_channels", "vq_width": "ch",
               "vq_mult": "ch_mult", "vq_blocks": "num_res_blocks", "vq_attention": "attn_resolutions"}
VQ_ONLY = {"double_latent": False, "double_z": False, "in_channels": 3, "out_channels": 3,
           "temporal_downsample_factor": Emu3VQ.frames, "num_hidden_layers": 2}
VIT = {"vit_width": "hidden_size", "vit_layers": "num_hidden_layers", "vit_heads": "num_attention_heads",
       "vit_patch": "patch_size", "image_size": "image_size"}
VIT_ONLY = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_qk_norm": False, "attention_bias": True, "depth": 2,
            "num_channels": 3}
SIGLIP_L = {"model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1}
LLAMA = {"width": 4096, "ffn": 11008, "layers": 32, "heads": 32, "vocab": 32000, "norm_eps": 1e-6, "theta": 1e4,
         "context": 2048}                        # what transformers assumes where a Llama's config.json is silent
RESIZE = {"min_pixels": "min_pixels", "max_pixels": "max_pixels", "min_side": "min_size"}
RESIZE_ONLY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "background_color": [127] * 3, "resample": 3,
               "do_resize": True, "do_rescale": True, "do_normalize": True}
# How pictures are drawn: no public config.json says it, the presets of the recipes do; `save` writes it down.
PICTURES = ("image_size", "guidance", "top_k", "suffix", "negative", "system")
ID_FIELDS = {role: f"{role}_token_id" for role in ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")}


def taken(section, names, only, place):
    """{our field: value} of those a section of a json file holds; what the code cannot honour is an error."""
    for key, value in only.items():
        given = section.get(key)
        if given is not None and value not in (given, [given] * 3):             # 127 for [127, 127, 127]
            raise InputError(f"{place}: {key} {given!r} cannot be honoured, only {value!r}")
    return {ours: section[theirs] for ours, theirs in names.items() if section.get(theirs) is not None}


def read_config(folder, known):
    """config.json and the file of preprocessing -> (layout, values of a Config without ids, content of config.json).
    known {name: function that reads the tensor} fills in what Janus-Pro's original file leaves out."""
    file = folder / "config.json"
    content = read_json(file)
    kind, layout = {"emu3": ("emu3", "hf"), "Emu3": ("emu3", "original"), "janus": ("janus", "hf"),
                    "multi_modality": ("janus", "original")}.get(content.get("model_type"), (None, None))
    if not kind:
        raise InputError(f"{file}: model_type {content.get('model_type')!r} is not emu3, Emu3, janus or multi_modality")
    values = asdict(EMU3_8B) if kind == "emu3" else asdict(JANUS_PRO_7B) | LLAMA
    vision, vq, text = (content.get(part) or {} for part in (
        "vision_config", "vq_config", "text_config" if layout == "hf" else "language_config"))
    text = content if (kind, layout) == ("emu3", "original") else text
    values["head_dim"] = None
    if kind == "janus" or "num_key_value_heads" in text:
        values["kv_heads"] = None
    text = text | (text.get("rope_parameters") or {}) | (text.get("rope_scaling") or {})
    values |= taken(text, TEXT, TEXT_ONLY, file)
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    values["head_dim"] = values["head_dim"] or values["width"] // values["heads"]
    if layout == "hf":
        books = {"codebook": "codebook_size" if kind == "emu3" else "num_embeddings"}
        values |= taken(vq, VQ_HF | books, VQ_ONLY, file)
    if kind == "emu3":
        values["image_size"] = math.isqrt(content.get("image_area") or values["image_size"] ** 2)
    elif layout == "hf":
        values |= taken(vision, VIT, VIT_ONLY, file)
        values["vit_ffn"] = int(values["vit_width"] * (vision.get("mlp_ratio") or 4.0))
        values["vq_attention"] = [len(values["vq_mult"]) - 1]
    else:
        values |= taken(vision.get("params") or {}, {"vit_heads": "heads"}, SIGLIP_L, file) | janus_sizes(known)
    return layout, values | read_resize(folder) | (content.get("pictures") or {}), content


def read_resize(folder):
    """How pictures are resized, where a file of the folder says it. transformers 5 puts it into another file."""
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).exists():
            content = read_json(folder / name)
            return taken((content.get(part) or {}) if part else content, RESIZE, RESIZE_ONLY, folder / name)
    return {}


def janus_sizes(known):
    """Sizes of SigLIP and the picture tokenizer from the shapes of Janus-Pro's original tensors; its config.json has
    only a name for them. (The number of heads shows in no shape.)"""
    def shape(name):
        if name not in known:
            raise InputError(f"weights lack {name}: download the whole folder again")
        return known[name]().shape

    def count(pattern):
        return len({found[0] for found in map(re.compile(pattern).match, known) if found})
    vit, vq = "vision_model.vision_tower.", "gen_vision_model."
    levels, blocks = count(vq + r"encoder\.conv_blocks\.\d+\."), count(vq + r"encoder\.conv_blocks\.0\.res\.\d+\.")
    vq_width, (vit_width, _, patch, _) = shape(vq + "encoder.conv_in.weight")[0], shape(vit + "patch_embed.proj.weight")
    ends = [shape(f"{vq}encoder.conv_blocks.{i}.res.{blocks - 1}.conv2.weight")[0] for i in range(levels)]
    codebook, code_dim = shape(vq + "quantize.embedding.weight")
    return {"vq_width": vq_width, "vq_mult": [end // vq_width for end in ends], "vq_blocks": blocks,
            "vq_attention": [i for i in range(levels) if count(rf"{vq}encoder\.conv_blocks\.{i}\.attn\.")],
            "vq_latent": shape(vq + "encoder.conv_out.weight")[0], "codebook": codebook, "code_dim": code_dim,
            "vit_width": vit_width, "vit_patch": patch, "vit_layers": count(vit + r"blocks\.\d+\."),
            "vit_ffn": shape(vit + "blocks.0.mlp.fc1.weight")[0],
            "image_size": patch * math.isqrt(shape(vit + "pos_embed")[1])}


def read_ids(folder, content, values):
    """(ids by role, tokenizer file or None): from the tokenizer's own file where it is there, else config.json."""
    kind, file = values["kind"], find_tokenizer(folder)
    known, place = token_ids(file) if file else content.get("vocabulary_map"), file or folder / "config.json"
    if known:
        ids, name = special_ids(known, kind, place), f"<|visual token {values['codebook'] - 1:06d}|>"
        last = ids.get("visual", 0) + values["codebook"] - 1
        if kind == "emu3" and known.get(name, last) != last:
            raise InputError(f"{place}: the ids of the picture codes are not in one row from code 0 to {name}")
        return ids, file
    text = content | content.get("text_config", {})
    ids = {role: text[key] for role, key in ID_FIELDS.items() if text.get(key) is not None}
    return ids | ({"placeholder": content["image_token_id"]} if content.get("image_token_id") is not None else {}), None


# ---------------------------------------------------------------------------------------------------------------------
# Public checkpoints: reading and writing
# ---------------------------------------------------------------------------------------------------------------------
def find_folder(name):
    """A folder (or .pth file) that exists, or else the local copy of a hub id, downloaded if need be."""
    if Path(name).exists() or Path(name).parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return Path(name)                            # a mistyped runs/name is no hub id
    import huggingface_hub
    try:
        return Path(huggingface_hub.snapshot_download(str(name)))
    except Exception as error:                      # no such id, no network, no rights: all end here
        raise InputError(f"{name} is no folder and cannot be had from the hub ({first_line(error)}): run `hf download "
                         f"{name}` where there is a network, then give that folder") from error


def stored_tensors(place):
    """{name: function that reads this tensor} of a folder, or of one .pth file; pickled files run no code."""
    index = next(iter(sorted(place.glob("*.index.json"))), None)
    sharded = read_json(index).get("weight_map") or {} if index else {}
    files = [place] if place.is_file() else sorted(
        {place / name for name in sharded.values()} or
        list(place.glob("*.safetensors")) or list(place.glob("pytorch_model*.bin")) or list(place.glob("*.pth")))
    if not files:
        raise InputError(f"{place} holds no weights: expected *.safetensors, pytorch_model*.bin or *.pth")
    if len(files) > 1 and files[0].suffix == ".pth":
        raise InputError(f"{place} holds {len(files)} checkpoints: give one of them, such as {files[-1]}")
    known = {}
    for file in files:
        try:
            safe = file.suffix == ".safetensors"
            source = safe_open(file, "pt") if safe else torch.load(file, "cpu", weights_only=True, mmap=True)
            read = source.get_tensor if safe else source.get
            known |= {name: functools.partial(read, name) for name in source.keys()}
        except Exception as error:                  # missing, truncated, not a checkpoint: all mean the same
            raise InputError(f"weights {file} cannot be read ({first_line(error)}): download it again") from error
    return {name: read for name, read in known.items() if not re.search(UNUSED, name)}


def load_public(place, dtype, device, vision_tokenizer, changed, shard=None):
    """A model from public weights: built without memory, then filled tensor by tensor."""
    folder, known = place if place.is_dir() else place.parent, stored_tensors(place)
    if place.is_file() and not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json: copy the json files of the model that {place.name} was "
                         "trained from into it")
    try:
        m, layout, tied, known = empty_model(folder, known, vision_tokenizer, changed)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{folder / 'config.json'} describes no model that can be built "
                         f"({first_line(error)}): is it complete?") from error
    if shard:
        shard(m)
    head, words = (public_names(name, m.config, layout)[0] for name in ("lm_head.weight", "lm.embed_tokens.weight"))
    if tied and head not in known and words in known:
        known[head] = known[words]
    state, problems, used = fresh_lora(m, device), [], set()
    for name, like in m.state_dict().items():
        if name in state:
            continue
        public = public_names(unforked(name, m.config), m.config, layout)
        used.update(public)
        missing = [part for part in public if part not in known]
        problems += [f"{part} is missing" for part in missing]
        if missing:
            continue
        value = torch.cat([known[part]() for part in public]) if len(public) > 1 else known[public[0]]()
        if [n for n in value.shape if n != 1] != [n for n in like.shape if n != 1]:
            problems.append(f"{public[0]} is {tuple(value.shape)}, not {tuple(like.shape)}")
            continue
        wanted = held_type(name, dtype or value.dtype) if value.is_floating_point() else value.dtype
        # Nobody holds more than one whole tensor.
        state[name] = own_part(value.reshape(like.shape).to(device, wanted, copy=True), like)
    problems += [f"{name} is not known" for name in known.keys() - used]
    if problems:
        shown = "; ".join(sorted(problems)[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise InputError(f"weights in {place} do not fit its config.json: {shown}")
    m.load_state_dict(state, assign=True)
    return m


def unforked(name, config):
    """The weight that a weight of UniFork's generation branch begins as."""
    name = re.sub(r"^lm\.gen_layers\.(\d+)", lambda found: f"lm.layers.{int(found[1]) + config.fork_layer}", name)
    return name.replace("lm.gen_norm", "lm.norm")


def empty_model(folder, known, vision_tokenizer, changed):
    """What the json files of a folder describe -> a model on the meta device, its layout, whether its embeddings are
    tied, and the stored tensors by the names of that layout."""
    layout, values, content = read_config(folder, known)
    kind = values["kind"]
    if (kind, layout) == ("emu3", "original"):
        vision = find_vision_tokenizer(folder, vision_tokenizer)
        values |= taken(read_json(vision / "config.json"), VQ_ORIGINAL, VQ_ONLY, vision / "config.json")
        values |= read_resize(vision)
        known = known | stored_tensors(vision)
    if (kind, layout) == ("emu3", "hf"):
        known = {renamed(name, EMU3_FROM_DISK): read for name, read in known.items()}
    ids, tokenizer_file = read_ids(folder, content, values)
    with torch.device("meta"):
        m = MODELS[kind](configured(values | {"ids": ids} | changed))
    m.tokenizer_file = tokenizer_file
    # transformers assumes it of Janus-Pro where config.json is silent, which the public weights contradict
    tied = content.get("tie_word_embeddings", (kind, layout) == ("janus", "hf"))
    return m, layout, tied, known


def find_vision_tokenizer(folder, given):
    """The folder of Emu3's picture tokenizer, given or beside the language model."""
    if given:
        return find_folder(given)
    for file in sorted(folder.resolve().parent.glob("*/config.json")):
        with suppress(InputError):                   # other folders are nobody's business
            if read_json(file).get("model_type") == "Emu3VisionVQ":
                return file.parent
    raise InputError(f"{folder} holds the language model alone: give --vision-tokenizer FOLDER "
                     "(hub: BAAI/Emu3-VisionTokenizer)")


SHARD_BYTES = 5e9


def save(m, folder):
    """Write the layout of transformers, which AutoModelForImageTextToText reads: json files of the configuration,
    safetensors, and the tokenizer's files where they are known. A folder that holds anything is refused."""
    folder, config, described = Path(folder), m.config, public_files(m)
    if config.fork_layer:
        raise InputError("a forked model has no layout in transformers: keep its run folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: choose another folder to save to")
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    shards, size = [{}], 0
    for name, value in merged(m).items():
        for part, tensor in to_transformers(name, value, config).items():
            if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
                shards, size = [*shards, {}], 0
            part = renamed(part, EMU3_TO_DISK) if config.kind == "emu3" else part
            shards[-1][part], size = tensor.contiguous(), size + tensor.nbytes
    files = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, aside / file, metadata={"format": "pt"})
    if len(shards) > 1:
        described["model.safetensors.index"] = {
            "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard}}
    ends = {f"{role}_token": SPECIAL[config.kind][role] for role in ("bos", "eos", "pad")}
    if m.tokenizer_file and Path(m.tokenizer_file).name == "tokenizer.json":
        described["tokenizer_config"] = {"tokenizer_class": "PreTrainedTokenizerFast"} | ends
    for name, content in described.items():
        (aside / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside = Path(m.tokenizer_file or "").parent
    for name in TOKENIZERS + TOKENIZER_NOTES if m.tokenizer_file else ():
        if (beside / name).exists():
            shutil.copy(beside / name, aside / name)
    if folder.exists():
        folder.rmdir()
    aside.rename(folder)


def public_files(m):
    """{name: content} of the json files that transformers writes beside the weights."""
    c, ids = m.config, m.ids
    ends = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad") if role in ids}
    text = {theirs: getattr(c, ours) for ours, theirs in TEXT.items() if ours != "theta"} | ends | {
        "rope_parameters": {"rope_theta": c.theta, "rope_type": "default"}, "tie_word_embeddings": False}
    vq = {theirs: getattr(c, ours) for ours, theirs in VQ_HF.items()}
    config = {"image_token_id": ids["placeholder"], "tie_word_embeddings": False,
              "dtype": str(m.lm_head.weight.dtype).removeprefix("torch."),
              "pictures": {name: getattr(c, name) for name in PICTURES}}
    resize = {name: RESIZE_ONLY[name] for name in ("image_mean", "image_std")}
    if c.kind == "emu3":
        known = {SPECIAL["emu3"][role]: i for role, i in ids.items()} | {"<image>": ids["placeholder"]}
        known |= {f"<|visual token {code:06d}|>": ids["visual"] + code for code in range(c.codebook)}
        vq |= {"codebook_size": c.codebook, "hidden_size": c.vq_width * c.vq_mult[-1],
               "temporal_downsample_factor": Emu3VQ.frames}
        config |= {"architectures": ["Emu3ForConditionalGeneration"], "model_type": "emu3", "vq_config": vq,
                   "text_config": text | {"model_type": "emu3_text_model"}, "vocabulary_map": known}
        resize |= {"image_processor_type": "Emu3ImageProcessor", "min_pixels": c.min_pixels,
                   "max_pixels": c.max_pixels, "spatial_factor": c.factor}
        return {"config": config, "generation_config": ends, "preprocessor_config": resize}
    if set(c.vq_attention) != {len(c.vq_mult) - 1}:
        raise InputError(f"vq_attention {c.vq_attention}: transformers has it at the last level only")
    vq = {key: value for key, value in vq.items() if key != "attn_resolutions"} | {
        "num_embeddings": c.codebook, "projection_dim": c.width, "image_token_embed_dim": c.width,
        "num_hidden_layers": 2}
    vision = {theirs: getattr(c, ours) for ours, theirs in VIT.items()} | {
        "mlp_ratio": c.vit_ffn / c.vit_width, "projection_dim": c.width, "depth": 2,
        "num_image_tokens": (c.image_size // c.vit_patch) ** 2}
    config |= {"architectures": ["JanusForConditionalGeneration"], "model_type": "janus", "vq_config": vq,
               "text_config": text | {"model_type": "llama"}, "vision_config": vision}
    drawing = {"generation_kwargs": {"boi_token_id": ids["boi"]}, "guidance_scale": c.guidance} if "boi" in ids else {}
    resize |= {"image_processor_type": "JanusImageProcessor", "min_size": c.min_side,
               "size": {"height": c.image_size, "width": c.image_size}}
    return {"config": config, "generation_config": ends | drawing, "preprocessor_config": resize}
