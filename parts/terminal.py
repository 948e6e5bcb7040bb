"""A conversation in the terminal: questions typed, pictures named, answers printed as they come.

    python -m pytest tests/test_terminal.py
"""

from parts.pictures import load_picture
from parts.settings import InputError

HELP = "/image FILE shows a picture with your next question, /new starts over, /quit or Ctrl-D ends."


def converse(reply, kind, waiting):
    """Questions from the terminal, answered by reply(turns, pictures) -> (turn, pictures in it), until it ends -> their
    number. The pictures `waiting` belong to the next question."""
    print(HELP)
    turns, pictures, answered = [], [], 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return answered
        try:
            if line == "/quit":
                return answered
            if line == "/new":
                turns, pictures, waiting = [], [], []
            elif line.startswith("/image "):
                path = line.removeprefix("/image ").strip().strip("'\"")         # terminals quote a dragged file
                load_picture(path, kind)
                waiting.append(path)
                print(f"({path} is shown with your next question)")
            elif line.startswith("/"):
                print(HELP)
            elif line:
                marks = line.count("<image>")
                if marks not in (0, len(waiting)):
                    raise InputError(f"{marks} <image> marks for {len(waiting)} new pictures: write one each, or none")
                asked = line if marks else "<image>" * len(waiting) + line
                (_, said), drawn = reply([*turns, (asked, None)], [*pictures, *waiting])
                turns = [*turns, (asked, said)]
                pictures = [*pictures, *waiting, *drawn]
                waiting = []
                answered = answered + 1
        except InputError as error:                  # of one line: the conversation goes on
            print(f"error: {error}")
        except KeyboardInterrupt:                    # of one answer
            print("\n(stopped; this question is forgotten)")


class Typist:
    """Prints an answer as it comes: tokens, of which a character of several appears when it is whole, and pictures,
    each saved by save(codes) under the name that is shown."""

    def __init__(self, text, save):
        self.text, self.save, self.ids, self.shown = text, save, [], ""

    def __call__(self, part):
        if not isinstance(part, int):
            self.end()
            print(f"[picture: {self.save(part)}]", flush=True)
            return
        self.ids.append(part)
        now = self.text.decode(self.ids).strip()
        if not now.endswith("\ufffd"):
            print(now[len(self.shown):], end="", flush=True)
            self.shown = now

    def end(self):
        """Print what is left of a stretch of text, and end its line."""
        now = self.text.decode(self.ids).strip()
        if now:
            print(now[len(self.shown):], flush=True)
        self.ids, self.shown = [], ""
