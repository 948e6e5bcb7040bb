"""A conversation in the terminal: questions typed, pictures named, answers printed as they come.

    python -m pytest tests/test_terminal.py
"""

from parts.pictures import load_picture
from parts.settings import InputError

HELP = "/image FILE shows a picture with your next question, /new starts over, /quit or Ctrl-D ends."


def converse(reply, kind, waiting):
    """Questions from the terminal, answered by reply(turns, pictures), until it ends -> their number. The pictures
    `waiting` belong to the next question."""
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
                said = reply([*turns, (asked, None)], [*pictures, *waiting])
                turns = [*turns, (asked, said)]
                pictures = [*pictures, *waiting]
                waiting = []
                answered = answered + 1
        except InputError as error:                  # of one line: the conversation goes on
            print(f"error: {error}")
        except KeyboardInterrupt:                    # of one answer
            print("\n(stopped; this question is forgotten)")


class Typist:
    """Prints an answer as its tokens come; a character of several tokens appears when it is whole."""

    def __init__(self, text):
        self.text, self.ids, self.shown = text, [], ""

    def __call__(self, token):
        self.ids.append(int(token[0]))
        now = self.text.decode(self.ids).strip()
        if not now.endswith("\ufffd"):
            print(now[len(self.shown):], end="", flush=True)
            self.shown = now

    def end(self):
        """Print what is left, end the line -> the whole answer."""
        now = self.text.decode(self.ids).strip()
        print(now[len(self.shown):], flush=True)
        return now
