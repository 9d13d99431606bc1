"""The command `degmix` itself."""

import re
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path

import pytest
import torch
from commands import SCRIPTS, run_command

from transformers_degmix.cli import COMMANDS
from transformers_degmix.cli.arguments import add_device_argument
from transformers_degmix.training.arguments import RECIPES


def test_every_module_is_a_command_with_help(monkeypatch, capsys):
    modules = {path.stem for path in Path(import_module("transformers_degmix.cli").__file__).parent.glob("*.py")}
    assert set(COMMANDS) == modules - {"__init__", "arguments", "splits"}
    for command in COMMANDS:
        assert run_command(monkeypatch, command, "--help") == 0
        assert capsys.readouterr().out.startswith(f"usage: degmix {command} ")


@pytest.mark.parametrize(("accelerator", "device"), [(None, "cpu"), (torch.device("cuda"), "cuda")])
def test_an_accelerator_is_the_default_device(monkeypatch, accelerator, device):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    parser = ArgumentParser()
    add_device_argument(parser)
    assert parser.parse_args([]).device == device
    assert parser.parse_args(["--device", "cuda:1"]).device == "cuda:1"


def test_help_lists_commands_and_recipes(monkeypatch, capsys):
    assert run_command(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name:10} {command.summary}\n" in shown for name, command in COMMANDS.items())
    assert run_command(monkeypatch, "train", "--help") == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {path.stem for path in RECIPES.glob("*.yaml")} <= set(words) and "swin_base" not in words
    assert run_command(monkeypatch, "trian") == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("transformers_degmix.cli.inspect")]:
        monkeypatch.delitem(sys.modules, name)
    message = run_command(monkeypatch, "inspect", "anything")
    assert message == "error: datasets is missing: pip install transformers-degmix[train]"


def test_unknown_recipes_are_refused_with_those_that_there_are(monkeypatch):
    message = run_command(monkeypatch, "train", "nyud_light")
    assert message.startswith("error: there is no file nyud_light, and the recipes of the package are cityscapes, ")
    assert ", nyud_lite, " in message


def test_scripts_are_commands(tmp_path):
    launch = [sys.executable, str(SCRIPTS / "compare_reports.py"), tmp_path]
    done = subprocess.run(launch, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(rf"error: .*{tmp_path}.*\n", done.stderr)


# Commands in the order in which their extras bring more packages; what is imported once stays.
EXTRAS = """
import sys
from importlib import import_module

onnx = {"onnx", "onnxruntime", "onnxscript"}
demo = {"gradio", "trimesh", "datasets", "skimage", "scipy", "pyarrow"}
absent = {*onnx, *demo, "accelerate", "evaluate", "matplotlib", "tensorboard", "av", "pillow_heif", "ray", "timm"}
for commands, extra in ((("predict", "convert", "push"), set()), (("export",), onnx), (("demo",), onnx | demo)):
    sys.modules |= dict.fromkeys(absent - extra)
    for name in extra:
        sys.modules.pop(name, None)
    for command in commands:
        import_module(f"transformers_degmix.cli.{command}")
"""


def test_commands_import_no_more_than_their_extras_bring():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", EXTRAS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


INTERRUPTED = """
import atexit, signal, sys, types
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from transformers_degmix.cli import main

def wait():
    ThreadPoolExecutor().submit(Event().wait)  # without end
    signal.raise_signal(signal.SIGINT)

command = sys.modules["transformers_degmix.cli.compare"] = types.ModuleType("compare")
command.main = wait
atexit.register(print, "cleared away")
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may have it ignored
main("compare")
"""


def test_ctrl_c_waits_for_nothing_and_is_said_in_one_line():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "interrupted\n")


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: path.name)
def test_all_scripts_end_so(path):
    _, last = path.read_text().split('if __name__ == "__main__":\n')
    assert last == "    run_script(main)\n" or re.fullmatch(r'    main\("\w+"\)\n', last)  # a command of `degmix`
