"""Claims about POPE: reading answers, counting, and the mean F1 (benchmarks/pope.py)."""

import pytest

from benchmarks.pope import pope_metrics, pope_parse, pope_score
from parts.settings import InputError


@pytest.mark.parametrize("text, expected", [
    *((text, "yes") for text in ("Yes", "NO", "No!", "No\n", "none", "cannot", '"no"', ".No", "", "There is none")),
    *((text, "no") for text in ("No", "no", "No, there is no dog.", "Yes, no doubt", "it is not, no. Yes", "No,"))])
def test_pope_reads_an_answer_word_by_word(text, expected):
    """Only the words No, no and not before the first period count, and nothing is stripped."""
    assert pope_parse(text) == expected


@pytest.mark.parametrize("texts, labels, counts, shares", [
    (["Yes", "No, there is no dog.", "yes", "There is none", "No\n", "Yes. No."], "yes no no no no yes",
     (2, 3, 1, 0), (0.5, 0.4, 1, 0.5714, 0.8333)),
    (["yes", "no", "yes", "no", "yes"], "yes yes no no yes", (2, 1, 1, 1), (0.6, 2 / 3, 2 / 3, 0.6667, 0.6)),
    (["yes"] * 6, "yes yes yes no no no", (3, 3, 0, 0), (0.5, 0.5, 1, 0.6667, 1)),
    (["yes", "yes", "no"], "Yes no", (1, 1, 0, 0), (0.5, 0.5, 1, 2 / 3, 2 / 3)),           # the third answer is surplus
    (["no", "no"], "yes no", (0, 0, 1, 1), (0.5, None, 0, None, 0)),                        # no yes answer
    (["yes", "no"], "no no", (0, 1, 1, 0), (0.5, 0, None, None, 0.5)),                      # no yes label
    (["yes", "no"], "no yes", (0, 1, 0, 1), (0, 0, 0, None, 0.5)), ([], "", (0,) * 4, (None,) * 5)])
def test_pope_counts_yes_as_positive(texts, labels, counts, shares):
    """The official program's examples, and None where it divides by zero; the yes ratio counts surplus answers."""
    metrics = pope_metrics(texts, labels.split())
    assert tuple(metrics[name] for name in ("TP", "FP", "TN", "FN")) == counts
    found = [metrics[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert found == pytest.approx(list(shares), abs=5e-5)


def test_pope_score_is_the_mean_f1_of_the_categories():
    """It is a plain mean in percent, and None if any category has no F1."""
    answers = {"random": ["yes"] * 2, "popular": ["yes", "no"], "adversarial": ["yes", "no"]}
    labels = {name: ["yes", "no"] for name in answers}
    report = pope_score(answers, labels)
    assert report["score"] == pytest.approx(100 * (2 / 3 + 1 + 1) / 3)
    assert report["categories"]["random"]["FP"] == 1
    assert pope_score(answers | {"random": ["no", "no"]}, labels)["score"] is None


def test_pope_refuses_labels_of_another_version():
    """Pairing by position would silently give a wrong number; --force drops the surplus instead."""
    answers, labels = {"random": ["yes", "no"]}, {"random": ["yes", "no", "no"]}
    with pytest.raises(InputError, match="POPE random: 2 answers, 3 labels; .*--force"):
        pope_score(answers, labels)
    assert pope_score(answers, labels, force=True)["score"] == 100
    with pytest.raises(InputError, match="POPE popular: 0 answers, 1 labels"):
        pope_score(answers, {"random": ["yes", "no"], "popular": ["yes"]})
