"""Hand out an exercise of this folder, and grade it. exercises/README.md says how to grade a class.

    python exercises/grade.py 3 --blank mine.py       # the file of exercise 3, without the functions to write
    python exercises/grade.py 3 mine.py               # points, and as last line `result {json}`
    python exercises/grade.py 7 --break A broken      # a copy of the code with an error in it

Functions from mine.py go into a copy of the code, and the exercise's tests run there in a process of their own. That
ends endless loops and spares your files from accidents; it is no sandbox: code that you do not trust needs one.
Exit status: 0 all points, 1 fewer, 2 bad input.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import answers
from answers import ROOT, Refused
from copies import copy_code, put_in, run_tests


@dataclass(frozen=True)
class Group:
    """Tests that must all pass for its points: of tests/test_<module>.py, with all parameters unless one is given."""

    points: int
    title: str
    module: str
    names: str                                      # with spaces between them

    def tests(self):
        return [f"tests/test_{self.module}.py::test_{name}" for name in self.names.split()]


@dataclass(frozen=True)
class Exercise:
    """A page, and the functions to write in one file; a page without functions asks for a text file with answers."""

    page: str
    file: str = ""
    functions: tuple = ()
    groups: tuple = ()
    answers: str = ""                               # name of the function in answers.py that grades them
    run: bool = False                               # needs a trained model, at least in part


# Every test here fails without the functions, and passes with the repository's own (tests/test_exercises.py).
EXERCISES = {
    1: Exercise("1-intensity.md", "aia.py", ("intensity",), (
        Group(3, "even attention", "aia", "uniform_attention_has_a_known_intensity"),
        Group(3, "any map, any span", "aia", "intensity_is_that_of_the_stored_map "
              "each_of_several_conditions_has_an_intensity_of_its_own_queries"),
        Group(2, "no queries", "aia", "a_sample_without_queries_has_intensity_zero"),
        Group(2, "bfloat16", "aia", "the_mean_adds_no_bfloat16_error"))),
    2: Exercise("2-no-map.md", "model.py", ("attend_fused",), (
        Group(1, "even attention", "aia", "uniform_attention_has_a_known_intensity[attend_fused]"),
        Group(2, "the map's numbers", "model", "all_bodies_of_attention_agree"),
        Group(5, "no map", "model", "fused_training_never_holds_a_map_nor_all_logits[fused]"),
        Group(2, "two conditions", "model", "two_conditions_are_measured_under_any_mask"))),
    3: Exercise("3-huber-and-stages.md", "aia.py", ("loss", "stage_at"), (
        Group(2, "Huber", "aia", "pull_is_delta_beyond_delta_and_the_error_within"),
        Group(1, "infinite delta", "aia", "without_huber_the_pull_is_the_error"),
        Group(3, "valid samples", "aia", "loss_is_the_huber_loss_averaged_over_layers_and_valid_samples "
              "invalid_samples_add_exactly_nothing no_valid_sample_gives_zero_and_no_nan"),
        Group(1, "reduction", "aia", "sum_is_the_mean_times_the_valid_samples"),
        Group(3, "stages", "aia", "printed_tables_are_reproduced_layer_by_layer "
              "depth_scales_table_s4_to_any_number_of_layers"))),
    4: Exercise("4-masks.md", "data.py", ("spans",), (
        Group(2, "drawing, Emu3", "data", "masks_of_emu3_generation"),
        Group(2, "drawing, Janus-Pro", "data", "masks_of_janus_generation"),
        Group(2, "answers, Emu3", "data", "masks_of_emu3_understanding"),
        Group(2, "answers, Janus-Pro", "data", "masks_of_janus_understanding"),
        Group(2, "a query for each word", "data", "an_answer_has_a_query_for_each_of_its_tokens"))),
    5: Exercise("5-lambda.md", "aia.py", ("lambda_for_ratio",), (
        Group(5, "50 : 1", "aia", "weight_makes_the_two_losses_stand_50_to_1"),
        Group(2, "nothing to align", "aia", "a_loss_of_zero_needs_no_weight"),
        Group(3, "calibration", "train", "calibration_gives_the_ratio_on_its_batches[tiny-emu3-ratio0]")), run=True),
    6: Exercise("6-reference.md", "aia.py", ("stages_from_curve", "resample"), (
        Group(4, "the paper's references", "aia", "reference_models_are_staged_by_one_rule"),
        Group(3, "short curves, both tasks", "aia", "own_curves_are_staged_by_one_rule"),
        Group(3, "resample", "aia", "resampling_keeps_both_ends_and_is_linear_between")), run=True),
    7: Exercise("7-break-it.md", answers="traps"),
    8: Exercise("8-both-directions.md", "data.py", ("spans",), (
        Group(3, "a story, Emu3", "data", "masks_of_a_story_in_emu3"),
        Group(3, "a story, Janus-Pro", "data", "masks_of_a_story_in_janus"),
        Group(2, "words before any picture", "data", "words_before_any_picture_are_no_queries"),
        Group(2, "given, dropped", "data", "a_given_picture_is_looked_at_and_not_learned "
              "a_conversation_without_its_words_keeps_tags_and_pictures"))),
    9: Exercise("9-rho.md", answers="distances", run=True),
    10: Exercise("10-edits.md", "parts/stories.py", ("edits",), (
        Group(3, "one thing", "stories", "all_edits_of_one_thing"),
        Group(3, "two things", "stories", "all_edits_of_two_things"),
        Group(2, "a group", "stories", "a_group_changes_its_colour_as_one"),
        Group(2, "larger worlds", "stories", "every_edit_does_what_it_says"))),
}


def stub(exercise):
    """What a student starts from, as the page shows it: signatures and docstrings, or a form for answers."""
    fence = "```text\n" if exercise.answers else "```python\n"
    return (ROOT / "exercises" / exercise.page).read_text(encoding="utf-8").split(fence)[1].split("```")[0]


def blank(exercise):
    """The student's copy of the file."""
    if exercise.answers:
        return stub(exercise)
    return put_in((ROOT / exercise.file).read_text(encoding="utf-8"), stub(exercise), exercise)


# ---------------------------------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------------------------------
def grade(exercise, given, timeout):
    """Rows (points, of, title, remark), a remark on the whole, and {test: outcome}."""
    if exercise.answers:
        return getattr(answers, exercise.answers)(given), "", {}
    tests = [test for group in exercise.groups for test in group.tests()]
    ran, why, remark = run_tests(exercise, given, tests, timeout)
    rows = []
    for group in exercise.groups:
        mine = [[one for one in ran if one == test or one.startswith(f"{test}[")] for test in group.tests()]
        bad = [one for ones in mine for one in ones if ran[one] != "PASSED"]
        if bad:
            rows.append((0, group.points, group.title, f"{bad[0].split('::')[1]}: {why.get(bad[0], 'not finished')}"))
        elif all(mine):
            rows.append((group.points, group.points, group.title, ""))
        else:
            rows.append((0, group.points, group.title, "not run"))
    return rows, remark, ran


def hand_out(exercise, options):
    """Write what the flags ask for, at a place where nothing is yet."""
    if options.trap and exercise is not EXERCISES[7]:
        raise Refused("--break is for exercise 7 alone")
    out = Path(options.trap[1] if options.trap else options.blank)
    if out.exists():
        raise Refused(f"{out} is there already: give another name")
    if options.trap:
        trap = answers.trap(options.trap[0])
        copy_code(out)
        file = out / trap.file
        file.write_text(file.read_text(encoding="utf-8").replace(trap.right, trap.wrong), encoding="utf-8")
    else:
        out.write_text(blank(exercise), encoding="utf-8")
    print(f"{out} written; the task is in exercises/{exercise.page}")
    if exercise.run:
        print("it needs a run of `python train.py`, too")


def main(argv=None):
    def refuse(message):
        print(f"grade.py: {message}", file=sys.stderr)
        sys.exit(2)
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.error = refuse
    cli.add_argument("number", type=int, choices=EXERCISES)
    cli.add_argument("file", nargs="?", help="the student's functions or answers")
    cli.add_argument("--blank", metavar="OUT", help="write the student's copy")
    cli.add_argument("--break", dest="trap", nargs=2, metavar=("LETTER", "FOLDER"), help="exercise 7: a broken copy")
    cli.add_argument("--timeout", type=float, default=120, help="seconds for all tests")
    options = cli.parse_intermixed_args(argv)
    exercise = EXERCISES[options.number]
    try:
        if options.blank or options.trap:
            return hand_out(exercise, options)
        if not 0 < options.timeout:
            raise Refused(f"--timeout {options.timeout:g}: give seconds above 0")
        if not options.file:
            raise Refused("give the student's file, or --blank OUT for a fresh one")
        rows, remark, ran = grade(exercise, Path(options.file).read_text(encoding="utf-8-sig"), options.timeout)
    except (Refused, OSError, UnicodeDecodeError) as error:
        refuse(f"{error}")
    except (MemoryError, RecursionError):
        refuse(f"{options.file}: an expression is nested too deeply")
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""                # none: a null byte
        refuse(f"{options.file}{where}: {error.msg}")
    total, of = (sum(row[i] for row in rows) for i in (0, 1))
    for points, most, title, why in [*rows, (total, of, "total", remark)]:
        print(f"{title:26} {points} / {most}   {why}".rstrip())
    result = {"exercise": options.number, "points": total, "of": of, "remark": remark,
              "groups": {title: points for points, _, title, _ in rows},
              "tests": len(ran), "passed": [*ran.values()].count("PASSED")}
    print(f"result {json.dumps(result)}")
    sys.exit(total < of)


if __name__ == "__main__":
    main()
