"""Claims about settings and flags (parts/settings.py)."""

from dataclasses import dataclass

import pytest

from parts.settings import InputError, opt, parse, parse_ratio


def test_a_flag_given_twice_adds():
    """--data A --data B is both of them, in place of the default, as is --data A B."""
    @dataclass(frozen=True)
    class Settings:
        """Some."""
        seeds: tuple = opt(("0", "1"), "seeds")
    assert parse(Settings, []).seeds == ("0", "1")
    for words in (["--seeds", "2", "3"], ["--seeds", "2", "--seeds", "3"]):
        assert parse(Settings, words).seeds == ("2", "3")


@pytest.mark.parametrize("text", ["0:0", "1", "1:2:3", "-1:2", "a:b", "1.5:1", ""])
def test_a_ratio_that_is_none_is_refused(text):
    """Two whole numbers, not both zero."""
    with pytest.raises(InputError, match="--ratio .*GEN:UND"):
        parse_ratio(text)
