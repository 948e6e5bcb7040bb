"""Claims about conversations in the terminal (parts/terminal.py); what is said there is claimed in test_eval.py."""

import torch

from parts.terminal import Typist


def test_words_appear_as_they_come(both_texts, capsys):
    """Never half a character; together they are the answer, each stretch in a line."""
    text = both_texts["emu3"]
    typist, shown = Typist(text, None), []
    for token in text.encode(" a \u6f22 dog"):
        typist(token)
        shown.append(capsys.readouterr().out)
    assert len([part for part in shown if part]) > 2 and "".join(shown) == "a \u6f22 dog"
    typist.end()
    assert capsys.readouterr().out == "\n"


def test_a_picture_is_named_where_it_comes(both_texts, capsys):
    """A terminal shows no pictures: it is saved, and its file stands between the words."""
    text, saved = both_texts["emu3"], []
    typist = Typist(text, lambda codes: saved.append(codes) or "dog.png")
    codes = torch.zeros(2, 2, dtype=torch.long)
    for part in (*text.encode(" a dog"), codes, *text.encode("there")):
        typist(part)
    typist.end()
    assert capsys.readouterr().out == "a dog\n[picture: dog.png]\nthere\n" and saved == [codes]


def test_an_answer_that_is_a_picture_alone_has_no_empty_line(both_texts, capsys):
    """Nothing was said before it."""
    typist = Typist(both_texts["emu3"], lambda codes: "cat.png")
    typist(torch.zeros(1, dtype=torch.long))
    typist.end()
    assert capsys.readouterr().out == "[picture: cat.png]\n"
