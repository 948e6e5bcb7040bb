"""Claims about conversations in the terminal (parts/terminal.py); what is said there is claimed in test_eval.py."""

import torch

from parts.terminal import Typist


def test_words_appear_as_they_come(both_texts, capsys):
    """Never half a character; together they are the answer."""
    text = both_texts["emu3"]
    typist, shown = Typist(text), []
    for token in text.encode(" a 漢 dog"):
        typist(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    assert len([part for part in shown if part]) > 2 and "".join(shown) == "a 漢 dog" == typist.end()
    assert capsys.readouterr().out == "\n"
