"""Claims about settings and flags (parts/settings.py)."""

from dataclasses import dataclass

import pytest

from parts.settings import InputError, moved, opt, parse


def test_a_flag_given_twice_adds():
    """--data A --data B is both of them, in place of the default, as is --data A B."""
    @dataclass(frozen=True)
    class Settings:
        """Some."""
        seeds: tuple = opt(("0", "1"), "seeds")
    assert parse(Settings, []).seeds == ("0", "1")
    for words in (["--seeds", "2", "3"], ["--seeds", "2", "--seeds", "3"]):
        assert parse(Settings, words).seeds == ("2", "3")


def test_an_old_name_says_the_new_one():
    """A command is the first word only, a flag may stand anywhere and may hold its value."""
    names = {"study": "python -m lab.study", "--shard": "--parallel hsdp"}
    moved(["--data", "study", "--sharded"], "train.py", names)
    for argv in (["study", "--quick"], ["--seed", "1", "--shard", "2"], ["--shard=2"]):
        with pytest.raises(InputError, match="^train.py (study|--shard) is now (python -m lab.study|--parallel hsdp)$"):
            moved(argv, "train.py", names)
