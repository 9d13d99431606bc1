"""The data set that the options of a command name. Needs the extra `train`."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from ..data.splits import DataSplit
from ..training.arguments import TrainingArguments, find_recipe, parse_arguments, read_config
from ..training.sources import Source


def read_split(args: Namespace) -> tuple[DataSplit, Source | None]:
    """The split that the options of [`~cli.arguments.add_data_arguments`] name, and its source in `config`, if given.

    Raises:
        ValueError, OSError: `config` is not a recipe, or has several sources and none of this name.
    """
    if args.config is None:
        return DataSplit(args.dataset, args.split, args.num_images, args.image_size), None
    run, source = read_source(args.config, args.dataset, streaming=False)
    size = args.image_size or run.image_size
    return DataSplit(source.dataset, args.split, args.num_images, size, source.columns), source


def read_source(config: Path, dataset: str, **fields: Any) -> tuple[TrainingArguments, Source]:
    """A run with other `fields`, and its source for a data set: by name if the run has several sources.

    Raises:
        ValueError, OSError: `config` is not a recipe, or has several sources and none of this name.
    """
    if read_config(find_recipe(str(config))).get("datasets") is None:
        fields["dataset"] = dataset
    run = parse_arguments([str(config)], **fields)
    for source in run.sources:
        if source.name in (None, dataset):
            return run, source
    names = [source.name for source in run.sources]
    raise ValueError(f"{dataset!r} is none of the sources of {config}: {names}")
