"""Claims about lab/plans.py: what is hidden is not seen, what is given is not written, and what is counted is there."""

import pytest
import torch

import data
import model
from lab import plans
from parts.settings import InputError
from parts.stories import PLAN
from parts.world import World

WORLD = World(0)
PROMPTS = ["a red circle and a blue square", "a green cross at the top left"]
GIVEN = ["a red circle at the top left and a blue square at the top right", "a green cross at the top left"]


@pytest.fixture(scope="module", params=["tiny-mixed", "tiny-mixed-janus", "tiny-mixed-fork"])
def made(request, tmp_path_factory):
    """A model that always opens a picture in place of a word, and its tokenizer."""
    torch.manual_seed(0)
    m = model.build(request.param)
    text = data.train_tokenizer(tmp_path_factory.mktemp("text") / "tokenizer.json", m.config, WORLD, mixed=True)
    m.words_of = lambda x, wanted, *_: {row: m.ids["boi"] for row, want in enumerate(wanted) if want == "word"}
    return m, text


def codes_of(monkeypatch, made, **how):
    """The codes of all pictures that `drawn` asks for, and what it returns."""
    found = []
    finished = plans.evaluation.finished

    def kept(m, text, answers):
        found.extend(part for parts in answers for part in parts if torch.is_tensor(part))
        return finished(m, text, answers)
    with monkeypatch.context() as patch:
        patch.setattr(plans.evaluation, "finished", kept)
        _, said = plans.drawn(*made, WORLD, PROMPTS, PLAN, GIVEN, **how)
    return torch.stack(found), said


def test_spans_hold_the_words_of_prompt_and_plan(made):
    """Hiding one column too many or too few would blame or excuse the wrong words."""
    m, text = made
    samples, spans = plans.begun(data.Preparer(m, text, training=False), PROMPTS, PLAN, GIVEN)
    for pieces, span, prompt, plan in zip(samples, spans, PROMPTS, GIVEN, strict=True):
        ids = [i for part, _ in pieces for i in part]
        assert text.decode(ids[slice(*span["plan"])]).strip() == plan and span["plan"][1] == len(ids)
        assert prompt in text.decode(ids[slice(*span["prompt"])]) and span["prompt"] == (1, span["plan"][0])


def test_hiding_changes_the_picture_only_through_what_is_hidden(monkeypatch, made):
    """Without layers nothing changes, and what is hidden in all of them might as well say something else."""
    plain, said = codes_of(monkeypatch, made)
    assert said == ["", ""]                         # the plan was given: the model has only to draw
    same, _ = codes_of(monkeypatch, made, hide=("plan", []))
    assert torch.equal(plain, same) and len(plain) == 2
    layers = list(range(made[0].config.layers))
    hidden, _ = codes_of(monkeypatch, made, hide=("plan", layers))
    assert not torch.equal(plain, hidden)
    monkeypatch.setattr("test_plans.GIVEN", [plan.replace("red", "blue").replace("green", "red") for plan in GIVEN])
    other, _ = codes_of(monkeypatch, made, hide=("plan", layers))
    assert torch.equal(hidden, other)


def test_attention_on_prompt_and_plan_is_a_share(made):
    """Both are parts of one softmax, of which the picture's own tokens take the rest."""
    m, text = made
    scenes = [WORLD.scene(plans.stream(0, "pool")) for _ in PROMPTS]
    found = plans.attention_paid(m, text, scenes, PROMPTS, GIVEN, WORLD)
    prompt, plan = (torch.tensor(found[name]) for name in ("prompt", "plan"))
    assert len(prompt) == m.config.layers and (prompt > 0).all() and (plan > 0).all() and (prompt + plan < 1).all()


def test_no_run_is_one_line():
    """The remedy is the command."""
    with pytest.raises(InputError, match="needs run folders"):
        plans.plans(plans.Plans())


def test_a_run_without_conversations_is_refused(runs, tmp_path):
    """It would draw nothing that it was asked for, which looks like a finding."""
    with pytest.raises(InputError, match="has learned no plans: give a run with conversations"):
        plans.plans(plans.Plans(runs=(str(runs["tiny-emu3"]),), n=1, out=str(tmp_path / "plans.json")))
    assert not (tmp_path / "plans.json").exists()
