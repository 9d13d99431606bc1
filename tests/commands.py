"""Runs commands and scripts in the process of the tests, and says how to run them in one of their own."""

import runpy
import sys
from pathlib import Path

from transformers_degmix.cli import main


SCRIPTS = Path(__file__).parents[1] / "scripts"
DEGMIX = (sys.executable, "-m", "transformers_degmix")


def run_command(monkeypatch, command: str, *args) -> str | int | None:
    """Runs `degmix` with these arguments; the message or code with which it exits, `None` if it just ends."""
    monkeypatch.setattr(sys, "argv", ["degmix", command, *map(str, args)])
    # The process of the tests is to stay.
    monkeypatch.setattr("transformers_degmix.cli.end_at_once", lambda: sys.exit("interrupted"))
    try:
        main()
    except SystemExit as exit:
        return exit.code


def run_script(monkeypatch, script: str, *args) -> str | int | None:
    """The same of `scripts/<script>`."""
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}", *map(str, args)])
    try:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    except SystemExit as exit:
        return exit.code
