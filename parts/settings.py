"""What every command shares: flags from dataclasses, bad input as one line, devices, JSON, files written whole."""

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import field, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError


class InputError(ValueError):
    """Bad input: the message is one line that says where, and what to do. Commands exit with status 2."""


def first_line(error):
    """The beginning of what a library says, for messages of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


# ---------------------------------------------------------------------------------------------------------------------
# Settings: a dataclass is defaults, flags, help and log
# ---------------------------------------------------------------------------------------------------------------------
def opt(default, help, choices=None, section=""):
    """A field of a settings dataclass, with the help text of its flag. section: title of the part of --help that
    begins here."""
    return field(default=default, metadata={"help": help, "choices": choices, "section": section})


def at_least(settings, least):
    """Refuse numbers of a settings dataclass that are below {field: least}, too large for 64 bits, or not numbers."""
    for name, low in least.items():
        if not low <= getattr(settings, name) < 2**63:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: give at least {low}, below 2^63")


class Extend(argparse.Action):
    """A flag that is given twice adds to what was given before, and takes the place of the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (*(() if before is self.default else before), *values))


def parse(cls, argv=None, prog=None, defaults=(), epilog=""):
    """A --flag for every field; positional fields are those named in cls.POSITIONAL. Bad flags exit with status 2.
    defaults {field: value} replace those of the class."""
    positional = getattr(cls, "POSITIONAL", ())
    cli = argparse.ArgumentParser(prog=prog, description=cls.__doc__, epilog=epilog, allow_abbrev=False,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    part = cli
    for f in fields(cls):
        if f.metadata["section"]:
            part = cli.add_argument_group(f.metadata["section"])
        options = {"default": f.default, "help": f.metadata["help"]}
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options |= {"nargs": "*" if f.name in positional else "+", "metavar": f.name.upper(), "action": Extend}
        else:
            options |= {"type": type(f.default), "choices": f.metadata["choices"]}
            if f.name not in positional and not options["choices"]:
                options["metavar"] = type(f.default).__name__.upper()
        if f.name not in positional:
            part.add_argument("--" + f.name.replace("_", "-"), **options)
        elif f.default:
            part.add_argument(f.name, **{"nargs": "?"} | options)
        else:
            part.add_argument(f.name, **options)
    cli.set_defaults(**dict(defaults))
    return cls(**vars(cli.parse_args(argv)))


def chosen(commands, prog, doc, argv=None):
    """The first word of a command line names one of commands {name: (settings class, function)} -> function, settings.
    Without it, or with --help, the doc is printed: (None, None)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(doc)
        return None, None
    if argv[0] not in commands:
        raise InputError(f"{prog} knows no command {argv[0]!r}: use one of {', '.join(commands)}")
    cls, command = commands[argv[0]]
    return command, parse(cls, argv[1:], f"{prog} {argv[0]}")


def tell(result):
    """The last line of a command that measures: its figures as JSON."""
    if result:                                       # other processes of torchrun have none
        print("result " + json.dumps(result))


def moved(argv, prog, names):
    """Refuse an old spelling of a command, {word: what it is called now}."""
    for word in (argv or [])[:1]:
        if word in names:
            raise InputError(f"{prog} {word} is now {names[word]}")


def run_command(command):
    """Run a command line: bad input is one clear line on stderr and exit status 2, never a traceback."""
    try:
        command()
    except (InputError, OSError, SafetensorError) as error:                     # the latter two: a full disk, no rights
        if os.environ.get("RANK", "0") != "0":      # what all processes meet, the first one says, and torchrun ends all
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def read_json(file, what=""):
    """The object in a JSON file. what: what the file is, for the message."""
    name = f"{what}: {file}" if what else str(file)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be read ({reason}): is it the right file, and complete?") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} holds no JSON object: is it the right file, and complete?")
    return content


def text_lines(file):
    """[(origin, line)] of the lines of a file that hold anything."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}): give the right file, complete"
                         ) from error
    return [(f"{file} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def json_lines(file, *needed):
    """[(origin, object)] of a JSON-lines file, each object with the needed fields."""
    rows = []
    for origin, line in text_lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{origin}: not JSON ({error}): write one object a line") from error
        if absent := [name for name in needed if not isinstance(row, dict) or name not in row]:
            raise InputError(f"{origin}: there is no {absent[0]!r}: each line is an object with {', '.join(needed)}")
        rows.append((origin, row))
    return rows


def whole_lines(*files):
    """The objects of JSON-lines files, without lines that a kill cut short. A file that is not there holds none."""
    rows = []
    for file in filter(Path.exists, files):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextlib.contextmanager
def aside(path):
    """A second name to write a file or a folder under; it is renamed at the end, so nobody ever sees half of it."""
    part = Path(f"{path}.part")
    if part.is_dir():
        shutil.rmtree(part)                         # of a command that was killed
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror or error}): choose a place that exists, with room"
                         ) from error


def write_json(content, file):
    with aside(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def lines_to(file, lines):
    """Write text lines, making the folder where it is missing."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with aside(file) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------
# One stream for each use, so that a change to one leaves all others as they are. Numbers are part of every result: they
# are never given to another use.
STREAMS = {"held out": 1, "pool": 2, "record": 4, "export": 5, "questions": 6, "prompts": 7, "reconstructions": 8,
           "curves": 9, "tokenizer": 10, "pairs": 11, "mix": 12}


def stream(seed, name, *more):
    """Random numbers of one use, and of one sample or step of it."""
    return np.random.default_rng([seed, STREAMS[name], *more])


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------
def device_of(name):
    """--device: "auto" takes CUDA where there is one; a process of torchrun has the GPU of its number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name
    try:
        torch.empty(0, device=name).numpy(force=True)                           # meta tensors hold no numbers
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} is not available here: use cpu, or auto, and no more processes than "
                         "GPUs") from error
    return name


def machine():
    """What a number was measured on, to be stored beside it."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":")[1].strip()
                break
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def memory_gb():
    """Largest memory of this process so far, in 1e9 bytes: GPU memory where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:                             # Windows does not tell
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
