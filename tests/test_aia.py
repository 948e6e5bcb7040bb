"""Claims about the method: intensity, targets, loss and weight (aia.py). "The paper" is arXiv 2511.22663."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import aia
import model
from parts.settings import InputError

ATTENDS = [model.attend_explicit, model.attend_fused]


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def stretches(length, *pairs, device="cpu"):
    """(1, length) bool, true from first to below last of each pair: a span in several pieces."""
    place = torch.arange(length, device=device)[None]
    return sum((first <= place) & (place < last) for first, last in pairs).bool()


# ---------------------------------------------------------------------------------------------------------------------
# Intensity
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attend", ATTENDS)
def test_uniform_attention_has_a_known_intensity(attend, device):
    """With equal scores token t spends 1/(t+1) on each visible token, 4 of which are the condition."""
    q = k = v = torch.zeros(1, 2, 12, 8, device=device)
    condition = torch.arange(12, device=device)[None] < 4
    expected = torch.tensor([4 / (t + 1) for t in range(4, 12)], device=device).mean()
    _, mass = attend(q, k, v, condition=condition)
    torch.testing.assert_close(aia.intensity(mass, ~condition), expected[None])


@pytest.mark.parametrize("attend", ATTENDS)
def test_intensity_is_that_of_the_stored_map(attend, device):
    """Eq. 1 on a map that is kept: mean over heads, mean over queries, sum over keys; spans may have holes."""
    q, k, v = torch.randn(3, 2, 3, 14, 8, generator=torch.Generator().manual_seed(0)).to(device).unbind()
    condition = stretches(14, (1, 4), (7, 9), device=device).repeat(2, 1)
    queries = torch.cat([stretches(14, (4, 6), (10, 13), device=device), stretches(14, (5, 6), device=device)])
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(14, 14, device=device).triu(1).bool(), -math.inf)
    attention = scores.softmax(-1)
    expected = torch.stack([a[:, asked][:, :, keys].mean(0).mean(0).sum()
                            for a, asked, keys in zip(attention, queries, condition, strict=True)])
    torch.testing.assert_close(aia.intensity(attend(q, k, v, condition=condition)[1], queries), expected)


def test_a_sample_without_queries_has_intensity_zero(device):
    """There is nothing to average, and 0/0 would poison the other samples of the batch."""
    queries = torch.tensor([[False] * 5, [True] * 5], device=device)
    assert aia.intensity(torch.ones(2, 3, 5, device=device), queries).tolist() == [0.0, 1.0]


def test_each_of_several_conditions_has_an_intensity_of_its_own_queries(device):
    """As if it were alone, also where one of them has no query in a sample."""
    mass, queries = random(2, 3, 4, 7).to(device), random(2, 3, 7, seed=1).to(device) < 0.5
    queries[1, 2] = False
    value = aia.intensity(mass, queries)
    alone = [aia.intensity(*one) for one in zip(mass, queries, strict=True)]
    torch.testing.assert_close(value, torch.stack(alone))
    assert value[1, 2] == 0 and value.count_nonzero() == 5


def test_the_mean_adds_no_bfloat16_error(device):
    """Equal masses average to just themselves in float32; the sum of 300 of them in bfloat16 would be rounded."""
    mass = torch.full((1, 3, 300), 0.1, dtype=torch.bfloat16, device=device)
    value = aia.intensity(mass, torch.ones(1, 300, dtype=torch.bool, device=device))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(mass[0, 0, 0].item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------------
# (Huber delta, target) of the stages, as the paper prints them.
PAIRS = {"gen": [(0.2, 0.4), (0.1, 0.4), (0.1, 0.4), (0.05, 0.2), (0.05, 0.2)],
         "und": [(0.05, 0.1), (0.05, 0.15), (0.05, 0.3), (0.05, 0.3), (0.05, 0.2)]}
# Layers of each stage. Table S4: 0-9, 10-19, 20-24, 25-30, above 30. Table S5: 0-9, 10-19, 20-24, 25-29, above 29 of
# 30 layers, which is none. The released code has one more layer in the second stage of understanding.
LAYERS = {("S4", "gen"): (10, 10, 5, 6, 1), ("S4", "und"): (10, 10, 5, 6, 1),
          ("S5", "gen"): (10, 10, 5, 5, 0), ("S5", "und"): (10, 10, 5, 5, 0),
          ("released", "gen"): (10, 10, 5, 5, 0), ("released", "und"): (10, 11, 4, 5, 0)}


def assert_stages(got, task, counts):
    delta, target = zip(*(pair for pair, n in zip(PAIRS[task], counts, strict=True) for _ in range(n)), strict=True)
    assert torch.equal(got[0], torch.tensor(target))
    assert torch.equal(got[1], torch.tensor(delta))


@pytest.mark.parametrize("table, task", LAYERS)
def test_printed_tables_are_reproduced_layer_by_layer(table, task):
    """Every layer has the delta and the target that the paper (or the released code) gives it."""
    counts = LAYERS[table, task]
    assert_stages(aia.targets(sum(counts), task, table), task, counts)


@pytest.mark.parametrize("task", aia.TASKS)
@pytest.mark.parametrize("last", [(3, 6, 8, 11), (4, 9, 11, 14, 15), (5, 11, 15, 18, 19), (6, 14, 18, 22, 23),
                                  (8, 16, 21, 26, 27), (8, 18, 22, 28, 29), (9, 19, 24, 30, 31)])
def test_depth_scales_table_s4_to_any_number_of_layers(last, task):
    """Stages end at the same relative depth, counted from the middle of a layer; 32 layers give Table S4 itself."""
    bounds = [-1, *last, *last[-1:] * (5 - len(last))]
    assert_stages(aia.targets(last[-1] + 1, task), task, [b - a for a, b in zip(bounds, bounds[1:], strict=False)])


@pytest.mark.parametrize("table, layers", [("S4", 30), ("S5", 32), ("released", 32)])
def test_printed_tables_refuse_another_depth(table, layers):
    """Their layer numbers mean nothing in a deeper or shallower model."""
    with pytest.raises(InputError, match=f"{table}.*{layers}"):
        aia.targets(layers, "gen", table)


@pytest.mark.parametrize("reference, expected", [
    ("hunyuan-image-3", (0.5, 0.4, 0.15)), ("simplear", (0.3, 0.2, 0.15)), ("qwen-image", (0.15, 0.25, 0.25)),
    ("flux", (0.05, 0.05, 0.1)),
])
def test_reference_models_are_staged_by_one_rule(reference, expected):
    """The mean of each of three stages, rounded to 0.05; at 32 layers the stages have 10, 15 and 7 of them."""
    target, delta = aia.targets(32, "gen", reference)
    torch.testing.assert_close(target, torch.tensor(expected).repeat_interleave(torch.tensor([10, 15, 7])))
    assert delta.unique_consecutive(return_counts=True)[1].tolist() == [10, 15, 7]
    assert torch.equal(aia.targets(32, "und", reference)[0], aia.targets(32, "und")[0])


def test_own_curves_are_staged_by_one_rule():
    """A layer belongs to the stage of its middle; the task decides the stages, and one without a layer is not there."""
    assert aia.stages_from_curve(aia.targets(32, "und")[0].tolist(), "und") == [
        (first / 32, delta, target) for first, delta, target in aia.STAGES["und"]]
    assert aia.stages_from_curve([0.31, 0.12], "und") == [(0.0, 0.05, 0.3), (0.625, 0.05, 0.1)]
    assert aia.stages_from_curve([0.31]) == [(0.0, 0.1, 0.3)]


def test_resampling_keeps_both_ends_and_is_linear_between():
    """Five layers read a curve of two points at 0, 1/4, 1/2, 3/4 and 1 of its depth."""
    assert aia.resample([0.0, 1.0], 5) == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("arguments, message", [
    (("draw",), "task 'draw'"), (("gen", "depth", "half"), "variant 'half'"), (("gen", "S6"), "depth, S4.* S6 "),
    (("gen", "depth", "raw", "nowhere.json"), "nowhere.json"),
])
def test_unknown_names_are_refused(arguments, message):
    """The message repeats the name, so that a slip of the pen is seen."""
    with pytest.raises(InputError, match=message):
        aia.targets(32, *arguments)


def test_own_targets_come_from_a_json_file(tmp_path):
    """Rows [first depth, delta, target]: four layers have their middles at 1/8, 3/8, 5/8 and 7/8."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"gen": [[0, 0.1, 0.5], [0.5, 0.2, 0.25]]}))
    target, delta = aia.targets(4, "gen", str(file))
    torch.testing.assert_close(target, torch.tensor([0.5, 0.5, 0.25, 0.25]))
    torch.testing.assert_close(delta, torch.tensor([0.1, 0.1, 0.2, 0.2]))
    with pytest.raises(InputError, match="mine.json.*'und'"):
        aia.targets(4, "und", str(file))


@pytest.mark.parametrize("content", [
    "{", "[]", '{"gen": 5}', '{"gen": []}', '{"gen": [[0, 0.1]]}', '{"gen": [[0, "x", 0.1]]}',
    '{"gen": [[0.5, 0.1, 0.4]]}', '{"gen": [[0, 0.1, 0.4], [1, 0.1, 0.4]]}',
    '{"gen": [[0, 0.1, 0.4], [0.5, 0.1, 0.4], [0.4, 0.1, 0.4]]}', '{"gen": [[0, 0.1, 0.4], [0, 0.1, 0.2]]}',
    '{"gen": [[0, 0, 0.4]]}', '{"gen": [[0, 0.1, 1.5]]}', '{"gen": [[0, 0.1, NaN]]}', '{"gen": [[0, NaN, 0.4]]}',
])
def test_malformed_targets_name_their_file(tmp_path, content):
    """Syntax, a missing task, wrong rows, depths that do not rise from 0 and values out of range are told in a line."""
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(InputError, match="mine.json"):
        aia.targets(4, "gen", str(file))


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------
def loss_of_curve(name, task, table, device, variant="full"):
    curve = torch.tensor(aia.reference_curve(("fig1", name, {"gen": "T2I", "und": "I2T"}[task])), device=device)
    valid = torch.tensor([True], device=device)
    return aia.loss(curve[None], *aia.targets(len(curve), task, table, variant), valid).item()


@pytest.mark.parametrize("name, table, variant, gen, und", [
    ("emu3", "S4", "full", 0.0301, 0.0058), ("janus_pro", "S5", "full", 0.0342, 0.0034),
    ("janus_pro", "S5", "raw", 0.0312, 0.00145), ("janus_pro", "S5", "no-huber", 0.0556, 0.0062),
])
def test_digitised_curves_have_the_documented_loss(name, table, variant, gen, und, device):
    """The curves of Fig. 1 without AIA against the targets of the paper and of the rows of its Table 3."""
    got = [loss_of_curve(name, task, table, device, variant) for task in aia.TASKS]
    assert got == pytest.approx([gen, und], abs=5e-5, rel=0)


def test_loss_is_the_huber_loss_averaged_over_layers_and_valid_samples(device):
    """PyTorch's huber_loss has the same form (smooth_l1_loss is it divided by delta), taken here one by one."""
    share, target, delta = (x.to(device) for x in (
        random(5, 4), random(4, seed=1), torch.tensor([0.2, 0.05, 0.4, math.inf])))
    valid = torch.tensor([True, False, True, True, False], device=device)
    terms = [F.huber_loss(share[b, i], target[i], delta=min(delta[i].item(), 1e9)) for b in (0, 2, 3) for i in range(4)]
    torch.testing.assert_close(aia.loss(share, target, delta, valid), torch.stack(terms).mean())


def test_loss_is_that_of_the_released_code_where_all_samples_count(device):
    """The authors keep the maps, add a Huber term per sample and layer, and divide by layers times batch."""
    batch, layers = 3, 30
    queries, keys = stretches(16, (9, 16), device=device), stretches(16, (0, 6), device=device)
    maps = torch.randn(layers, batch, 2, 16, 16, generator=torch.Generator().manual_seed(0)).to(device).softmax(-1)
    target, delta = aia.targets(layers, "und", "released")
    total = 0.0
    for layer in range(layers):
        for b in range(batch):
            window = maps[layer, b][:, 9:16, 0:6]                               # (H, Q, K)
            distance = abs(window.float().sum(-1).mean(-1).mean().item() - target[layer].item())
            near = distance <= delta[layer]
            total += distance**2 / 2 if near else delta[layer].item() * (distance - delta[layer].item() / 2)
    mass = (maps * keys).sum(-1)                                                # (L, B, H, T)
    ours = torch.stack([aia.intensity(m, queries.expand(batch, -1)) for m in mass], 1)
    value = aia.loss(ours, target, delta, torch.ones(batch, dtype=torch.bool, device=device))
    assert value.item() == pytest.approx(total / (layers * batch), rel=1e-5)


def test_invalid_samples_add_exactly_nothing(device):
    """A dropped prompt has no key to look at: same loss without it, and a gradient of exactly zero."""
    share, (target, delta) = random(4, 32).to(device).requires_grad_(), aia.targets(32, "gen")
    valid = torch.tensor([True, False, True, False], device=device)
    value = aia.loss(share, target, delta, valid)
    value.backward()
    assert torch.equal(value, aia.loss(share[valid], target, delta, valid[valid]))
    assert torch.count_nonzero(share.grad[~valid]) == 0
    assert torch.count_nonzero(share.grad[valid]) > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_valid_sample_gives_zero_and_no_nan(reduction, device):
    """A micro-batch of dropped prompts only must not poison the step."""
    share, (target, delta) = random(2, 32).to(device).requires_grad_(), aia.targets(32, "gen")
    value = aia.loss(share, target, delta, torch.zeros(2, dtype=torch.bool, device=device), reduction)
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(share.grad, torch.zeros_like(share))


def test_pull_is_delta_beyond_delta_and_the_error_within(device):
    """The derivative of the Huber term, divided here by 4 layers and 1 sample; above the target it pulls down."""
    share = torch.tensor([[0.9, 0.0, 0.45, 0.31]], device=device, requires_grad=True)
    target, delta = torch.tensor([0.4, 0.4, 0.4, 0.3]), torch.tensor([0.2, 0.1, 0.1, 0.05])
    aia.loss(share, target, delta, torch.tensor([True], device=device)).backward()
    torch.testing.assert_close(share.grad * 4, torch.tensor([[0.2, -0.1, 0.05, 0.01]], device=device))


def test_without_huber_the_pull_is_the_error(device):
    """delta is infinite then: an infinity in a branch that is not taken would still make the gradient NaN."""
    share = torch.tensor([[0.9, 0.0, 0.45, 0.31]], device=device, requires_grad=True)
    target, delta = aia.targets(4, "gen", variant="no-huber")
    aia.loss(share, target, delta, torch.tensor([True], device=device)).backward()
    torch.testing.assert_close(share.grad * 4, (share - target.to(device)).detach())


def test_sum_is_the_mean_times_the_valid_samples(device):
    """So micro-batches may be summed and divided once by the count of the whole step."""
    share, (target, delta) = random(6, 32).to(device), aia.targets(32, "und")
    valid = torch.tensor([True, False, True, True, False, True], device=device)
    parts = sum(aia.loss(share[i:i + 2], target, delta, valid[i:i + 2], "sum") for i in (0, 2, 4))
    torch.testing.assert_close(parts / 4, aia.loss(share, target, delta, valid))
    with pytest.raises(ValueError, match="average"):
        aia.loss(share, target, delta, valid, "average")


@pytest.mark.parametrize("attend", ATTENDS)
def test_gradient_of_attention_intensity_and_loss_is_exact(attend, device):
    """Finite differences in float64 from queries, keys and values to the attention's output and to the loss."""
    q, k, v = (torch.randn(1, heads, 6, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
               .to(device).requires_grad_() for seed, heads in enumerate((2, 1, 1)))
    condition, queries = stretches(6, (0, 2), (3, 4), device=device), stretches(6, (2, 3), (4, 6), device=device)
    target, delta, valid = torch.tensor([0.1, 0.9]), torch.tensor([0.05, 2.0]), torch.tensor([True], device=device)

    def out_and_loss(q, k, v):
        out, mass = attend(q, k, v, condition=condition)
        share = aia.intensity(mass, queries)
        # One layer in the linear zone and one in the quadratic zone.
        return out, aia.loss(torch.stack([share, share], 1), target, delta, valid, "sum")

    assert torch.autograd.gradcheck(out_and_loss, (q, k, v))


# ---------------------------------------------------------------------------------------------------------------------
# Weight
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task, ntp, expected", [("gen", 6.129, 3.6), ("und", 1.60, 9.3)])
def test_weight_makes_the_two_losses_stand_50_to_1(task, ntp, expected, device):
    """Janus-Pro's next-token losses at the start of Fig. 3 and its curves of Fig. 1; the released code has 5 and 10."""
    value = loss_of_curve("janus_pro", task, "S5", device)
    weight = aia.lambda_for_ratio(ntp, value)
    assert round(weight, 1) == expected
    assert ntp / (weight * value) == pytest.approx(50)


def test_a_loss_of_zero_needs_no_weight():
    """Nothing is left to align, and the ratio is not defined."""
    assert aia.lambda_for_ratio(2.0, 0.0) == 0.0
