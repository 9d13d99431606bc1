"""The command `degmix`: one module per subcommand, which parses, calls and prints."""

import multiprocessing
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import NoReturn

from ..version import __version__


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: its line in `degmix --help`.
        extra: the extra of the package that it needs, if any.
    """

    summary: str
    extra: str | None = None


# By module name.
COMMANDS = {
    "predict": Command("predicts all tasks of images, videos and data sets"),
    "demo": Command("serves a page for trying out a model in the browser", "demo"),
    "prepare": Command("makes a data set from the archives of a benchmark, or renders one", "train"),
    "inspect": Command("shows samples of a data set and warns of what looks wrong", "train"),
    "train": Command("trains or fine-tunes a model", "train"),
    "evaluate": Command("scores a model on a data set and writes a report", "train"),
    "compare": Command("puts reports into one table", "train"),
    "explain": Command("shows which task attends to which, and where mixers sample", "train"),
    "export": Command("writes an ONNX file", "onnx"),
    "convert": Command("converts a released checkpoint into a model directory"),
    "push": Command("puts a model directory on the Hub"),
}


def main(command: str | None = None):
    """Runs a subcommand with the arguments of the command line. Without `command`, the first argument names it.

    The exit code is 0, 1 after an error or Ctrl-C (one line reports it), or 2 if the arguments are wrong.
    """
    if command is None:
        parser = ArgumentParser(
            "degmix",
            description="DeGMix: multi-task dense prediction.",
            epilog="\n".join(f"  {name:10} {known.summary}" for name, known in COMMANDS.items())
            + "\n\n`degmix COMMAND --help` lists the options of a command.",
            formatter_class=RawDescriptionHelpFormatter,
        )
        parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
        parser.add_argument("--version", action="version", version=__version__)
        command = parser.parse_args(sys.argv[1:2]).command
        del sys.argv[1]
    sys.argv[0] = f"degmix {command}"  # in messages about arguments
    run_script(partial(_run, command))


def _run(command: str):
    try:
        import_module(f".{command}", __name__).main()
    except ModuleNotFoundError as error:
        extra = COMMANDS[command].extra
        sys.exit(f"error: {error.name} is missing: pip install transformers-degmix" + (f"[{extra}]" if extra else ""))
    except (ImportError, OSError, ValueError) as error:
        # An error of a loader process has its traceback in the message.
        message = str(error)
        sys.exit(f"error: {message.strip().splitlines()[-1] if 'Original Traceback' in message else message}")


def run_script(main: Callable[[], None]):
    """Runs the main function of a script. Ctrl-C ends it at once, with one line and exit code 1."""
    try:
        main()
    except KeyboardInterrupt:
        end_at_once()


def end_at_once() -> NoReturn:
    """Ends the process. By now, the command has closed what it opened.

    Python's own exit deletes all modules and objects one by one. That takes seconds, or a minute on busy cores.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error when a loader process ends
    for child in multiprocessing.active_children():
        child.terminate()
    print("interrupted", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)
