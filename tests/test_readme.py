"""Claims about the README: its numbers are those of files in assets/, and its links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
# Behind a paragraph or table stands where its numbers are from: <!-- assets/FILE.json: SHOWN = KEY.KEY, ... -->
# KEYs lead to a number; " / KEY.KEY", " / 60" and " * 100" change it. SHOWN is rounded as it is shown.
SOURCES = re.findall(r"<!-- (assets/\S+\.json): (.*?) -->", PAGE, re.S)
ITEMS = [(file, *item.split(" = ")) for file, items in SOURCES for item in re.split(r",\s+", items.strip())]
# Versions, papers, dates.
OTHER = (r"\d+(\.\d+){2,}", r"arXiv[: ]\d+\.\d+", r"Python 3\.\d+", r"\d\d\d\d-\d\d-\d\d")


def number_at(content, keys):
    """The number that KEY.KEY.KEY leads to; entries of lists by their index."""
    for key in keys.split("."):
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def value_of(file, source):
    """What a source comes to."""
    content = json.loads((ROOT / file).read_text(encoding="utf-8"))
    first, *more = re.split(r" ([*/]) ", source)
    value = number_at(content, first)
    for sign, operand in zip(more[::2], more[1::2], strict=True):
        operand = float(operand) if re.fullmatch(r"[\d.]+", operand) else number_at(content, operand)
        value = value * operand if sign == "*" else value / operand
    return value


@pytest.mark.parametrize("file, shown, source", ITEMS, ids=[f"{shown}:{source}" for _, shown, source in ITEMS])
def test_a_number_is_that_of_its_file(file, shown, source):
    """Rounded as it is shown; a run that is renewed changes it, or fails here."""
    plain = shown.replace(",", "").replace("+", "")
    decimals = len(plain.partition(".")[2])
    assert f"{value_of(file, source):.{decimals}f}" == plain


def test_every_number_with_decimals_has_a_file():
    """What nobody measured, or nobody can find again, is not told. (Code, versions, papers and dates apart.)"""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|https?://\S+", "", PAGE, flags=re.S)
    for kind in OTHER:
        text = re.sub(kind, "", text)
    start, missing = 0, []
    for comment in [*re.finditer(r"((?:<!-- assets/.*? -->\s*)+)", text, re.S), None]:
        shown = text[start:comment.start()] if comment else text[start:]
        told = re.findall(r"(\S+) = ", comment.group()) if comment else []
        missing += [found for found in re.findall(r"(?<![\w.])\d+\.\d+", shown) if found not in told]
        missing += [one for one in told if one not in shown]                    # and none is told for nothing
        start = comment.end() if comment else start
    assert missing == []


def test_every_share_and_every_time_has_a_file():
    """The same for whole numbers that somebody measured."""
    text = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    told = {shown for _, shown, _ in ITEMS}
    assert {*re.findall(r"(?<![\w.])(\d+) (?:%|minutes|ms|GiB)", text)} - told == set()


def test_the_last_line_of_a_run_is_that_of_its_file():
    """What the README shows, a run has printed."""
    line, = re.findall(r"^result ({.*})$", PAGE, re.M)
    content = json.loads((ROOT / "assets/tiny-emu3-seed0.json").read_text(encoding="utf-8"))
    assert json.loads(line) == {key: value for key, value in content.items() if key != "machine"}


def test_links_and_pictures_are_there():
    """A reader who follows one finds a file."""
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", PAGE)
    assert len(links) > 20 and [link for link in links if ":" not in link and not (ROOT / link).exists()] == []


def test_the_readme_stays_short():
    """One page to start from; the rest stands beside the code."""
    assert len(PAGE.splitlines()) <= 220
