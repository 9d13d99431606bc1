"""The data sets of a run, each labelled for some of the run's tasks."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..data.benchmarks import TASKS
from ..data.columns import check_fields


@contextmanager
def naming_errors(where: str = "") -> Iterator[None]:
    """Puts `where` before the message of a ValueError inside the block.

    An error of a `@strict` dataclass, which says that a value has another type, becomes a ValueError of one line.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    except StrictDataclassError as error:
        cause: BaseException = error
        while cause.__cause__:  # the innermost names type and value
            cause = cause.__cause__
        message, *_ = str(cause).split(". Errors:")  # which repeat it
        raise ValueError(f"{where}{message}") from error


@strict
@dataclass(kw_only=True)
class Source:
    """A data set of a run, and what the run takes from it.

    Attributes:
        name: in messages, tables and cards; `None` for the only data set of a run without `datasets`.
        dataset, columns, train_split, eval_split, num_train_images, num_eval_images: see [`TrainingArguments`].
        tasks: names of the tasks whose labels are read; by default the tasks with a column in the training split.
        weight: its share of the images of an epoch, relative to the other weights. By default, this is its number of
            training images, so that each comes once; for streams, whose lengths are unknown, all have the same weight.
    """

    name: str | None = None
    dataset: str
    columns: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] | None = None
    weight: int | float | None = None
    train_split: str
    eval_split: str
    num_train_images: int | None = None
    num_eval_images: int | None = None

    def __post_init__(self):
        for name in ("num_train_images", "num_eval_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")

    @property
    def title(self) -> str:
        """The start of messages about it."""
        return "" if self.name is None else f"source {self.name!r}: "

    def naming(self) -> AbstractContextManager[None]:
        """Puts the title before the messages of errors inside the block."""
        return naming_errors(self.title)

    def choose(self, tasks: dict[str, dict]) -> dict[str, dict]:
        """The tasks whose labels are read; all if the source names none."""
        return {name: task for name, task in tasks.items() if self.tasks is None or name in self.tasks}

    def maps_classes(self, task: str) -> bool:
        """Whether the stored class ids of the task are mapped to others."""
        column = self.columns.get(task)
        return isinstance(column, dict) and "classes" in column


def parse_sources(datasets: list[dict[str, Any]] | None, shared: dict[str, Any]) -> list[Source]:
    """The sources of a run: its `datasets`, or its only data set.

    Args:
        datasets: of [`TrainingArguments`].
        shared: fields of [`Source`] that the run sets for all sources; a source's own fields override them.

    Raises:
        ValueError: a source has an unknown field or a value that is not allowed, or two have the same name.
    """
    if datasets is None:
        return [Source(**shared)]
    sources = [_parse_source(number, given, shared) for number, given in enumerate(datasets)]
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`datasets` must hold sources of different names, got {names}")
    without = [source.name for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(f"either all sources or none must have a `weight`, but {without} have none")
    return sources


def _parse_source(number: int, given: dict[str, Any], shared: dict[str, Any]) -> Source:
    where = f"source {given.get('name', number)!r} of `datasets`"
    check_fields(where, given, [field.name for field in fields(Source)])
    missing = [name for name in ("name", "dataset") if given.get(name) is None]
    if missing:
        raise ValueError(f"{where} must have the fields {missing}")
    with naming_errors(f"{where}: "):
        source = Source(**{**shared, **given})
    if source.weight is not None and not 0 < source.weight < math.inf:
        raise ValueError(f"{where} must have a positive number as `weight`, got {source.weight!r}")
    if source.tasks is not None and not source.tasks:
        raise ValueError(f"{where} must have some of the run's tasks as `tasks`, got none")
    return source


def check_tasks(sources: list[Source], known: dict[str, dict]):
    """Raises ValueError if a source names a task that the run does not know.

    In `columns`, it may name any task of the benchmarks: the same columns can serve models of fewer tasks.
    """
    for source in sources:
        columns = {"image": {}, **known, **TASKS}
        for given, names, allowed in (("tasks", source.tasks or (), known), ("columns", source.columns, columns)):
            unknown = [name for name in names if name not in allowed]
            if unknown:
                raise ValueError(f"{source.title}`{given}` names {unknown}; the run knows {list(allowed)}")
