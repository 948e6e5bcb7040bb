"""Claims about the two models (model.py): attention, sizes, padding, caching, drawing, and parity with transformers."""

import copy
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import aia
import data
import formats.weights
import model
import parts.kernels
from formats.weights import (
    EMU3_FROM_DISK,
    EMU3_TO_DISK,
    ID_FIELDS,
    TEXT_FIELDS,
    VQ_ORIGINAL,
    public_files,
    public_names,
    renamed,
    to_transformers,
)
from parts.kernels import CHUNK, try_lse
from parts.settings import InputError
from parts.text import SPECIAL
from parts.vision import flatten

TINY = ["tiny-emu3", "tiny-janus"]
SMALL = {"layers": 2, "heads": 4, "kv_heads": 2}        # shared key/value heads, which the tiny presets do not have
GRID = (2, 3)                                   # sides of the code grid that the drawing tests use


@pytest.fixture(autouse=True)
def seed_and_one_thread():
    """On a busy machine threads that wait for each other make these tiny sizes ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="module", params=TINY)
def m(request, device):
    return tiny(request.param, device, **SMALL).requires_grad_(False)


@pytest.fixture
def lse(device, monkeypatch):
    """Of the kernels with a log-sum-exp the one that works on the device, found as training finds it."""
    monkeypatch.setattr(parts.kernels, "PASSED", {})
    found, faults = try_lse(device, torch.float32, 4, 2, 32)
    assert found, faults


@pytest.fixture
def chunks_of_256(device, monkeypatch):
    """The loss takes as many tokens at once as on a CPU."""
    monkeypatch.setitem(CHUNK, device.type, 256)


def close(got, expected, tolerance=1e-5):
    """Equal up to a tolerance relative to the largest entry."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1e-12))


def batch_of(config, task, device):
    """Two samples of different length: a drawing each, or two turns of questions about a picture each."""
    text = SimpleNamespace(ids=config.ids, encode=lambda text: list(text.encode()))
    template, codes = data.TEMPLATES[config.kind](config, text), torch.randint(config.codebook, (2, *config.grid))
    if task == "gen":
        samples = [template.generation(prompt, c) for prompt, c in zip(["a cat", "two red dogs"], codes, strict=True)]
    else:
        turns = [[(["what", 0], "a cat"), (["how many?"], "one")], [([0, "where is it?"], "on the left"), (["?"], "3")]]
        samples = [template.understanding(t, [c]) for t, c in zip(turns, codes, strict=True)]
    janus = config.kind == "janus"
    pixels = torch.randn(2, 3, config.image_size, config.image_size) if janus and task == "und" else None
    return data.collate(task, samples, torch.tensor([True, True]), config.ids["pad"], pixels,
                        codes.flatten(1) if janus and task == "gen" else None).to(device)


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
    return torch.randint(10, 40, (n,)).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Attention and sizes
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gaps", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("past", [0, 5, 8])
@pytest.mark.parametrize("shared", [4, 2, 1])
def test_all_bodies_of_attention_agree(shared, past, gaps, lse, device):
    """Output, mass and gradients, with 4 heads on `shared` ones, cached keys, padding and a condition with holes."""
    q, w = torch.randn(2, 2, 4, 9 - past, 8).to(device)
    k, v = torch.randn(2, 2, shared, 9, 8).to(device)
    condition, mask = torch.tensor([[[0, 1, 1, 0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1, 0, 0]],
                                    [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]], device=device).bool()
    u, visible = w[..., 0], model.visibility(mask if gaps else None, torch.arange(past, 9, device=device), 9)
    results = []
    for attend in (model.attend_fused, model.attend_lse, model.attend_explicit):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, mass = attend(*inputs, visible, condition)
        results.append([out, mass, *torch.autograd.grad((out * w).sum() + (mass * u).sum(), inputs)])
        assert attend(*inputs, visible)[1] is None
    for other in results[:-1]:
        for got, expected in zip(other, results[-1], strict=True):
            close(got, expected)


@pytest.mark.parametrize("task", aia.TASKS)
@pytest.mark.parametrize("name", TINY)
def test_whole_models_agree_with_any_attention(name, task, lse, device):
    """Loss, intensities and all gradients of next-token prediction plus AIA are those of the written-out softmax."""
    results, batch = [], batch_of(model.PRESETS[name], task, device)
    for attention in model.ATTENTION:
        one = tiny(name, device, heads=4, kv_heads=2, attention=attention)
        out = one(batch)
        target, delta = aia.targets(one.config.layers, task)
        (out.ntp / out.tokens + 10 * aia.loss(out.intensity, target, delta, batch.aia_valid)).backward()
        grads = {key: p.grad for key, p in one.named_parameters() if p.grad is not None}
        results.append({"ntp": out.ntp, "intensity": out.intensity, **grads})
    for result in results[1:]:
        assert results[0].keys() == result.keys()
        for key, expected in results[0].items():
            close(result[key], expected)


@pytest.mark.parametrize("preset, total, parts", [
    ("emu3-8b", 8_762_751_807, {
        "lm.": 7_735_799_808, "lm.layers.0.": 218_112_000, "lm_head.": 756_211_712, "vq.": 270_740_287,
        "vq.encoder": 109_488_252, "vq.decoder": 161_120_859, "vq.quantize.": 131_072, "vq.quant_conv.": 52,
        "vq.post_quant_conv.": 52}),
    ("janus-pro-7b", 7_407_773_323, {
        "lm.": 6_490_935_296, "lm.layers.0.": 202_383_360, "lm_head.": 419_430_400, "vision.": 303_688_704,
        "aligner.": 20_979_712, "gen_aligner.": 16_818_176, "gen_head.": 83_906_560, "gen_embed.": 131_072,
        "vq.": 71_883_403, "vq.encoder.": 29_298_176, "vq.decoder.": 42_449_795, "vq.quantize.": 131_072,
        "vq.quant_conv.": 2_056, "vq.post_quant_conv.": 2_304}),
    ("janus-pro-1b", 2_076_636_811, {
        "lm.": 1_442_940_928, "lm.layers.0.": 51_384_320, "lm_head.": 209_715_200, "vision.": 303_688_704,
        "aligner.": 6_295_552, "gen_aligner.": 4_214_784, "gen_head.": 37_767_168, "gen_embed.": 131_072,
        "vq.": 71_883_403}),
])
def test_full_models_have_the_published_number_of_parameters(preset, total, parts):
    """Each part to the last parameter, built without memory; Janus-Pro without SigLIP's unused pooling head."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in model.build(preset).named_parameters()}
    assert sum(sizes.values()) == total
    assert {part: sum(n for name, n in sizes.items() if name.startswith(part)) for part in parts} == parts


def test_rotary_frequencies_survive_bfloat16(device):
    """At position 9216 and theta 1e6 rounded frequencies are radians off; rope_bf16 asks for just that."""
    seen = []
    for rope_bf16 in (False, True):
        m = tiny("tiny-emu3", device, theta=1e6, layers=1, rope_bf16=rope_bf16).to(torch.bfloat16)
        m.lm.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[2]))
        cache = model.Cache(m.lm, torch.ones(1, 9216, device=device).bool(), 1)
        cache.used = 9216
        m.lm(torch.zeros(1, 1, m.config.width, dtype=torch.bfloat16, device=device), cache=cache)
    angle = 9216 * 1e6 ** (-torch.arange(0, 32, 2, dtype=torch.float64, device=device) / 32)
    exact = angle.cos().repeat(2), torch.cat([-angle.sin(), angle.sin()])       # the sine brings the sign of its half
    kept, rounded = ([(part.double() - right).abs().max() for part, right in zip(rope, exact, strict=True)]
                     for rope in seen)
    assert max(kept) < 2**-8 < 1 < min(rounded)


def test_training_mode_changes_no_picture_code(device):
    """Emu3's tokenizer has batch norms, which must not learn from, or depend on, a batch of the language model."""
    m, pixels = tiny("tiny-emu3", device, vq_blocks=1), torch.randn(2, 3, 24, 24).to(device)
    before = m.encode_images(pixels)
    assert torch.equal(m.train().encode_images(pixels), before)
    assert torch.equal(m.eval().encode_images(pixels), before)


# ---------------------------------------------------------------------------------------------------------------------
# Loss, padding, cache
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", aia.TASKS)
def test_loss_is_cross_entropy_of_the_full_logits(m, task, device):
    """Position t predicts the label at t + 1, and positions without a label count for nothing."""
    batch = batch_of(m.config, task, device)
    logits = m.head(task)(m.lm(m.embed(batch))[0])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    out = m(batch, intensity=False)
    close(out.ntp, expected)
    assert out.tokens == (batch.labels[:, 1:] != -100).sum() and out.intensity is None


@pytest.mark.parametrize("head", ["one layer", "three layers"])
@pytest.mark.parametrize("n", [0, 1, 600])
def test_the_chunked_loss_is_the_plain_one(n, head, chunks_of_256, device):
    """Value and all gradients, for no token, one, and more than two chunks; the head of the vocabulary and that of
    Janus-Pro's codes, which has biases."""
    one = torch.nn.Linear(16, 700, bias=False)
    head = one if head == "one layer" else torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU(),
                                                               torch.nn.Linear(16, 700))
    x, target = torch.randn(n, 16).to(device).requires_grad_(), torch.randint(700, (n,)).to(device)
    head = head.to(device)
    expected = F.cross_entropy(head(x), target, reduction="sum") if n else 0.0 * head(x).sum()
    got = model.next_token_loss(x, head, target)
    close(got, expected)
    inputs = [x, *head.parameters()]
    for a, b in zip(torch.autograd.grad(3 * got, inputs), torch.autograd.grad(3 * expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_chunked_loss_under_autocast_rounds_as_linear_layers_do(device):
    """Products in bfloat16, the loss in float32: near the exact one, with gradients for float32 weights."""
    head, x, target = (part.to(device) for part in (
        torch.nn.Linear(64, 700, bias=False), torch.randn(300, 64), torch.randint(700, (300,))))
    exact = F.cross_entropy(head(x), target, reduction="sum")
    with torch.autocast(device.type, torch.bfloat16):
        got = model.next_token_loss(x, head, target)
    got.backward()
    assert got.dtype == torch.float32 and abs(got / exact - 1) < 1e-3
    (expected,) = torch.autograd.grad(exact, head.weight)
    assert head.weight.grad.dtype == torch.float32
    close(head.weight.grad, expected, 2e-2)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation has put out."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_fused_training_never_holds_a_map_nor_all_logits(attention, chunks_of_256, device):
    """Forward and backward, with AIA: nothing as large as tokens x tokens or tokens x vocabulary is ever made. CUDA has
    kernels for heads that share a key in half precision only."""
    t, vocab = 1024, 1000
    m = tiny("tiny-emu3", device, layers=1, vocab=vocab, attention=attention, heads=2, kv_heads=1, head_dim=16,
             width=32, ffn=64)
    tokens, place = torch.randint(480, (1, t)), torch.arange(t)[None]
    batch = data.Batch("gen", tokens, tokens, place < 400, place >= 400, torch.ones(1).bool()).to(device)
    with Largest() as seen, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out = m(batch)
        (out.ntp + out.intensity.sum()).backward()
    limit = min(t * t, t * vocab)
    assert seen.numel < limit / 2 if attention == "fused" else seen.numel >= t * t


@pytest.mark.parametrize("name, how", [*((name, "checkpointed") for name in TINY), ("tiny-emu3", "compiled")])
@pytest.mark.parametrize("task", aia.TASKS)
def test_recomputed_and_compiled_layers_give_the_same_numbers(name, task, how, device):
    """Loss, intensities and gradients, of which the mass is a part. Both models have the same layers to compile."""
    batch, results = batch_of(model.PRESETS[name], task, device), []
    for changed in (False, True):
        one = tiny(name, device, **SMALL, checkpoint_activations=changed and how == "checkpointed").train()
        for layer in one.lm.layers if changed and how == "compiled" else ():
            layer.compile(backend="aot_eager")
        out = one(batch)
        (out.ntp / out.tokens + out.intensity.square().sum()).backward()
        results.append({"ntp": out.ntp, "intensity": out.intensity,
                        **{key: p.grad for key, p in one.named_parameters() if p.grad is not None}})
    for result in results[1:]:
        assert results[0].keys() == result.keys()
        for key, expected in results[0].items():
            close(result[key], expected)


@pytest.fixture(params=TINY)
def forked(request, device):
    """A model, and the same with UniFork's two branches from its second layer on."""
    m, f = tiny(request.param, **SMALL), model.build(request.param, **SMALL, fork_layer=1)
    f.load_state_dict(m.state_dict(), strict=False)
    model.fork(f)
    return m.requires_grad_(False).to(device), f.to(device)


def test_equal_branches_are_the_shared_model(forked, device):
    """Bit for bit, loss and intensities and what is drawn and said: a fork changes nothing until it is trained."""
    m, f = forked
    for task in aia.TASKS:
        batch = batch_of(m.config, task, device)
        one, two = m(batch), f(batch)
        assert torch.equal(one.ntp, two.ntp) and torch.equal(one.intensity, two.intensity)
    ids = torch.randint(5, 90, (2, 6)).to(device)
    drawn = [x.generate_images(ids, guidance=1, temperature=0) for x in (m, f)]
    said = [x.generate_text(ids, max_new_tokens=4) for x in (m, f)]
    assert torch.equal(*drawn) and torch.equal(*said)


def test_each_task_trains_its_own_branch(forked, device):
    """Routing is by sample: the loss of one task has no gradient in the branch of the other."""
    _, f = forked
    for task in aia.TASKS:
        f.zero_grad()
        out = f(batch_of(f.config, task, device))
        (out.ntp + out.intensity.sum()).backward()
        moved = {name for name, p in f.lm.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        branches = [{name for name, _ in f.lm.named_parameters() if name.startswith(parts)}
                    for parts in (("gen_layers", "gen_norm"), ("layers.1", "norm"))]
        own, other = branches if task == "gen" else branches[::-1]
        assert own <= moved and not other & moved and "layers.0.mlp.up_proj.weight" in moved


def test_a_branch_of_its_own_is_drawn_with(forked, device):
    """Generation takes the generation branch, cached or not; answers take the other."""
    m, f = forked
    with torch.no_grad():
        for p in f.lm.gen_layers.parameters():
            p.copy_(torch.randn(p.shape))
    ids = torch.randint(5, 90, (2, 6)).to(device)
    codes = f.generate_images(ids, guidance=1, temperature=0)
    if m.config.kind == "janus":                    # the code of the highest logit at each place of a full pass
        assert torch.equal(f.image_logits(ids, codes.clone()).argmax(-1), codes)
    assert not torch.equal(codes, m.generate_images(ids, guidance=1, temperature=0))
    assert torch.equal(f.generate_text(ids, max_new_tokens=4), m.generate_text(ids, max_new_tokens=4))


@pytest.mark.parametrize("fork_layer", [1, 2, 3])
def test_a_fork_adds_the_layers_above_it(fork_layer):
    """Of L layers L - k, and a norm."""
    shared, forked = (model.build("tiny-emu3", fork_layer=k) for k in (0, fork_layer))
    layer = sum(p.numel() for p in shared.lm.layers[0].parameters())
    more = sum(p.numel() for p in forked.parameters()) - sum(p.numel() for p in shared.parameters())
    assert more == (4 - fork_layer) * layer + 96


@pytest.mark.parametrize("name", TINY)
def test_a_fork_begins_from_public_weights(name, tmp_path):
    """Both branches read the same tensors; a forked model has no place in transformers' layout."""
    m = tiny(name, **SMALL)
    formats.weights.save(m, tmp_path / "public")
    f = formats.weights.load(tmp_path / "public", fork_layer=1)
    theirs, mine = m.lm.layers[1].state_dict(), f.lm.gen_layers[0].state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert torch.equal(f.lm.gen_norm.weight, m.lm.norm.weight)
    with pytest.raises(InputError, match="run folder"):
        formats.weights.save(f, tmp_path / "forked")


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_intensity_in_half_precision_is_right_to_a_thousandth(sharpness, device):
    """Of the same bfloat16 queries and keys: a token's mass carries bfloat16 rounding, its float32 average hardly."""
    q, k, v = ((sharpness * torch.randn(2, 4, 200, 32)).bfloat16().to(device) for _ in range(3))
    place = torch.arange(200, device=device).expand(2, -1)
    condition, queries = place < 80, place >= 90
    half = model.attend_fused(q, k, v, None, condition)[1]
    exact = model.attend_explicit(q.double(), k.double(), v.double(), None, condition)[1]
    assert half.dtype == torch.bfloat16
    error = aia.intensity(half, queries) - aia.intensity(exact, queries)
    assert 0 < error.abs().max() < 1e-3


@pytest.mark.parametrize("task", aia.TASKS)
def test_hidden_states_are_those_between_the_layers(m, task, device):
    """L + 1 of them, the embeddings first; the last one, normalised, is what the head reads."""
    batch = batch_of(m.config, task, device)
    states = m(batch, hidden=True).hidden
    assert len(states) == m.config.layers + 1 and torch.equal(states[0], m.embed(batch))
    close(m.lm.norm(states[-1]), m.lm(m.embed(batch))[0])
    assert m(batch).hidden is None


def test_padding_on_either_side_changes_nothing(m):
    """Pads are masked and positions counted from the first real token; on the right even the mask may be left out."""
    rows = [words(5), words(9)]
    (left, seen_left), (right, seen_right) = padded(rows, m), padded(rows, m, right=True)
    for b, row in enumerate(rows):
        alone = m.logits(ids_of([row], m))[0]
        close(m.logits(left, mask=seen_left)[b][seen_left[b]], alone)
        close(m.logits(right, mask=seen_right)[b][seen_right[b]], alone)
        close(m.logits(right)[b][seen_right[b]], alone)
    assert model.positions(seen_left).tolist() == [[0] * 4 + [*range(5)], [*range(9)]]


@pytest.mark.parametrize("lengths", [(9, 9), (6, 9)], ids=["equal", "padded"])
def test_cached_steps_equal_the_full_pass(m, lengths):
    """Steps of 4, 1, 2 (Emu3's code and row end), 1 and 1 tokens see the same keys at the same positions."""
    ids, mask = padded([words(n) for n in lengths], m)
    x, cache, parts = m.lm.embed_tokens(ids), model.Cache(m.lm, mask[:, :4], 5), []
    for n in (4, 1, 2, 1, 1):
        parts.append(m.lm(x[:, cache.used:cache.used + n], cache=cache)[0])
    close(torch.cat(parts, 1)[mask], m.lm(x, mask)[0][mask])


def test_greedy_text_equals_full_passes_and_stops_at_eos(m, device):
    """A batch of questions about pictures, padded on the left, against one question at a time without a cache."""
    picture = [m.ids["placeholder"]] * (16 if m.config.kind == "emu3" else 4)
    pixels, expected = torch.randn(2, 3, 16, 16).to(device), []
    rows = [words(3) + picture + words(2), words(6) + picture + words(4)]
    for b, row in enumerate(rows):
        new = []
        for _ in range(8):
            new.append(m.logits(ids_of([row + new], m), pixels[b:b + 1])[0, -1].argmax().item())
        expected.append(new)
    ids, mask = padded(rows, m)
    assert m.generate_text(ids, pixels, mask, max_new_tokens=8).tolist() == expected
    # The same weights with the last token of one answer as EOS: both answers end where it first comes up.
    stopping = tiny(f"tiny-{m.config.kind}", device, **SMALL, ids=m.ids | {"eos": expected[0][2]})
    ends = [new[:new.index(expected[0][2]) + 1] if expected[0][2] in new else new for new in expected]
    assert len(ends[0]) != len(ends[1])
    longest = max(map(len, ends))
    assert stopping.generate_text(ids, pixels, mask, max_new_tokens=8).tolist() == [
        new + [m.ids["pad"]] * (longest - len(new)) for new in ends]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------
def next_code_logits(m, prompt, codes):
    """Logits (K,) of the code after a prompt and the codes so far, by a pass over the whole sequence."""
    if m.config.kind == "janus":
        drawn = m.gen_aligner(m.gen_embed(ids_of([codes], m).long()))
        x = torch.cat([m.lm.embed_tokens(ids_of([prompt], m)), drawn], 1)
        return m.gen_head(m.lm(x)[0][0, -1])
    tokens = []
    for i, code in enumerate(codes):
        tokens += [m.ids["visual"] + code, m.ids["eol"]][:2 if (i + 1) % GRID[1] == 0 else 1]
    return m.logits(ids_of([prompt + tokens], m))[0, -1, m.ids["visual"]:][:m.config.codebook]


def draw_slowly(m, prompt, guidance, negative):
    """Greedy codes of one prompt. s = u + g (c - u), u from the negative prompt (Emu3) or from pads (Janus-Pro)."""
    free = negative or [prompt[0], *[m.ids["pad"]] * (len(prompt) - 2), prompt[-1]]
    codes = []
    for _ in range(GRID[0] * GRID[1]):
        c, u = next_code_logits(m, prompt, codes), next_code_logits(m, free, codes)
        codes.append((u + guidance * (c - u)).argmax().item())
    return codes


@pytest.mark.parametrize("lengths", [(5, 5), (4, 7)], ids=["equal", "padded"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_drawing_equals_full_passes(m, guidance, lengths):
    """A batch with a cache, guidance and forced row ends draws what each prompt alone draws without them."""
    rows, negative = [words(n) for n in lengths], words(6) if m.config.kind == "emu3" else None
    expected = [draw_slowly(m, row, guidance, negative) for row in rows]
    ids, mask = padded(rows, m)
    negative = negative and ids_of([negative], m)
    for how in ({"temperature": 0}, {"top_k": 1}):                              # of one code to choose from, any draw
        codes = m.generate_images(ids, mask, GRID, negative, guidance, **how)   # takes the likeliest
        assert codes.flatten(1).tolist() == expected
    assert len(set(sum(expected, []))) > 3      # a model that repeats one code would prove little


def test_teacher_forced_logits_are_those_of_each_step(m, device):
    """One pass over prompt and codes gives what drawing them one by one gives; Emu3's row ends are skipped."""
    rows, codes = [words(5), words(5)], torch.randint(m.config.codebook, (2, *GRID))
    got = m.image_logits(ids_of(rows, m), m.as_codes(codes).to(device))
    for row, flat, logits in zip(rows, codes.flatten(1).tolist(), got, strict=True):
        close(logits, torch.stack([next_code_logits(m, row, flat[:i]) for i in range(6)]))


def test_emu3_rows_end_with_a_row_end_token():
    """Two rows of three codes are eight tokens."""
    m = tiny("tiny-emu3")
    visual, eol = m.ids["visual"], m.ids["eol"]
    block = m.block(torch.tensor([[[0, 1, 2], [63, 4, 5]]]))
    assert (block - visual).tolist() == [[[0, 1, 2, eol - visual], [63, 4, 5, eol - visual]]]


def test_sampling_keeps_what_it_is_told_to(device):
    """Of probabilities 0.1, 0.5, 0.05, 0.35: temperature 0 takes the second, top-k 2 and top-p 0.6 two of them."""
    logits = torch.tensor([0.1, 0.5, 0.05, 0.35]).log().to(device).expand(4000, -1)

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        drawn = model.sample(logits, temperature, top_k, top_p, torch.Generator(device).manual_seed(0))
        return torch.bincount(drawn, minlength=4) / len(drawn)

    two = torch.tensor([0, 0.5, 0, 0.35], device=device) / 0.85
    cold = torch.tensor([0.1, 0.5, 0.05, 0.35], device=device) ** 2
    for got, expected in [(shares(), logits[0].exp()), (shares(top_k=2), two), (shares(top_p=0.6), two),
                          (shares(0.5), cold / cold.sum()), (shares(top_p=0.45), torch.eye(4, device=device)[1]),
                          (shares(0), torch.eye(4, device=device)[1])]:
        assert torch.equal(got > 0, expected > 0)
        torch.testing.assert_close(got, expected, rtol=0, atol=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("holes, pictures", [(15, 1), (0, 1), (16, 0), (16, 2)])
def test_placeholders_must_match_the_pictures(m, holes, pictures, device):
    """A picture of 4 x 4 tokens needs 16 of them, else codes would land on the wrong places."""
    ids = ids_of([words(2) + [m.ids["placeholder"]] * holes], m)
    with pytest.raises(InputError, match=f"^{holes} placeholders"):
        m.logits(ids, torch.randn(pictures, 3, 16, 16).to(device) if pictures else None)


@pytest.mark.parametrize("guidance", [1.0, None])
def test_generation_refuses_prompts_padded_on_the_right(m, guidance):
    """It would go on after a pad."""
    ids, mask = padded([words(3), words(5)], m, right=True)
    negative = ids_of([words(4)], m) if m.config.kind == "emu3" else None
    with pytest.raises(InputError, match="padded on the left"):
        m.generate_text(ids, None, mask)
    with pytest.raises(InputError, match="padded on the left"):
        m.generate_images(ids, mask, GRID, negative, guidance)


def test_guidance_needs_the_prompt_of_its_model(m):
    """Emu3 is guided away from a negative prompt, Janus-Pro from its own prompt blanked."""
    negative = ids_of([words(4)], m) if m.config.kind == "janus" else None
    with pytest.raises(InputError, match="negative prompt"):
        m.generate_images(ids_of([words(4)], m), size=GRID, negative=negative)


@pytest.mark.parametrize("name, changes, message", [
    ("emu4", {}, "emu4"), ("tiny-emu3", {"depth": 3}, "depth"), ("tiny-janus", {"attention": "flash"}, "flash"),
])
def test_unknown_settings_are_refused(name, changes, message):
    """The message repeats what is not known."""
    with pytest.raises(InputError, match=message):
        model.build(name, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Parity with transformers: tiny random checkpoints of its Emu3 and Janus
# ---------------------------------------------------------------------------------------------------------------------
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


@pytest.fixture(scope="module")
def emu3(device):
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


@pytest.fixture(scope="module")
def janus(device):
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


@pytest.fixture(params=["emu3", "janus"])
def pair(request):
    return request.getfixturevalue(request.param)


def test_logits_equal_transformers(pair, device):
    """Text only, and text with a picture, in a batch padded on the left."""
    theirs, ours = pair
    holes, size = (54, (48, 64)) if ours.config.kind == "emu3" else (16, (64, 64))
    picture, pixels = [ours.ids["placeholder"]] * holes, torch.randn(2, 3, *size).to(device)
    shapes = {"image_sizes": torch.tensor([size, size], device=device)} if ours.config.kind == "emu3" else {}
    for rows, given in [([words(9), words(6)], {}),
                        ([words(5) + picture + words(4), words(3) + picture + words(4)],
                         {"pixel_values": pixels, **shapes})]:
        ids, mask = padded(rows, ours)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        expected = theirs(input_ids=ids, attention_mask=mask.long(), position_ids=positions, **given).logits
        close(ours.logits(ids, given.get("pixel_values"), mask)[mask], expected[mask])


@torch.no_grad()
def test_half_precision_stays_close(pair):
    """In bfloat16 within 2e-2 of transformers in bfloat16, no farther from float32 than that is. (These weights make
    attention sharp, so that rounding alone moves single logits by 3e-2 of the largest.)"""
    theirs, ours = (copy.deepcopy(one) for one in pair)
    ids = ids_of([words(24), words(24)], ours)
    exact = ours.logits(ids)
    ours.lm.bfloat16(), ours.lm_head.bfloat16(), theirs.bfloat16()
    # .to() also rounds the rotary frequencies of transformers, which loading in bfloat16 would not
    inner = theirs.model.text_model if ours.config.kind == "emu3" else theirs.model.language_model
    steps = torch.arange(0, ours.config.head_dim, 2, device=ids.device) / ours.config.head_dim
    inner.rotary_emb.inv_freq = ours.config.theta ** -steps
    got = ours.logits(ids)
    assert got.dtype == torch.bfloat16
    expected = theirs(input_ids=ids).logits
    close(got.float(), expected.float(), 2e-2)
    assert (got - exact).square().mean() <= 1.1 * (expected - exact).square().mean() < (0.02 * exact.abs().max()) ** 2


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


def test_janus_drawing_equals_transformers(janus, device):
    """Code embedding, decoder and code head step by step, and greedy codes with guidance 5."""
    (theirs, ours), ids = janus, torch.tensor([[100, 5, 6, 7, 110], [100, 9, 8, 7, 110]], device=device)
    codes = torch.randint(64, (2, 16)).to(device)
    drawn = theirs.prepare_embeddings_for_image_generation(codes[:, :-1])
    x = torch.cat([theirs.get_input_embeddings()(ids), drawn], 1)
    close(ours.image_logits(ids, codes),
          theirs.model.generation_head(theirs.model.language_model(inputs_embeds=x).last_hidden_state[:, 4:]))
    theirs.generation_config.generation_kwargs = {"boi_token_id": 110}
    expected = theirs.generate(inputs=ids, attention_mask=torch.ones_like(ids), generation_mode="image",
                               guidance_scale=5, do_sample=False)
    assert torch.equal(ours.generate_images(ids, guidance=5.0, temperature=0), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Public checkpoints
# ---------------------------------------------------------------------------------------------------------------------
def forced(monkeypatch, codes):
    """From now on drawing takes these codes (B, N) and keeps the logits (B, K) that it would have drawn from."""
    seen, steps = [], iter(codes.unbind(1))
    monkeypatch.setattr(model, "sample", lambda logits, *_: seen.append(logits) or next(steps))
    return seen


def test_guided_logits_of_janus_equal_transformers_at_each_step(janus, monkeypatch, device):
    """On a given list of codes, so that no step hides behind another; prompts in halves there, in turn here."""
    (theirs, ours), ids = janus, torch.tensor([[100, 5, 6, 7, 110], [100, 9, 8, 7, 110]], device=device)
    codes = torch.randint(64, (2, 16)).to(device)
    seen = forced(monkeypatch, codes)
    ours.generate_images(ids, guidance=5.0)
    blank = torch.where((ids == 100) | (ids == 110), ids, 102)
    drawn = theirs.prepare_embeddings_for_image_generation(codes[:, :-1])
    x = torch.cat([theirs.get_input_embeddings()(torch.cat([ids, blank])), drawn.repeat(2, 1, 1)], 1)
    hidden = theirs.model.language_model(inputs_embeds=x).last_hidden_state[:, 4:]
    given, free = theirs.model.generation_head(hidden).chunk(2)
    close(torch.stack(seen, 1), free + 5 * (given - free))


def emu3_constraint(ids, prompt, h, w):
    """What may come after a prompt of `prompt` tokens: codes, a row end after each row."""
    visual = [*range(ids["visual"], ids["visual"] + 64)]
    return lambda _, row: [ids["eol"]] if (len(row) - prompt + 1) % (w + 1) == 0 else visual


def test_drawing_of_emu3_equals_transformers(emu3, monkeypatch, device):
    """Greedy codes of its generate with guidance, a negative prompt and a prefix constraint; and on a given list of
    codes the guided logits of each step, up to what a softmax does not see."""
    (theirs, ours), (h, w) = emu3, GRID
    prompt, negative = ids_of([words(7), words(7)], ours), ids_of([words(5)], ours)
    expected = theirs.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=h * (w + 1), do_sample=False,
        eos_token_id=None, guidance_scale=3.0, negative_prompt_ids=negative.expand(2, -1),
        negative_prompt_attention_mask=torch.ones_like(negative.expand(2, -1)),
        prefix_allowed_tokens_fn=emu3_constraint(ours.ids, 7, h, w))[:, 7:]
    codes = ours.generate_images(prompt, None, GRID, negative, 3.0, temperature=0)
    assert torch.equal(ours.block(codes).flatten(1), expected)
    codes = torch.randint(64, (2, h, w)).to(device)
    seen = forced(monkeypatch, codes.flatten(1))
    ours.generate_images(prompt, None, GRID, negative, 3.0)
    tokens, got = ours.block(codes).flatten(1), iter(seen)
    for t in range(h * (w + 1)):
        if (t + 1) % (w + 1):
            rows = [torch.cat([start, tokens[:, :t]], 1) for start in (prompt, negative.expand(2, -1))]
            given, free = (theirs(input_ids=row).logits[:, -1].log_softmax(-1) for row in rows)
            close(next(got).log_softmax(-1), (free + 3 * (given - free))[:, 40:104].log_softmax(-1))


@pytest.mark.parametrize("preset, architecture, original, transformers", [
    ("emu3-8b", "Emu3ForConditionalGeneration", 786, 786), ("janus-pro-1b", "JanusForConditionalGeneration", 868, 964),
    ("janus-pro-7b", "JanusForConditionalGeneration", 922, 1018)])
def test_names_are_an_exact_round_trip_over_all_keys_of_full_size_models(preset, architecture, original, transformers):
    """Ours to transformers, whose own model has just these tensors, and back; ours to the authors' names and back
    (without the 14 tensors of Janus-Pro that nobody uses)."""
    hf = pytest.importorskip("transformers")
    with torch.device("meta"):
        ours = model.build(preset)
        content = public_files(ours)["config"]
        theirs = getattr(hf, architecture)(getattr(hf, architecture.replace("ForConditionalGeneration", "Config"))(
            **{key: value for key, value in content.items() if key not in ("architectures", "model_type")}))
    state, public = ours.state_dict(), {}
    for name, value in state.items():
        public |= to_transformers(name, value, ours.config)
    assert {name: x.shape for name, x in public.items()} == {name: x.shape for name, x in theirs.state_dict().items()}
    assert len(public) == transformers
    on_disk = {renamed(name, EMU3_TO_DISK): x for name, x in public.items()}
    for layout, stored in [("hf", {renamed(name, EMU3_FROM_DISK): x for name, x in on_disk.items()}),
                           ("original", {public_names(name, ours.config, "original")[0]: value
                                         for name, value in state.items()})]:
        for name, value in state.items():
            parts = [stored.pop(part) for part in public_names(name, ours.config, layout)]
            assert (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(value.shape).shape == value.shape
        assert not stored
    names = [part for name in state for part in public_names(name, ours.config, "original")]
    assert len(set(names)) == len(names) == original


ORIGINAL_NAMES = {
    "lm.layers.11.self_attn.q_proj.weight": ("model.layers.11.self_attn.q_proj.weight",
                                             "language_model.model.layers.11.self_attn.q_proj.weight"),
    "lm_head.weight": ("lm_head.weight", "language_model.lm_head.weight"),
    "vq.quantize.weight": ("quantize.embedding.weight", "gen_vision_model.quantize.embedding.weight"),
    "vq.encoder.down.1.block.0.nin_shortcut.weight": ("encoder.down.1.block.0.nin_shortcut.weight", None),
    "vq.encoder.down.3.attn.1.proj_out.bias": ("encoder.down.3.attn.1.proj_out.bias", None),
    "vq.encoder.downsample.2.weight": ("encoder.down.2.downsample.conv.weight",
                                       "gen_vision_model.encoder.conv_blocks.2.downsample.conv.weight"),
    "vq.encoder_time_conv.1.conv.bias": ("encoder.time_conv.1.conv.conv.bias", None),
    "vq.encoder_time_blocks.1.conv2.conv.weight": ("encoder.time_res_stack.1.conv2.conv.weight", None),
    "vq.decoder.up.0.block.2.conv1.weight": ("decoder.up.3.block.2.conv1.weight",
                                             "gen_vision_model.decoder.conv_blocks.0.res.2.conv1.weight"),
    "vq.decoder.upsample.0.weight": ("decoder.up.3.upsample.conv.weight",
                                     "gen_vision_model.decoder.conv_blocks.0.upsample.conv.weight"),
    "vq.decoder.mid.attn_1.q.weight": ("decoder.mid.attn_1.q.weight", "gen_vision_model.decoder.mid.1.q.weight"),
    "vq.quant_conv.conv.weight": ("quant_conv.conv.weight", None),
    "vision.pos_embed": (None, "vision_model.vision_tower.pos_embed"),
    "vision.patch_embed.weight": (None, "vision_model.vision_tower.patch_embed.proj.weight"),
    "vision.blocks.23.qkv.bias": (None, "vision_model.vision_tower.blocks.23.attn.qkv.bias"),
    "vision.blocks.10.proj.weight": (None, "vision_model.vision_tower.blocks.10.attn.proj.weight"),
    "vision.blocks.10.fc1.weight": (None, "vision_model.vision_tower.blocks.10.mlp.fc1.weight"),
    "vision.blocks.10.norm2.bias": (None, "vision_model.vision_tower.blocks.10.norm2.bias"),
    "aligner.2.weight": (None, "aligner.layers.2.weight"),
    "gen_aligner.0.bias": (None, "gen_aligner.layers.0.bias"),
    "gen_head.0.weight": (None, "gen_head.output_mlp_projector.weight"),
    "gen_head.2.weight": (None, "gen_head.vision_head.weight"),
    "gen_embed.weight": (None, "gen_embed.weight"),
}


@pytest.mark.parametrize("ours", ORIGINAL_NAMES)
def test_original_names_are_those_of_the_released_files(ours):
    """One of each kind, written down by hand from the published lists of keys."""
    for config, expected in zip((model.EMU3_8B, model.JANUS_PRO_7B), ORIGINAL_NAMES[ours], strict=True):
        assert expected is None or public_names(ours, config, "original") == [expected]


def test_transformers_folders_load_with_equal_weights(pair, tmp_path, device):
    """What transformers saves, read by name from config.json and the file; no number of it is that of the recipe."""
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    m = formats.weights.load(tmp_path, device=device)
    expected = ours.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in m.state_dict().items())
    same = {f.name for f in fields(model.Config)} - {"ids", "context", "image_size", "init_std", "embed_std"}
    assert {name: getattr(m.config, name) for name in same} == {name: getattr(ours.config, name) for name in same}
    assert m.ids["placeholder"] == ours.ids["placeholder"] and m.ids["pad"] == ours.ids["pad"]


def original_folder(m, folder, suffix):
    """The model in original names and files: one folder for Janus-Pro, two side by side for Emu3."""
    c, folder = m.config, folder / "language"
    state = {public_names(name, c, "original")[0]: value for name, value in m.state_dict().items()}
    text = {theirs: getattr(c, ours) for ours, theirs in TEXT_FIELDS.items()}
    if c.kind == "emu3":
        parts = {folder: {name: value for name, value in state.items() if name.startswith(("model.", "lm_head."))}}
        parts[folder.parent / "vision"] = {name: value for name, value in state.items() if name not in parts[folder]}
        ids = {theirs: m.ids[role] for role, theirs in ID_FIELDS.items()}
        vq = {theirs: getattr(c, ours) for ours, theirs in VQ_ORIGINAL.items()}
        configs = {folder: text | ids | {"model_type": "Emu3"},
                   folder.parent / "vision": vq | {"model_type": "Emu3VisionVQ"}}
    else:
        state |= {"vision_model.vision_tower.attn_pool.q.weight": torch.ones(2),
                  "gen_vision_model.quantize.codebook_used": torch.ones(3)}
        config = {"model_type": "multi_modality", "language_config": text,
                  "vision_config": {"params": {"model_name": "siglip_large_patch16_384", "heads": c.vit_heads}}}
        parts, configs = {folder: state}, {folder: config}
    for place, tensors in parts.items():
        place.mkdir()
        (place / "config.json").write_text(json.dumps(configs[place]))
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        if suffix == "safetensors":
            save_file(tensors, place / "model.safetensors")
        elif suffix == "bin":                        # in two shards with an index
            names = list(tensors)
            halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
            for file, half in halves.items():
                torch.save({name: tensors[name] for name in half}, place / file)
            weight_map = {name: file for file, half in halves.items() for name in half}
            (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            torch.save(tensors, place / "iter_7.pth")
    return folder


OTHER = {"layers": 2, "width": 32, "ffn": 48, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 97, "context": 77,
         "vq_width": 32}


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth"])
@pytest.mark.parametrize("kind", ["emu3", "janus"])
def test_original_folders_load_with_equal_weights(kind, suffix, tmp_path):
    """Both models in the authors' own names, in each way such files are stored. What Janus-Pro's original config.json
    keeps silent about is read off the tensors."""
    if kind == "emu3":
        ids = dict(zip(("pad", "bos", "eos", "eol", "eof", "img", "boi", "eoi"), range(8), strict=True))
        config = replace(model.EMU3_8B, **OTHER, codebook=48, vq_mult=(1, 2), vq_blocks=1, vq_attention=(1,), ids=ids)
    else:
        config = replace(model.JANUS_PRO_7B, **OTHER, codebook=48, code_dim=6, vq_latent=40, vq_mult=(1, 2),
                         vq_blocks=1, vq_attention=(1,), image_size=24, vit_width=64, vit_layers=2, vit_heads=4,
                         vit_ffn=80, vit_patch=8, ids={})
    torch.manual_seed(0)
    ours = model.from_config(config)
    folder = original_folder(ours, tmp_path, suffix)
    m = formats.weights.load(folder / "iter_7.pth" if suffix == "pth" and kind == "janus" else folder)
    assert all(torch.equal(value, m.state_dict()[name]) for name, value in ours.state_dict().items())
    assert replace(m.config, ids=config.ids) == config


def edited(folder, file="config.json", **changes):
    """Change a json file: section__field=value; the section __ is the file itself."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        (content[section] if section else content)[key] = value
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("changes", [
    {"text_config__rope_scaling": {"rope_type": "default"}}, {"text_config__rope_scaling": {"type": "default"}},
    {"text_config__hidden_act": None}, {"__image_area": None}, {"__pictures": None}])
def test_settings_that_say_nothing_new_are_read(changes, emu3, tmp_path):
    """Older converters write defaults and nulls where newer ones write nothing."""
    emu3[0].save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    assert formats.weights.load(tmp_path).config.theta == emu3[1].config.theta


@pytest.mark.parametrize("changes, message", [
    ({"text_config__rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "config.json: rope_type 'linear' cannot"),
    ({"__vq_config": None}, "do not fit its config.json"),
    ({"vq_config__base_channels": 33}, "no model that can be built"),
    ({"text_config__num_hidden_layers": "three"}, "no model that can be built"),
    ({"vq_config__temporal_downsample_factor": 2}, "temporal_downsample_factor 2 cannot be honoured, only 4")])
def test_settings_that_cannot_be_honoured_are_one_clear_line(changes, message, emu3, tmp_path):
    """Never a traceback, never a model that differs from what was asked for."""
    emu3[0].save_pretrained(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        formats.weights.load(tmp_path)


def test_picture_settings_of_a_newer_transformers_are_read(emu3, tmp_path):
    """Its processors write them into another file."""
    emu3[0].save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"min_pixels": 64}}))
    assert formats.weights.load(tmp_path).config.min_pixels == 64
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"image_std": [0.2, 0.2, 0.2]}}))
    with pytest.raises(InputError, match="processor_config.json: image_std"):
        formats.weights.load(tmp_path)


def test_neighbours_of_emu3_do_not_disturb(tmp_path):
    """The picture tokenizer is found beside the language model, whatever else lies there."""
    ids = dict(zip(("pad", "bos", "eos", "eol", "eof", "img", "boi", "eoi"), range(8), strict=True))
    config = replace(model.EMU3_8B, **OTHER, codebook=48, vq_mult=(1, 2), vq_blocks=1, vq_attention=(1,), ids=ids)
    folder = original_folder(model.from_config(config), tmp_path, "safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text("not json")
    assert formats.weights.load(folder).config.codebook == 48
    (tmp_path / "vision/config.json").unlink()
    with pytest.raises(InputError, match="holds the language model alone: give --vision-tokenizer"):
        formats.weights.load(folder)


def test_a_fine_tuned_file_alone_says_what_belongs_beside_it(tmp_path):
    """Such files hold tensors only; and of several, one must be chosen."""
    for name in ("iter_1.pth", "iter_2.pth"):
        torch.save({"lm_head.weight": torch.ones(1)}, tmp_path / name)
    with pytest.raises(InputError, match="holds no config.json: copy the json files of the model that iter_1.pth"):
        formats.weights.load(tmp_path / "iter_1.pth")
    (tmp_path / "config.json").write_text('{"model_type": "multi_modality"}')
    with pytest.raises(InputError, match="holds 2 checkpoints: give one of them"):
        formats.weights.load(tmp_path)


def test_a_folder_that_does_not_fit_is_refused_with_all_that_is_wrong(janus, tmp_path):
    """Missing, unknown and misshaped tensors in one message, and a setting that the code cannot honour by name."""
    janus[0].save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["model.extra"] = torch.ones(1)
    del state["lm_head.weight"]
    state["model.aligner.fc1.bias"] = torch.ones(7)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head.weight is missing; model.aligner.fc1.bias is \(7,\), not \(64,\); "
                                         "model.extra is not known"):
        formats.weights.load(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="config.json: hidden_act 'relu'"):
        formats.weights.load(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    content["text_config"]["hidden_act"] = "silu"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="model.safetensors cannot be read"):
        formats.weights.load(tmp_path)


def test_a_transformers_model_is_written_back_as_it_was(pair, tmp_path, device):
    """Every tensor and every size, whatever the configuration; the codes and sizes of pictures too."""
    theirs, ours = pair
    formats.weights.save(ours, tmp_path / "out")
    import transformers
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").to(device)
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert again.config.text_config.num_key_value_heads == ours.config.kv_heads
    processor = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5] * 3
    assert replace(formats.weights.load(tmp_path / "out").config, ids=ours.config.ids) == ours.config


def test_a_hub_id_is_resolved_or_the_download_is_named(janus, tmp_path, monkeypatch):
    """With a local copy it is that folder; without network the one line says what to run."""
    import huggingface_hub
    janus[0].save_pretrained(tmp_path / "copy")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(tmp_path / "copy"))
    assert formats.weights.load("someone/some-model").config.layers == 3

    def offline(name):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"^someone/some-model is no folder .*\(no network\): run `hf download"):
        formats.weights.load("someone/some-model")


def test_tied_embeddings_are_honoured(janus, tmp_path):
    """A file without lm_head.weight is complete if config.json ties it to the word embeddings, and only then."""
    janus[0].save_pretrained(tmp_path)
    state, content = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    silent = {key: value for key, value in content.items() if key != "tie_word_embeddings"}
    for tied in (True, None, False):                 # silence means yes to transformers
        told = silent if tied is None else silent | {"tie_word_embeddings": tied}
        (tmp_path / "config.json").write_text(json.dumps(told))
        if tied is not False:
            m = formats.weights.load(tmp_path)
            assert torch.equal(m.lm_head.weight, m.lm.embed_tokens.weight)
        else:
            with pytest.raises(InputError, match="lm_head.weight is missing"):
                formats.weights.load(tmp_path)


def test_the_preprocessor_file_is_read_and_what_it_asks_is_done_or_refused(emu3, tmp_path):
    """Sizes come from it; another normalisation than (x - 0.5) / 0.5 would silently spoil every picture."""
    emu3[0].save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"min_pixels": 4096, "max_pixels": 8192, "image_mean": [0.5, 0.5, 0.5]}))
    m = formats.weights.load(tmp_path)
    assert (m.config.min_pixels, m.config.max_pixels) == (4096, 8192)
    file.write_text(json.dumps({"image_mean": [0.48, 0.46, 0.41]}))
    with pytest.raises(InputError, match=r"preprocessor_config.json: image_mean \[0.48"):
        formats.weights.load(tmp_path)


@pytest.mark.parametrize("name", ["tiny-emu3", "tiny-janus"])
def test_saved_models_open_in_transformers_with_equal_logits(name, tmp_path, monkeypatch, device):
    """A model of the laptop run, in several shards, read by transformers and by us; a folder in use is left alone."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    m = model.build(name).to(device)
    monkeypatch.setattr(formats.weights, "SHARD_BYTES", 1e6)
    formats.weights.save(m, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 and not (tmp_path / "out.part").exists()
    theirs = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").to(device)
    ids = torch.randint(5, 400, (2, 12)).to(device)
    with torch.no_grad():
        close(m.logits(ids), theirs(input_ids=ids).logits)
    again = formats.weights.load(tmp_path / "out", device=device)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in m.state_dict().items())
    fresh = {"init_std": m.config.init_std, "embed_std": m.config.embed_std, "ids": m.config.ids}
    assert replace(again.config, **fresh) == m.config
    half = formats.weights.load(tmp_path / "out", dtype=torch.bfloat16, device=device)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert all(torch.equal(value, half.vq.state_dict()[key]) for key, value in m.vq.state_dict().items())
    with pytest.raises(InputError, match="not empty"):
        formats.weights.save(m, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_loading_holds_the_model_once(suffix, tmp_path):
    """Peak anonymous memory stays below 1.1 times the model in the target type plus the largest stored tensor."""
    torch.manual_seed(0)
    m = model.build("tiny-janus", width=768, ffn=3072, layers=8, heads=12, kv_heads=12, head_dim=64)
    formats.weights.save(m, tmp_path / "big")
    if suffix == "bin":
        file = tmp_path / "big/model.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    script = """
import threading, torch, formats.weights
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
formats.weights.load(%r)
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
m = formats.weights.load(%r, dtype=torch.bfloat16)
done.set(); thread.join()
print(peak - before, sum(x.nbytes for x in m.state_dict().values()))
"""
    small = tmp_path / "small"
    formats.weights.save(model.build("tiny-janus"), small)     # imports and allocators warm up before it counts
    done = subprocess.run([sys.executable, "-c", script % (str(small), str(tmp_path / "big"))], capture_output=True,
                          text=True, cwd=Path(model.__file__).parent, check=True)
    peak, size = map(int, done.stdout.split())
    largest = max(value.nbytes for value in m.state_dict().values())
    assert 0.5 * size < peak <= 1.1 * size + largest
