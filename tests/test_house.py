"""Claims about the house: which file may import which, how long files and functions are, one name for one thing."""

import ast
import io
import re
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
# Floors from the ground up: a file imports only from floors below its own, or from files named before it in its row.
# Beside each file the most lines it may have.
FLOORS = [
    {"parts/installed.py": 20, "parts/settings.py": 330},
    {"parts/processes.py": 100, "parts/lock.py": 140, "aia.py": 220},
    {"parts/text.py": 270, "parts/pictures.py": 190, "parts/vision.py": 400, "parts/world.py": 480,
     "parts/stories.py": 240, "parts/loss.py": 90, "parts/kernels.py": 275, "parts/decoding.py": 470,
     "parts/terminal.py": 80, "parts/plots.py": 160},
    {"model.py": 950},
    {"formats/records.py": 245, "formats/checkpoints.py": 260, "formats/hub.py": 200, "formats/weights.py": 520,
     "formats/readers.py": 405, "formats/datasets.py": 520},
    {"data.py": 800},
    {"eval.py": 850},
    {"train.py": 1080},
    {f"benchmarks/{name}.py": 340 if name == "common" else 280 for name in (
        "common", "judge", "mmmu", "mmbench", "mmvp", "mmvet", "pope", "mme", "geneval", "dpg", "fid", "score")},
    {f"lab/{name}.py": 400 if name == "check" else 600 for name in (
        "rows", "figures", "references", "alignment", "report", "claims", "study", "dry_run", "speed", "gpu", "plans",
        "knockout", "gradients", "maps", "explore", "summary", "check", "plug")},
]
LINES = {file: lines for floor in FLOORS for file, lines in floor.items()}
FILES = [*LINES]
METHOD = ["aia.py", "model.py", "data.py", "train.py", "eval.py"]       # what a reader of the method reads
FOLDERS = ("parts", "formats", "benchmarks", "lab")
# Libraries that only some commands need, imported where they are used.
OPTIONAL = {"matplotlib", "pyarrow", "openpyxl", "transformers", "huggingface_hub", "pytorch_fid", "cleanfid",
            "resource", "jinja2"}
LAZY = {"eval.py": {"benchmarks", "lab"}}                                      # `eval.py score BENCH` hands over to it
SHARED = {"main", "COMMANDS", "MOVED"}                                        # global names that several files may have


def tree(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def imported(node):
    """Modules, and names that may be modules, of the import statements under a node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)


def functions(file):
    return [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef)]


def test_the_files_are_those_of_the_plan():
    """A new file has a place in the order, and each folder a page and an empty __init__.py."""
    found = {file.relative_to(ROOT).as_posix() for folder in (".", *FOLDERS) for file in (ROOT / folder).glob("*.py")}
    assert found - {f"{folder}/__init__.py" for folder in FOLDERS} == set(FILES)
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").read_text() == "" and (ROOT / folder / "README.md").exists()


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_below(file):
    """So it can be read with what comes before it, and there is no cycle."""
    modules = {name.removesuffix(".py").replace("/", "."): i for i, name in enumerate(FILES)}
    late = {name for name in imported(tree(file)) if modules.get(name, -1) >= FILES.index(file)}
    assert {name.split(".")[0] for name in late} <= LAZY.get(file, set())


@pytest.mark.parametrize("file", FILES)
def test_imports_stand_at_the_top(file):
    """Inside functions are only libraries that not everyone installs."""
    inside = {name.split(".")[0] for function in functions(file) for name in imported(function)}
    assert inside <= OPTIONAL | LAZY.get(file, set())


@pytest.mark.parametrize("file", FILES)
def test_private_names_of_torch_stay_in_two_files(file):
    """They may change with any release, which must never break training."""
    private = re.findall(r"torch(?:\.\w+)*\._(?!_)\w+|torch\.ops\.aten", (ROOT / file).read_text(encoding="utf-8"))
    assert not private or file in ("parts/kernels.py", "lab/dry_run.py")


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_fit_one_sitting(file):
    """A function has at most 60 lines, a module's forward 25."""
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= LINES[file]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions(file)}
    assert {name: lines for name, lines in long.items() if lines > (25 if name == "forward" else 60)} == {}


def test_the_method_is_read_in_an_evening():
    """The five files together, and the share of them that explains."""
    lines = comments = 0
    for file in METHOD:
        source = (ROOT / file).read_text(encoding="utf-8")
        lines += len(source.splitlines())
        spoken = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                spoken |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                spoken.add(token.start[0])
        comments += len(spoken)
    assert lines <= 3870 and 0.15 <= comments / lines <= 0.25


def test_a_global_name_is_one_thing():
    """The same name in two files would be two things to remember."""
    homes = {}
    for file in FILES:
        for node in tree(file).body:
            targets = [node] if isinstance(node, ast.FunctionDef | ast.ClassDef) else getattr(node, "targets", [])
            names = [getattr(part, "name", None) or getattr(part, "id", None) for target in targets
                     for part in ([target] if target is node else ast.walk(target))]
            for name in {*names} - {None} - SHARED:
                homes.setdefault(name, set()).add(file)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_a_module_has_its_tests_in_one_file():
    """tests/ mirrors the files; the house, the course, all flags, and what a run reports are claims about several."""
    found = {file.name for file in (ROOT / "tests").glob("test_*.py")}
    assert found == {f"test_{Path(file).name}" for file in FILES} | {
        "test_house.py", "test_flags.py", "test_belongs.py", "test_readme.py", "test_exercises.py"}


def test_training_has_few_flags_and_names_the_other_commands(capsys):
    """Whole commands come first, as a newcomer needs them; the flags stand in titled parts."""
    assert len(fields(train.TrainConfig)) <= 45
    with pytest.raises(SystemExit):
        train.main(["--help"])
    told = capsys.readouterr().out
    assert "first of all:" in told and "built-in world:" in told
    commands = told.partition("options:")[0]
    assert "\n    python train.py --preset tiny-janus --seed 1\n" in commands
    assert all(name in commands for name in ("eval.py", "data.py", "lab.study", "dry_run", "figures"))
