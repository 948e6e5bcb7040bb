"""Claims about parts/kernels.py: what is faster or leaner is also the same."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import aia
import data
import model
import train
from parts.kernels import (
    CHUNK,
    ChunkedCrossEntropy,
    Recorded,
    attention_and_mass,
    chunked_cross_entropy,
    indices,
    kernel_for,
    try_lse,
)

TARGETS = {task: aia.targets(2, task) for task in aia.TASKS}


def head(n, words, width, dtype, device="cpu", bias=True):
    """x, W, b with gradients, and targets."""
    g = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=g).to(device, dtype).requires_grad_()
                    for shape in ((n, width), (words, width), (words,)))
    return x, weight, b if bias else None, torch.randint(words, (n,), generator=g).to(device)


@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_in_chunks_is_the_cross_entropy_in_float64(bias, monkeypatch, device):
    """Three chunks, the last one short: value and every gradient to the last digits."""
    monkeypatch.setitem(CHUNK, device.type, 8)
    x, weight, b, target = head(20, 30, 5, torch.float64, device, bias)
    inputs = [part for part in (x, weight, b) if part is not None]
    expected = F.cross_entropy(F.linear(x, weight, b), target, reduction="sum")
    got = chunked_cross_entropy(x, weight, b, target)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    for mine, theirs in zip(torch.autograd.grad(0.3 * got, inputs), torch.autograd.grad(0.3 * expected, inputs),
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_the_loss_makes_only_gradients_that_are_asked_for():
    """A frozen head gets none, its sum is not even held; under no_grad nothing is made although weights could learn."""
    x, weight, b, target = head(20, 30, 5, torch.float32)
    frozen = chunked_cross_entropy(x, weight.detach(), b.detach(), target)
    assert [grad is None for grad in frozen.grad_fn.grads] == [False, True, True]
    inputs_frozen = chunked_cross_entropy(x.detach(), weight, None, target)
    assert [grad is None for grad in inputs_frozen.grad_fn.grads] == [True, False, True]
    made, forward = [], ChunkedCrossEntropy.forward
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkedCrossEntropy, "forward",
                      staticmethod(lambda ctx, *args: (forward(ctx, *args), made.extend(ctx.grads))[0]))
        loss = chunked_cross_entropy(x, weight, b, target)
    assert made == [None] * 3 and not loss.requires_grad
    torch.testing.assert_close(loss, frozen.detach())


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32(monkeypatch):
    """1,000 chunks of one token that all pull the same word: a sum in bfloat16 would stop growing at 256."""
    monkeypatch.setitem(CHUNK, "cpu", 1)
    x = torch.ones(1000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(x, weight, None, torch.zeros(1000, dtype=torch.long)).backward()
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad[:, 0].float(), torch.tensor([-500.0, 500.0]), rtol=4e-3, atol=0)


def test_the_scale_of_a_bfloat16_loss_is_not_rounded():
    """One over the label tokens is no power of two: rounded to bfloat16, every gradient below would be off alike."""
    x, weight, b, target = head(40, 30, 5, torch.bfloat16)
    one, third = (torch.autograd.grad(scale * chunked_cross_entropy(x, weight, b, target), x)[0].float()
                  for scale in (1.0, 1 / 3))
    assert float((one * third).sum() / (one * one).sum()) == pytest.approx(1 / 3, rel=1e-3)


def test_the_loss_in_chunks_cannot_be_differentiated_twice():
    """Its gradients are scaled in place, so a second backward pass would be wrong: it is refused."""
    x, weight, b, target = head(4, 6, 3, torch.float32)
    loss = chunked_cross_entropy(x, weight, b, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Attention mass from log-sum-exp
# ---------------------------------------------------------------------------------------------------------------------
T, C, P, W = 24, data.TEXT, data.PADDING, data.ANSWER
# Roles of three samples: of generation with prompts of different length, the last with an empty prompt; of
# understanding with two turns and padding on the right, and the last without a picture.
ROLES = {"gen": [[C] * 6 + [data.IMAGE] * 18, [C] * 3 + [data.IMAGE] * 15 + [P] * 6, [data.IMAGE] * 20 + [P] * 4],
         "und": [[C] * 2 + [data.IMAGE] * 8 + [C] * 3 + [W] * 4 + [C] * 2 + [W] * 5,
                 [data.IMAGE] * 4 + [W] * 5 + [data.IMAGE] * 4 + [C] * 2 + [W] * 3 + [P] * 6, [C] * 9 + [W] * 15]}


def heads(groups, dtype, device, tokens=T, samples=3):
    """q of 4 heads, k and v of some groups, two random directions, all drawn in float32."""
    if not try_lse(device, dtype, 4, groups, 8, T)[0]:
        pytest.skip(f"{device} has no kernel with a log-sum-exp for {dtype}")
    g = torch.Generator().manual_seed(0)
    *inputs, w = (torch.randn(samples, n, tokens, 8, generator=g).to(device, dtype) for n in (4, groups, groups, 4))
    return [x.requires_grad_() for x in inputs], w, torch.randn(samples, 4, tokens, generator=g).to(device, dtype)


def result_of(attend, inputs, w, u, condition, queries, rectangle=None):
    """Out, mass of the queries, and gradients of a random function of both."""
    out, mass = attend(*inputs, None, condition, rectangle)
    mass = mass * queries[:, None]
    loss = (out * w).to(torch.float64).sum() + 3 * (mass * u).to(torch.float64).sum()
    return [out.detach(), mass.detach(), *torch.autograd.grad(loss, inputs)]


def off(got, expected):
    """Relative distance of two tensors."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("task", aia.TASKS)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_mass_from_log_sum_exp_is_that_of_the_written_out_softmax(dtype, close, groups, task, device):
    """Out, mass and gradients in each precision, with shared heads, several turns, padding, and samples without a key;
    in bfloat16 no further off than the flag channel by half."""
    condition, queries = data.spans(torch.tensor(ROLES[task], device=device), task)
    rectangle = indices(queries), indices(condition)
    assert not condition[2].any() and queries[2].any()
    inputs, w, u = heads(groups, dtype, device)
    exact = result_of(model.attend_explicit, [x.detach().double().requires_grad_() for x in inputs], w.double(),
                      u.double(), condition, queries)
    channel = result_of(model.attend_fused, inputs, w, u, condition, queries)
    for name, got, right, rival in zip(("out", "mass", "q", "k", "v"), result_of(
            model.attend_lse, inputs, w, u, condition, queries, rectangle), exact, channel, strict=True):
        assert got.isfinite().all() and off(got, right) < max(close, 1.5 * off(rival, right)), (name, off(got, right))


def test_rows_that_do_not_count_and_rows_without_a_key_have_no_mass(device):
    """Keys after a row do not count for it; where none is before it, mass and gradients are 0 and not NaN."""
    inputs, _, _ = heads(2, torch.float32, device, samples=1)
    place = torch.arange(T, device=device)[None]
    condition, queries = (place >= 10) & (place < 14), torch.tensor([[5, 9, 12, 20]], device=device)
    out, mass = attention_and_mass(*inputs, queries, indices(condition))
    expected = model.attend_explicit(*inputs, None, condition)[1]
    torch.testing.assert_close(mass[:, :, [12, 20]], expected[:, :, [12, 20]])
    assert mass[:, :, 12:].count_nonzero() == 2 * 4 == mass.count_nonzero()
    for grad in torch.autograd.grad(mass[:, :, [5, 9]].sum(), inputs):
        assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_gradient_of_mass_alone_is_exact(dtype, close, device):
    """Nobody uses the rows' outputs, or hardly: a faint dO to shift O along is made, and leaves no trace."""
    condition, queries = data.spans(torch.tensor(ROLES["gen"], device=device), "gen")
    rectangle = indices(queries), indices(condition)
    inputs, w, u = heads(2, dtype, device)
    u = u * queries[:, None]
    mass = model.attend_explicit(*inputs, None, condition)[1]
    right = torch.autograd.grad((mass * u).sum(), inputs, allow_unused=True)
    for share in (0.0, 1e-25):
        out, mass = attention_and_mass(*inputs, *rectangle)
        got = torch.autograd.grad((mass * u).sum() + share * (out * w).sum(), inputs)
        assert off(got[0], right[0]) < close and off(got[1], right[1]) < close
        assert right[2] is None and got[2].abs().max() < 1e-15


def test_the_derivative_of_attention_with_mass_passes_gradcheck():
    """Against differences of the function itself, in float64."""
    inputs, _, _ = heads(2, torch.float64, "cpu", tokens=7, samples=2)
    rows, keys = torch.tensor([[3, 4, 6], [2, 5, -1]]), torch.tensor([[0, 1], [1, -1]])
    assert torch.autograd.gradcheck(lambda *x: attention_and_mass(*x, rows, keys), inputs)


@pytest.mark.parametrize("rows, keys", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_rectangle_has_no_mass(rows, keys, device):
    """A micro-batch of nothing but text has no key, one of one-word drawings no query: attention goes on as it is."""
    inputs, w, _ = heads(2, torch.float32, device)
    index = torch.arange(3, device=device).expand(3, -1)
    out, mass = attention_and_mass(*inputs, index[:, :rows], index[:, :keys])
    expected = model.attend_fused(*inputs)[0]
    assert not mass.any()
    for got, right in zip(torch.autograd.grad((out * w).sum() + mass.sum(), inputs),
                          torch.autograd.grad((expected * w).sum(), inputs), strict=True):
        torch.testing.assert_close(got, right)


def test_indices_list_what_a_mask_marks():
    """In order, as many as the fullest row has, -1 behind; a mask of nothing has none."""
    mask = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    assert indices(mask).tolist() == [[1, 3, 4], [4, -1, -1], [-1, -1, -1]]
    assert indices(mask[2:]).shape == (1, 0)


def batch_of(m, task, tokens=40):
    """Two samples of a task, one padded by five, that fit a tiny model."""
    place, g = torch.arange(tokens).expand(2, -1), torch.Generator().manual_seed(3)
    ids, real = torch.randint(5, 400, (2, tokens), generator=g), place < torch.tensor([[tokens], [tokens - 5]])
    if m.config.kind == "emu3":
        condition, queries = place < 10, (place >= 10) & (place < tokens - 1)
        labels = torch.where((place >= 10) & real, ids, -100)
        return data.Batch(task, ids, labels, condition, queries & real, torch.ones(2).bool(),
                          lengths=(tokens, tokens - 5))
    n = 4 if task == "und" else 16
    picture = (place >= 8) & (place < 8 + n)
    ids = torch.where(picture, m.ids["placeholder"], ids)
    if task == "und":
        queries, labels = (place >= 8 + n) & real, torch.where((place > 8 + n) & real, ids, -100)
        return data.Batch(task, ids, labels, picture, queries, torch.tensor([True, False]),
                          torch.rand(2, 3, 16, 16, generator=g), lengths=(tokens, tokens - 5))
    codes = torch.randint(m.config.codebook, (2, 16), generator=g)
    labels = torch.full_like(ids, -100).masked_scatter(picture, codes)
    return data.Batch(task, ids, labels, place < 8, picture, torch.tensor([True, False]), codes=codes,
                      lengths=(tokens,) * 2)


def tiny(name, **changes):
    torch.manual_seed(0)
    return model.build(name, **{"layers": 2, "kv_heads": 1, **changes}).train()


@pytest.mark.parametrize("name, task", [("tiny-emu3", "gen"), ("tiny-janus", "und"), ("tiny-janus", "gen")])
@pytest.mark.parametrize("recompute, lora", [(False, 0), (True, 0), (False, 4), (True, 4)])
def test_a_model_learns_the_same_by_log_sum_exp(name, task, recompute, lora, device):
    """Losses, intensities and all gradients of a step with AIA, recomputed layers and LoRA among them."""
    results = []
    for attention in ("explicit", "lse"):
        m = tiny(name, attention=attention, lora_rank=lora, checkpoint_activations=recompute).to(device)
        model.settle_attention(m, device, torch.float32)
        if attention == "lse" and not kernel_for(m.lm.norm.weight):
            pytest.skip(f"{device} has no kernel with a log-sum-exp")
        train.freeze(m, train.TUNE)
        targets = {task: tuple(x.to(device) for x in TARGETS[task])}
        sums = train.accumulate(m, [batch_of(m, task)], targets, {task: 30.0})
        results.append((train.metrics_of(sums)[task], {name: p.grad for name, p in m.named_parameters()
                                                       if p.grad is not None}))
    (expected, right), (found, got) = results
    assert got.keys() == right.keys() and (not lora or all("lora" in name for name in got))
    assert found["ntp"] == pytest.approx(expected["ntp"], rel=1e-5)
    assert found["aia"] == pytest.approx(expected["aia"], rel=1e-4)
    torch.testing.assert_close(found["intensity"], expected["intensity"], rtol=1e-4, atol=1e-6)
    for name, grad in got.items():
        torch.testing.assert_close(grad, right[name], rtol=1e-3, atol=1e-5 * float(right[name].abs().max()) + 1e-9)


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


@pytest.mark.parametrize("name, task", [("tiny-emu3", "gen"), ("tiny-janus", "und"), ("tiny-janus", "gen"),
                                        ("tiny-unifork", "und")])
@pytest.mark.parametrize("attention", ["fused", "lse"])
def test_a_micro_batch_never_waits_for_the_device(attention, name, task, monkeypatch):
    """No operation of forward and backward needs a number on the host; of a step only metrics_of asks for some."""
    m = tiny(name, attention=attention, **({"layers": 3} if name == "tiny-unifork" else {}))
    targets = {task: aia.targets(m.config.layers, task)}
    batches = [batch_of(m, task)] * 2
    total = train.counts(batches)
    monkeypatch.setattr(train, "counts", lambda batches: total)                 # from batches that are on the CPU
    assert try_lse("cpu", torch.float32, m.config.heads, 1, m.config.head_dim)[0]
    for weights in ({task: 5.0}, None):
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
        train.accumulate(m.to("meta"), batches, {task: [x.to("meta") for x in targets[task]]}, {task: 5.0})
        with pytest.raises((NotImplementedError, RuntimeError)):
            m.lm.norm.weight.cpu()


@pytest.mark.parametrize("attention", ["fused", "lse"])
def test_compiled_layers_are_one_graph_at_any_length(attention):
    """Six lengths, with and without AIA: `fullgraph` refuses a break, and after the second length none is compiled
    anew."""
    torch.compiler.reset()
    m, plain = (tiny("tiny-emu3", layers=1, attention=attention) for _ in range(2))
    assert try_lse("cpu", torch.float32, m.config.heads, 1, m.config.head_dim)[0]
    made = []
    for layer in m.lm.layers:
        layer.compile(backend=lambda graph, inputs: made.append(len(made)) or graph, fullgraph=True)
    for length in (40, 31, 52, 28, 47, 60):
        for intensity in (False, True):
            batch = batch_of(m, "gen", length)
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
    tiny("tiny-emu3")
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name, task", [("tiny-emu3", "gen"), ("tiny-janus", "und")])
def test_under_autocast_attention_gets_activations_of_one_type(name, task):
    """Rotations in float32 would widen q and k again, and a kernel would read twice as much."""
    m, seen = tiny(name), []
    inner = m.lm.layers[0].self_attn.attend
    m.lm.layers[0].self_attn.attend = lambda q, k, v, *more: (seen.extend([q.dtype, k.dtype, v.dtype]),
                                                              inner(q, k, v, *more))[1]
    with torch.autocast("cpu", torch.bfloat16):
        m(batch_of(m, task))
    assert seen == [torch.bfloat16] * 3


def test_a_frozen_siglip_beside_half_precision_computes_in_it():
    """Sharded weights have a precision of their own and no autocast; SigLIP, whole and in float32, would be slow."""
    m, seen = tiny("tiny-janus"), []
    m.vision.blocks[0].qkv.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    batch = batch_of(m, "und")
    exact = m.see(batch.pixels)
    m.aligner.to(torch.bfloat16)
    half = m.see(batch.pixels)
    assert seen == [torch.float32, torch.bfloat16] and half.dtype == torch.bfloat16
    assert off(half.detach(), exact.detach()) < 0.05


def test_lora_begins_the_same_under_any_default_device():
    """Its numbers come from a generator of the CPU, also where torch.device says that tensors are made elsewhere."""
    m = tiny("tiny-emu3", lora_rank=4)
    expected = model.fresh_lora(m)
    with torch.device("meta"):
        got = model.fresh_lora(m)
    assert all(torch.equal(got[name], value) for name, value in expected.items()) and len(got) == 2 * 2 * 7


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny-emu3", "tiny-janus"])
def test_a_step_over_all_columns_draws_and_says_the_same(name, monkeypatch, capsys):
    """What a GPU replays reads the whole cache under a mask; recorded here it fails, is told, and goes on plainly."""
    m = tiny(name).eval()
    ids, mask = torch.randint(5, 400, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    ids[:, 0], ids[:, -1] = m.ids["bos"], m.ids["boi"]
    mask[1, :4] = False                             # padding in front of one
    away = torch.randint(5, 400, (1, 9)) if name == "tiny-emu3" else None

    def work():
        g = torch.Generator().manual_seed(0)
        return (m.generate_images(ids, mask, negative=away, guidance=2.0, top_k=0, generator=g),
                m.generate_text(ids, mask=mask, max_new_tokens=20))
    before = work()
    assert not capsys.readouterr().err
    monkeypatch.setattr(model, "REPLAYED", ("cpu",))
    monkeypatch.setattr(model, "REPLAY_FROM", 1)
    monkeypatch.setattr(model, "ASK_EVERY", 7)
    after = work()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "cannot be recorded" in capsys.readouterr().err


class Graph:
    """Stands in for a CUDA graph: what runs while it is recorded is the step, and replaying runs it into its output."""

    def replay(self):
        recorded, (given, out) = self.step, self.ends
        out.copy_(recorded(given))


@pytest.mark.parametrize("name", ["tiny-emu3", "tiny-janus"])
def test_a_replayed_step_draws_and_says_the_same(name, monkeypatch, capsys):
    """All of the bookkeeping around a recording, with a stand-in for what only CUDA has: places are put back after the
    two runs that warm up and the one that is recorded, and each shape of a step has a graph of its own."""
    m, graphs = tiny(name).eval(), []
    ids = torch.randint(5, 400, (2, 12), generator=torch.Generator().manual_seed(5))
    away = torch.randint(5, 400, (1, 9)) if name == "tiny-emu3" else None

    def work():
        g = torch.Generator().manual_seed(0)
        return (m.generate_images(ids, negative=away, guidance=2.0, top_k=0, generator=g),
                m.generate_text(ids, max_new_tokens=20))
    before = work()
    record = Recorded.record

    def recorded(self, x):
        graph, given, out = record(self, x)
        graph.step, graph.ends = self.step, (given, out)
        graphs.append(tuple(x.shape))
        return graph, given, out
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    for attribute, value in {"Stream": stream, "current_stream": stream, "CUDAGraph": Graph,
                             "stream": lambda aside: contextlib.nullcontext(),
                             "graph": lambda graph: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, attribute, value)
    monkeypatch.setattr(Recorded, "record", recorded)
    monkeypatch.setattr(model, "REPLAYED", ("cpu",))
    monkeypatch.setattr(model, "REPLAY_FROM", 1)
    assert all(torch.equal(a, b) for a, b in zip(work(), before, strict=True)) and not capsys.readouterr().err
    steps = [(4, 1, 96), (4, 2, 96)] if name == "tiny-emu3" else [(4, 1, 96)]
    assert sorted(graphs[:len(steps)]) == steps and graphs[len(steps):] == [(2, 1, 96)]


@pytest.mark.parametrize("whole", [False, True], ids=["sliced", "all columns"])
def test_a_row_that_stands_still_goes_on_where_it_was(whole):
    """Rows move in turn, one column a step; each gives what it gives alone, whatever the others do meanwhile."""
    m = tiny("tiny-emu3").eval()
    x, mask = torch.randn(3, 10, m.config.width), torch.ones(3, 4, dtype=torch.bool)
    mask[2, :2] = False
    moves = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 1, 0], [0, 1, 0, 1, 1, 1]]).bool()
    with torch.no_grad():
        alone = [m.lm(x[b:b + 1, 4 - int(mask[b].sum()):4 + int(moves[b].sum())])[0][0, -int(moves[b].sum()):]
                 for b in range(3)]
        cache, taken, found = model.Cache(m.lm, mask, 6), [4] * 3, [[], [], []]
        m.lm(x[:, :4], cache=cache)
        if whole:
            cache.recorded(None)
        for moving in moves.T:
            now = torch.stack([x[b, min(taken[b], 9)] for b in range(3)])[:, None]
            out = m.lm(now, cache=cache, moving=moving)[0]
            for b in range(3):
                if moving[b]:
                    found[b].append(out[b, 0])
                    taken[b] += 1
    for mine, right in zip(found, alone, strict=True):
        torch.testing.assert_close(torch.stack(mine), right, rtol=1e-4, atol=1e-5)


def test_codes_are_drawn_as_by_torch_multinomial():
    """The same numbers from the same generator, without its look at the input."""
    logits = torch.randn(60, 50, generator=torch.Generator().manual_seed(1)) * 3
    got = model.sample(logits, 0.8, 20, 0.9, torch.Generator().manual_seed(7))
    probability = (logits / 0.8).masked_fill(logits < logits.topk(20).values[:, -1:], -torch.inf).softmax(-1)
    ordered, order = probability.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= 0.9, 0.0)
    probability = torch.zeros_like(probability).scatter(-1, order, ordered)
    assert torch.equal(got, torch.multinomial(probability, 1, generator=torch.Generator().manual_seed(7))[:, 0])
