"""Claims about DPG-Bench: the rule of parents in both variants, categories, crops, the judge (benchmarks/dpg.py)."""

import pytest
from made_benchmarks import DPG_FIRST, DPG_ROWS, dpg_files, dpg_row, judged, png, refused, written

from benchmarks.dpg import dpg_crops, dpg_score
from parts.settings import InputError

ONE = {"a.png": ["no yes yes"], "b.v2.png": ["yes yes"]}
TWO = {"a.png": ["no yes yes", "yes yes no"], "b.v2.png": ["yes yes", "yes no"]}


def dpg(answers, variant="official", rows=DPG_ROWS, pic_num=1):
    """dpg_score of {file: [words, one text for each crop]}, the words in the order of the questions."""
    replies = {file: [{f"{file[0]}{i}?": word for i, word in enumerate(crop.split(), 1)} for crop in crops]
               for file, crops in answers.items()}
    return dpg_score([DPG_FIRST, *rows] if variant == "official" else list(rows), replies, pic_num, variant)


def test_dpg_official_is_a_mean_over_pictures():
    """The worked examples: a1's no also costs a2; categories count the last crop only, and before that rule."""
    found = dpg(ONE)
    assert found["score"] == pytest.approx(66.667, abs=5e-4)
    assert found["failed"] == []
    assert found["images"] == pytest.approx({"a.png": 1 / 3, "b.v2.png": 1})
    assert found["l1"] == {"entity": 50, "attribute": 100, "global": 100, "relation": 100}
    assert found["l2"] == {"entity - whole": 50, "attribute - color": 100, "global -": 100, "relation - spatial": 100}
    found = dpg(TWO, pic_num=2)
    assert found["score"] == 62.5
    assert found["images"] == pytest.approx({"a.png": 0.5, "b.v2.png": 0.75})
    assert found["l1"] == {"entity": 100, "attribute": 100, "global": 0, "relation": 0}


def test_dpg_ulmevalkit_is_a_mean_over_questions():
    """Both worked examples: longer items weigh more, and categories are counted after the rule of parents."""
    found = dpg(ONE, "ulmevalkit")
    assert found == {"score": 0.6, "l1": {"entity": 0.5, "attribute": 0, "global": 1, "relation": 1},
                     "l2": {"entity-whole": 0.5, "attribute-color": 0, "global-": 1, "relation-spatial": 1}}
    found = dpg(TWO, "ulmevalkit", pic_num=2)
    assert found["score"] == 0.6
    assert found["l1"] == {"entity": 0.75, "attribute": 0.5, "global": 0.5, "relation": 0.5}
    listed = [row | {"dependency": [int(row["dependency"])]} for row in DPG_ROWS]
    assert dpg(TWO, "ulmevalkit", listed, pic_num=2) == found


def test_dpg_zeros_travel_down_in_file_order_only():
    """3 depends on 2, and 2 on 1; a 3 listed before 2 does not see 2's zero. To ULMEvalKit a later parent is a yes."""
    first, second, third = dpg_row("a", 1, "0"), dpg_row("a", 2, "1"), dpg_row("a", 3, "0, 2")
    answers = {"a.png": ["no yes yes"]}
    for rows, official, ulmevalkit in (((first, second, third), 0, 0), ((first, third, second), 100 / 3, 1 / 3),
                                       ((second, first), 0, 1 / 2)):
        assert dpg(answers, rows=rows)["score"] == pytest.approx(official)
        assert dpg(answers, "ulmevalkit", rows)["score"] == pytest.approx(ulmevalkit)


def test_dpg_official_loses_the_first_row_and_its_children():
    """A picture whose question has a lost parent fails and is left out, unless an earlier parent is a no."""
    replies = {"a.png": [{"a1?": "yes", "a2?": "yes"}], "b.png": [{"b1?": "yes", "b2?": "no"}]}
    rows = [dpg_row("a", 1, "0"), dpg_row("a", 2, "1"), *DPG_ROWS[3:]]
    found = dpg_score(rows, replies, 1, "official")
    assert (found["score"], found["failed"]) == (50, ["a.png"])
    assert found["l1"] == {"entity": 100, "relation": 0}
    assert dpg_score(rows, replies, 1, "ulmevalkit")["score"] == 0.75
    unknown = [dpg_row("a", 1, "0"), dpg_row("a", 2, "1,9")]
    assert dpg({"a.png": ["no yes"], "a.jpg": ["yes yes"]}, rows=unknown)["failed"] == ["a.jpg"]
    assert dpg({"a.jpg": ["yes yes"]}, "ulmevalkit", unknown)["score"] == 1


def test_dpg_official_forgets_an_item_that_comes_back():
    """Its earlier rows are dropped, and a repeated proposition id overwrites; ULMEvalKit counts every row."""
    rows = [dpg_row("a", 1, "0"), dpg_row("b", 1, "0"), dpg_row("a", 2, "0"), dpg_row("a", 2, "0", "other")]
    found = dpg({"a.png": ["no yes"]}, rows=rows)
    assert (found["score"], found["l1"]) == (100, {"other": 100})
    assert dpg({"a.png": ["no yes"]}, "ulmevalkit", rows)["score"] == pytest.approx(2 / 3)


def test_dpg_counts_an_exact_yes_and_lists_what_it_cannot_score():
    """The official program leaves out a file without item, crop or reply; ULMEvalKit needs every reply."""
    assert dpg({"b.png": ["Yes yes."]})["score"] == 0
    found = dpg(ONE | {"readme.txt": [], "b.png": ["yes"]}, pic_num=1)
    assert found["failed"] == ["readme.txt", "b.png"]
    assert found["score"] == pytest.approx(66.667, abs=5e-4)
    found = dpg(ONE, pic_num=2)
    assert (found["score"], found["failed"]) == (None, list(ONE))
    assert dpg(ONE | {"readme.txt": ["yes"]}, "ulmevalkit")["score"] == 0.6
    with pytest.raises(InputError, match="DPG-Bench b.png: no reply to 'b2\\?'"):
        dpg({"b.png": ["yes"]}, "ulmevalkit")
    with pytest.raises(InputError, match="DPG-Bench, data row 2: "):
        dpg(ONE, rows=[dpg_row("a", 1, "one")])


def test_dpg_crops_read_the_grid_row_by_row():
    """The order is top left, top right, bottom left, bottom right."""
    assert dpg_crops(8) == [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert dpg_crops(8, 1) == [(0, 0, 8, 8)]


@pytest.mark.parametrize("variant, score", [("official", 62.5), ("ulmevalkit", 0.6)])
def test_dpg_asks_about_the_crops_of_a_grid(variant, score, tmp_path):
    """The worked example with two crops, each twice; a file that cannot be read is left out."""
    dpg_files(tmp_path / "data", variant)
    for name, content in {"a.png": png(size=(8, 8)), "b.v2.png": png(size=(8, 8)), "b.cut.png": b""}.items():
        written(tmp_path / "images" / name, content)
    no = {("a", 0): "a1?", ("a", 4): "a3?", ("b", 4): "b2?"}            # by item and left edge of the crop

    def judge(request):
        crop = (request["image"][0], request["box"][0])
        return ["no" if no.get(crop) == request["question"] else "yes"]

    found, rounds = judged("dpg", tmp_path, judge, "--preds", tmp_path / "images", "--variant", variant)
    assert found["score"] == pytest.approx(score)
    assert found.get("failed", ["b.cut.png"]) == ["b.cut.png"]
    assert len(rounds[0]) == 4 * 3 + 4 * 2
    assert rounds[0][3] == {"kind": "vqa", "image": "a.png", "box": [4, 0, 8, 4], "question": "a1?"}
    lines = (tmp_path / "out/dpg-bench_results.txt").read_text().splitlines()
    assert lines[-1] == f"DPG-Bench score: {found['score']}"
    if variant == "official":
        assert lines[0] == f"{tmp_path / 'images/a.png'}, {1 / 3}, {2 / 3}, {1 / 3}, {2 / 3}, 0.5"
    detail = (tmp_path / "out/dpg-bench_results_detail.txt").read_text().splitlines()
    assert detail[0] == f"{tmp_path / 'images/a.png'}, (0, 0, 4, 4), a1?, no"
    assert len(detail) == 20


def test_dpg_says_which_pictures_are_missing(tmp_path, capsys):
    """The official program scores the files that are there; ULMEvalKit's goes through all prompts, so there a missing
    picture is an error. With no picture of any prompt there is nothing to score."""
    dpg_files(tmp_path / "data")
    for name in ("a.png", "c.png"):
        written(tmp_path / "images" / name, png(size=(8, 8)))
    flags = ("--preds", tmp_path / "images", "--pictures", 1)
    found, _ = judged("dpg", tmp_path, lambda request: ["yes"], *flags)
    assert (found["score"], found["missing"], found["failed"]) == (100, ["b"], ["c.png"])
    told = capsys.readouterr().out
    assert "warning: 1 of 2 prompts have no readable picture, such as b: the score leaves them out" in told
    assert "warning: 1 of 2 pictures cannot be scored, such as c.png: the score leaves them out" in told
    flags = ("dpg", tmp_path, "--judge", written(tmp_path / "J"), *flags)
    dpg_files(tmp_path / "data", "ulmevalkit")
    (tmp_path / "data/dpg_bench.csv").unlink()
    assert "lacks readable pictures of 1 of 2 prompts, such as b" in refused(capsys, *flags, "--variant", "ulmevalkit")
    written(tmp_path / "images/a.png", "no picture")
    dpg_files(tmp_path / "data")
    assert "images holds no readable picture named after a prompt, such as a.png" in refused(capsys, *flags)
