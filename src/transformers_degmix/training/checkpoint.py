"""The state of a training run in one file, which appears whole or not at all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from ..files import write_whole


def save_checkpoint(path: Path, parts: dict[str, Any], arguments: dict[str, Any], accelerator: Accelerator):
    """Writes the states of a run's parts and of all processes' random number generators, and the run's arguments.

    All processes must call this. The file is written beside `path`, then renamed.

    Args:
        path: of the file.
        parts: name -> object with `state_dict` and `load_state_dict`; states hold only tensors, numbers and texts.
        arguments: what the run was started with.

    Raises:
        OSError: the file cannot be written; a file that was at `path` stays.
    """
    # Of PyTorch, from which dropout and stochastic depth draw.
    generators = gather_object([{"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}])
    if accelerator.is_main_process:
        states = {name: part.state_dict() for name, part in parts.items()}
        checkpoint = {"parts": states, "generators": generators, "arguments": arguments}
        with writing(path):
            write_whole(path, lambda file: torch.save(checkpoint, file))


def load_checkpoint(path: Path, parts: dict[str, Any], arguments: dict[str, Any], accelerator: Accelerator):
    """Sets parts and random number generators to what [`save_checkpoint`] wrote.

    Args:
        path: of the file.
        parts, arguments: as for [`save_checkpoint`].

    Raises:
        ValueError: the file is no checkpoint, or of a run with other arguments; the message names them.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["arguments"]
    except Exception as error:  # PyTorch's parser raises many types
        raise ValueError(f"{path} is no checkpoint of a training run: {error}") from error
    changed = [name for name in arguments if _comparable(saved.get(name)) != _comparable(arguments[name])]
    if changed:
        listed = ", ".join(f"`{name}` was {saved.get(name)!r} and is {arguments[name]!r}" for name in changed)
        raise ValueError(f"{path} is of a run with other arguments: {listed}")
    for name, part in parts.items():
        part.load_state_dict(checkpoint["parts"][name])
    generators = checkpoint["generators"][accelerator.process_index]
    torch.set_rng_state(generators["cpu"])
    torch.cuda.set_rng_state_all(generators["cuda"][: torch.cuda.device_count()])  # there may have been more devices


def _comparable(value: Any) -> Any:
    """The value of an argument with texts in place of NaN, which does not equal itself."""
    return json.loads(json.dumps(value), parse_constant=str)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of PyTorch and safetensors while they write a file into OSErrors that name it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}") from error
