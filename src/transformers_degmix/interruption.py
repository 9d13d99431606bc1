"""Ctrl-C in scripts."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable


def run_script(main: Callable[[], None]):
    """Runs the main function of a script, which Ctrl-C ends with one line and exit code 1.

    What the function has opened is closed by then. The rest ends at once: Python would clear away all modules and
    objects one by one, which takes seconds, and a minute where other processes take the cores.
    """
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises an error where a loader ends
        for child in multiprocessing.active_children():
            child.terminate()
        print("interrupted", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)
