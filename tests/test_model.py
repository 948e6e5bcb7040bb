"""Claims about the two models: attention, loss, training steps, and parity with transformers (model.py)."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from made import NAMES, SMALL, batch_of, both_models, close, fresh, ids_of, objective, off, padded, small, tiny, words
from torch.utils._python_dispatch import TorchDispatchMode

import aia
import data
import model
import parts.kernels
import train
from formats.records import RECORD_TASKS
from parts import decoding
from parts.kernels import KERNELS, kernel_for, try_lse
from parts.loss import CHUNK, next_token_loss
from parts.settings import InputError

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")


@pytest.fixture(scope="module", params=NAMES)
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


TARGETS = {task: aia.targets(2, task) for task in aia.TASKS}
MIXED = ("tiny-mixed", "tiny-mixed-janus", "tiny-mixed-codes", "tiny-mixed-fork")


# ---------------------------------------------------------------------------------------------------------------------
# Attention and sizes
# ---------------------------------------------------------------------------------------------------------------------
def each_body(shared, past, condition, visible, device):
    """Output, mass and gradients of all bodies of attention are the same, with 4 heads on `shared` ones and cached keys
    -> mass, and the q, k, v it belongs to."""
    q, w = torch.randn(2, 2, 4, 9 - past, 8).to(device)
    k, v = torch.randn(2, 2, shared, 9, 8).to(device)
    u = w[..., 0] if condition.dim() == 2 else w[..., :2].movedim(-1, 0)        # (B, H, T) or (2, B, H, T)
    results = []
    for attend in (model.attend_fused, model.attend_lse, model.attend_explicit):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, mass = attend(*inputs, visible, condition)
        results.append([out, mass, *torch.autograd.grad((out * w).sum() + (mass * u).sum(), inputs)])
        assert attend(*inputs, visible)[1] is None
    for other in results[:-1]:
        for got, expected in zip(other, results[-1], strict=True):
            close(got, expected)
    return mass, (q, k, v)


@pytest.mark.parametrize("gaps", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("past", [0, 5, 8])
@pytest.mark.parametrize("shared", [4, 2, 1])
def test_all_bodies_of_attention_agree(shared, past, gaps, lse, device):
    """Output, mass and gradients, with 4 heads on `shared` ones, cached keys, padding and a condition with holes."""
    condition, mask = torch.tensor([[[0, 1, 1, 0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1, 0, 0]],
                                    [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]], device=device).bool()
    visible = decoding.visibility(mask if gaps else None, torch.arange(past, 9, device=device), 9)
    each_body(shared, past, condition, visible, device)


@pytest.mark.parametrize("gaps", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("past", [0, 5, 8])
@pytest.mark.parametrize("shared", [4, 2, 1])
def test_two_conditions_are_measured_under_any_mask(shared, past, gaps, lse, device):
    """As one by one with the written-out softmax: with cached keys, padding, and no key for one of them in a sample."""
    conditions = torch.tensor([[[0, 1, 1, 0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1, 0, 0]],
                               [[0, 0, 1, 1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]]], device=device).bool()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]], device=device).bool()
    visible = decoding.visibility(mask if gaps else None, torch.arange(past, 9, device=device), 9)
    mass, given = each_body(shared, past, conditions, visible, device)
    close(mass, torch.stack([model.attend_explicit(*given, visible, condition)[1] for condition in conditions]))


@pytest.mark.parametrize("name, task", [*((name, task) for name in NAMES for task in aia.TASKS),
                                        *((name, "mixed") for name in MIXED)])
def test_whole_models_agree_with_any_attention(name, task, lse, device):
    """Loss, intensities and all gradients of next-token prediction plus AIA are those of the written-out softmax."""
    results, batch = [], batch_of(model.PRESETS[name], task, device)
    for attention in model.ATTENTION:
        one = tiny(name, device, heads=4, kv_heads=2, attention=attention)
        out = one(batch)
        objective(out, batch).backward()
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
        cache = decoding.Cache(m.lm, torch.ones(1, 9216, device=device).bool(), 1)
        cache.used = 9216
        m.lm(torch.zeros(1, 1, m.config.width, dtype=torch.bfloat16, device=device), cache=cache)
    angle = 9216 * 1e6 ** (-torch.arange(0, 32, 2, dtype=torch.float64, device=device) / 32)
    exact = angle.cos().repeat(2), torch.cat([-angle.sin(), angle.sin()])       # the sine brings the sign of its half
    kept, rounded = ([(part.double() - right).abs().max() for part, right in zip(rope, exact, strict=True)]
                     for rope in seen)
    assert max(kept) < 2**-8 < 1 < min(rounded)


def test_the_softmax_of_half_precision_is_taken_in_float32(device):
    """As both public models do: of a sum over hundreds of keys bfloat16 keeps three digits."""
    q, k, v = (torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(i)).to(device, torch.bfloat16)
               for i in range(3))
    condition = torch.arange(300, device=device)[None] % 2 == 0
    _, mass = model.attend_explicit(q, k, v, condition=condition)
    scores = (q @ k.mT * 16 ** -0.5).double()
    hidden = torch.ones(300, 300, dtype=torch.bool, device=device).triu(1)
    expected = (scores.masked_fill(hidden, -torch.inf).softmax(-1) * condition[:, None, None]).sum(-1)
    torch.testing.assert_close(mass, expected.float(), rtol=1e-5, atol=1e-6)


@both_models
def test_the_kernel_of_attention_is_told(name, monkeypatch):
    """Both kinds of pass by the step that differentiates them: heads of one width on the fast kernel, shared ones too;
    where AIA takes another way than a plain pass, both are told."""
    def told(**changes):
        m = fresh(name, **changes)
        model.settle_attention(m, "cpu", torch.float32)
        return model.attention_kernel(m, "cpu", torch.float32)
    assert told() == told(heads=4, kv_heads=2) == told(attention="fused") == "fused, flash kernel"
    assert told(attention="lse") == "fused, flash kernel; with AIA fused, flash for CPUs kernel and its log-sum-exp"
    assert "every map" in told(attention="explicit")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "slow math fallback" in told()


@pytest.mark.parametrize("least, taken", [(None, False), (65, False), (64, True)])
def test_log_sum_exp_is_taken_from_the_length_on_where_it_is_faster(least, taken, monkeypatch):
    """`auto` asks the table, for the 64 tokens of the kernel that is told; compiled layers ask for the device alone.
    That longer samples go another way is told too."""
    monkeypatch.setattr(model, "LSE_FROM", {} if least is None else {"cpu": least})
    m = fresh("tiny-emu3")
    model.settle_attention(m, "cpu", torch.float32)
    told = model.attention_kernel(m, "cpu", torch.float32)
    assert ("and its log-sum-exp" in told) == taken and (f"from {least} tokens on" in told) == (least is not None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert ("and its log-sum-exp" in model.attention_kernel(m, "cpu", torch.float32)) == (least is not None)


def test_several_conditions_take_flag_channels_at_any_length(monkeypatch):
    """By log-sum-exp each of them would compute most of the map once more."""
    monkeypatch.setattr(model, "LSE_FROM", {"cpu": 1})
    assert try_lse("cpu", torch.float32, 4, 4, 32)[0]
    q, conditions = torch.randn(1, 4, 8, 32, requires_grad=True), torch.ones(2, 1, 8).bool()
    one, two = (parts.kernels.kernel_of(model.attend_auto(q, q, q, condition=condition)[0].grad_fn)
                for condition in (conditions[0], conditions))
    assert "log-sum-exp" in one and two == "fused, flash kernel"


def test_where_log_sum_exp_cannot_be_had_training_goes_on_without(monkeypatch, capsys):
    """A kernel that is not there and one that is wrong are named, and attention takes the flag channel."""
    cpu, = KERNELS["cpu"]
    absent = replace(cpu, name="absent", forward=lambda *args: torch.ops.aten.of_another_version(*args))
    wrong = replace(cpu, name="wrong", backward=lambda *args: [1.005 * grad for grad in cpu.backward(*args)])
    monkeypatch.setattr(parts.kernels, "PASSED", {})
    monkeypatch.setitem(KERNELS, "cpu", (absent, wrong))
    m = fresh("tiny-emu3", attention="lse")
    model.settle_attention(m, "cpu", torch.float32)
    said = capsys.readouterr().out
    assert "absent: " in said and "wrong: wrong by" in said and "fused, with a flag channel, instead" in said
    assert model.attention_kernel(m, "cpu", torch.float32) == "fused, flash kernel"
    monkeypatch.setitem(KERNELS, "cpu", (wrong, cpu))
    assert try_lse("cpu", torch.float32, 4, 2, 16)[0] == cpu.name
    assert kernel_for(torch.zeros(1)) is cpu and kernel_for(torch.zeros(1).double()) is None


def test_log_sum_exp_is_tried_in_both_types_of_a_run(monkeypatch):
    """Training in half precision is evaluated in float32, with the same attention."""
    monkeypatch.setattr(parts.kernels, "PASSED", {})
    model.settle_attention(fresh("tiny-emu3", attention="lse"), "cpu", torch.bfloat16)
    assert kernel_for(torch.zeros(1)) and kernel_for(torch.zeros(1).bfloat16())


# ---------------------------------------------------------------------------------------------------------------------
# Loss and padding
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
    got = next_token_loss(x, head, target)
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
        got = next_token_loss(x, head, target)
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


@pytest.mark.parametrize("name, how, task", [
    *((name, "checkpointed", task) for name in NAMES for task in aia.TASKS),
    *(("tiny-emu3", "compiled", task) for task in aia.TASKS), ("tiny-mixed-fork", "checkpointed", "mixed")])
def test_recomputed_and_compiled_layers_give_the_same_numbers(name, task, how, device):
    """Loss, intensities and gradients, of which the mass is a part. Both models have the same layers to compile."""
    batch, results = batch_of(model.PRESETS[name], task, device), []
    for changed in (False, True):
        sizes = SMALL | {"layers": 3} if "fork" in name else SMALL
        one = tiny(name, device, **sizes, checkpoint_activations=changed and how == "checkpointed").train()
        for layer in one.lm.all_layers() if changed and how == "compiled" else ():
            layer.compile(backend="aot_eager")
        out = one(batch)
        (objective(out, batch, 0.0) + out.intensity.square().sum()).backward()
        results.append({"ntp": out.ntp, "intensity": out.intensity,
                        **{key: p.grad for key, p in one.named_parameters() if p.grad is not None}})
    for result in results[1:]:
        assert results[0].keys() == result.keys()
        for key, expected in results[0].items():
            close(result[key], expected)


@pytest.fixture(params=NAMES)
def forked(request, device):
    """A model, and the same with UniFork's two branches from its second layer on."""
    m, f = tiny(request.param, **SMALL), model.build(request.param, **SMALL, fork_layer=1)
    f.load_state_dict(m.state_dict(), strict=False)
    model.fork(f)
    return m.requires_grad_(False).to(device), f.to(device)


def test_equal_branches_are_the_shared_model(forked, device):
    """Bit for bit, loss and intensities and what is drawn and said, also in turn: a fork changes nothing until it is
    trained."""
    m, f = forked
    for task in RECORD_TASKS:
        batch = batch_of(m.config, task, device)
        one, two = m(batch), f(batch)
        assert torch.equal(one.ntp, two.ntp) and torch.equal(one.intensity, two.intensity)
    ids = torch.randint(5, 90, (2, 6)).to(device)
    drawn = [x.generate_images(ids, guidance=1, temperature=0) for x in (m, f)]
    said = [x.generate_text(ids, max_new_tokens=4) for x in (m, f)]
    assert torch.equal(*drawn) and torch.equal(*said)
    answers = []
    for x in (m, f):
        with torch.no_grad():
            x.lm_head.weight[x.ids["boi"]] *= 9     # opens pictures often
        parts = x.generate(ids, opening=(7, 8), max_new_tokens=8, max_pictures=2, code_temperature=0)
        answers.append([[part.tolist() if torch.is_tensor(part) else part for part in row] for row in parts])
    assert answers[0] == answers[1] and any(len(row) > 1 for row in answers[0])


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


@pytest.mark.parametrize("task", aia.TASKS)
def test_a_mixed_batch_trains_each_branch_by_its_own_task(task, forked, device):
    """Both run over all of its tokens, but codes are read off the one and words off the other."""
    _, f = forked
    i, out = aia.TASKS.index(task), f(batch_of(f.config, "mixed", device))
    (out.ntp[i] + out.intensity[i].sum()).backward()
    moved = {name for name, p in f.lm.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    everything = {name for name, _ in f.lm.named_parameters()}
    other = ("layers.1.", "norm.") if task == "gen" else ("gen_layers.", "gen_norm.")
    assert moved == {name for name in everything if not name.startswith(other)}


@pytest.mark.parametrize("name", MIXED)
def test_one_pass_over_a_mixed_batch_is_a_pass_for_each_task(name, device):
    """The same tokens as a batch of one task, with its labels and masks alone and through its own branch: the losses,
    what they are divided by, and the intensities of every layer."""
    m = tiny(name, device)
    batch = batch_of(m.config, "mixed", device)
    out = m(batch)
    assert out.ntp.shape == (2,) and out.intensity.shape == (2, 2, m.config.layers)
    for i, task in enumerate(aia.TASKS):
        alone = m(data.Batch(task, batch.tokens, batch.labels[i], batch.condition[i], batch.queries[i],
                             batch.aia_valid[i], batch.pixels, None, batch.codes, batch.drawn))
        close(out.ntp[i], alone.ntp)
        close(out.intensity[i], alone.intensity)
        assert out.tokens[i] == alone.tokens > 0 and (out.intensity[i] > 0).all()


@pytest.mark.parametrize("name", MIXED)
def test_the_gradient_of_a_mixed_batch_is_the_slope_of_its_loss(name):
    """L_NTP + lambda L_AIA of both tasks in float64, against differences along a random direction in each part."""
    m = tiny(name, layers=3, width=32, ffn=32).double()
    batch = batch_of(m.config, "mixed").each(lambda x: x.double() if x.is_floating_point() else x)
    objective(m(batch), batch).backward()
    parts = {}
    for key, p in m.named_parameters():
        if p.grad is not None:
            parts.setdefault(".".join(key.split(".")[:1 + key.startswith("lm.")]), []).append(p)
    assert len(parts) == (9 if m.config.kind == "janus" else 6 if m.config.fork_layer else 4)
    for key, weights in parts.items():
        step = [1e-6 * torch.randn_like(p) for p in weights]
        ends = []
        with torch.no_grad():
            for sign in (1, -2):                    # from where it is one step up, from there two down
                for p, part in zip(weights, step, strict=True):
                    p += sign * part
                ends.append(objective(m(batch), batch))
            for p, part in zip(weights, step, strict=True):
                p += part
        slope = sum((p.grad * part).sum() for p, part in zip(weights, step, strict=True))
        assert (ends[0] - ends[1]) / 2 == pytest.approx(slope.item(), rel=1e-5), key


def test_a_branch_of_its_own_is_drawn_with(forked, device):
    """Generation takes the generation branch, cached or not; answers take the other."""
    m, f = forked
    with torch.no_grad():
        for p in f.lm.gen_layers.parameters():
            p.copy_(torch.randn(p.shape))
    ids = torch.randint(5, 90, (2, 6)).to(device)
    codes = f.generate_images(ids, guidance=1, temperature=0)
    # the code of the highest logit at each place of a full pass
    assert torch.equal(f.image_logits(ids, codes.clone()).argmax(-1), codes.flatten(1))
    assert not torch.equal(codes, m.generate_images(ids, guidance=1, temperature=0))
    assert torch.equal(f.generate_text(ids, max_new_tokens=4), m.generate_text(ids, max_new_tokens=4))


@pytest.mark.parametrize("fork_layer", [1, 2, 3])
def test_a_fork_adds_the_layers_above_it(fork_layer):
    """Of L layers L - k, and a norm."""
    shared, forked = (model.build("tiny-emu3", fork_layer=k) for k in (0, fork_layer))
    layer = sum(p.numel() for p in shared.lm.layers[0].parameters())
    more = sum(p.numel() for p in forked.parameters()) - sum(p.numel() for p in shared.parameters())
    assert more == (4 - fork_layer) * layer + 96


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


def test_emu3_rows_end_with_a_row_end_token():
    """Two rows of three codes are eight tokens."""
    m = tiny("tiny-emu3")
    visual, eol = m.ids["visual"], m.ids["eol"]
    block = m.block(torch.tensor([[[0, 1, 2], [63, 4, 5]]]))
    assert (block - visual).tolist() == [[[0, 1, 2, eol - visual], [63, 4, 5, eol - visual]]]


# ---------------------------------------------------------------------------------------------------------------------
# A training step
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, task", [("tiny-emu3", "gen"), ("tiny-janus", "und"), ("tiny-janus", "gen")])
@pytest.mark.parametrize("recompute, lora", [(False, 0), (True, 0), (False, 4), (True, 4)])
def test_a_model_learns_the_same_by_log_sum_exp(name, task, recompute, lora, device):
    """Losses, intensities and all gradients of a step with AIA, recomputed layers and LoRA among them."""
    results = []
    for attention in ("explicit", "lse"):
        m = small(name, attention=attention, lora_rank=lora, checkpoint_activations=recompute).to(device)
        model.settle_attention(m, device, torch.float32)
        if attention == "lse" and not kernel_for(m.lm.norm.weight):
            pytest.skip(f"{device} has no kernel with a log-sum-exp")
        train.freeze(m, train.TUNE)
        targets = {task: tuple(x.to(device) for x in TARGETS[task])}
        sums = train.accumulate(m, [batch_of(m.config, task, valid=(True, False))], targets, {task: 30.0})
        results.append((train.metrics_of(sums)[task], {name: p.grad for name, p in m.named_parameters()
                                                       if p.grad is not None}))
    (expected, right), (found, got) = results
    assert got.keys() == right.keys() and (not lora or all("lora" in name for name in got))
    assert found["ntp"] == pytest.approx(expected["ntp"], rel=1e-5)
    assert found["aia"] == pytest.approx(expected["aia"], rel=1e-4)
    torch.testing.assert_close(found["intensity"], expected["intensity"], rtol=1e-4, atol=1e-6)
    for name, grad in got.items():
        torch.testing.assert_close(grad, right[name], rtol=1e-3, atol=1e-5 * float(right[name].abs().max()) + 1e-9)


@pytest.mark.parametrize("valid", [(True, False), (False, True), (True, True)])
def test_a_step_reports_the_intensity_of_valid_samples(valid):
    """A mean over them, however they are cut into micro-batches; what a dropped prompt attends to is nothing to log."""
    m, batch = small("tiny-emu3"), batch_of(model.PRESETS["tiny-emu3"], "gen", valid=valid)
    found = train.metrics_of(train.accumulate(m, [batch, batch], TARGETS, {}, backward=False))["gen"]
    with torch.no_grad():
        expected = m(batch).intensity[torch.tensor(valid)]
    torch.testing.assert_close(found["intensity"], expected.mean(0))
    assert found["aia"] == pytest.approx(aia.loss(expected, *TARGETS["gen"], torch.ones(len(expected)).bool()).item())


class Operations(TorchDispatchMode):
    """Notes the operations that run inside, and of indexing by a mask that it is."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) and any(
            x is not None and x.dtype is torch.bool for x in args[1])
        self.names.append(name + " by a mask" * masks)
        return function(*args, **(kwargs or {}))


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "masked_scatter_backward", "is_nonzero",
         "equal", "_unique2", "unique_dim", "index by a mask", "index_put by a mask", "index_put_ by a mask",
         "_index_put_impl_ by a mask"}


@pytest.mark.parametrize("name, task", [
    ("tiny-emu3", "gen"), ("tiny-janus", "und"), ("tiny-janus", "gen"), ("tiny-unifork", "und"),
    ("tiny-mixed", "mixed"), ("tiny-mixed-janus", "mixed"), ("tiny-mixed-fork", "mixed")])
@pytest.mark.parametrize("attention", ["fused", "lse"])
def test_a_micro_batch_never_waits_for_the_device(attention, name, task, monkeypatch):
    """No operation of forward and backward needs a number on the host; of a step only metrics_of asks for some."""
    m = small(name, attention=attention, **({"layers": 3} if "fork" in name else {}))
    targets = {one: aia.targets(m.config.layers, one) for one in aia.TASKS}
    batches = [batch_of(m.config, task, valid=(True, False))] * 2
    total = train.counts(batches)
    monkeypatch.setattr(train, "counts", lambda batches: total)                 # from batches that are on the CPU
    assert try_lse("cpu", torch.float32, m.config.heads, 1, m.config.head_dim)[0]
    for weights in ({"gen": 5.0, "und": 5.0}, None):
        with Operations() as seen:
            sums = train.accumulate(m, batches, targets, weights)
            norm = torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.grad is not None], 1.0)
        assert not WAITS & {*seen.names}, WAITS & {*seen.names}
        assert any("backward" in name for name in seen.names) and len(seen.names) > 200
    with Operations() as seen:
        train.metrics_of(sums, norm)
    assert "_local_scalar_dense" in seen.names      # the names above are those that this version uses
    if attention == "fused":                        # on meta tensors, which have no numbers, copies to the CPU fail too
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
        train.accumulate(m.to("meta"), batches, {one: [x.to("meta") for x in pair] for one, pair in targets.items()},
                         {"gen": 5.0, "und": 5.0})
        with pytest.raises((NotImplementedError, RuntimeError)):
            m.lm.norm.weight.cpu()


@pytest.mark.parametrize("attention", ["fused", "lse"])
def test_compiled_layers_are_one_graph_at_any_length(attention):
    """Six lengths, with and without AIA: `fullgraph` refuses a break, and after the second length none is compiled
    anew."""
    torch.compiler.reset()
    m, plain = (small("tiny-emu3", layers=1, attention=attention) for _ in range(2))
    assert try_lse("cpu", torch.float32, m.config.heads, 1, m.config.head_dim)[0]
    made = []
    for layer in m.lm.layers:
        layer.compile(backend=lambda graph, inputs: made.append(len(made)) or graph, fullgraph=True)
    for length in (40, 31, 52, 34, 47, 60):
        for intensity in (False, True):
            batch = batch_of(m.config, "gen", tokens=length)
            got, expected = m(batch, intensity=intensity), plain(batch, intensity=intensity)
            torch.testing.assert_close(got.ntp, expected.ntp)
            if intensity:
                torch.testing.assert_close(got.intensity, expected.intensity)
                (got.ntp + got.intensity.sum()).backward()
    assert len(made) == 4                           # one length, then any length; each without AIA and with it


# ---------------------------------------------------------------------------------------------------------------------
# What must be exact, and what may be half as wide
# ---------------------------------------------------------------------------------------------------------------------
def test_a_model_switches_off_what_rounds_convolutions():
    """cuDNN rounds the inputs of convolutions to 10 bits unless it is told not to, and codes flip."""
    torch.backends.cudnn.allow_tf32 = True
    small("tiny-emu3")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name, task", [("tiny-emu3", "gen"), ("tiny-janus", "und")])
def test_under_autocast_attention_gets_activations_of_one_type(name, task):
    """Rotations in float32 would widen q and k again, and a kernel would read twice as much."""
    m, seen = small(name), []
    inner = m.lm.layers[0].self_attn.attend
    m.lm.layers[0].self_attn.attend = lambda q, k, v, *more: (seen.extend([q.dtype, k.dtype, v.dtype]),
                                                              inner(q, k, v, *more))[1]
    with torch.autocast("cpu", torch.bfloat16):
        m(batch_of(m.config, task, valid=(True, False)))
    assert seen == [torch.bfloat16] * 3


def test_a_frozen_siglip_beside_half_precision_computes_in_it():
    """Sharded weights have a precision of their own and no autocast; SigLIP, whole and in float32, would be slow."""
    m, seen = small("tiny-janus"), []
    m.vision.blocks[0].qkv.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    batch = batch_of(m.config, "und")
    exact = m.see(batch.pixels)
    m.aligner.to(torch.bfloat16)
    half = m.see(batch.pixels)
    assert seen == [torch.float32, torch.bfloat16] and half.dtype == torch.bfloat16
    assert off(half.detach(), exact.detach()) < 0.05


def test_lora_begins_the_same_under_any_default_device():
    """Its numbers come from a generator of the CPU, also where torch.device says that tensors are made elsewhere."""
    m = small("tiny-emu3", lora_rank=4)
    expected = model.fresh_lora(m)
    with torch.device("meta"):
        got = model.fresh_lora(m)
    assert all(torch.equal(got[name], value) for name, value in expected.items()) and len(got) == 2 * 2 * 7


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("holes, pictures", [(15, 1), (0, 1), (16, 0), (16, 2)])
def test_placeholders_must_match_the_pictures(m, holes, pictures, device):
    """A picture of 4 x 4 tokens needs 16 of them, else codes would land on the wrong places."""
    ids = ids_of([words(2) + [m.ids["placeholder"]] * holes], m)
    with pytest.raises(InputError, match=f"^{holes} placeholders"):
        m.logits(ids, torch.randn(pictures, 3, 16, 16).to(device) if pictures else None)


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


