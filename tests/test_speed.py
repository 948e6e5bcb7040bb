"""Claims about the benchmark of training steps (lab/speed.py)."""

from dataclasses import replace

import pytest
import torch
from made import objective

import model
from lab.speed import STEP_VARIANTS, Step, step_flops


@pytest.mark.parametrize("variant", STEP_VARIANTS)
def test_benchmarked_steps_do_the_same_work(variant):
    """All manners of one training step have the next-token loss and the AIA of the explicit one, so that seconds and
    bytes compare; only plain next-token prediction measures no attention."""
    config = replace(model.TINY_EMU3, layers=2, vocab=60, width=32, ffn=32, heads=2, kv_heads=2, head_dim=16)
    step, right = (Step(name, 40, config) for name in (variant, "explicit"))
    for layer in right.m.lm.layers:
        layer.self_attn.attend = model.attend_explicit
    step.m.load_state_dict(right.m.state_dict())
    expected = objective(right.m(step.batch), step.batch, 0.0 if variant in ("plain", "mixed") else 5.0)
    gradients = torch.autograd.grad(expected, right.m.lm.layers[0].self_attn.q_proj.weight)[0]
    found, moved = [], step.m.lm.layers[0].self_attn.q_proj.weight
    moved.register_post_accumulate_grad_hook(lambda p: found.append(p.grad.clone()))
    step()
    torch.testing.assert_close(found[0], gradients, rtol=1e-3, atol=1e-6)


def test_flops_of_a_step_are_those_of_its_matrices():
    """Six for each weight and token, and half of 12 L T^2 C for causal attention; embeddings are looked up, not
    multiplied."""
    config = replace(model.TINY_EMU3, layers=3, width=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=100)
    weights = 3 * (4 * 64 * 64 + 3 * 64 * 128) + 64 * 100
    assert step_flops(config, 10) == 6 * weights * 10 + 12 * 3 * 64 * 100 / 2
    m = model.from_config(config)
    assert weights == sum(p.numel() for name, p in m.named_parameters() if name.startswith(("lm.layers", "lm_head"))
                          and p.ndim == 2)
