"""Predictions for data sets: the output is a data set that training reads, made by many processes and machines.

The rows are cut into shards. Each shard becomes one Parquet file, which appears whole or not at all and is never made
again. A run that was killed goes on where it was, with any number of processes. [`predict_dataset`] shares the shards
among the processes of Accelerate's launchers by position. With [`predict_dataset_with_ray`], Ray gives them to free
workers.
"""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm import tqdm

from ..data.splits import PROCESS_TIMEOUT
from .output_folder import OutputFolder, Summary
from .shards import Job, ShardPredictor


def predict_dataset(job: Job, device: str | torch.device = "cpu") -> Summary | None:
    """Predicts a split, or what is left of it. Processes that one of Accelerate's launchers started share the shards.

    Args:
        job: what to predict.
        device: of the model. With "cuda", each of several processes has its own GPU.

    Returns:
        What was done, in the main process; `None` in others.

    Raises:
        ValueError: the job cannot be done; nothing was written.
        OSError: a file cannot be written, or rows cannot be read. What is done stays.
    """
    # Processes finish at different times, and the first may wait long for the last.
    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=PROCESS_TIMEOUT)
    with state.main_process_first():  # it downloads and renders
        predictor = ShardPredictor(job, state.device if state.num_processes > 1 else device)
    folder = OutputFolder(predictor)
    with folder.claimed() if state.is_main_process else nullcontext():
        # One list for all: in their own, files that others have just written would be missing.
        missing = broadcast_object_list([folder.missing()])[0]
        mine = missing[state.process_index :: state.num_processes]
        with tqdm(total=predictor.count(mine), unit="image", disable=not state.is_main_process) as bar:
            for shard in mine:
                predictor(shard, bar.update)
        seconds = add_up(gather_object([predictor.predictor.seconds]))  # waits for all
        return folder.finish(seconds) if state.is_main_process else None


def predict_dataset_with_ray(job: Job, num_workers: int = 1, device: str = "cpu") -> Summary:
    """[`predict_dataset`] by workers of Ray Data, on this machine or on the cluster that Ray is connected to.

    Ray starts the workers, gives each one shard at a time, and restarts workers that die; their shard is made again.
    Workers read the input and write the output themselves: all machines must see both under the same names.

    Args:
        job: what to predict.
        num_workers: number of models; each has a CPU, or a GPU if `device` is "cuda".
        device: of the models.

    Raises:
        ImportError: the extra `ray` is not installed.
        ValueError, OSError: as [`predict_dataset`].
    """
    import ray

    kind = torch.device(device).type
    folder = OutputFolder(ShardPredictor(job))
    with folder.claimed():
        missing = folder.missing()
        seconds = []
        if missing:
            shards = ray.data.from_items(missing, override_num_blocks=len(missing))
            spent = shards.map_batches(
                RayWorker,
                batch_size=1,
                fn_constructor_args=(job, kind, Image.MAX_IMAGE_PIXELS),
                # No shard waits for a slow or dead worker while another is free.
                compute=ray.data.ActorPoolStrategy(
                    size=min(num_workers, len(missing)), max_tasks_in_flight_per_actor=1
                ),
                **({"num_gpus": 1} if kind == "cuda" else {"num_cpus": 1}),
            )
            for row in spent.iter_rows():
                if failure := row.pop("failure"):
                    raise OSError(failure)
                seconds.append(row)
        return folder.finish(add_up(seconds))


class RayWorker:
    """Ray's actor for [`predict_dataset_with_ray`]: one model, which predicts the shards that it is given.

    Args:
        job, device: as for [`ShardPredictor`].
        max_image_pixels: `PIL.Image.MAX_IMAGE_PIXELS` of the process that started Ray.
    """

    def __init__(self, job: Job, device: str, max_image_pixels: int | None):
        Image.MAX_IMAGE_PIXELS = max_image_pixels
        self.predictor = ShardPredictor(job, device)

    def __call__(self, shards: dict[str, Any]) -> dict[str, list[Any]]:
        before, failure = dict(self.predictor.predictor.seconds), ""
        try:
            for shard in shards["item"]:
                self.predictor(int(shard))
        except OSError as error:  # Ray would raise another error, without the message
            failure = str(error)
        seconds = self.predictor.predictor.seconds
        return {"failure": [failure], **{name: [seconds[name] - before[name]] for name in seconds}}


def add_up(seconds: list[dict[str, float]]) -> dict[str, float]:
    """The sums of the seconds of several [`Predictor`]s."""
    return {name: sum(spent[name] for spent in seconds) for name in ("all", "model", "input")}
