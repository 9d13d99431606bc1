"""Ctrl-C ends scripts at once."""

import subprocess
import sys
from pathlib import Path

import pytest


SCRIPTS = sorted((Path(__file__).parents[1] / "scripts").glob("*.py"))

SCRIPT = """
import atexit, signal
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from transformers_degmix.interruption import run_script

def main():
    ThreadPoolExecutor().submit(Event().wait)  # without end
    signal.raise_signal(signal.SIGINT)

atexit.register(print, "cleared away")
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may have it ignored
run_script(main)
"""


def test_nothing_is_waited_for_and_one_line_is_said():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", "interrupted\n")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_all_scripts_end_so(path):
    assert path.read_text().endswith('if __name__ == "__main__":\n    run_script(main)\n')
