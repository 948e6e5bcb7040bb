"""Claims about intervals, differences and verdicts (lab/claims.py)."""

import math
import statistics

import pytest

import aia
from eval import MIXED_SCORES
from lab.claims import (
    STUDENT,
    by_row,
    claims_of,
    curves_apart,
    holm,
    interval,
    moves_of,
    on_first,
    print_apart,
    sign_flip,
    summary_of,
)


def made_up_row(name, seed, und, gen, lift=0.0):
    """A row of a study with given scores; lift moves its curves."""
    row = {"row": name, "seed": seed, "und": und, "gen": gen, "seconds": 60.0, "ntp_und": 1 - und, "ntp_gen": 1 - gen,
           "alignment": {"und": [0.1, 0.2, 0.3], "gen": [0.1, 0.3, 0.2]}}
    for task, curve in (("gen", [0.1, 0.2, 0.3]), ("und", [0.3, 0.2, 0.1])):
        row |= {f"{task}_curve": [x + lift for x in curve], f"{task}_sink": curve, f"distance_{task}": 0.2 - lift,
                f"std_{task}": 0.05}
    return row


def test_the_study_pairs_rows_by_seed():
    """Seeds differ more than rows do, so a row is compared with the plain one of the same seed."""
    plain = [made_up_row("unified", seed, 0.5 + 0.1 * seed, 0.4) for seed in range(4)]
    tuned = [made_up_row("aia", seed, 0.52 + 0.1 * seed + 0.001 * (seed % 2), 0.4) for seed in range(4)]
    summary = summary_of(plain + tuned)
    row, found = summary["aia"]["und"], summary["aia"]["difference"]["und"]
    assert found["mean"] == pytest.approx(0.0205) and found["interval"] < 0.001 < row["interval"]
    differences = [0.02, 0.021, 0.02, 0.021]
    half = 3.182 * statistics.stdev(differences) / 2                            # t of three degrees of freedom
    assert found["interval"] == pytest.approx(half) and "difference" not in summary["unified"]


def test_experts_are_one_row_of_two_runs():
    """Each is judged by its own task only."""
    rows = [made_up_row("expert-gen", 0, 0.0, 0.9), made_up_row("expert-und", 0, 0.8, 0.0, 0.1)]
    joint = by_row(rows)["experts"][0]
    assert (joint["und"], joint["gen"]) == (0.8, 0.9)
    assert joint["und_curve"] == rows[1]["und_curve"] and joint["gen_curve"] == rows[0]["gen_curve"]
    assert (joint["ntp_und"], joint["ntp_gen"], joint["seconds"]) == pytest.approx((0.2, 0.1, 120))


def test_a_conflict_is_what_the_experts_of_a_setting_gain():
    """Each setting has experts of its own, in its world, and seeds that miss one of the three runs do not count."""
    rows = [made_up_row(name, seed, und, gen) for seed in (0, 1) for name, und, gen in (
        ("unified", 0.9, 0.8), ("expert-und", 0.9, 0.0), ("expert-gen", 0.0, 0.7),
        ("crowd", 0.5, 0.4), ("crowd-und", 0.6, 0.0), ("crowd-gen", 0.0, 0.6))]
    summary = summary_of(rows + [made_up_row("crowd", 2, 0.5, 0.4), made_up_row("half", 0, 0.5, 0.4)])
    assert [name for name, row in summary.items() if row["baseline"]] == ["experts", "crowd-experts"]
    found = {key: part["mean"] for key, part in summary["crowd-experts"]["difference"].items()}
    assert found == pytest.approx({"und": 0.1, "gen": 0.2, "both": 0.15, "ntp_und": -0.1, "ntp_gen": -0.2})
    assert summary["crowd-experts"]["paired"] == [0, 1]
    assert summary["experts"]["difference"]["gen"]["mean"] == pytest.approx(-0.1)


@pytest.mark.parametrize("gains, verdict", [
    ([0.1, 0.11, 0.12], "holds"), ([-0.1, -0.11, -0.12], "does not hold"), ([0.1, -0.1, 0.05], "not decided here"),
    ([0.1], "not decided here"), ([], "not decided here")])
def test_a_verdict_needs_an_interval_without_zero(gains, verdict):
    """One seed decides nothing, however large its figure."""
    rows = [made_up_row("unified", seed, 0.5, 0.5) for seed in range(3)]
    rows += [made_up_row("aia", seed, 0.5 + gain, 0.5) for seed, gain in enumerate(gains)]
    claim = next(claim for claim in claims_of(rows) if claim["claim"] == "AIA improves understanding")
    assert claim["verdict"] == verdict and claim["seeds"] == len(gains)
    stable = next(claim for claim in claims_of(rows) if claim["claim"].startswith("patterns"))
    assert stable["figure"] == pytest.approx(0.08)


def test_a_claim_about_several_rows_needs_all_of_them():
    """The best of some rows is above their mean by chance alone, so each is compared on its own."""
    def decided(low, high):
        rows = [made_up_row(name, seed, 0.5 + gain + 0.01 * seed * (name == "aia"), 0.5) for seed in range(3)
                for name, gain in (("aia", 0.0), ("rho-1", low), ("rho-100", high))]
        return next(claim for claim in claims_of(rows) if claim["claim"].startswith("rho"))
    assert decided(-0.2, -0.3)["verdict"] == "holds" and decided(-0.2, 0.1)["verdict"] == "does not hold"
    assert decided(-0.2, 0.005)["verdict"] == "not decided here"
    assert decided(-0.2, -0.3)["figure"] == pytest.approx(0.105)


def test_the_shared_model_lies_between_in_each_task():
    """Above one expert and below the other on average is not enough."""
    rows = [made_up_row(name, seed, 0.5, 0.5) for seed in range(3) for name in ("unified", "expert-gen", "expert-und")]
    for row in rows:                                # experts end at 0.3 and 0.2
        if row["row"] == "unified":
            row["alignment"] = {"und": [0.1, 0.2, 0.25], "gen": [0.1, 0.2, 0.15 + 0.001 * row["seed"]]}
    claim = next(claim for claim in claims_of(rows) if "lies between" in claim["claim"])
    assert claim["figure"] == pytest.approx(-0.049) and claim["verdict"] == "does not hold"


CURVES = {"low": [0.1, 0.2, 0.3], "high": [0.3, 0.4, 0.5], "middle": [0.2, 0.3, 0.4], "falling": [0.3, 0.2, 0.1]}


@pytest.mark.parametrize("claim, good, bad", [
    ("the two tasks' curves", {"unified": {"gen_curve": "low", "und_curve": "falling"}},
     {"unified": {"gen_curve": "low", "und_curve": "high"}}),
    ("more decoupling", {"unified": {"und_curve": "low"}, "unifork-1": {"und_curve": "middle"}},
     {"unified": {"und_curve": "middle"}, "unifork-1": {"und_curve": "low"}}),
    ("AIA moves", {"aia": {"distance_gen": 0.1}}, {"aia": {"distance_gen": 0.3}}),
    ("AIA improves und", {"aia": {"und": 0.6}}, {"aia": {"und": 0.4}}),
    ("AIA improves gen", {"aia": {"gen": 0.6}}, {"aia": {"gen": 0.4}}),
    ("at half width AIA", {"half+aia": {"gen": 0.6}}, {"half+aia": {"gen": 0.4}}),
    ("at half width forked", {"half+fork": {"gen": 0.6}}, {"half+fork": {"gen": 0.4}}),
    ("forked beats shared", {"unifork-2": {"gen": 0.6}}, {"unifork-2": {"gen": 0.4}}),
    ("forked beats shared of", {"unifork": {"gen": 0.6}}, {"unifork": {"gen": 0.4}}),
    ("alignment rises in", {}, {"expert-und": {"alignment": {"und": [0.3, 0.2, 0.1], "gen": [0.1, 0.3, 0.2]}}}),
    ("alignment rises and", {}, {"expert-gen": {"alignment": {"und": [0.1, 0.2, 0.3], "gen": [0.1, 0.2, 0.3]}}}),
    ("Huber", {"no-huber": {"und": 0.4}}, {"no-huber": {"und": 0.6}}),
    ("stages", {"raw": {"und": 0.4}}, {"raw": {"und": 0.6}})])
def test_a_claim_holds_where_its_rows_say_so_and_not_in_their_mirror(claim, good, bad):
    """Operands or signs that are the wrong way round would report the contrary of what was found."""
    def verdict(changes):
        rows = []
        for seed in range(3):
            for place, name in enumerate(("unified", "aia", "expert-und", "expert-gen", "unifork-1", "unifork-2",
                                          "unifork", "wide", "raw", "no-huber", "half", "half+aia", "half+fork")):
                row = made_up_row(name, seed, 0.5, 0.5) | {"und_curve": CURVES["high"], "gen_curve": CURVES["low"]}
                row |= {key: CURVES[value] if isinstance(value, str) else value
                        for key, value in changes.get(name, {}).items()}
                little = 0.0003 * seed * (place + 1)                            # no two seeds or rows are alike

                def bent(curve, little=little):
                    return [x + little * i * i for i, x in enumerate(curve)]
                for task in aia.TASKS:
                    row |= {task: row[task] + little, f"distance_{task}": row[f"distance_{task}"] + little,
                            f"{task}_curve": bent(row[f"{task}_curve"])}
                rows.append(row | {"alignment": {task: bent(curve) for task, curve in row["alignment"].items()}})
        names = [entry["claim"] for entry in claims_of(rows)]
        name = claim if claim in names else next(name for name in names if name.startswith(claim))
        return next(entry["verdict"] for entry in claims_of(rows) if entry["claim"] == name)
    assert (verdict(good), verdict(bad)) == ("holds", "does not hold")


@pytest.mark.parametrize("claim, better, worse", [
    ("a plan improves colour attribution", ("mixed", "plan_by_skill"), ("mixed", "plain_by_skill")),
    ("a plan improves colour attribution (Janus-Pro)", ("mixed-janus", "plan_by_skill"),
     ("mixed-janus", "plain_by_skill")),
    ("a plan improves the mean of all skills", ("mixed", "plan"), ("mixed", "plain")),
    ("AIA keeps what is done in turn (it loses less than 0.02)", ("mixed+aia", "edit"), ("mixed", "consistent")),
    ("a second encoder has to look again", ("mixed-janus", "third"), ("mixed-codes", "plan")),
    ("a fork costs what is done in turn", ("mixed", "edit"), ("mixed-fork", "third"))])
def test_what_is_done_in_turn_is_judged_the_right_way_round(claim, better, worse):
    """Each claim holds where its row gains, and does not where what it is compared with does."""
    def verdict(name, score):
        rows = []
        for seed in range(3):
            for row in ("mixed", "mixed+aia", "mixed-janus", "mixed-codes", "mixed-fork"):
                made = made_up_row(row, seed, 0.5, 0.5) | dict.fromkeys(MIXED_SCORES, 0.5)
                made |= {f"{way}_by_skill": {"colour attribution": 0.5} for way in ("plan", "plain")}
                gain = 0.3 + 0.01 * seed
                if row == name:
                    made[score] = {"colour attribution": 0.5 + gain} if score.endswith("skill") else 0.5 + gain
                rows.append(made)
        return next(entry["verdict"] for entry in claims_of(rows) if entry["claim"] == claim)
    assert (verdict(*better), verdict(*worse)) == ("holds", "does not hold")


def test_a_loss_within_the_margin_counts_as_none():
    """So that "AIA loses nothing" can be found true, and not only left open."""
    rows = [made_up_row(name, seed, 0.5, 0.5) | dict.fromkeys(MIXED_SCORES, 0.5 - loss - 0.001 * seed)
            for name, loss in (("mixed", 0.0), ("mixed+aia", 0.01)) for seed in range(3)]
    for row in rows:
        row |= {f"{way}_by_skill": {"colour attribution": 0.5} for way in ("plan", "plain")}
        if row["row"] == "mixed+aia":
            row["edit"] += 0.002 * row["seed"]      # no two seeds are alike
    claim = next(entry for entry in claims_of(rows) if entry["claim"].startswith("AIA keeps"))
    assert claim["verdict"] == "holds" and 0.009 < claim["figure"] < 0.012


def test_intervals_are_those_of_students_distribution():
    """Its quantile has a closed form for 1, 2 and 4 degrees of freedom."""
    p = 0.975
    two, q = (2 * p - 1) / (2 * p * (1 - p)) ** 0.5, 4 * p * (1 - p)
    four = 2 * (math.cos(math.acos(q**0.5) / 3) / q**0.5 - 1) ** 0.5
    assert STUDENT[:2] + STUDENT[3:4] == pytest.approx((math.tan(math.pi * (p - 0.5)), two, four), abs=1e-3)
    assert list(STUDENT) == sorted(STUDENT, reverse=True) and STUDENT[-1] > 1.96
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, two / 3**0.5), abs=1e-3)
    assert interval([1.0, 2.0]) == (1.5, None)


@pytest.mark.parametrize("values, p", [
    ([1.0, 2.0, 3.0], 2 / 8),                       # only +++ and ---
    ([1.0, 2.0, -3.0], 1.0),                        # a sum of zero is never far
    ([1.0, 2.0, -1.0], 6 / 8)])                     # sums 4, 2, 2, 0 and their negatives: six are 2 or more
def test_the_sign_flip_test_counts_signs(values, p):
    """All 2^n choices, counted by hand."""
    assert sign_flip(values) == p and sign_flip([-value for value in values]) == p
    assert sign_flip([[value, -2 * value] for value in values]) == p                    # layers that move together


def test_the_sign_flip_test_keeps_the_layers_of_a_seed_together():
    """Seeds that move a layer each are no evidence, however far: any choice of signs is as far from zero."""
    assert sign_flip([[1.0, 0.0], [0.0, 1.0]]) == 1.0 and sign_flip([[1.0, 1.0], [1.0, 1.0]]) == 0.5


def test_holms_correction_is_that_of_the_textbook():
    """The smallest of three counts three times, the next twice, and none comes before one that was smaller."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06]) and holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def early(gains, seeds=range(20, 30), noise=0.0):
    """Planned claims on early AIA, whose und and gen differ by gains on average; noise changes its sign by seed."""
    rows = []
    for seed in seeds:
        rows.append(made_up_row("narrow", seed, 0.5, 0.5))
        spread = 0.002 * (seed % 3 - 1) + noise * (-1) ** seed
        rows.append(made_up_row("early", seed, *(0.5 + gain + spread for gain in gains)))
    return [claim for claim in claims_of(rows) if claim["claim"].startswith("AIA from the first joint step")]


@pytest.mark.parametrize("gains, verdicts", [
    ((0.1, 0.1), ["holds"] * 3), ((-0.1, -0.1), ["does not hold"] * 3),
    ((0.1, 0.004), ["holds", "holds", "no effect"]), ((-0.1, 0.1), ["no effect", "does not hold", "holds"])])
def test_planned_claims_are_decided_either_way(gains, verdicts):
    """Better, worse, or a difference that lies, interval and all, within the margin."""
    found = early(gains)
    assert [claim["verdict"] for claim in found] == verdicts and {claim["seeds"] for claim in found} == {10}
    assert all(claim["corrected"] >= claim["p"] for claim in found)


@pytest.mark.parametrize("seeds", [range(20, 29), range(10, 20), range(15)])
def test_planned_claims_are_not_judged_before_their_look_is_complete(seeds):
    """Whoever looks earlier, or at seeds that chose a setting, finds what chance offers."""
    assert {claim["verdict"] for claim in early((0.1, 0.1), seeds)} == {"not decided here"}
    found = early((0.1, 0.1), {*range(20, 30), *seeds})
    assert [claim["seeds"] for claim in found] == [10] * 3          # nor do other seeds enter it


def test_the_second_look_judges_what_the_first_left_open():
    """On all twenty seeds; what was decided stays, whatever ten more say."""
    assert {claim["verdict"] for claim in early((0.03, 0.03), noise=0.05)} == {"not decided here"}
    found = early((0.04, 0.04), range(20, 40), noise=0.05)
    assert [(claim["verdict"], claim["seeds"]) for claim in found] == [("holds", 20)] * 3
    decided = [made_up_row(name, seed, und, 0.5) for seed in range(20, 40) for name, und in (
        ("narrow", 0.5), ("early", (0.7 if seed < 30 else 0.1) + 0.001 * (seed % 3)))]
    found = [claim for claim in claims_of(decided) if claim["claim"].endswith("improves understanding")]
    assert ("holds", 10) in [(claim["verdict"], claim["seeds"]) for claim in found]


@pytest.mark.parametrize("claim, better, worse", [
    ("there is a conflict", ("narrow-und", "narrow-gen"), ("narrow",)),
    ("early AIA that fades", ("early-fading",), ("narrow",)),
    ("early AIA towards the experts' curves improves", ("early-experts",), ("narrow",)),
    ("early AIA towards the experts' curves that", ("early-experts-fading",), ("narrow",)),
    ("early AIA towards exchanged targets improves", ("early-exchanged",), ("narrow",)),
    ("early AIA towards exchanged targets that", ("early-exchanged-fading",), ("narrow",)),
    ("the right targets", ("early",), ("early-exchanged",)),
    ("early AIA without the first", ("early-no-first",), ("narrow",)),
    ("without the first token beats", ("early-no-first",), ("early",)),
    ("an early fork", ("early-fork",), ("narrow",)),
    ("in a larger world", ("small+aia",), ("small",))])
def test_explored_claims_are_the_right_way_round(claim, better, worse):
    """Each holds where its own row gains, and not where what it is compared with does."""
    names = ("narrow", "narrow-und", "narrow-gen", "early", "early-fading", "early-experts", "early-experts-fading",
             "early-exchanged", "early-exchanged-fading", "early-no-first", "early-fork", "small", "small+aia")

    def verdict(gaining):
        rows = [made_up_row(name, seed, *[0.5 + (0.2 + 0.01 * seed if name in gaining else 0.0)] * 2)
                for seed in range(3) for name in names]
        return next(entry["verdict"] for entry in claims_of(rows) if entry["claim"].startswith(claim))
    assert (verdict(better), verdict(worse)) == ("holds", "does not hold")


def test_the_share_on_the_first_token_is_that_of_what_moved():
    """Curves that rise and fall count by how far they move, and the sink where it moves the same way."""
    base = {"gen_curve": [0.4, 0.4, 0.4], "gen_sink": [0.1, 0.1, 0.1]}
    row = {"gen_curve": [0.6, 0.3, 0.4], "gen_sink": [0.25, 0.1, 0.1]}
    assert on_first(row, base) == pytest.approx(0.15 / 0.3)
    assert on_first(row | {"gen_sink": [0.25, 0.2, 0.1]}, base) == pytest.approx(0.05 / 0.3)


def test_experts_are_compared_with_how_seeds_differ():
    """Curves of one seed and of two, task by task; and whether all experts lie on the same side."""
    rows = [made_up_row(name, seed, 0.5, 0.5, lift) for seed, far in enumerate((0.0, 0.1, 0.4)) for name, lift in (
        ("unified", far), ("expert-gen", far + 0.02), ("expert-und", far - 0.04 * (-1) ** seed))]
    found = curves_apart(rows)["unified"]
    assert found["n"] == 3
    for task, far, shift, p in (("gen", 0.02, 0.02, 0.25), ("und", 0.04, -0.04 / 3, 1.0)):
        one = found[task]
        assert (one["experts"]["mean"], one["p"]) == (pytest.approx(far), p)
        assert [mean for mean, _ in one["shift"]] == pytest.approx([shift] * 3)
        assert one["seeds"]["mean"] == pytest.approx(((0.1 + 0.4) / 2 + (0.1 + 0.3) / 2 + (0.4 + 0.3) / 2) / 3)
        assert one["seeds"]["interval"] > 0
    assert curves_apart(rows[:3]) == {}


def test_many_seeds_are_told_without_all_their_signs(capsys):
    """2^40 choices of signs would fill any memory."""
    rows = [made_up_row(name, seed, 0.5, 0.5) for seed in range(40) for name in ("unified", "expert-gen", "expert-und")]
    found = curves_apart(rows)
    assert found["unified"]["gen"]["p"] is None and found["unified"]["n"] == 40
    print_apart(found)
    assert capsys.readouterr().out.rstrip().endswith("| - |")


def test_moves_are_those_of_the_same_seed():
    """Of a row, how far its curves are from its baseline's, and what it gained; a baseline has none."""
    rows = [made_up_row(name, seed, score, 0.5, lift) for seed in (1, 0) for name, score, lift in (
        ("unified", 0.4, 0.0), ("aia", 0.6 + 0.1 * seed, 0.05))] + [made_up_row("aia", 2, 0.5, 0.5)]
    assert moves_of(rows) == {"aia": [pytest.approx([0.05, 0.1]), pytest.approx([0.05, 0.15])]}
