"""Claims about missing libraries (parts/installed.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", ["train.py", "eval.py", "data.py"])
def test_a_missing_library_is_one_line_with_the_remedy(command):
    """The first minute of a newcomer, who has not installed anything: no traceback."""
    hidden = ("import importlib.util as u, runpy, sys; find = u.find_spec; "
              "u.find_spec = lambda name: None if name in ('torch', 'PIL') else find(name); "
              f"sys.argv = [{command!r}]; runpy.run_path({command!r}, run_name='__main__')")
    ended = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: torch, PIL missing: pip install -r requirements.txt\n"
