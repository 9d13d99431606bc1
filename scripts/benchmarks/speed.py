"""Measures time and memory of the model against the textbook formulation of the same function.

    python scripts/benchmarks/speed.py --output outputs/benchmark
    python scripts/benchmarks/speed.py --sizes 256x256 512x512 512x1024 --tasks 1 2 4 8 --output outputs/benchmark
    python scripts/benchmarks/speed.py --compile --onnx --published --output outputs/benchmark
    python scripts/benchmarks/speed.py --large 1024 2048 4096 --output outputs/benchmark
    python scripts/benchmarks/speed.py --single-task --output outputs/benchmark
    python scripts/benchmarks/speed.py --busy 512 1024 2048 4096 --output outputs/benchmark

The textbook (tests/textbook.py, which PYTHONPATH=tests finds) has the same parameters and gives the same numbers with
explicit tokens, `nn.MultiheadAttention`, loops over the tasks and `F.grid_sample`. Functions are called in turns, and
the shortest time of each counts: on a machine that also does other things, ratios hold, but seconds may not. "Head" is
all that follows the backbone. Parameters and images are random. Writes report.json, report.md and pictures.

On a CPU, the decoder takes pixels in portions (`DeGMixModel.CPU_PORTION`). `--busy` compares portions of several
sizes, with one thread and with two, on idle cores and beside a process that computes on each of them. The quickest
portion can differ. On busy cores, threads wait for each other, and the shortest time says little: the table has
medians and the longest time of a single pass.
"""

import argparse
import copy
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import transformers
import yaml
from PIL import Image
from small_models import random_labels
from textbook import textbook_head
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import is_timm_available, logging

from transformers_degmix import (
    DeGMixConfig,
    DeGMixForDepthEstimation,
    DeGMixForMultiTaskDensePrediction,
    DeGMixForNormalEstimation,
    DeGMixForSemanticSegmentation,
    DeGMixImageProcessor,
    MultiTaskDensePredictionPipeline,
)
from transformers_degmix.cli import run_script
from transformers_degmix.configuration_degmix import NYUD_TASKS
from transformers_degmix.data.benchmarks import BENCHMARKS
from transformers_degmix.files import check_writable, whole_directory
from transformers_degmix.loss_degmix import multi_task_loss
from transformers_degmix.training.arguments import TrainingArguments, parse_arguments


ROOT = Path(__file__).parents[2]


SINGLE_TASK_CLASSES = {
    model_class.kind: model_class
    for model_class in (DeGMixForDepthEstimation, DeGMixForNormalEstimation, DeGMixForSemanticSegmentation)
}
LARGE_WAYS = ("resized", "windows", "whole")
Table = list[dict[str, Any]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="directory to create for the report")
    parser.add_argument("--recipe", default="nyud", help="default: nyud, with Swin-T")
    parser.add_argument("--size", type=parse_size, help="HEIGHTxWIDTH (default: the benchmark's, 425x560 for NYUD-v2)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: 5)")
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=[], help="show time against image size")
    parser.add_argument("--tasks", type=int, nargs="+", default=[], help="show time against the number of tasks")
    parser.add_argument(
        "--large", type=int, nargs="+", default=[], help="show the pipeline's memory against image sides (Linux)"
    )
    parser.add_argument(
        "--large-ways",
        nargs="+",
        default=list(LARGE_WAYS),
        choices=LARGE_WAYS,
        help="images resized to the benchmark's size, in windows of that size, or whole as they are (default: all)",
    )
    parser.add_argument("--single-task", action="store_true", help="compare with the models of one task")
    parser.add_argument(
        "--busy",
        type=int,
        nargs="+",
        default=[],
        metavar="PIXELS",
        help="compare portions of so many pixels, on idle and on busy cores, with one thread and two (Linux): minutes",
    )
    parser.add_argument("--published", action="store_true", help="count operations beside the authors' figures")
    parser.add_argument("--compile", action="store_true", help="measure the head with torch.compile too")
    parser.add_argument("--onnx", action="store_true", help="measure the whole model in onnxruntime too: minutes")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="by autocast")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.busy and args.device != "cpu":
        parser.error(f"--busy compares portions, which only a CPU takes: it needs `--device cpu`, got {args.device!r}")
    if any(portion < 1 for portion in args.busy):
        parser.error(f"--busy needs portions of at least 1 pixel, got {args.busy}")
    return args


def parse_size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, got {text!r}") from None
    return height, width


class FixedBackbone(nn.Module):
    """Returns the feature maps that it was given, whatever the image, so that the head can be measured alone."""

    def __init__(self, feature_maps: tuple[Tensor, ...]):
        super().__init__()
        self.feature_maps = feature_maps

    def forward(self, pixel_values: Tensor) -> BackboneOutput:
        return BackboneOutput(feature_maps=self.feature_maps)


class Machine:
    """Runs and measures on a device."""

    def __init__(self, device: str, dtype: str, rounds: int):
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self.rounds = rounds

    def run(self, function: Callable[[], Any]) -> float:
        """Seconds that one call takes."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            start = time.perf_counter()
            function()
            self.wait()
            return time.perf_counter() - start

    def wait(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def compare(self, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Shortest seconds of each function, see `take_turns`."""
        return {name: min(times) for name, times in self.take_turns(functions).items()}

    def take_turns(self, functions: dict[Any, Callable[[], Any]]) -> dict[Any, list[float]]:
        """Seconds of all calls of each function. They are called in turns, after a first call that does not count."""
        for function in functions.values():
            self.run(function)
        rows = [{name: self.run(function) for name, function in functions.items()} for _ in range(self.rounds)]
        return {name: [row[name] for row in rows] for name in functions}

    def peak_memory(self, function: Callable[[], Any]) -> int:
        """The most bytes that a call has allocated at any time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(function)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            self.run(function)
        now = peak = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return peak


def process_memory(field: str) -> int:
    """Bytes that the process has in memory now, `VmRSS`, or had at most, `VmHWM` (Linux)."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[field].split()[0])


class MatrixProduct:
    """A product of large matrices, into existing memory: allocating it would take a part of the time."""

    def __init__(self, device: torch.device):
        self.left, self.right, self.product = (torch.randn(4096, 4096, device=device) for _ in range(3))
        self.operations = 2 * 4096**3  # two per multiply-add

    def __call__(self):
        torch.mm(self.left, self.right, out=self.product)


def build_model(run: TrainingArguments, tasks: dict[str, dict] | None = None) -> DeGMixForMultiTaskDensePrediction:
    """A model of a recipe's configuration, for its benchmark's tasks if none are given, with random parameters.

    Raises:
        ValueError: the recipe has no benchmark.
    """
    if tasks is None:
        if run.benchmark is None:
            raise ValueError(f"the recipe must be for one of the benchmarks {sorted(BENCHMARKS)}")
        benchmark = BENCHMARKS[run.benchmark]
        tasks = benchmark.task_fields()
        for name, classes in benchmark.classes.items():
            tasks[name]["num_labels"] = len(classes[0])
    return DeGMixForMultiTaskDensePrediction(DeGMixConfig(**{**run.model, "tasks": tasks}))


@contextmanager
def inference_passes(
    model: DeGMixForMultiTaskDensePrediction, images: Tensor
) -> Iterator[dict[str, Callable[[], Any]]]:
    """The head, and the textbook's."""
    model.eval()
    backbone = model.model.backbone
    with torch.inference_mode():
        feature_maps = backbone(images).feature_maps
        model.model.backbone = FixedBackbone(feature_maps)
        yield {
            "ours": lambda: model(images),
            "textbook": lambda: textbook_head(model, feature_maps, tuple(images.shape[-2:])),
        }
    model.model.backbone = backbone


def measure_inference(
    machine: Machine, model: DeGMixForMultiTaskDensePrediction, images: Tensor
) -> tuple[Table, Table, float]:
    """Time and memory of the head against the textbook's, where its time goes, and operations a second of a GEMM."""
    product, backbone = MatrixProduct(machine.device), model.model.backbone
    with inference_passes(model, images) as passes:
        seconds = machine.compare({"product": product, "backbone": lambda: backbone(images), **passes})
        memory = {name: machine.peak_memory(function) for name, function in passes.items()}
        gemm_rate = product.operations / seconds["product"]
        blocks = profile_blocks(machine, model, images, gemm_rate)
    table = [
        compared("head, inference: time", "s", seconds["ours"], seconds["textbook"]),
        compared("head, inference: peak memory", "MB", memory["ours"] / 1e6, memory["textbook"] / 1e6),
    ]
    operations = sum(row["GFLOP"] for row in blocks)
    blocks.append({"block": "head, all", **block_figures(seconds["ours"], operations, seconds["ours"], gemm_rate)})
    blocks.append({"block": "backbone", "ms": 1e3 * seconds["backbone"]})
    return table, blocks, gemm_rate


@contextmanager
def training_steps(
    machine: Machine, model: DeGMixForMultiTaskDensePrediction, images: Tensor
) -> Iterator[dict[str, Callable[[], None]]]:
    """Forward, loss, backward and update of the head, and the same of the textbook's."""
    model.train()
    size = tuple(images.shape[-2:])
    labels = {
        task: label.to(machine.device) for task, label in random_labels(model.config.tasks, len(images), *size).items()
    }
    backbone = model.model.backbone
    with torch.no_grad():
        feature_maps = tuple(feature_map.requires_grad_() for feature_map in backbone(images).feature_maps)
    model.model.backbone = FixedBackbone(feature_maps)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step(forward: Callable[[], dict[str, Tensor]]):
        loss, _ = multi_task_loss(forward(), labels, model.config.tasks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    yield {
        "ours": lambda: step(lambda: model(images).logits),
        "textbook": lambda: step(lambda: textbook_head(model, feature_maps, size)[0]),
    }
    model.model.backbone = backbone


def measure_training(machine: Machine, model: DeGMixForMultiTaskDensePrediction, images: Tensor) -> Table:
    """A training step of the head against the textbook's."""
    with training_steps(machine, model, images) as steps:
        seconds = machine.compare(steps)
        memory = {name: machine.peak_memory(step) for name, step in steps.items()}
    return [
        compared("head, training step: time", "s", seconds["ours"], seconds["textbook"]),
        compared("head, training step: peak memory", "MB", memory["ours"] / 1e6, memory["textbook"] / 1e6),
    ]


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process computes on each core that this one may use, until the block ends or this process is gone."""
    program = (
        "import os, sys\n"
        "os.sched_setaffinity(0, [int(sys.argv[1])])\n"
        "print(flush=True)\n"
        "while os.getppid() == int(sys.argv[2]):\n"
        "    sum(range(100_000))\n"
    )
    processes = []
    try:
        for core in os.sched_getaffinity(0):
            command = [sys.executable, "-c", program, str(core), str(os.getpid())]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in processes:
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def measure_busy(
    machine: Machine, model: DeGMixForMultiTaskDensePrediction, images: Tensor, portions: list[int]
) -> Table:
    """Time of the head in portions of several sizes against the textbook's, on idle cores and on busy ones."""

    def in_portions(portion: int, function: Callable[[], Any]) -> Callable[[], Any]:
        def call():
            model.model.CPU_PORTION = portion
            function()

        return call

    table, num_threads = [], torch.get_num_threads()
    ways = {"inference": inference_passes(model, images), "training step": training_steps(machine, model, images)}
    loads = {"idle": nullcontext, "busy": busy_cores}
    with tqdm(total=8, desc="busy") as progress:
        for what, way in ways.items():
            with way as functions:
                turns = {portion: in_portions(portion, functions["ours"]) for portion in portions}
                turns["textbook"] = functions["textbook"]
                for (cores, load), threads in product(loads.items(), (1, 2)):
                    torch.set_num_threads(threads)
                    with load():
                        seconds = machine.take_turns(turns)
                    textbook = seconds.pop("textbook")
                    for portion, ours in seconds.items():
                        table.append(
                            {
                                "head": what,
                                "cores": cores,
                                "threads": threads,
                                "portion": portion,
                                "ours / textbook": statistics.median(ours) / statistics.median(textbook),
                                "s": statistics.median(ours),
                                "longest s": max(ours),
                                "textbook s": statistics.median(textbook),
                                "textbook longest s": max(textbook),
                            }
                        )
                    progress.update()
    torch.set_num_threads(num_threads)
    del model.model.CPU_PORTION  # the class's value again
    return table


def compared(what: str, unit: str, ours: float, textbook: float) -> dict[str, Any]:
    return {"what": what, "ours / textbook": ours / textbook, "unit": unit, "ours": ours, "textbook": textbook}


def profile_blocks(
    machine: Machine, model: DeGMixForMultiTaskDensePrediction, images: Tensor, gemm_rate: float
) -> Table:
    """Time and operations of each block of the head, of all tasks together."""
    decoder = model.model
    layers = [layer for mixer in decoder.mixers.values() for layer in mixer]
    blocks = {
        "fusion": [decoder.fusion],
        "mixers: channel mixing": [
            module for layer in layers for module in (layer.channel_mixing, layer.channel_norm)
        ],
        "mixers: deformable": [module for layer in layers for module in (layer.spatial_mixing, layer.spatial_norm)],
        "interaction": [decoder.interaction],
        "query": [decoder.query],
        "gating": [decoder.gating],
        "heads": list(model.heads.values()),
    }
    seconds, operations = {}, {}
    for _ in range(machine.rounds):
        spent, starts, handles = dict.fromkeys(blocks, 0.0), {}, []
        for name, modules in blocks.items():

            def enter(module, args):
                machine.wait()
                starts[module] = time.perf_counter()

            def leave(module, args, outputs, name=name):
                machine.wait()
                spent[name] += time.perf_counter() - starts[module]

            for module in modules:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        total = machine.run(lambda: model(images))
        for handle in handles:
            handle.remove()
        spent["activations, residuals, layouts, resizing"] = total - sum(spent.values())
        seconds = {name: min(seconds.get(name, total), value) for name, value in spent.items()}

    counter = FlopCounterMode(display=False)
    with counter:
        model(images)
    by_module = counter.get_flop_counts()
    names = {module: f"{type(model).__name__}.{name}" for name, module in model.named_modules()}
    for name, modules in blocks.items():
        operations[name] = sum(sum(by_module.get(names[module], {}).values()) for module in modules) / 1e9
    # The projections that are merged once for all pixels are prepared outside of the blocks' calls.
    rest = counter.get_total_flops() / 1e9 - sum(operations.values())
    return [
        {"block": name, **block_figures(value, operations.get(name, rest), sum(seconds.values()), gemm_rate)}
        for name, value in seconds.items()
    ]


def block_figures(seconds: float, operations: float, total: float, gemm_rate: float) -> dict[str, float]:
    return {
        "ms": 1e3 * seconds,
        "share": seconds / total,
        "GFLOP": operations,
        "of the GEMM rate": 1e9 * operations / seconds / gemm_rate,
    }


def measure_compiled(machine: Machine, model: DeGMixForMultiTaskDensePrediction, images: Tensor) -> Table:
    """The head compiled for one size against the head in eager mode."""
    with inference_passes(model, images) as passes:
        compiled = torch.compile(model, fullgraph=True)
        preparation = machine.run(lambda: compiled(images))
        seconds = machine.compare({"eager": passes["ours"], "compiled": lambda: compiled(images)})
    return against_eager("head, inference", seconds, {"compiled": preparation})


def measure_onnx(machine: Machine, model: DeGMixForMultiTaskDensePrediction, images: Tensor) -> Table:
    """The whole model in onnxruntime against eager mode."""
    import onnxruntime

    from transformers_degmix.hub.onnx import export_onnx

    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        preparation = machine.run(lambda: export_onnx(model, path))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {"pixel_values": images.cpu().numpy()}
    with torch.inference_mode():
        functions = {"eager": lambda: model(images), "onnxruntime": lambda: session.run(None, inputs)}
        seconds = machine.compare(functions)
    return against_eager("whole model, inference", seconds, {"onnxruntime": preparation})


def against_eager(what: str, seconds: dict[str, float], preparation: dict[str, float]) -> Table:
    return [
        {what: name, "time / eager": value / seconds["eager"], "s": value, "preparation s": preparation.get(name)}
        for name, value in seconds.items()
    ]


def measure_sizes(machine: Machine, model: DeGMixForMultiTaskDensePrediction, sizes: list[tuple[int, int]]) -> Table:
    """Time of the whole model and its parts against the size of the image."""
    model.eval()
    table = []
    with torch.inference_mode():
        for height, width in tqdm(sizes, desc="sizes"):
            images = torch.randn(1, 3, height, width, device=machine.device)
            functions = {"model": lambda: model(images), "backbone": lambda: model.model.backbone(images)}
            seconds = machine.compare(functions)
            pixels = height * width / 1e6
            table.append(
                {
                    "size": f"{height} x {width}",
                    "megapixels": pixels,
                    "model s": seconds["model"],
                    "backbone s": seconds["backbone"],
                    "model s / megapixel": seconds["model"] / pixels,
                }
            )
    return table


def measure_large(
    machine: Machine,
    run: TrainingArguments,
    model: DeGMixForMultiTaskDensePrediction,
    sides: list[int],
    ways: list[str],
) -> Table:
    """Peak memory of the process while the pipeline predicts a photo, beyond its memory before.

    It includes NumPy's arrays and PIL's images, which PyTorch's profiler does not see, but not memory of a GPU.
    """
    height, width = run.image_size
    processor = DeGMixImageProcessor(
        tasks=model.config.tasks, do_resize=True, size={"shortest_edge": height, "longest_edge": width}
    )
    predict = MultiTaskDensePredictionPipeline(model=model.eval(), image_processor=processor)
    options = {"resized": {}, "windows": {"window_size": (height, width)}, "whole": {"do_resize": False}}
    table = []
    for side, way in tqdm(list(product(sides, ways)), desc="large"):
        photo = Image.effect_noise((side, side), 64).convert("RGB")
        Path("/proc/self/clear_refs").write_text("5")  # resets `VmHWM`
        before = process_memory("VmRSS")
        seconds = machine.run(lambda: predict(photo, **options[way]))
        memory = process_memory("VmHWM") - before
        table.append(
            {
                "size": f"{side} x {side}",
                "way": way,
                "peak MB": memory / 1e6,
                "bytes a pixel": memory / side**2,
                "s": seconds,
            }
        )
    return table


def measure_tasks(machine: Machine, run: TrainingArguments, images: Tensor, counts: list[int]) -> Table:
    """Time of the whole model against the number of tasks."""
    table = []
    with torch.inference_mode():
        for count in tqdm(counts, desc="tasks"):
            kinds = list(NYUD_TASKS.values())
            tasks = {f"task_{i}": kinds[i % len(kinds)] for i in range(count)}
            model = build_model(run, tasks).eval().to(machine.device)
            functions = {"model": lambda: model(images), "backbone": lambda: model.model.backbone(images)}
            seconds = machine.compare(functions)
            head = seconds["model"] - seconds["backbone"]
            table.append({"tasks": count, "model s": seconds["model"], "head s": head, "head s / task": head / count})
    return table


def measure_single_task(machine: Machine, model: DeGMixForMultiTaskDensePrediction, images: Tensor) -> Table:
    """Parameters, operations and time of models of one task, beside the model of all.

    Each task first attends to all, which needs the mixers of all, and then only to itself.
    """
    model.eval()
    size = tuple(images.shape[-2:])
    work = count_work(lambda: type(model)(model.config), size)
    table = [{"predicts": "all tasks", "attends to": "all", **work, "s / all": 1.0}]
    for task, fields in tqdm(model.config.tasks.items(), desc="single task"):
        if fields["kind"] not in SINGLE_TASK_CLASSES:
            continue
        for attends_to in ("all", "itself"):
            config = copy.deepcopy(model.config)
            config.single_task = task
            config.tasks[task]["attends_to"] = None if attends_to == "all" else [task]
            build = partial(SINGLE_TASK_CLASSES[fields["kind"]], config)
            single = build().eval().to(machine.device)
            with torch.inference_mode():
                seconds = machine.compare({"all": partial(model, images), "one": partial(single, images)})
            table.append(
                {
                    "predicts": task,
                    "attends to": attends_to,
                    **count_work(build, size),
                    "s / all": seconds["one"] / seconds["all"],
                }
            )
    return table


def count_work(build: Callable[[], nn.Module], size: tuple[int, int]) -> dict[str, float]:
    """Parameters of a model, and operations on one image of (height, width)."""
    with FakeTensorMode(), torch.no_grad():
        model = build().eval()  # before counting, because it runs the backbone too
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *size))
    return {
        "parameters, millions": model.num_parameters() / 1e6,
        "G multiply-adds": counter.get_total_flops() / 2e9,
    }


def count_published() -> Table:
    """Parameters and operations of the published configurations, beside the authors' figures.

    Configurations with timm's backbones are left out if timm is not installed.
    """
    table = []
    for published in tqdm(yaml.safe_load((ROOT / "model_cards" / "published.yaml").read_text()), desc="published"):
        if "recipe" not in published or published["benchmark"] != "nyud":
            continue
        run = parse_arguments([published["recipe"]])
        backbone_config = run.model.get("backbone_config", {})
        if backbone_config.get("model_type") == "timm_backbone" and not is_timm_available():
            continue
        figures = count_work(partial(build_model, run), run.image_size)
        table.append(
            {
                "model": f"{published['model']} {published['backbone']}",
                "parameters, millions": figures["parameters, millions"],
                "by the authors": published.get("parameters"),
                "G multiply-adds": figures["G multiply-adds"],
                "G by the authors": published.get("gflops"),
            }
        )
    return table


def describe_machine(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.open() if line.startswith("model name")), name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{name}, {torch.get_num_threads()} threads"


def format_table(rows: Table) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        return "-" if value is None else str(value)

    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Table, horizontal: str, label: str, lines: list[str], path: Path):
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for line in lines:
        axes.plot([row[horizontal] for row in rows], [row[line] for row in rows], marker="o", label=line)
    axes.set(xlabel=label, ylabel="seconds", ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main():
    args = parse_args()
    logging.set_verbosity_error()
    try:
        check_writable(args.output)
        torch.manual_seed(0)
        machine = Machine(args.device, args.dtype, args.rounds)
        run = parse_arguments([str(args.recipe)])
        model = build_model(run).to(machine.device)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    images = torch.randn(args.batch_size, 3, *(args.size or run.image_size), device=machine.device)

    with tqdm(total=2, desc="head") as progress:
        against, blocks, gemm_rate = measure_inference(machine, model, images)
        progress.update()
        against += measure_training(machine, model, images)
        progress.update()
    tables = {"Against the textbook": against, "Where the head's time goes": blocks}
    if args.busy:
        tables["Beside busy processes"] = measure_busy(machine, model, images, args.busy)
    if args.compile:
        tables["Compiled"] = measure_compiled(machine, model, images)
    if args.onnx:
        tables["ONNX"] = measure_onnx(machine, model, images)
    if args.sizes:
        tables["Time against size"] = measure_sizes(machine, model, args.sizes)
    if args.large:
        tables["Memory against size"] = measure_large(machine, run, model, args.large, args.large_ways)
    if args.tasks:
        tables["Time against the number of tasks"] = measure_tasks(machine, run, images, args.tasks)
    if args.single_task:
        tables["Models of one task"] = measure_single_task(machine, model, images)
    if args.published:
        tables["Published configurations"] = count_published()

    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(machine.device),
        "gemm_gflops": gemm_rate / 1e9,
        "images": list(images.shape),
        "dtype": args.dtype,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tables": tables,
    }
    facts = "\n".join(f"- {name}: {value}" for name, value in report.items() if name != "tables")
    text = "\n\n".join(
        ["# Benchmark", facts, *(f"## {name}\n\n{format_table(rows)}" for name, rows in tables.items())]
    )
    with whole_directory(args.output) as directory:
        (directory / "report.json").write_text(json.dumps(report, indent=2))
        (directory / "report.md").write_text(text + "\n", encoding="utf-8")
        if args.sizes:
            rows = tables["Time against size"]
            draw(rows, "megapixels", "megapixels", ["model s", "backbone s"], directory / "size.png")
        if args.tasks:
            rows = tables["Time against the number of tasks"]
            draw(rows, "tasks", "number of tasks", ["model s", "head s"], directory / "tasks.png")
    print(text)


if __name__ == "__main__":
    run_script(main)
