"""Shared by all commands: flags from dataclasses, one-line errors, JSON, files written whole, devices."""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import time
import warnings
from dataclasses import field, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError


class Stop(Exception):
    """Raised after a signal once the checkpoint is saved; args[0] is the signal, 0 if another process got it."""


class InputError(ValueError):
    """Bad input. The message is one line with cause and remedy; commands print it and exit with status 2."""


def first_line(error):
    """The first line of a library's error message, cut to fit into one of ours."""
    return shortened((str(error).splitlines() or [type(error).__name__])[0])


def shortened(value, most=200):
    """A value as messages quote it: one line that any terminal prints, of at most so many characters."""
    text = " ".join(str(value).encode(errors="backslashreplace").decode().splitlines())
    return text if len(text) <= most else f"{text[:most - 3]}..."


# ---------------------------------------------------------------------------------------------------------------------
# Settings: a dataclass is defaults, flags, help and log
# ---------------------------------------------------------------------------------------------------------------------
def opt(default, help, choices=None, section=""):
    """A field of a settings dataclass with the help text of its flag. section: title of a new section of --help."""
    return field(default=default, metadata={"help": help, "choices": choices, "section": section})


def at_least(settings, least):
    """Refuse fields of a settings dataclass that are below {field: least}, too large for 64 bits, or NaN."""
    for name, low in least.items():
        if not low <= getattr(settings, name) < 2**63:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)}: give at least {low}, below 2^63")


def check_idle(settings, usual, idle):
    """Refuse fields {reason: names} that do nothing, if they differ from the usual values."""
    for reason, names in idle.items():
        for name in names:
            if getattr(settings, name) != usual[name]:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} {getattr(settings, name)} has no effect, as {reason}: leave it out")


class Extend(argparse.Action):
    """Repeating a flag appends to its values; the first use replaces the default."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before is self.default:
            before = ()
        setattr(namespace, self.dest, (*before, *values))


def parse(cls, argv=None, prog=None, defaults=(), doc=""):
    """A settings dataclass from a command line: a --flag for every field, except for those named in cls.POSITIONAL.
    defaults {field: value} replace those of the class, doc its docstring. Bad flags exit with status 2."""
    positional = getattr(cls, "POSITIONAL", ())
    short = "%(prog)s [--flag value ...]" if fields(cls)[0].metadata["section"] else None       # too many to list
    cli = argparse.ArgumentParser(prog=prog, usage=short, description=doc or cls.__doc__, allow_abbrev=False)
    cli.formatter_class = argparse.RawDescriptionHelpFormatter if doc else argparse.HelpFormatter
    section = cli
    for f in fields(cls):
        if f.metadata["section"]:
            section = cli.add_argument_group(f.metadata["section"])
        options = {"default": f.default, "help": f.metadata["help"]}
        if f.default not in ("", (), False):
            options["help"] += f" (default: {f.default})"
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options |= {"nargs": "*" if f.name in positional else "+", "metavar": f.name.upper(), "action": Extend}
        else:
            options |= {"type": type(f.default), "choices": f.metadata["choices"]}
            if f.name not in positional and not options["choices"]:
                options["metavar"] = type(f.default).__name__.upper()
        if f.name in positional and f.default:
            options.setdefault("nargs", "?")
        flag = f.name if f.name in positional else "--" + f.name.replace("_", "-")
        section.add_argument(flag, **options)
    cli.set_defaults(**dict(defaults))
    return cls(**vars(cli.parse_args(argv)))


def chosen(commands, prog, doc, argv=None):
    """Find the first word of a command line in commands {name: (settings class, function)} -> function, settings.
    Without a command, or with --help, print doc -> None, None."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(doc)
        return None, None
    if argv[0] not in commands:
        raise InputError(f"{prog} has no command {argv[0]!r}: use one of {', '.join(commands)}")
    cls, command = commands[argv[0]]
    return command, parse(cls, argv[1:], f"{prog} {argv[0]}")


def tell(result):
    """Print the last line of a command that measures: its result as JSON."""
    if result:                                      # only the first process has one
        print("result " + json.dumps(result))


def moved(argv, prog, names):
    """Refuse the old name of a command or of a --flag, {old: new}."""
    for word in argv[:1] + [word.split("=")[0] for word in argv if word.startswith("--")]:
        if word in names:
            raise InputError(f"{prog} {word} is now {names[word]}")


def stoppable(work, again):
    """work(); if it is stopped, one line that says how to continue, and exit: 130 after Ctrl-C, else 0."""
    try:
        return work()
    except Stop as stop:
        print(f"stopped and saved; {again}")
        sys.exit(130 if stop.args[0] == signal.SIGINT else 0)
    except KeyboardInterrupt:
        print(f"stopped at once; {again}, from the last checkpoint if one was saved")
        sys.exit(130)


def run_command(command):
    """Run a command: bad input ends in one line on stderr and exit status 2, Ctrl-C in one and 130; no traceback."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")          # one process is no mistake
    status = 0
    try:
        command()
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        status = 130
    except (InputError, OSError, SafetensorError) as error:                     # the last two: disk full, no permission
        if os.environ.get("RANK", "0") != "0":      # if all processes fail, let the first one say why: torchrun stops
            time.sleep(3)                           # the others as soon as it has
        if isinstance(error, OSError) and error.filename:
            error = f"{error.filename} cannot be used ({error.strerror}): check its path, your rights and the disk"
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):
            raise
        print("error: another process has ended: see what it printed", file=sys.stderr)
        status = 1
    # DistributedDataParallel keeps its group alive. A thread of gloo that lets go of a tensor while the interpreter
    # shuts down aborts the process (github.com/pytorch/pytorch/pull/179291): one of several skips the shutdown.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        os._exit(status or 0)
    if status:
        sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def utf8(content, origin=""):
    """The text in bytes. UTF-8, with or without a byte-order mark, is the only encoding that is read: guessing another
    one makes wrong words."""
    fault = "UTF-16 or UTF-32"
    if not content.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" not in content[:100]:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            fault = f"not UTF-8 from byte {error.start} on"
    where = f"{origin}: " if origin else ""
    raise InputError(f"{where}the text is {fault}: save it as UTF-8 (in PowerShell: Out-File -Encoding utf8)")


def read_text(file, name=""):
    """The text of a UTF-8 file. name: of the file in error messages."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{name or file} cannot be read ({error.strerror}): check or replace this file") from error
    return utf8(content, name or file)


def read_json(file, what=""):
    """The object in a JSON file. what: a name for the file in error messages."""
    name = f"{what}: {file}" if what else str(file)
    text = read_text(file, name)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} cannot be read ({error}): check or replace this file") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} holds no JSON object: check or replace this file")
    return content


def text_lines(file):
    """[(origin, line)] of the lines of a file that are not blank."""
    lines = read_text(file).split("\n")
    return [(f"{file} line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def json_lines(file, *needed):
    """[(origin, object)] of a JSON-lines file, each object with the needed fields."""
    rows = []
    for origin, line in text_lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{origin}: not JSON ({error}): write one object per line") from error
        if absent := [name for name in needed if not isinstance(row, dict) or name not in row]:
            raise InputError(f"{origin}: {absent[0]!r} is missing: each line is an object with {', '.join(needed)}")
        rows.append((origin, row))
    return rows


def whole_lines(*files):
    """The objects in JSON-lines files, without lines that a kill cut short. Missing files count as empty."""
    rows = []
    for file in filter(Path.exists, files):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


@contextlib.contextmanager
def aside(path):
    """A temporary name for a file or folder, renamed to `path` once complete: nobody ever finds half of one there."""
    part = Path(f"{path}.part")
    if part.is_dir():
        shutil.rmtree(part)                         # left by a command that was killed
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written ({reason}): choose a folder that exists, and make room") from error


def check_out(file, flag="--out"):
    """Refuse a file that cannot be written, before hours of work for it. Empty: nothing is to be written."""
    if file and (Path(file).is_dir() or not os.access(Path(file).parent, os.W_OK | os.X_OK)):
        raise InputError(f"{flag} {file} cannot be written: give a file in a folder that exists and can be written")


def write_json(content, file):
    with aside(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers
# ---------------------------------------------------------------------------------------------------------------------
# One stream per use, so that a change to one leaves all others as they are. Results depend on these numbers: never
# change one or use it again.
STREAMS = {"held out": 1, "pool": 2, "record": 4, "export": 5, "questions": 6, "prompts": 7, "reconstructions": 8,
           "curves": 9, "tokenizer": 10, "pairs": 11, "mix": 12, "captions": 13, "in turn": 14}


def stream(seed, name, *more):
    """The random numbers of one use, or of one sample or step of it."""
    return np.random.default_rng([seed, STREAMS[name], *more])


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------
def device_of(name):
    """The device of --device: "auto" is CUDA if available. Under torchrun, each process takes its own GPU."""
    given = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":                              # set_device wants an index
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=name).numpy(force=True)                           # refuses "meta", which holds no numbers
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {given} is not available here: use cpu or auto, one process per GPU") from error
    return name


def uses_bf16(config, device):
    """Whether activations are in bfloat16."""
    if config.dtype == "auto" and device.startswith("cuda"):
        return config.pure_bf16 or torch.cuda.is_bf16_supported()
    return config.pure_bf16 or config.dtype == "bfloat16"


def machine():
    """What a number was measured on, to be stored with it."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":")[1].strip()
                break
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def memory_gb():
    """Peak memory of this process so far, in 1e9 bytes: of the GPU if it uses one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:                             # on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
