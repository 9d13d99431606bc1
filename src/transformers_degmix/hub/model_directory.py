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


# Patterns of files that a model directory on the Hub must have. All code is written together with modeling_degmix.py.
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
        path, overwrite: as there.
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
        repo: id of the repository, which is created if it is missing.
        private: whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the directory does not have all of [`PUSHED`].
        OSError: the Hub or the connection fails; the message is one line.
    """
    names = os.listdir(path) if os.path.isdir(path) else []
    missing = [pattern for pattern in PUSHED if not any(fnmatch(name, pattern) for name in names)]
    if missing:
        raise ValueError(f"{path} is not a complete model directory: it lacks {', '.join(missing)}")
    with hub_errors():
        url = create_repo(repo, private=private, exist_ok=True)
        # An earlier push may have left weights in files of other names.
        upload_folder(repo_id=url.repo_id, folder_path=path, delete_patterns="model*.safetensors*")
    return url


def load_model_directory(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[DeGMixForMultiTaskDensePrediction | OnnxModel, ImageProcessingMixin]:
    """The model, in eval mode, and the image processor of a shipped model, a directory, the Hub or an ONNX file.

    An ONNX file is one of [`export_onnx`]. It stays on the CPU, in float32.

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
