"""Claims about recorded judges: what is refused (benchmarks/judge.py). Rounds of requests: see each benchmark."""

import re

import pytest
from made_benchmarks import refused_files, written


@pytest.mark.parametrize("bench, change, message", [
    ("mmbench --judge J --judge-prompt J", lambda f: None, r"J is not the official judge prompt .*--force accepts it"),
    ("mmbench --judge J", lambda f: None, r"a judge of mmbench needs --judge-prompt, a file with the official text"),
    ("mmbench --judge J --judge-prompt I", lambda f: None, r"--judge-prompt .*I cannot be read \(No such file"),
    ("mmbench --judge J --judge-prompt I", lambda f: written(f / "I", "é".encode("utf-16")), r"I: the text is UTF-16"),
    ("mmvp --judge J --variant official", lambda f: None, r"J holds no reply to .*--judge-export"),
    ("mmvp --judge J --variant official", lambda f: written(f / "J", [{"key": "", "replies": "yes"}]),
     r"J line 1: replies must be a"),
    ("mmvp --judge J --variant official", lambda f: written(f / "J", [{"key": [], "replies": ["yes"]}]),
     r"J line 1: 'key' is not a text"),
    ("mmvp --judge J", lambda f: None, r"mmvp --variant aia asks no judge: leave out --judge"),
    ("pope --judge-export J", lambda f: None, r"pope --variant aia asks no judge: leave out --judge")])
def test_bad_replies_and_prompts_are_refused_in_one_line(bench, change, message, tmp_path, capsys):
    """Another prompt or a missing reply would silently give another number; J is an empty file."""
    assert re.search(message, refused_files(bench, change, tmp_path, capsys))
