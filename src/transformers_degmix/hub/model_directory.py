"""Model directories: saved, loaded, and put on the Hub."""

import os
from collections.abc import Mapping
from fnmatch import fnmatch
from os import PathLike
from types import MappingProxyType

import torch
from huggingface_hub import create_repo, upload_folder
from transformers import AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from .. import DeGMixForMultiTaskDensePrediction, DeGMixImageProcessor
from ..files import hub_errors, whole_directory
from .onnx import OnnxModel
from .shipped import find_model


# Patterns of what a model directory on the Hub must hold. All code is written together with the model's.
PUSHED = ("config.json", "model*.safetensors", "preprocessor_config.json", "modeling_degmix.py", "README.md")


def save_model_directory(
    path: str | PathLike,
    model: PreTrainedModel,
    processor: ImageProcessingMixin,
    overwrite: bool = False,
    more: Mapping[str, bytes] = MappingProxyType({}),
):
    """Writes configuration, weights, preprocessing and code for `from_pretrained` as one [`whole_directory`].

    Args:
        path, overwrite: see there.
        model: with its weights.
        processor: its image processor.
        more: other files by name, such as a card.
    """
    with whole_directory(path, overwrite) as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        for name, content in more.items():
            (directory / name).write_bytes(content)


def push_model_directory(path: str | PathLike, repo: str, private: bool = False) -> str:
    """Puts the files of a model directory into a repository on the Hub, in one commit.

    Args:
        path: the directory, with a card.
        repo: its id; made if there is none.
        private: whether it then is private.

    Returns:
        Its address.

    Raises:
        ValueError: the directory does not hold all of [`PUSHED`].
        OSError: the Hub or the way there fails, for a reason of one line.
    """
    names = os.listdir(path) if os.path.isdir(path) else []
    missing = [pattern for pattern in PUSHED if not any(fnmatch(name, pattern) for name in names)]
    if missing:
        raise ValueError(f"{path} is no complete model directory: it lacks {', '.join(missing)}")
    with hub_errors():
        url = create_repo(repo, private=private, exist_ok=True)
        # Weights that an earlier push left in files of other names would lie beside these.
        upload_folder(repo_id=url.repo_id, folder_path=path, delete_patterns="model*.safetensors*")
    return url


def load_model_directory(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[DeGMixForMultiTaskDensePrediction | OnnxModel, ImageProcessingMixin]:
    """Model, in eval mode, and image processor of a shipped model, a directory or the Hub, or a file of `export_onnx`.

    Of such a file both stay on the CPU, in float32.

    Raises:
        ValueError: they cannot be loaded, or weights are missing, or the model is of another class; the message is
            one line.
    """
    try:
        if str(name).endswith(".onnx"):
            model = OnnxModel(name)
            return model, model.processor
        place = find_model(name)
        model, loading = AutoModel.from_pretrained(place, dtype=dtype, output_loading_info=True)
        if not isinstance(model, DeGMixForMultiTaskDensePrediction):
            raise ValueError(f"it is a {type(model).__name__}, not a {DeGMixForMultiTaskDensePrediction.__name__}")
        if loading["missing_keys"]:
            # Transformers would draw them at random, and warn.
            missing = sorted(loading["missing_keys"])
            raise ValueError(f"it lacks weights ({len(missing)}), such as {missing[0]}")
        return model.eval().to(device), DeGMixImageProcessor.from_pretrained(place)
    except Exception as error:  # a wrong name, a broken file, a missing device: each has exceptions of its own
        raise ValueError(f"cannot load {name}: {' '.join(str(error).split())}") from error
