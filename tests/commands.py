"""Runs scripts in the process of the tests."""

import runpy
import sys
from pathlib import Path


SCRIPTS = Path(__file__).parents[1] / "scripts"


def run_main(monkeypatch, script: str, *args) -> str | int | None:
    """Runs `scripts/<script>` with these arguments; the message or code with which it exits, `None` if it just ends.

    By its path: imported, the folder's evaluate.py would hide the package of that name.
    """
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}", *map(str, args)])
    try:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    except SystemExit as exit:
        return exit.code
