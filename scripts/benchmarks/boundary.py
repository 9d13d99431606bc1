"""Compares `BoundaryMetric` with pyEdgeEval, which wraps the matcher of the BSDS benchmark: F-measures and time.

    pip install pyEdgeEval opencv-python-headless    # builds it, with a C++ compiler
    python scripts/benchmarks/boundary.py --num-images 8

The boundaries are those of Rooms at NYUD-v2's size and tolerance; predictions are made from them with false
boundaries, shifts, gaps, blur and noise. Both sides run one image after another on one core; seconds are processor
time. The whole procedure of pyEdgeEval is timed, and also its matcher alone (correspond_pixels), without the thinning
in Python around it.

The matcher draws random numbers: its F-measures change in the fourth decimal from run to run.
"""

import argparse
import time

import numpy as np
import torch
from pyEdgeEval import correspond_pixels, nms
from pyEdgeEval.preprocess.nms.toolbox import conv_tri, grad2
from pyEdgeEval.preprocess.thin import binary_thin
from scipy.ndimage import gaussian_filter
from skimage.morphology import thin
from tqdm import tqdm

from transformers_degmix.cli import run_script
from transformers_degmix.data.benchmarks import BENCHMARKS
from transformers_degmix.data.rooms import load_rooms
from transformers_degmix.evaluation import BoundaryMetric
from transformers_degmix.evaluation.boundary import THRESHOLDS


IMAGE_SIZE = BENCHMARKS["nyud"].input_size
TOLERANCE = BENCHMARKS["nyud"].edge_tolerance


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=8, metavar="N", help="pyEdgeEval takes minutes for each")
    return parser.parse_args()


def degrade(edge: np.ndarray, index: int) -> np.ndarray:
    """A noisy prediction in [0, 1] of a boundary map: with false boundaries, shifted, with gaps, or blurred."""
    rng = np.random.default_rng(index)
    prediction = 3 * gaussian_filter(edge.astype(float), 1.5)
    match index % 4:
        case 0:
            prediction = np.maximum(prediction, 0.6 * prediction[:, ::-1])
        case 1:
            prediction = np.roll(prediction, (2, 3), axis=(0, 1))
        case 2:
            prediction *= np.clip(0.5 + 15 * gaussian_filter(rng.standard_normal(edge.shape), 15), 0, 1)
        case 3:
            prediction = 2 * gaussian_filter(prediction, 1.5)
    noise = gaussian_filter(rng.standard_normal(edge.shape), 2)
    noise /= noise.std()
    return np.clip(prediction * (1 + 0.3 * noise) + 0.12 * np.abs(noise), 0, 1)


class PyEdgeEval:
    """Counts `(matched predicted, predicted, matched true, true)` by threshold, and the seconds spent on them."""

    def __init__(self):
        self.counts = np.zeros((4, len(THRESHOLDS)))
        self.seconds = self.matcher_seconds = 0.0

    def update(self, prediction: np.ndarray, edge: np.ndarray):
        start = time.process_time()
        dx, dy = grad2(conv_tri(prediction, 4))
        (dxx, _), (dxy, dyy) = grad2(dx), grad2(dy)
        ridges = nms(prediction, np.arctan(dyy * np.sign(-dxy) / (dxx + 1e-5)) % np.pi, r=1, s=5, m=1.01)
        true = binary_thin(edge)
        for index, threshold in enumerate(THRESHOLDS):
            predicted = binary_thin(ridges >= threshold)
            start_match = time.process_time()
            matched_predicted, matched_true, *_ = correspond_pixels(predicted, true, max_dist=TOLERANCE)
            self.matcher_seconds += time.process_time() - start_match
            maps = matched_predicted, predicted, matched_true, true
            self.counts[:, index] += [np.count_nonzero(pixels) for pixels in maps]
        self.seconds += time.process_time() - start

    def f_measure(self) -> np.ndarray:
        matched_predicted, predicted, matched_true, true = self.counts
        precision, recall = matched_predicted / predicted.clip(1), matched_true / true
        return 2 * precision * recall / (precision + recall).clip(1e-12)


def main():
    args = parse_args()
    torch.set_num_threads(1)
    rooms = load_rooms("test", args.num_images, IMAGE_SIZE)
    metric, peer = BoundaryMetric({"num_labels": 1}, TOLERANCE), PyEdgeEval()
    seconds = 0.0
    for index, room in enumerate(progress := tqdm(rooms)):
        edge = np.array(room["edge"]) > 127
        prediction = degrade(thin(edge), index)
        start = time.process_time()
        metric.update(torch.from_numpy(prediction)[None], torch.from_numpy(edge)[None].float())
        seconds += time.process_time() - start
        peer.update(prediction, edge)
        progress.set_postfix(seconds=seconds, peer=peer.seconds)

    matched, predicted, true = metric.sums["counts"].numpy()
    f_measure, peer_f_measure = 2 * matched / (predicted + true), peer.f_measure()
    print(f"{args.num_images} images of {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]}, in brackets: pyEdgeEval")
    print(f"odsF {f_measure.max():.5f} ({peer_f_measure.max():.5f})")
    print(f"largest difference at one threshold: F {np.abs(f_measure - peer_f_measure).max():.5f}, ", end="")
    print(f"predicted pixels {np.abs(predicted - peer.counts[1]).max():.0f} of {predicted.max()}")
    print(f"seconds per image {seconds / args.num_images:.2f} ({peer.seconds / args.num_images:.1f}, ", end="")
    print(f"of which its matcher {peer.matcher_seconds / args.num_images:.1f})")
    print(f"{peer.seconds / seconds:.0f} times as fast, {peer.matcher_seconds / seconds:.0f} times its matcher alone")


if __name__ == "__main__":
    run_script(main)
