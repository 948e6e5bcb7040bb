"""Claims about picture tokenizers and SigLIP, with their parity with transformers (parts/vision.py)."""

import pytest
import torch
import torch.nn.functional as F
from made import both_models, close, fresh, tiny

from parts.vision import autoencode, flatten

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")


def test_training_mode_changes_no_picture_code(device):
    """Emu3's tokenizer has batch norms, which must not learn from, or depend on, a batch of the language model."""
    m, pixels = tiny("tiny-emu3", device, vq_blocks=1), torch.randn(2, 3, 24, 24).to(device)
    before = m.encode_images(pixels)
    assert torch.equal(m.train().encode_images(pixels), before)
    assert torch.equal(m.eval().encode_images(pixels), before)


def test_emu3_tokenizer_shortcuts_equal_the_slow_way(emu3, device):
    """The 2-D encoder would see four equal frames and the decoder paint four, of which frame 0 is the picture: one of
    each gives the same."""
    vq = emu3[1].vq
    pixels, codes = torch.randn(1, 3, 24, 16).to(device), torch.randint(64, (1, 3, 2)).to(device)
    x = torch.stack([vq.encoder(frame) for frame in pixels.expand(4, 1, -1, -1, -1)], 2)         # (1, C, 4, h, w)
    for conv in vq.encoder_time_conv:
        x = F.silu(conv(x))
    for block in vq.encoder_time_blocks:
        x = block(x)
    assert torch.equal(vq.nearest(flatten(vq.quant_conv(x)[:, :, 0])).view(1, 3, 2), vq.encode(pixels))
    z = vq.vectors(codes)[:, :, None]
    both = [vq.post_quant_conv(z), z]
    for i, x in enumerate(both):
        for block in vq.decoder_time_blocks:
            x = block(x)
        for conv in vq.decoder_time_conv:
            x = F.silu(conv(x.repeat_interleave(2, 2)))
        both[i] = x
    frames = [vq.decoder(both[0][:, :, t], both[1][:, :, t]) for t in range(4)]
    close(vq.decode(codes), frames[0])
    assert (frames[0] - frames[3]).abs().max() > 1e-2


def test_emu3_picture_codes_equal_transformers(emu3, device):
    """Codes exactly, also of a picture that is not square; pixels decoded from them."""
    (theirs, ours), pixels = emu3, torch.randn(2, 3, 48, 64).to(device)
    codes = ours.encode_images(pixels)
    encoded = theirs.model.vqmodel.encode(pixels, torch.tensor([[48, 64]] * 2, device=device), return_dict=True)
    assert torch.equal(codes, torch.stack(encoded.image_tokens))
    assert codes.shape == (2, 6, 8) and codes.unique().numel() > 10
    close(ours.decode_images(codes), theirs.model.vqmodel.decode(codes))


def test_janus_picture_codes_follow_the_published_rule(janus, device):
    """Latents and codebook at unit length, then the nearest row; transformers, which normalises neither, gives the
    latents here, and decodes."""
    (theirs, ours), pixels = janus, torch.randn(2, 3, 64, 64).to(device)
    vq, codes = theirs.model.vqmodel, ours.encode_images(pixels)
    latents = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1).flatten(2).transpose(1, 2)     # (B, N, code_dim)
    close(ours.vq.latents(pixels).flatten(2).transpose(1, 2), latents)
    similar = latents @ F.normalize(vq.quantize.embedding.weight, dim=1).T      # the nearest has the largest cosine
    assert torch.equal(codes, similar.argmax(-1))
    assert codes.unique().numel() > 3
    random = torch.randint(64, (2, 16)).to(device)
    close(ours.decode_images(random), vq.decode(random))


def test_janus_picture_reader_equals_transformers(janus, device):
    """SigLIP with its final norm, and the aligner."""
    (theirs, ours), pixels = janus, torch.randn(2, 3, 64, 64).to(device)
    expected = theirs.model.get_image_features(pixels, return_dict=True).pooler_output
    close(ours.aligner(ours.vision(pixels)), expected)


@both_models
def test_equal_patches_share_a_code_in_training_and_different_ones_are_plain_vector_quantization(name):
    """A code that changes with its surroundings is hard to predict; pictures whose patches all differ lose nothing."""
    m = fresh(name)
    noise = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        m.vq.quantize.weight.copy_(m.vq.latents(noise).movedim(1, -1).flatten(0, 2)[::2])       # 64 rows, all in use
        assert torch.equal(autoencode(m.vq, noise)[1], m.vq.encode(noise))
        assert autoencode(m.vq, noise)[3] == 0
        shared = noise.clone()
        shared[:, :, 4:8, 8:12] = noise[0, :, :4, :4]               # place (1, 2) of every picture
        codes, within = autoencode(m.vq, shared)[1::2]
        assert len(m.vq.encode(shared)[:, 1, 2].unique()) > 1 == len(codes[:, 1, 2].unique())
        z = m.vq.latents(shared).movedim(1, -1)                                                 # (8, 4, 4, code_dim)
        equal = torch.cat([z[:, 1, 2], z[:1, 0, 0]])                # picture 0 shows the patch twice
        spread = (equal - equal.mean(0)).square().sum() / (z - z.mean((0, 1, 2))).square().sum()
    assert within.item() == pytest.approx(spread.item(), rel=1e-4) and within > 0
