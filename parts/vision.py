"""Picture encoders: the VQ tokenizers of both models, SigLIP, and one training step of a tokenizer."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from parts.pictures import to_tensor
from parts.settings import stream


# ---------------------------------------------------------------------------------------------------------------------
# Picture tokenizers: convolutional encoder, nearest codebook row, convolutional decoder
# ---------------------------------------------------------------------------------------------------------------------
class Norm(nn.GroupNorm):
    """Group norm with 32 groups. Takes code vectors like SpatialNorm, and ignores them."""

    def __init__(self, channels):
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x, codes=None):
        return super().forward(x)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift come from the code vectors at the same position (Emu3's decoder)."""

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
        self.norm1 = norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        nn.init.zeros_(self.conv2.weight)           # new branches, here and below, start by adding nothing

    def forward(self, x, codes=None):
        y = self.conv1(F.silu(self.norm1(x, codes)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y, codes)))


class AttnBlock(nn.Module):
    """One attention head over the whole grid."""

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
    """The residual blocks of one resolution, each followed by attention if configured."""

    def __init__(self, before, after, blocks, attention, norm):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(before if i == 0 else after, after, norm) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(after, norm) for _ in range(blocks if attention else 0))

    def forward(self, x, codes=None):
        for i, block in enumerate(self.block):
            x = block(x, codes)
            if self.attn:
                x = self.attn[i](x, codes)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels, norm):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, norm)
        self.attn_1 = AttnBlock(channels, norm)
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
        self.mid = Middle(widths[-1], Norm)
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.vq_latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = level(x)
            if i < len(self.downsample):
                x = self.downsample[i](F.pad(x, (0, 1, 0, 1)))                  # padded right and below only
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
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

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
    """What both picture tokenizers share: the codebook. Always in float32, as half precision changes codes."""

    def __init__(self, config):
        super().__init__()
        self.quantize = nn.Embedding(config.codebook, config.code_dim)
        nn.init.uniform_(self.quantize.weight, -1 / config.codebook, 1 / config.codebook)

    def latents(self, pixels):
        """Encode pixels (B, 3, S, S) -> (B, code_dim, h, w), not yet rounded to codes."""

    def pixels(self, vectors):
        """Decode code vectors (B, code_dim, h, w) -> (B, 3, S, S), not clipped."""

    def rows(self):
        """The codebook (K, code_dim) as latents are compared with it and pictures decoded from it."""
        return self.quantize.weight

    def nearest(self, flat):
        """The codes (n,) of the nearest rows (squared distance) for flat latents (n, code_dim)."""
        rows = self.rows()
        # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, where |z|^2 is the same for all rows
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
    """VQ-16 of LlamaGen, used by Janus-Pro. Latents and codebook rows have unit length."""

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
    """3-D convolution over (time, height, width). Time is padded by two frames in front, whatever the kernel."""

    def __init__(self, channels, kernel, time_stride=1):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, kernel, stride=(time_stride, 1, 1))
        side = [kernel[1] // 2, (kernel[1] - 1) // 2]
        self.padding = (*side, *side, 2, 0)

    def pass_through(self):
        """Start close to the identity on the newest frame. With small random weights, so many convolutions in a row
        would leave no signal, and training from scratch would stall."""
        weight = self.conv.weight.data.mul_(0.1)
        for channel in range(len(weight)):
            weight[channel, channel, -1, weight.shape[3] // 2, weight.shape[4] // 2] += 1.0
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class TimeBlock(nn.Module):
    """Residual block over time. Its batch norm uses the stored statistics, even in training."""

    def __init__(self, channels):
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, (3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.conv2 = CausalConv3d(channels, (3, 3, 3))

    def train(self, mode=True):
        super().train(mode)
        for norm in (self.norm1, self.norm2):
            norm.eval()
        return self

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Emu3VQ(VQ):
    """Emu3VisionVQ, a video tokenizer: a picture goes in as four equal frames, and comes out as frame 0 of four."""

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
        # The four frames are equal, so the 2-D encoder needs to encode only one.
        x = self.encoder(pixels)[:, :, None].repeat(1, 1, self.frames, 1, 1)    # (B, C, 4, h, w)
        for conv in self.encoder_time_conv:
            x = F.silu(conv(x))
        for block in self.encoder_time_blocks:
            x = block(x)                                                        # (B, C, 1, h, w)
        return self.quant_conv(x)[:, :, 0]                                      # (B, C, h, w)

    def pixels(self, vectors):
        codes = vectors[:, :, None]                                             # (B, C, 1, h, w)
        # The decoder's input and the codes for its spatial norms pass through the same layers.
        x = torch.cat([self.post_quant_conv(codes), codes])                     # (2 B, C, 1, h, w)
        for block in self.decoder_time_blocks:
            x = block(x)
        for conv in self.decoder_time_conv:
            x = F.silu(conv(x.repeat_interleave(2, 2)))                         # twice the frames
        x, codes = x[:, :, 0].chunk(2)                                          # frame 0 is the picture
        return self.decoder(x, codes)


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP, the encoder through which Janus-Pro sees pictures
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
        patches = config.picture_tokens
        self.pos_embed = nn.Parameter(config.embed_std * torch.randn(1, patches, c))
        self.blocks = nn.ModuleList(VitBlock(c, config.vit_heads, config.vit_ffn) for _ in range(config.vit_layers))
        self.norm = nn.LayerNorm(c, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# One step of training a picture tokenizer
# ---------------------------------------------------------------------------------------------------------------------
AGREEMENT = 5.0                     # final weight of the latents' variance within equal patches


def equal_patches(pixels, latents):
    """Group latents by the pixels under them -> flat latents (n, code_dim), the group of each (n,), which is the same
    for equal patches of pixels, and the mean latent of each group (m, code_dim)."""
    side = pixels.shape[-1] // latents.shape[-1]
    content = F.unfold(pixels, side, stride=side).transpose(1, 2).flatten(0, 1)                 # (n, 3 side side)
    _, patch, times = torch.unique(content, dim=0, return_inverse=True, return_counts=True)
    flat = flatten(latents)                                                     # (n, code_dim)
    mean = torch.zeros_like(flat[:len(times)]).index_add(0, patch, flat) / times[:, None]
    return flat, patch, mean


def autoencode(vq, pixels, commitment=0.25, quantize=True):
    """Pixels (B, 3, S, S) -> reconstruction, codes (B, h, w), |sg(z) - e|^2 + commitment |z - sg(e)|^2 (arXiv
    1711.00937, Eq. 3), and the share of the latents' variance that lies within equal patches.

    Equal patches of pixels get the same code, that of their mean latent, whatever surrounds them: language models learn
    such codes many times faster. If all patches differ, this is plain vector quantization.
    """
    z = vq.latents(pixels)                                                      # (B, code_dim, h, w)
    flat, patch, mean = equal_patches(pixels, z)
    within = (flat - mean[patch]).square().sum(1).mean() / (flat - flat.mean(0)).square().sum(1).mean().detach()
    if not quantize:
        return vq.pixels(z), None, 0.0, within
    codes = vq.nearest(mean.detach())[patch].view(len(z), *z.shape[2:])         # (B, h, w)
    e = vq.vectors(codes)                                                       # (B, code_dim, h, w)
    pull = F.mse_loss(e, z.detach()) + commitment * F.mse_loss(z, e.detach())
    # Straight through: e in the forward pass, while z gets the gradient as if it had not been rounded.
    return vq.pixels(z + (e - z).detach()), codes, pull, within


@torch.no_grad()
def fill_codebook(vq, pixels):
    """Move the codebook rows onto mean latents of equal patches of these pictures.

    Each row goes to the mean that is farthest from the rows before it. Random latents would mostly be background.
    """
    mean = equal_patches(pixels, vq.latents(pixels))[-1]                         # (m, code_dim)
    nearest = torch.full_like(mean[:, 0], torch.inf)
    for i in range(len(vq.quantize.weight)):
        vq.quantize.weight[i] = mean[nearest.argmax()]
        nearest = torch.minimum(nearest, (mean - vq.quantize.weight[i]).square().sum(1))


def tokenizer_step(m, pictures, step, phase, seed):
    """Gradients of one training step of a picture tokenizer, on a batch that follows from seed and step: losses of
    reconstruction, codebook and agreement of equal patches."""
    rng = stream(seed, "tokenizer", step)
    device = m.vq.quantize.weight.device

    def some(n):
        return torch.stack([to_tensor(pictures[i]) for i in rng.integers(len(pictures), size=n)]).to(device)
    warm = phase.steps // 5                         # without the codebook at first, until latents mean something
    if step in (warm, phase.steps // 2):
        fill_codebook(m.vq, some(128))
    pixels = some(phase.batch_size)
    again, codes, pull, within = autoencode(m.vq, pixels, quantize=step >= warm)
    error = again - pixels
    # At full weight from the start, agreement would be reached by latents that carry no information.
    agree = AGREEMENT * step / phase.steps * within
    (error.abs().mean() + error.square().mean() + pull + agree).backward()
    used = 0 if codes is None else len(codes.unique())
    return {"tokenizer": {"l1": error.abs().mean().item(), "within": within.item(), "codes": used}}
