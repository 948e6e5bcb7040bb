"""Claims about settings and flags (parts/settings.py)."""

import os
from dataclasses import dataclass

import pytest
import torch

from parts.settings import InputError, check_out, device_of, json_lines, moved, opt, parse, read_json, text_lines


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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_text_that_is_not_utf_8_is_refused(encoding, tmp_path):
    """What PowerShell's > writes is UTF-16; read by a guess, its lines become other words."""
    file = tmp_path / "a.json"
    text = '{"word": "é"}\n{"word": "b"}\n'
    file.write_bytes(text.encode(encoding))
    for read in (read_json, text_lines, json_lines):
        with pytest.raises(InputError, match="a.json: the text is (UTF-16|not UTF-8).*: save it as UTF-8"):
            read(file)
    for good in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(good))
        assert [row["word"] for _, row in json_lines(file, "word")] == ["é", "b"]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    """Hours of work would be lost at its end; no file at all is no reason to stop."""
    (tmp_path / "file").touch()
    check_out("")
    check_out(tmp_path / "new.json")
    for wrong in (tmp_path, tmp_path / "file/new.json", tmp_path / "none/new.json"):
        with pytest.raises(InputError, match="cannot be written: give a file in a folder that exists"):
            check_out(wrong)
    monkeypatch.setattr(os, "access", lambda folder, mode: not mode & os.W_OK)                # one that only root may
    with pytest.raises(InputError, match="can be written"):
        check_out(tmp_path / "new.json")


@pytest.mark.parametrize("rank, expected", [(None, "cuda:0"), ("3", "cuda:3")])
def test_a_gpu_is_named_by_its_number(rank, expected, monkeypatch):
    """`torch.cuda.set_device` refuses a bare "cuda"; under torchrun each process takes its own. Tried without a GPU."""
    taken = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    on_cpu = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: on_cpu(*size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert device_of("auto") == device_of("cuda") == expected
    assert device_of("cuda:1") == "cuda:1" and taken == [expected, expected, "cuda:1"]
