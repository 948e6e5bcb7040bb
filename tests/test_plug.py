"""Claims about AIA in models of transformers, against the maps of eager attention (lab/plug.py)."""

import copy
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from made import close
from made_hf import IDS, ROLES, TEXT, hf, tiny
from torch.nn.functional import pad

import aia
import data
from lab.plug import attend_by_name, masses
from parts.settings import InputError

CONDITION, QUERIES = data.spans(ROLES, "und")
LABELS = torch.where(ROLES == data.ANSWER, IDS, -100)
README = Path(__file__).parent.parent / "lab/README.md"


def pair(kind, side=None):
    """Two samples, the second three tokens shorter and padded on a side -> eager model, another with the same weights,
    inputs with labels, condition and queries."""
    m, one = tiny(kind)
    for layer in m.get_decoder().layers:
        layer.self_attn.scaling *= 1.5                       # some models have a factor of their own

    def both(x, fill):
        cut, ends = (x[:, :-3], (3, 0) if side == "left" else (0, 3)) if side else (x, (0, 0))
        return torch.cat([x, pad(cut, ends, value=fill)])
    inputs = {name: both(x, 0) if x.shape == IDS.shape else torch.cat([x, x.flip(0)]) for name, x in one.items()}
    inputs |= {"attention_mask": both(torch.ones_like(IDS), 0), "labels": both(LABELS, -100)}
    return m, copy.deepcopy(m), inputs, *data.spans(both(ROLES, data.PADDING), "und")


def objective(out, found, queries):
    """Loss of the model and AIA, weighted so that neither hides the other -> loss, intensities (B, L)."""
    intensity = torch.stack([aia.intensity(mass, queries) for mass in found], 1)
    target, delta = aia.targets(len(found), "und")
    return out.loss + 40 * aia.loss(intensity, target, delta, queries.any(1)), intensity


def by_plug(m, inputs, condition, queries):
    """A training step's loss, intensities and gradients, in the manner of a training loop: backward comes outside."""
    with masses(m, condition) as found:
        out = m(**inputs)
    loss, intensity = objective(out, found, queries)
    loss.backward()
    assert len(found) == 3                                   # though layers may have been computed again
    return loss, intensity, {name: p.grad for name, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2_5_VL", "Qwen3VL", "Janus"])
def test_masses_and_their_gradients_are_those_of_eager_maps(kind, side, device):
    """Eq. 1 written out on output_attentions; the gradients of all weights, picture encoder included. Only the three
    layers of the language model count."""
    eager, m, inputs, condition, queries = pair(kind, side)
    eager, m, condition, queries = eager.to(device), m.to(device), condition.to(device), queries.to(device)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    out = eager(**inputs, output_attentions=True)
    maps = [(part * condition[:, None, None]).sum(-1) for part in out.attentions]           # (B, H, T)
    expected, intensity = objective(out, maps, queries)
    expected.backward()
    loss, got, gradients = by_plug(m, inputs, condition, queries)
    assert got.shape == (2, 3) and got.std() > 1e-3
    close(got, intensity), close(loss, expected)
    wanted = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys() and any("vis" in name for name in wanted) == (kind != "Llama")
    for name in wanted:         # 1e-2: where gradients are small, or zero like that of a key bias, rounding is left
        error = (gradients[name] - wanted[name]).abs().max()
        assert error < 1e-5 * max(wanted[name].abs().max(), 1e-2), name


@pytest.mark.parametrize("everywhere", [False, True], ids=["decoder", "everywhere"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2_5_VL", "Qwen3VL", "Janus"])
def test_outside_of_the_context_nothing_is_measured(kind, everywhere):
    """Logits inside and outside are those of eager attention; a picture encoder keeps its attention, unless it was
    given this name too: then it is not causal all the same, and not counted."""
    eager, m, inputs, condition, _ = pair(kind, "left")
    with torch.no_grad():
        expected = eager(**inputs).logits
        with masses(m, condition) as found:
            m.set_attn_implementation("aia") if everywhere else None
            inside = m(**inputs).logits
        kept = [*found]
        outside = m(**inputs).logits
    real = inputs["attention_mask"].bool()
    close(inside[real], expected[real]), close(outside[real], expected[real])
    assert len(found) == 3 and all(mine is before for mine, before in zip(found, kept, strict=True))
    named = {part.config._attn_implementation for part in m.modules() if isinstance(part, hf.PreTrainedModel)}
    assert named == ({"aia"} if everywhere or kind == "Llama" else {"aia", "eager"})


def test_no_map_is_kept():
    """Nothing that waits for the backward pass is T x T, while eager attention keeps such maps; shared heads are not
    repeated."""
    ids, saved = torch.arange(40)[None], []

    def kept(call):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
            call()
        return sum(shape[-2:] == (40, 40) for shape in saved)
    m = tiny("Llama")[0]
    assert kept(lambda: m(ids)) > 0
    with masses(m, ids < 9):
        assert kept(lambda: m(ids)) == 0 and (1, 2, 40, 16) in saved


@pytest.mark.parametrize("kind", ["Llama", "Qwen3VL"])
def test_layers_that_are_computed_again_count_once(kind):
    """Gradient checkpointing, its backward pass outside of the context: the same masses and gradients as without."""
    _, m, inputs, condition, queries = pair(kind, "right")
    _, expected, wanted = by_plug(copy.deepcopy(m).train(), inputs, condition, queries)
    m.train().activation_checkpointing_enable({"use_reentrant": False})
    calls, layer = [], m.get_decoder().layers[0].self_attn
    layer.register_forward_pre_hook(lambda module, args: calls.append(module))
    _, got, gradients = by_plug(m, inputs, condition, queries)
    assert len(calls) == 2 and torch.equal(got, expected) and gradients.keys() == wanted.keys()
    for name in wanted:
        close(gradients[name], wanted[name])


def test_each_call_begins_anew():
    """Two calls in one context, as with accumulated gradients: the list is that of the last one."""
    m = tiny("Llama")[0].requires_grad_(False)
    with masses(m, CONDITION) as found:
        m(IDS)
        first = [*found]
        m(IDS.flip(1))
    assert len(first) == len(found) == 3 and not torch.equal(first[0], found[0])


def refused(m, why, condition=CONDITION, **inputs):
    with pytest.raises(InputError, match=why) as error, masses(m, condition):
        m(IDS, **inputs)
    assert "\n" not in str(error.value)


def test_what_would_be_measured_wrongly_is_refused_in_one_line():
    """Each of these would give another mass than Eq. 1, none, or one without a gradient."""
    m = tiny("Llama")[0]
    refused(m, r"condition \(1, 9\), but 1 samples of 16 tokens", CONDITION[:, :9])
    refused(m, "32 with the cache", past_key_values=m(IDS).past_key_values)
    m.train().activation_checkpointing_enable({"use_reentrant": True})
    refused(m, "use_reentrant", inputs_embeds=None)
    for layer in m.model.layers:
        layer.self_attn.attention_dropout = 0.1
    refused(m, "has dropout")
    local = TEXT | {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    refused(hf.Gemma2ForCausalLM(hf.Gemma2Config(**local)), "has softcap")
    refused(hf.GptOssForCausalLM(hf.GptOssConfig(**local)), "has s_aux")
    refused(hf.Lfm2ForCausalLM(hf.Lfm2Config(**TEXT, layer_types=["full_attention", "full_attention", "conv"])),
            "2 of 3 layers")
    q, given = torch.zeros(1, 2, 16, 8), SimpleNamespace(condition=CONDITION, found=[], grad=False)
    with pytest.raises(InputError, match="no causal mask"):
        attend_by_name(torch.nn.Identity(), q, q, q, None, is_causal=False, aia=given)


def test_a_version_without_names_of_attention_is_refused_in_one_line(monkeypatch):
    """transformers 4 calls a class, or passes nothing on."""
    m = tiny("Llama")[0]
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    refused(m, "needs version 5: pip")


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": LABELS}


def distance(m):
    """Mean distance of the curve to its target."""
    with torch.no_grad(), masses(m, CONDITION) as found:
        m(**BATCH)
    curve = torch.stack([aia.intensity(mass, QUERIES)[0] for mass in found])
    return (curve - aia.targets(3, "und")[0]).abs().mean().item()


def test_the_lines_of_the_readme_train():
    """As they stand, on a tiny Llama: after 20 steps the curve is at most half as far from its target."""
    code = re.search(r"## AIA in your own training loop.*?```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    m = tiny("Llama")[0]
    before = distance(m)
    exec(code, {"model": m, "loader": [BATCH] * 20, "image_id": 6,
                "optimizer": torch.optim.AdamW(m.parameters(), lr=1e-2)})
    assert distance(m) < before / 2


def test_a_trainer_with_another_loss_trains(tmp_path):
    """transformers.Trainer, of which only compute_loss is replaced: the same after 20 steps."""
    pytest.importorskip("accelerate")

    class Trainer(hf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **how):
            with masses(self.accelerator.unwrap_model(model), CONDITION.expand(len(inputs["input_ids"]), -1)) as found:
                out = model(**inputs)
            loss = objective(out, found, QUERIES.expand(len(inputs["input_ids"]), -1))[0]
            return (loss, out) if return_outputs else loss
    m = tiny("Llama")[0]
    before = distance(m)
    how = hf.TrainingArguments(str(tmp_path), max_steps=20, learning_rate=1e-2, report_to=[], save_strategy="no",
                               per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True)
    Trainer(m, how, train_dataset=[{name: x[0] for name, x in BATCH.items()}] * 8).train()
    assert distance(m.eval()) < before / 2
