"""A copy of the code with somebody else's functions in it, and its tests (exercises/grade.py)."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from answers import ROOT, Refused

COPIED = ("aia.py", "model.py", "data.py", "train.py", "eval.py", "parts/*.py", "formats/*.py", "benchmarks/*.py",
          "lab/*.py", "tests/*.py", "assets/paper_curves.json", "exercises/symptoms.py")


# ---------------------------------------------------------------------------------------------------------------------
# Functions of one file in the place of those of another
# ---------------------------------------------------------------------------------------------------------------------
def extent(node):
    """First line, from 0, and end of a statement with its decorators."""
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]) - 1, node.end_lineno


def top_level(source):
    """{name: statement} of all that a text defines or imports at its top level; of an import that name alone."""
    found, lines = {}, source.split("\n")           # a form feed ends a line for splitlines, not for Python
    for node in ast.parse(source).body:
        first, end = extent(node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            found |= {alias.asname or alias.name.split(".")[0]: start + ast.unparse(ast.Import([alias]))
                      for alias in node.names}
            continue
        names = [getattr(node, "name", "")]         # of a function or class
        if isinstance(node, ast.Assign | ast.AnnAssign):
            parts = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
            names = [part.id for part in parts if isinstance(part.ctx, ast.Store)]
        found |= dict.fromkeys(filter(None, names), "\n".join(lines[first:end]))
    return found


def needed(names, mine):
    """What these names use of the top level of their text, themselves included, in its order."""
    todo, met = [*names], set()
    while todo:
        name = todo.pop()
        if name in mine and name not in met:
            met.add(name)
            todo += [node.id for node in ast.walk(ast.parse(mine[name])) if isinstance(node, ast.Name)]
    return [name for name in mine if name in met]


def alike(one, other):
    """Whether two statements differ in layout and comments at most: many editors reformat a file when they save it."""
    return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


def put_in(source, given, exercise):
    """The text of an exercise's file with its functions taken from another text. What they use of that text comes
    before them, unless the file has it already."""
    mine, own = top_level(given), top_level(source)
    module = exercise.file.removesuffix(".py").replace("/", ".")
    for name in exercise.functions:
        if name not in mine:
            raise Refused(f"there is no function {name}")
    before = []
    for name in needed(exercise.functions, mine):
        there = name in exercise.functions or mine[name] in before or alike(mine[name], own.get(name, ""))
        if there or mine[name].startswith(f"from {module} "):
            continue
        package = all(text.get(name, "").startswith(f"import {name}") for text in (mine, own))      # or a part of it
        if name not in own or package:
            before.append(mine[name])
        else:
            raise Refused(f"{name} is something else in {exercise.file}: give yours another name")
    lines = source.removesuffix("\n").split("\n")
    places = [(*extent(node), node.name) for node in ast.parse(source).body
              if getattr(node, "name", None) in exercise.functions]
    for first, end, name in sorted(places, reverse=True):           # from below, so that places stay right
        lines[first:end] = [mine[name]]
    first = min(places)[0]
    lines[first:first] = [piece + "\n\n" for piece in before]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The copy and its tests
# ---------------------------------------------------------------------------------------------------------------------
def copy_code(folder):
    """What the tests need, into a folder: no git, no runs, no pictures."""
    for file in (file for pattern in COPIED for file in ROOT.glob(pattern)):
        to = folder / file.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)


# A line of `pytest -v`; it has no outcome if the process ended during the test.
RAN = re.compile(r"(tests/\S+::.+?)(?: (PASSED|FAILED|ERROR|SKIPPED).*)?")


def run_tests(exercise, given, tests, timeout):
    """{test: outcome} with the functions of a text, {test or file: why it failed}, and a remark on the whole."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"} | {"COLUMNS": "300"}
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rfE", "-p", "no:cacheprovider", *tests]
    late = False
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log.txt"
        copy_code(folder)
        file = folder / exercise.file
        file.write_text(put_in(file.read_text(encoding="utf-8"), given, exercise), encoding="utf-8")
        with log.open("w") as out:
            try:
                subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                               env=clean, timeout=timeout)
            except subprocess.TimeoutExpired:
                late = True
        lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    ran = {found[1]: found[2] for line in lines if (found := RAN.fullmatch(line))}
    told = [line.partition(" ")[2].partition(" - ") for line in lines if line.startswith(("FAILED ", "ERROR "))]
    why = {test: reason for test, _, reason in told}
    if late:
        return ran, why, f"stopped after {timeout:g} s: an endless loop?"
    if not ran:
        errors = [line[1:].strip() for line in lines if line.startswith("E  ")]
        return ran, why, f"the tests did not start: {[*lines[-1:], *errors[-1:]][-1]}"
    return ran, why, ""
