"""Claims about one of several processes: what it learns from its environment (parts/processes.py)."""

from made_data import ALBUM, encode

from formats.datasets import Encoded


def test_several_processes_share_the_encoding(saved, album, tmp_path, monkeypatch):
    """Each takes its part by RANK and WORLD_SIZE, and writes files of its own."""
    (m, init), file = saved("emu3"), album(*ALBUM)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, held in (("0", 2), ("1", 3)):
        monkeypatch.setenv("RANK", rank)
        encode(tmp_path / "codes", file, init)
        assert len(Encoded(tmp_path / "codes", m).parts) == held
