"""Measures `degmix predict --dataset`: images a second by one process, two, and Ray, and how long the model waits.

    python scripts/benchmarks/dataset.py [--num-images 500] [--size 240 320] [--model MODEL] [--output report.json]

The images are Rooms as JPEG. Each process has one thread, which reads, predicts and writes one image after the other:
the times are of the work itself. Starting up is not counted. The plain predictor decodes and predicts the same
images in the same run, and keeps nothing. Ray is left out if it is not installed.

    python scripts/benchmarks/dataset.py --estimate report.json [--photos 10_000_000] [--gpus 8 64] [...]

computes from that report what so many photographs cost on GPUs. The time of a CPU core and the size on disk are the
measured ones, scaled by the number of pixels. The time of a GPU is not measured: it is twice the multiply-adds,
divided by the GPU's peak and by the share of the peak that is assumed to be reached.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch

from transformers_degmix.cli import run_script
from transformers_degmix.cli.arguments import add_model_argument
from transformers_degmix.data.rooms import load_rooms
from transformers_degmix.files import write_whole
from transformers_degmix.hub.model_directory import load_model_directory
from transformers_degmix.images_degmix import decode_image
from transformers_degmix.inference.predictor import Predictor


SUMMARY = re.compile(r"([\d.]+) s, of which the model waited ([\d.]+) s for input and ([\d.]+) s for output")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_argument(parser)
    parser.add_argument("--num-images", type=int, default=500, help="number of rooms (default 500)")
    parser.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("H", "W"), help="of the rooms")
    parser.add_argument("--output", type=Path, help="file for the report, which --estimate reads")
    estimate = parser.add_argument_group("estimate")
    estimate.add_argument("--estimate", type=Path, metavar="REPORT", help="compute from a report rather than measure")
    estimate.add_argument("--photos", type=int, default=10_000_000, help="how many (default 10 million)")
    estimate.add_argument("--photo-size", type=int, nargs=2, default=(425, 560), metavar=("H", "W"), help="of each")
    estimate.add_argument(
        "--gmacs", type=float, default=109, help="10^9 multiply-adds of a photo (default 109: Swin-T)"
    )
    estimate.add_argument("--gpus", type=int, nargs="+", default=[8, 64], help="numbers of GPUs (default 8 64)")
    estimate.add_argument("--cores", type=int, default=12, help="CPU cores beside each GPU (default 12)")
    # NVIDIA A100 Tensor Core GPU data sheet: bfloat16, dense.
    estimate.add_argument("--peak", type=float, default=312, help="TFLOP/s of a GPU (default 312: A100, bfloat16)")
    estimate.add_argument("--utilisation", type=float, default=0.2, help="assumed share of the peak (default 0.2)")
    estimate.add_argument("--price", type=float, default=2.0, help="of a GPU for an hour (default 2)")
    return parser.parse_args()


def save_rooms(folder: Path, num_images: int, size: tuple[int, int]) -> list[bytes]:
    """Makes a data set of rooms as JPEG files, which are returned too."""
    files = []
    for image in load_rooms("test", num_images, size, num_proc=os.cpu_count())["image"]:
        file = BytesIO()
        image.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    cells = [{"bytes": file, "path": None} for file in files]
    features = datasets.Features({"image": datasets.Image()})
    folder.mkdir()
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(folder / "test.parquet")
    return files


def time_plain_predictor(model: str, files: list[bytes]) -> dict[str, float]:
    predictor = Predictor(*load_model_directory(model), num_workers=0)
    for warm_up in (files[:1], files):
        predictor.seconds = dict.fromkeys(predictor.seconds, 0.0)
        for _ in predictor(warm_up, lambda file: decode_image(BytesIO(file)), lambda *_: None):
            pass
    return predictor.seconds


def time_command(words: list[str], num_processes: int) -> dict[str, float]:
    """Seconds by part, summed over a command's processes, as it prints them."""
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command += ["-m", "transformers_degmix", "predict", *words]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if not (found := SUMMARY.search(run.stdout)):
        sys.exit(f"error: {' '.join(command)}: {run.stderr}")
    total, reading, writing = map(float, found.groups())
    return {"all": total, "input": reading, "output": writing, "model": total - reading - writing}


def measure(args: argparse.Namespace) -> dict:
    """The report."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    rows = {}
    with TemporaryDirectory() as folder:
        source = Path(folder, "rooms")
        files = save_rooms(source, args.num_images, tuple(args.size))
        seconds = time_plain_predictor(args.model, files)
        rows["plain predictor"] = {"processes": 1, **seconds, "output": 0.0}
        words = ["--model", args.model, "--dataset", str(source), "--split", "test", "--num-workers", "0"]
        # Two for each process, so that neither waits long for the other.
        words += ["--num-shards", str(min(4, args.num_images))]
        variants = {"1 process": (1, []), "2 processes": (2, []), "Ray, 2 workers": (1, ["--engine", "ray"])}
        for name, (num_processes, options) in variants.items():
            if options and not importlib.util.find_spec("ray"):
                continue
            options = [*options, "--workers", "2"] if options else []
            output = Path(folder, name)
            seconds = time_command([*words, *options, "--output-dataset", str(output)], num_processes)
            rows[name] = {"processes": 2 if options else num_processes, **seconds}
            written = sum(file.stat().st_size for file in output.glob("data/*"))
    for row in rows.values():
        row["images_per_second"] = args.num_images * row["processes"] / row["all"]
    return {
        "model": args.model,
        "num_images": args.num_images,
        "size": list(args.size),
        "bytes_per_image": written / args.num_images,
        "rows": rows,
    }


def table(report: dict) -> Iterator[str]:
    """The lines that say what was measured."""
    plain = report["rows"]["plain predictor"]["images_per_second"]
    size = " x ".join(map(str, report["size"]))
    yield f"{report['num_images']} rooms of {size}, {report['model']}, {report['bytes_per_image'] / 1e3:.0f} kB each"
    yield ""
    yield "| | images a second | ratio to the plain predictor | model waited for input | for output |"
    yield "| --- | --- | --- | --- | --- |"
    for name, row in report["rows"].items():
        shares = " | ".join(f"{row[part] / row['all']:.0%}" for part in ("input", "output"))
        rate = row["images_per_second"]
        yield f"| {name} | {rate:.2f} | {rate / plain:.2f} | {shares} |"


def estimate(report: dict, args: argparse.Namespace) -> Iterator[str]:
    """The lines that say what many photos cost."""
    row = report["rows"]["1 process"]
    pixels = args.photo_size[0] * args.photo_size[1] / (report["size"][0] * report["size"][1])
    core = {part: pixels * row[part] / report["num_images"] for part in ("input", "output")}
    seconds = {
        "decoding": core["input"] / args.cores,
        "model": 2 * args.gmacs / (1e3 * args.peak * args.utilisation),
        "writing": core["output"] / args.cores,
    }
    # Reading and writing share the cores; the model runs meanwhile.
    on_cores = seconds["decoding"] + seconds["writing"]
    slowest = max(seconds["model"], on_cores)
    size = " x ".join(map(str, args.photo_size))
    stored = pixels * report["bytes_per_image"]
    yield f"a photo of {size}: {pixels:.2f} times the pixels of the measured ones"
    yield f"- decoding: {core['input'] * 1e3:.2f} ms of a core, {seconds['decoding'] * 1e3:.2f} ms on {args.cores}"
    yield (
        f"- model: 2 x {args.gmacs:g} G / ({args.peak:g} T x {args.utilisation:g}) = {seconds['model'] * 1e3:.2f} ms "
        "of a GPU (assumed)"
    )
    yield f"- writing: {core['output'] * 1e3:.2f} ms of a core, {seconds['writing'] * 1e3:.2f} ms on {args.cores}"
    bound = "the model" if seconds["model"] >= on_cores else max(("decoding", "writing"), key=seconds.__getitem__)
    balanced = (core["input"] + core["output"]) / seconds["model"]
    yield f"- bottleneck: {bound}; a GPU needs {balanced:.0f} cores beside it"
    yield f"- {args.photos:,} photos become {args.photos * stored / 1e12:.1f} TB"
    yield ""
    yield "| GPUs | photos a second | hours | money | written a second |"
    yield "| --- | --- | --- | --- | --- |"
    for gpus in args.gpus:
        hours = args.photos * slowest / gpus / 3600
        rate = gpus / slowest
        yield f"| {gpus} | {rate:.0f} | {hours:.1f} | {hours * gpus * args.price:.0f} | {rate * stored / 1e6:.0f} MB |"


def main():
    args = parse_args()
    if args.estimate:
        lines = estimate(json.loads(args.estimate.read_text()), args)
    else:
        report = measure(args)
        if args.output:
            write_whole(args.output, lambda file: file.write(json.dumps(report, indent=2).encode()))
        lines = table(report)
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
