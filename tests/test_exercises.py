"""Claims about the course (exercises/): what is handed out is blank, what is graded earns its points."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "exercises"))          # its files are scripts beside each other, as a student runs them

import answers  # noqa: E402
import grade  # noqa: E402
from answers import Refused  # noqa: E402
from copies import put_in  # noqa: E402
from grade import EXERCISES  # noqa: E402

TO_WRITE = [number for number, exercise in EXERCISES.items() if exercise.functions]
each_to_write = pytest.mark.parametrize("number", TO_WRITE)
PARTS = ("**Goal.**", "**Given.**", "**Asked.**", "**Expected numbers.**", "**To think about.**")


def own(exercise):
    """The repository's file."""
    return (ROOT / exercise.file).read_text(encoding="utf-8")


def function(source, name):
    found, = (node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    return found


def refused(capsys, *arguments):
    """The one line with which bad input ends."""
    with pytest.raises(SystemExit) as end:
        grade.main([*map(str, arguments)])
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", EXERCISES)
def test_a_page_has_all_its_parts(number):
    """Students find the same things on each, in the same order; the lecturer's page has a row and answers for it."""
    exercise = EXERCISES[number]
    text = (ROOT / "exercises" / exercise.page).read_text(encoding="utf-8")
    lecturer = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {number}. ") and len(text.splitlines()) <= 70
    assert "minutes" in text.splitlines()[2] and "10 points" in text.splitlines()[2]
    places = [text.find(part) for part in PARTS]
    assert -1 not in places and places == sorted(places)
    assert text.count("<details><summary>Hint ") == text.count("</details>") == 3
    assert f"| {number} | [" in lecturer and f"- **{number}.** (1)" in lecturer
    assert sum(group.points for group in exercise.groups) == (10 if exercise.functions else 0)
    assert exercise.run == ("no training run" not in text.splitlines()[2])


def test_the_grader_is_read_in_one_sitting():
    """A teacher reads it before trusting its marks."""
    assert len((ROOT / "exercises" / "grade.py").read_text(encoding="utf-8").splitlines()) <= 200


# ---------------------------------------------------------------------------------------------------------------------
# The notebook
# ---------------------------------------------------------------------------------------------------------------------
NOTEBOOK = ROOT / "exercises" / "story.ipynb"


def cells(kind):
    """{id: source} of the notebook's cells, in their order."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return {cell["id"]: "".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind}


def run_cells(ids, run, names):
    """Run cells as Jupyter does, in one namespace, on another run folder."""
    for name in ids:
        exec(compile(cells("code")[name].replace("runs/tiny-emu3-seed0", str(run)), f"cell {name}", "exec"), names)
    return names


def test_the_notebook_is_stored_clean():
    """Without outputs, so that it stays small and a diff shows what was changed; with all that Jupyter asks for."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    content = json.loads(text)
    assert content.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"} and len(text) < 20_000
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)           # from 4.5 on, cells have ids
    assert content["metadata"]["kernelspec"].keys() >= {"name", "display_name"}
    for cell in content["cells"]:
        kind, source = cell["cell_type"], cell["source"]
        more = {"execution_count": None, "outputs": []} if kind == "code" else {}
        assert cell == {"cell_type": kind, "id": cell["id"], "metadata": {}, "source": source} | more
        assert kind in ("code", "markdown") and re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert all(line.endswith("\n") for line in source[:-1])
    assert len(cells("code")) + len(cells("markdown")) == len(content["cells"])


def test_the_notebook_runs_cell_by_cell(two_steps, monkeypatch):
    """From its own folder, where Jupyter starts it; its asserts hold what is done by hand against the code."""
    shown = []
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: (shown.extend(plt.get_fignums()), plt.close("all")))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT / "exercises")
    names = run_cells(cells("code"), two_steps, {})
    assert names["ROOT"] == ROOT and names["RUN"] == two_steps and len(shown) == 6
    assert all({*names["found"][task]} == {"before", "control", "after"} for task in ("gen", "und"))


def test_the_notebook_says_what_to_do_without_a_run(tmp_path, monkeypatch):
    """From the repository's folder, where some start Jupyter."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match="run `python train.py` in"):
        run_cells(("setup", "imports", "run"), tmp_path / "none", {})


# ---------------------------------------------------------------------------------------------------------------------
# Handing out
# ---------------------------------------------------------------------------------------------------------------------
@each_to_write
def test_a_blank_asks_for_the_same_function_and_tells_nothing_of_its_body(number):
    """Same arguments, an own docstring, and no line of the solution left anywhere in the student's file, comments
    included."""
    exercise = EXERCISES[number]
    source, blank = own(exercise), grade.blank(exercise)
    for name in exercise.functions:
        solved, asked = function(source, name), function(blank, name)
        assert ast.dump(asked.args) == ast.dump(solved.args) and ast.get_docstring(asked)
        assert [type(node) for node in asked.body] == [ast.Expr, ast.Raise]
        lines = source.splitlines()[solved.body[0].end_lineno:solved.end_lineno]
        told = [line for line in map(str.strip, lines) if len(line) > 25 and line in blank]
        assert lines and told == []


def test_a_blank_changes_nothing_else():
    """The student's file is the original but for what is asked."""
    exercise = EXERCISES[3]
    source = own(exercise)
    assert put_in(source, source, exercise) == source
    assert put_in(grade.blank(exercise), source, exercise) == source


def test_nothing_is_written_over(tmp_path, capsys):
    """It may be the student's work."""
    mine = tmp_path / "mine.py"
    grade.main(["1", "--blank", str(mine)])
    assert "NotImplementedError" in mine.read_text()
    assert "is there already" in refused(capsys, 1, "--blank", mine)


# ---------------------------------------------------------------------------------------------------------------------
# Taking functions over
# ---------------------------------------------------------------------------------------------------------------------
MINE = '''"""Mine."""
import math
import os
from aia import TASKS
from functools import reduce

UNUSED = os.environ
HALF = 0.5


def helper(x):
    return math.floor(x * HALF)


def intensity(mass, queries):
    return helper(mass), TASKS


print("never run")
'''


def test_functions_bring_what_they_use_and_no_more():
    """Helpers, constants and imports, in front of them and in their order; what comes from the file itself is there."""
    text = put_in(own(EXERCISES[1]), MINE, EXERCISES[1])
    assert text.index("HALF = 0.5") < text.index("def helper") < text.index("def intensity")
    assert text.count("import math") == 1 and "return helper(mass), TASKS" in text
    assert not any(word in text for word in ("UNUSED", "never run", "from aia", "reduce", "per_token"))
    text = put_in("import os\n\n\ndef intensity():\n    pass\n", MINE, EXERCISES[1])
    assert text.startswith("import os\n\n\nimport math\n")


def test_a_file_that_an_editor_has_laid_out_anew_is_taken():
    """Its RULE_STAGES are still those of aia.py, though not letter by letter."""
    source = own(EXERCISES[6])
    mine = source.replace('RULE_STAGES = {"gen": ((0, 0.20),', 'RULE_STAGES = {\n    "gen": ((0, .2),')
    assert put_in(source, mine, EXERCISES[6]) == source != mine
    with pytest.raises(Refused, match="RULE_STAGES is something else"):
        put_in(source, mine.replace("(0, .2)", "(0, .3)"), EXERCISES[6])


def test_what_would_change_the_file_elsewhere_is_refused():
    """A helper with the name of something else would break other functions, and the mark would be about that."""
    with pytest.raises(Refused, match="TASKS is something else in aia.py"):
        put_in(own(EXERCISES[1]), MINE.replace("from aia import TASKS", "TASKS = 1"), EXERCISES[1])
    ended = put_in(own(EXERCISES[1]), "# a form feed: \f\n" + MINE, EXERCISES[1])
    assert ended == put_in(own(EXERCISES[1]), MINE, EXERCISES[1])
    part = "import torch.nn.functional\n\n\ndef intensity(mass, queries):\n    return torch.nn.functional.relu(mass)\n"
    assert part.splitlines()[-1] in put_in(own(EXERCISES[1]), part, EXERCISES[1])         # the same torch, no conflict
    with pytest.raises(Refused, match="no function intensity"):
        put_in(own(EXERCISES[1]), "x = 1", EXERCISES[1])


@pytest.mark.parametrize("arguments, message", [
    (("1",), "give the student's file"), (("11", "mine.py"), "invalid choice: 11"), (("1", "nowhere.py"), "nowhere.py"),
    (("1", "wrong.py"), "line 2: expected ':'"), (("1", "empty.py"), "no function intensity"),
    (("1", "null.py"), "null.py: source code"), (("1", "empty.py", "--timeout", "nan"), "give seconds above 0"),
    (("7", "--break", "D", "new"), "no error D"), (("5", "--break", "A", "new"), "for exercise 7"),
    (("9", "empty.py"), "name both run folders"),
])
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    """And status 2, so that a script tells it from a bad mark."""
    monkeypatch.chdir(tmp_path)
    Path("wrong.py").write_text("x = 1\ndef intensity(mass, queries)\n    pass\n")
    Path("empty.py").write_text("")
    Path("null.py").write_text("x = 1\0")
    assert message in refused(capsys, *arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [TO_WRITE[0], *(pytest.param(number, marks=pytest.mark.slow)
                                                   for number in TO_WRITE[1:])])
def test_a_blank_has_no_points_and_the_solution_has_all(number):
    """No test is chosen that passes without the function; each one is found, and passes with the repository's own."""
    exercise = EXERCISES[number]
    rows, _, blank = grade.grade(exercise, grade.stub(exercise), 300)
    assert not any(points for points, *_ in rows) and {*blank.values()} == {"FAILED"}
    rows, _, solved = grade.grade(exercise, own(exercise), 300)
    assert sum(points for points, *_ in rows) == 10 and {*solved.values()} == {"PASSED"}
    assert blank.keys() == solved.keys()


def test_code_that_cannot_be_imported_has_no_points_and_a_reason():
    """The error itself, not that pytest found no tests."""
    mine = "import nowhere\n\n\ndef intensity(mass, queries):\n    return nowhere.mean(mass)\n"
    rows, remark, ran = grade.grade(EXERCISES[1], mine, 100)
    assert remark == "the tests did not start: ModuleNotFoundError: No module named 'nowhere'"
    assert ran == {} and not any(points for points, *_ in rows)


@pytest.mark.slow
def test_an_endless_loop_ends_and_what_came_before_it_counts(tmp_path, capsys):
    """The group in which it hangs has no points, and those behind it have not been run."""
    mine = tmp_path / "mine.py"
    mine.write_text(own(EXERCISES[1]).replace("    per_token =", "    while len(queries) == 2 and mass.dim() == 3:\n"
                                              "        pass\n    per_token ="))
    with pytest.raises(SystemExit) as end:
        grade.main(["1", "--timeout", "20", str(mine)])     # flags may stand before the file
    *_, last = capsys.readouterr().out.splitlines()
    result = json.loads(last.removeprefix("result "))
    assert end.value.code == 1 and result["remark"] == "stopped after 20 s: an endless loop?"
    assert result["groups"] == {"even attention": 3, "any map, any span": 0, "no queries": 0, "bfloat16": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Answers: traps and numbers
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("letter", answers.TRAPS)
def test_a_trap_is_one_change_in_the_function_it_names(letter):
    """Else the answer would be wrong, or the change not made."""
    trap = answers.TRAPS[letter]
    source = own(trap)
    assert source.count(trap.right) == 1
    assert trap.right in ast.get_source_segment(source, function(source, trap.function))


@pytest.mark.slow
@pytest.mark.parametrize("letter", ["", *answers.TRAPS])
def test_each_trap_shows_in_its_own_symptom_alone(letter, tmp_path):
    """And sound code, as the page prints it, in none."""
    folder = tmp_path / "broken"
    if letter:
        grade.main(["7", "--break", letter, str(folder)])
    shown = subprocess.run([sys.executable, "-m", "exercises.symptoms"], cwd=folder if letter else ROOT,
                           capture_output=True, text=True).stdout.splitlines()
    assert ["NOT THE SAME" in line for line in shown] == [letter == one for one in answers.TRAPS]
    page = (ROOT / "exercises" / EXERCISES[7].page).read_text(encoding="utf-8")
    assert letter or all(line[:38] in page for line in shown)


def test_places_of_traps_are_graded_one_by_one():
    """By file and function; blanks, back quotes and what stands behind # don't matter."""
    right = {letter: f"{trap.file}:{trap.function}" for letter, trap in answers.TRAPS.items()}
    told = f"A: `{right['A']}`  # pads are seen\nB:{right['B']}()\nC: aia.py:loss\n"
    assert [points for points, *_ in answers.traps(told)] == [3, 3, 0]
    assert [points for points, *_ in answers.traps(grade.stub(EXERCISES[7]))] == [0, 0, 0]


def made_run(folder, rho, far, start="abc"):
    """A run folder with what exercise 9 reads: every layer is `far` from its target."""
    folder.mkdir()
    curve = {"target": [0.4, 0.4], "before": {"weights": start}, "after": {"intensity": [0.4 - far, 0.4 + far]}}
    (folder / "curves.json").write_text(json.dumps({"gen": curve, "und": curve}))
    (folder / "settings.json").write_text(json.dumps({"rho": rho}))
    rows = [{"name": "joint", "und": {"lambda": 0.0}}, {"name": "tune", "und": {"lambda": 100 / rho}}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_distances_are_recomputed_from_the_runs(tmp_path):
    """Numbers of somebody else's run, or of runs with different beginnings, earn nothing."""
    folders = [made_run(tmp_path / "50", 50, 0.105), made_run(tmp_path / "1", 1, 0.009)]
    told = "run 50: {}\nrun 1: {}\ngen 50: 0.105\nund 50: 0.105\ngen 1: 0.009\nund 1: {}\nlambda 50: 2\nlambda 1: 100"
    assert [points for points, *_ in answers.distances(told.format(*folders, 0.009))] == [2, 3, 3, 2]
    assert [points for points, *_ in answers.distances(told.format(*folders, "small"))] == [2, 3, 0, 2]
    other = made_run(tmp_path / "other", 1, 0.009, "abd")
    assert [points for points, *_ in answers.distances(told.format(folders[0], other, 0.009))] == [0, 3, 3, 2]
    (other / "metrics.jsonl").write_text("1")
    for broken in (tmp_path, other):
        with pytest.raises(Refused, match="no finished run"):
            answers.distances(told.format(folders[0], broken, 0.009))
