"""Claims about picture tokenizers and SigLIP, with their parity with transformers (parts/vision.py)."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from made import both_models, close, fresh, tiny
from made_data import training_scenes

import parts.vision
import train
from parts.pictures import to_tensor
from parts.vision import AGREEMENT, autoencode, equal_patches, fill_codebook, flatten, tokenizer_step
from parts.world import draw_scenes

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


@both_models
def test_reconstruction_passes_straight_through_the_codes(name):
    """Latents get the gradient of the decoder's input as it is, and the codebook none: that of reconstruction must not
    pull rows away from their latents."""
    m, seen = tiny(name), {}

    def keep(name):
        inner = getattr(m.vq, name)

        def kept(x):
            seen[name] = inner(x) if name != "pixels" else x
            seen[name].retain_grad()
            return inner(x) if name == "pixels" else seen[name]
        return kept
    for part in ("latents", "vectors", "pixels"):
        setattr(m.vq, part, keep(part))
    again, _, pull, _ = autoencode(m.vq, torch.randn(2, 3, 16, 16))
    z, e, given = (seen[part] for part in ("latents", "vectors", "pixels"))
    close(given, e)
    again.square().mean().backward(retain_graph=True)
    assert torch.equal(z.grad, given.grad) and z.grad.abs().max() > 0 and e.grad is None
    z.grad = None
    pull.backward()
    close(e.grad, 2 * (e - z) / z.numel())                          # |sg(z) - e|^2
    close(z.grad, 0.25 * 2 * (z - e) / z.numel())                   # 0.25 |z - sg(e)|^2


@both_models
def test_agreement_moves_latents_but_not_their_variance(name):
    """The share falls when equal patches agree, not when all latents are blown up: its divisor has no gradient."""
    m = fresh(name)
    z = torch.randn(2, m.config.code_dim, 4, 4, requires_grad=True)
    m.vq.latents = lambda pixels: z
    pixels = torch.randn(2, 3, 16, 16)
    pixels[1] = pixels[0]                                           # each patch twice
    autoencode(m.vq, pixels)[3].backward()
    mean = z.mean(0, keepdim=True)
    variance = (z - z.mean((0, 2, 3), keepdim=True)).square().sum(1).mean()
    close(z.grad, 2 * (z - mean) / (2 * 16 * variance))


@both_models
def test_a_filled_codebook_has_every_patch_there_is(name):
    """Each row goes to what is farthest from those before it, so rare patches come before a second copy of any."""
    m, pixels = fresh(name), torch.stack([*map(to_tensor, draw_scenes(training_scenes(4)))])
    fill_codebook(m.vq, pixels)
    mean = equal_patches(pixels, m.vq.latents(pixels))[-1]
    assert 5 < len(mean) < m.config.codebook
    apart = (mean[:, None] - m.vq.quantize.weight).norm(dim=-1)     # (patches, rows)
    assert apart.min(1).values.max() < 1e-5 * apart.max()


def test_a_step_of_the_picture_tokenizer_adds_up_its_losses(monkeypatch):
    """l1 + l2 + pull + agreement, whose weight grows from 0 to AGREEMENT; without codes for the first fifth; the
    codebook is filled when codes begin, and again halfway. Pictures follow from seed and step."""
    m, phase = fresh("tiny-emu3"), replace(train.TOKENIZER, batch_size=6)
    pictures = draw_scenes(training_scenes(50))
    a, b, c = (torch.tensor(value, requires_grad=True) for value in (0.3, 0.1, 0.1))
    met, filled = [], []

    def faked(vq, pixels, commitment=0.25, quantize=True):
        met.append(pixels)
        codes = torch.tensor([0, 5, 5]) if quantize else None
        return pixels - a, codes, b, c
    monkeypatch.setattr(parts.vision, "autoencode", faked)
    monkeypatch.setattr(parts.vision, "fill_codebook", lambda vq, pixels: filled.append((step, pixels)))
    for step in (0, 1, 199, 200, 201, 500, 750, 999):
        a.grad = b.grad = c.grad = None
        row = tokenizer_step(m, pictures, step, phase, 3)["tokenizer"]
        assert (a.grad.item(), b.grad.item()) == pytest.approx((1 + 2 * 0.3, 1.0), rel=1e-5)
        assert c.grad.item() == pytest.approx(AGREEMENT * step / 1000) and row["codes"] == (2 if step >= 200 else 0)
        assert (row["l1"], row["within"]) == pytest.approx((0.3, 0.1), rel=1e-5)
    assert [step for step, _ in filled] == [200, 500] and all(pixels.shape == (128, 3, 16, 16) for _, pixels in filled)
    assert [*map(len, met)] == [6] * 8 and len(filled[0][1].unique(dim=0)) > len(pictures) / 2
    known = {to_tensor(picture).numpy().tobytes() for picture in pictures}
    assert {one.numpy().tobytes() for batch in met for one in batch} <= known
    batches = {batch.numpy().tobytes() for batch in met}
    for step, seed in ((0, 3), (0, 4), (1, 4)):
        tokenizer_step(m, pictures, step, phase, seed)
        assert (met[-1].numpy().tobytes() in batches) == (seed == 3)
        batches.add(met[-1].numpy().tobytes())
    assert len(batches) == 8 + 2


@both_models
def test_the_first_stage_is_these_steps_at_their_rates(name):
    """What training does to a picture tokenizer, said again by hand: bit for bit, with the pictures of each step."""
    phase = replace(train.TOKENIZER, steps=10, batch_size=4, warmup=3)
    ours, pictures = fresh(name), draw_scenes(training_scenes(12))
    plain = copy.deepcopy(ours)
    run = SimpleNamespace(m=ours, pictures=pictures, config=SimpleNamespace(seed=3), autocast=nullcontext)
    now = SimpleNamespace(run=run, phase=phase, optimizer=train.make_optimizer(ours, phase),
                          bar=SimpleNamespace(update=lambda: None))
    optimizer = torch.optim.AdamW(plain.vq.parameters(), 8e-3, (0.9, 0.99), weight_decay=0.0, fused=True)
    for step in range(4):
        train.take_step(now, step)
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, phase)
        tokenizer_step(plain, pictures, step, phase, 3)
        torch.nn.utils.clip_grad_norm_(plain.vq.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (key, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), key
    assert not torch.equal(ours.vq.quantize.weight, fresh(name).vq.quantize.weight)
