"""Models, weights and batches that several test files make."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import aia
import data
import model
from formats.weights import public_names
from parts.text import SPECIAL

NAMES = ("tiny-emu3", "tiny-janus")
both_models = pytest.mark.parametrize("name", NAMES)
SMALL = {"layers": 2, "heads": 4, "kv_heads": 2}        # shared key/value heads, which the tiny presets do not have


def shake(m):
    """Break what initialisation makes equal: no error hides behind a norm of 1, a bias of 0 or uniform attention."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if p.dim() == 1:
                p.normal_(0 if name.endswith("bias") else 1, 0.1)
            else:
                p.normal_(0, p[0].numel() ** -0.5)
        for norm in m.modules():
            if isinstance(norm, torch.nn.BatchNorm3d):
                norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(1, 1.1)
    return m.eval()


def tiny(name, device="cpu", **changes):
    """A tiny model, always with the same weights."""
    return shake(model.build(name, **changes)).to(device)


def close(got, expected, tolerance=1e-5):
    """Equal up to a tolerance relative to the largest entry."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1e-12))


def copy_weights(theirs, ours, device):
    """Fill our model from theirs by renaming, then move both; every weight of theirs must be used."""
    source, state, used = theirs.state_dict(), {}, set()
    for key, value in ours.state_dict().items():
        parts = public_names(key, ours.config, "hf")
        whole = torch.cat([source[part] for part in parts]) if len(parts) > 1 else source[parts[0]]
        state[key] = whole.reshape(value.shape)
        used.update(parts)
    assert used == set(source)
    ours.load_state_dict(state)
    return theirs.requires_grad_(False).to(device), ours.requires_grad_(False).to(device)


def emu3_pair(device):
    """A tiny random Emu3 of transformers, and ours with its weights."""
    hf = pytest.importorskip("transformers")
    ids = dict(zip(("pad", "bos", "eos", "placeholder", "eol", "eof", "img", "boi", "eoi"), range(9), strict=True),
               visual=40)
    names = {f"w{i}": i for i in range(9, 40)} | {SPECIAL["emu3"][role]: i for role, i in ids.items()}
    names |= {"<image>": ids["placeholder"]} | {f"<|visual token {c:06d}|>": 40 + c for c in range(64)}
    text = hf.Emu3TextConfig(
        vocab_size=112, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vq = {"codebook_size": 64, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "num_res_blocks": 2,
          "channel_multiplier": [1, 2, 2, 4], "attn_resolutions": [3], "temporal_downsample_factor": 4,
          "hidden_size": 128}
    theirs = hf.Emu3ForConditionalGeneration(
        hf.Emu3Config(text_config=text.to_dict(), vq_config=vq, vocabulary_map=names))
    ours = model.from_config(replace(
        model.EMU3_8B, layers=3, width=64, ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=112, codebook=64,
        vq_width=32, ids=ids))
    shake(theirs).model.vqmodel.quantize.embedding.weight.data *= 0.2           # rows among the latents: many codes
    return copy_weights(theirs, ours, device)


def janus_pair(device):
    """A tiny random Janus of transformers, and ours with its weights."""
    hf = pytest.importorskip("transformers")
    text = {"model_type": "llama", "vocab_size": 160, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 512, "bos_token_id": 100, "eos_token_id": 101, "pad_token_id": 102}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 16,
              "mlp_ratio": 4.0, "projection_dim": 64, "depth": 2, "num_image_tokens": 16}
    vq = {"embed_dim": 8, "num_embeddings": 64, "latent_channels": 16, "base_channels": 32, "num_res_blocks": 2,
          "channel_multiplier": [1, 1, 2, 2, 4], "projection_dim": 64, "num_hidden_layers": 2,
          "image_token_embed_dim": 64}
    theirs = hf.JanusForConditionalGeneration(hf.JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, image_token_id=120, tie_word_embeddings=False))
    ours = model.from_config(replace(
        model.JANUS_PRO_7B, layers=3, width=64, ffn=128, heads=4, kv_heads=4, head_dim=16, vocab=160, codebook=64,
        vq_width=32, vq_latent=16, image_size=64, vit_width=32, vit_layers=2, vit_heads=4, vit_ffn=128,
        ids={"bos": 100, "eos": 101, "pad": 102, "boi": 110, "eoi": 111, "placeholder": 120}))
    return copy_weights(shake(theirs), ours, device)


def off(got, expected):
    """Relative distance of two tensors."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def fresh(name, **changes):
    """A model with its first weights, always the same."""
    torch.manual_seed(0)
    return model.build(name, **changes)


def small(name, **changes):
    """A model of two layers that share a key, with its first weights."""
    return fresh(name, **{"layers": 2, "kv_heads": 1, **changes}).train()


def ids_of(rows, m):
    """Rows of ids of the same length -> ids (B, T), where the model is."""
    return torch.tensor(rows, device=m.lm_head.weight.device)


def padded(rows, m, right=False):
    """Rows of ids of different length -> ids (B, T), mask (B, T)."""
    longest = max(map(len, rows))
    gaps = [[m.ids["pad"]] * (longest - len(row)) for row in rows]
    ids = ids_of([row + gap if right else gap + row for row, gap in zip(rows, gaps, strict=True)], m)
    lengths, place = ids_of([[len(row)] for row in rows], m), torch.arange(longest, device=ids.device)
    return ids, place < lengths if right else place >= longest - lengths


def words(n):
    """Ids of n words."""
    return torch.randint(10, 40, (n,)).tolist()


def batch_of(config, task, device="cpu", valid=(True, True), tokens=None):
    """Two samples of different length: a drawing each, or two turns of questions about a picture each, or conversations
    in which pictures and text come in turn; always the same. With `tokens`, drawings of Emu3 of which the longer one
    has that many."""
    g = torch.Generator().manual_seed(3)
    text = SimpleNamespace(ids=config.ids, encode=lambda text: list(text.encode()))
    template = data.TEMPLATES[config.kind](config, text)
    codes = torch.randint(config.codebook, (2, *config.grid), generator=g)
    if task == "gen":
        prompts = ("a cat", "two red dogs")
        if tokens:
            empty = sum(len(ids) for ids, _ in template.generation("", codes[0]))
            prompts = ("x" * ((tokens - empty) // 2), "x" * (tokens - empty))
        samples = [template.generation(prompt, c) for prompt, c in zip(prompts, codes, strict=True)]
    elif task == "und":
        turns = [[(["what", 0], ["a cat"]), (["how many?"], ["one"])],
                 [([0, "where is it?"], ["on the left"]), (["?"], ["3"])]]
        samples = [template.conversation(t, [c]) for t, c in zip(turns, codes, strict=True)]
    else:                                           # the first draws twice, the second plans, sees one and draws one
        turns = [[(["a cat"], [0]), (["no dog?"], ["here", 1, "it is"])],
                 [(["how?"], ["so"]), (["as", 0], ["in red", 1])]]
        codes = torch.cat([codes, torch.randint(config.codebook, (2, *config.grid), generator=g)])
        given = codes.flatten(1) if config.kind == "janus" else codes
        samples = [template.conversation(t, c) for t, c in zip(turns, given.split(2), strict=True)]
        codes = codes[[0, 1, 3]]
    pixels = drawn = None
    if config.kind == "janus" and task != "gen":
        n = 2 if task == "und" else 4 if config.see == "both" else 1
        pixels = torch.randn(n, 3, config.image_size, config.image_size, generator=g)
    if config.kind == "janus" and task != "und":
        drawn = codes.flatten(1)
    return data.collate(task, samples, torch.tensor(valid), config.ids["pad"], pixels, drawn).to(device)


def objective(out, batch, weight=10.0):
    """The loss of a batch alone, L = L_NTP + weight L_AIA of each of its tasks."""
    total = 0.0
    for task, ntp, tokens, intensity, valid in zip(
            batch.tasks, *map(batch.per_task, (out.ntp, out.tokens, out.intensity, batch.aia_valid)), strict=True):
        total = total + ntp / tokens + weight * aia.loss(intensity, *aia.targets(intensity.shape[1], task), valid)
    return total
