"""Claims about GenEval: positions, colours, counting, the summary, and the order of judges (benchmarks/geneval.py)."""

import json

import numpy as np
import pytest
from made_benchmarks import GENEVAL, edit, geneval_files, judged, refused, written
from PIL import Image

from benchmarks.geneval import (
    GENEVAL_COLORS,
    geneval_color_texts,
    geneval_crop,
    geneval_evaluate,
    geneval_iou,
    geneval_position,
    geneval_summary,
)
from parts.settings import InputError

CAT, DOG = [20, 20, 30, 30], [0, 20, 10, 30]


def geneval(boxes, include, exclude=(), tag="position", color=None, **options):
    """geneval_evaluate with metadata of these clauses."""
    return geneval_evaluate(boxes, {"tag": tag, "include": include, "exclude": exclude}, color, **options)


def want(name, count=1, **more):
    """A clause."""
    return {"class": name, "count": count} | more


def scored(*scores, box=CAT):
    """A detector's rows: the same box with these scores."""
    return np.array([[*box, score] for score in scores], np.float32)


def test_geneval_position_is_seen_from_the_second_box():
    """The worked examples: a tenth of both sizes is tolerated; a direction counts above half of the whole offset."""
    assert geneval_position(DOG, CAT) == {"left of"}
    assert geneval_position(CAT, DOG) == {"right of"}
    assert geneval_position((12, 12, 22, 22), (20, 20, 30, 30)) == {"above", "left of"}
    assert geneval_position((0, 0, 10, 10), (20, 30, 30, 40)) == {"above"}
    assert geneval_position((20, 30, 30, 40), (0, 0, 10, 10)) == {"below"}
    assert geneval_position(CAT, CAT) == set() == geneval_position((22, 20, 32, 30), CAT)
    assert geneval_position((24, 20, 34, 30), CAT) == set()         # 2 of 4 are left, which is not above half


def test_geneval_iou_counts_both_borders():
    """11 x 11 boxes that share 3 x 3 pixels: 9 of 233."""
    assert geneval_iou((12, 12, 22, 22), (20, 20, 30, 30)) == pytest.approx(9 / 233)
    assert geneval_iou((12, 12, 22, 22), (20, 20, 30, 30)) == pytest.approx(0.0386, abs=5e-5)
    assert geneval_iou(CAT, CAT) == 1 and geneval_iou(CAT, DOG) == 0


def test_geneval_asks_each_pair_for_the_relation():
    """A dog left of a cat is right; the reason names the relations found, or says that the cat is missing."""
    def reason(relation, dogs, cats=((*CAT, 0.9),), count=1):
        boxes = {"cat": cats, "dog": np.array([[*dog, 0.8 - i / 10] for i, dog in enumerate(dogs)])}
        found = geneval(boxes, [want("cat"), want("dog", count, position=[relation, 0])])
        assert found["correct"] == (found["reason"] == "")
        return found["reason"]

    assert reason("left of", [DOG]) == "" == reason("left of", [DOG, CAT])                  # only one dog is checked
    assert reason("left of", [DOG, CAT, CAT], count=3) == "expected dog left of target, found  target"     # only once
    assert reason("left of", [(40, 20, 50, 30)]) == "expected dog left of target, found right of target"
    assert reason("below", [(12, 12, 22, 22)]) == "expected dog below target, found above and left of target"
    assert reason("left of", [DOG], []) == "expected cat>=1, found 0\nno target for dog to be left of"


def test_geneval_ignores_a_failed_clause_as_target():
    """The cat has the wrong colour, so the dog has nothing to be left of; details list the classes that were found."""
    include = [want("cat", color="red"), want("dog", position=("left of", 0)), want("sofa")]
    found = geneval({"cat": [[*CAT, 0.9]], "dog": [[*DOG, 0.8]], "sofa": []}, include, color=lambda *_: ["pink"])
    assert found == {"correct": False, "details": {"cat": [[*CAT, 0.9]], "dog": [[*DOG, 0.8]]},
                     "reason": "expected red cat>=1, found 0 red; and 1 pink\nno target for dog to be left of\n"
                               "expected sofa>=1, found 0"}


def test_geneval_counts_exactly_through_include_and_exclude():
    """Dogs with scores .95 .95 .88: the third is below .9, the threshold for counting only."""
    include, exclude = [want("dog", 2)], [want("dog", 3)]
    assert geneval({"dog": scored(0.95, 0.95, 0.88)}, include, exclude, "counting")["correct"]
    assert geneval({"dog": scored(0.95, 0.95, 0.88)}, include, exclude)["reason"] == "expected dog<3, found 3"
    found = geneval({"dog": scored(0.95)}, include, exclude, "counting")
    assert found["reason"] == "expected dog>=2, found 1"


def test_geneval_keeps_the_best_boxes_above_the_threshold():
    """Highest score first, strictly above 0.3 as float32, at most 16; overlap drops a box only when asked to."""
    def kept(scores, **options):
        boxes = {"cat": [[*CAT, score] for score in scores]}
        return [row[4] for row in geneval(boxes, [], **options)["details"].get("cat", [])]

    assert kept([0.4, 0.3, 0.9, 0.3000001, 0.30000000001]) == [0.9, 0.4, 0.3000001]
    assert kept([0.1]) == []
    assert len(kept([0.5] * 20)) == 16
    assert kept([0.9, 0.8], max_overlap=0.99) == [0.9]
    assert kept([0.4, 0.9], threshold=0.5) == [0.9]


def test_geneval_asks_for_the_colour_of_the_counted_boxes_only():
    """One red car is wanted, cars are blue (.9) and red (.8): only the blue one is examined, with its own mask."""
    asked = []

    def judge(image, objects, name):
        asked.append((image, [(row[4], mask) for row, mask in objects], name))
        return ["blue", "white", "blue"][:len(objects)]

    boxes = {"car": scored(0.8, 0.9)}
    masks = {"car": ["mask of .8", "mask of .9"]}
    red = want("car", color="red")
    found = geneval(boxes, [red], color=judge, masks=masks, image="picture")
    assert found["reason"] == "expected red car>=1, found 0 red; and 1 blue"
    assert asked == [("picture", [(pytest.approx(0.9), "mask of .9")], "car")]
    found = geneval({"car": scored(0.9, 0.8, 0.7)}, [want("car", 3, color="white", position=("above", 0))], color=judge)
    assert found["reason"] == "expected white car>=3, found 1 white; and 2 blue, 1 white"   # position is not checked
    assert geneval(boxes, [want("car", color="blue")], color=judge)["correct"]
    with pytest.raises(InputError, match="there is no colour judge"):
        geneval(boxes, [red])


def test_geneval_crop_greys_the_surroundings_and_rounds_to_even():
    """It is #999999 outside the mask and black outside the picture; 0.5 rounds to 0 and 1.5 to 2."""
    red = Image.new("RGBA", (4, 3), "red")
    mask = np.zeros((3, 4), bool)
    mask[0, 0] = True
    crop = np.asarray(geneval_crop(red, [0.5, -1, 1.5, 1.6, 0.9], mask))
    assert crop.shape == (3, 2, 3)
    assert crop[:, 0].tolist() == [[0, 0, 0], [255, 0, 0], [153, 153, 153]]
    assert (crop[1:, 1] == 153).all()
    assert (np.asarray(geneval_crop(red, (0, 0, 4, 3), None)) == (255, 0, 0)).all()
    turned = Image.new("RGB", (4, 3))
    turned.getexif()[0x0112] = 6
    assert (np.asarray(geneval_crop(turned, (0, 0, 3, 4), np.zeros((4, 3), bool))) == 153).all()


def test_geneval_colours_have_three_texts():
    """ULMEvalKit's third text is the same for all colours: its f-string lacks the f."""
    first = ["a photo of a orange car", "a photo of a orange-colored car"]
    assert geneval_color_texts("car", "orange") == [*first, "a photo of a orange object"]
    assert geneval_color_texts("car", "orange", "ulmevalkit") == [*first, "a photo of a {c} object"]
    assert " ".join(GENEVAL_COLORS) == "red orange yellow green blue purple pink brown black white"


def test_geneval_overall_is_the_mean_over_tags():
    """The worked example: 4/4, 1/4 + 0/4 and 2/4 pictures."""
    results = [(tag, prompt, i < right) for tag, prompt, right in (
        ("single_object", "a", 4), ("counting", "b", 1), ("counting", "c", 0), ("colors", "d", 2)) for i in range(4)]
    found = geneval_summary(results)
    assert found["tags"] == {"single_object": 1, "counting": 0.125, "colors": 0.5}
    assert list(found["tags"]) == ["single_object", "counting", "colors"]
    assert found["overall"] == pytest.approx(0.54167, abs=5e-6)
    assert (found["correct_images"], found["correct_prompts"]) == (0.4375, 0.75)


def test_geneval_asks_detector_then_colour_judge(tmp_path):
    """Both dogs are found, one of two cars is red, one of two pictures has two dogs: tags 1, 1/2, 1/2, overall 2/3."""
    geneval_files(tmp_path / "data")
    for i, row in enumerate(GENEVAL):
        written(tmp_path / f"images/{i:05d}/metadata.jsonl", [row])
        for name in ("0000.png", "0001.png", "grid.png"):
            written(tmp_path / f"images/{i:05d}/samples/{name}")

    def judge(request):
        first = "0000.png" in request["image"]
        if request["kind"] == "color":
            return ['["red"]' if first else '["blue"]']
        scores = {"0": (0.95,), "2": (0.95, 0.95, 0.88) if first else (0.95,)}.get(request["image"][4], ())
        return [json.dumps([[[0, 0, 10, 10, score] for score in scores], [], [[1, 2, 3, 4, 0.5]]])]

    found, rounds = judged("geneval", tmp_path, judge, "--preds", tmp_path / "images")
    assert [[request["kind"] for request in requests] for requests in rounds] == [["detect"] * 6, ["color"] * 2]
    assert rounds[1][0] == {"kind": "color", "image": "00001/samples/0000.png", "class_name": "car",
                            "boxes": [[1, 2, 3, 4, 0.5]]}
    assert found["score"] == pytest.approx(2 / 3)
    assert [*found["tags"].values()] == [1, 0.5, 0.5]
    assert (found["prompts"], found["pictures"], found["correct_prompts"]) == ("evaluation_metadata.jsonl", 6, 1)
    row = json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[3])
    assert row == {"filename": str(tmp_path / "images/00001/samples/0001.png"), "tag": "colors", "prompt": "a red car",
                   "correct": False, "reason": "expected red car>=1, found 0 red; and 1 blue",
                   "metadata": json.dumps(GENEVAL[1]), "details": '{"car": [[1.0, 2.0, 3.0, 4.0, 0.5]]}'}


def test_geneval_says_which_pictures_are_missing(tmp_path, capsys):
    """The official program scores what is there: one dog found in the only complete prompt would be a perfect score."""
    geneval_files(tmp_path / "data")
    for i, number in enumerate((2, 1)):
        written(tmp_path / f"images/{i:05d}/metadata.jsonl", [GENEVAL[i]])
        for k in range(number):
            written(tmp_path / f"images/{i:05d}/samples/{k}.png")

    def judge(request):
        return ['["red"]' if request["kind"] == "color" else "[[[0, 0, 9, 9, 1]], [], [[0, 0, 9, 9, 1]]]"]

    found, _ = judged("geneval", tmp_path, judge, "--preds", tmp_path / "images")
    assert (found["score"], found["pictures"], found["missing"]) == (1, 3, ["00001", "00002"])
    assert ("warning: 2 of 3 prompts have fewer than 2 pictures, such as 00001, 00002: the score leaves them out"
            in capsys.readouterr().out)


@pytest.mark.parametrize("old, new", [
    ('"a dog"', "5"), ('"single_object"', "[]"), ('"include": [{"class": "dog", "count": 1}]', '"include": 5'),
    ('"count": 1', '"count": "1"'), ('"class": "dog"', '"class": ["dog"]'), ('"class": "dog", ', ""),
    ('"count": 1', '"count": 1, "color": ["red"]'), ('"count": 1', '"count": 1, "position": ["left of", -1]'),
    ('"count": 1', '"count": 1, "position": ["left of", 0]'), ('"count": 1', '"count": 1, "position": "left"')])
def test_geneval_refuses_a_line_that_cannot_be_scored(old, new, tmp_path, capsys):
    """Before anything is drawn. An object cannot lie left of itself, or of one that comes later."""
    geneval_files(tmp_path / "data")
    edit(tmp_path / "data/evaluation_metadata.jsonl", old, new)
    assert "evaluation_metadata.jsonl line 1: " in refused(capsys, "geneval", tmp_path, "--preds", tmp_path)
