"""A folder of images and label maps as `docs/own_data.md` describes it, and maps that look like labels."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def regions(rng: np.random.Generator, values, size: tuple[int, int], length: int = 2) -> np.ndarray:
    """A map of squares, each of a value that is drawn from `values`: a list, or the number below which they are."""
    rows, columns = (np.arange(side) // length for side in size)
    return rng.choice(values, (rows[-1] + 1, columns[-1] + 1))[rows[:, None], columns]


def codes_of_normals(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """8-bit codes of unit vectors that face the camera, different in each pixel."""
    x, y = rng.uniform(-0.5, 0.5, (2, *size))
    normals = np.stack([x, y, np.sqrt(1 - x**2 - y**2)], axis=-1)
    return ((normals + 1) / 2 * 255).round().astype(np.uint8)


def save_folder(folder: Path):
    """Splits of four and three random images with the labels `parts`, `materials` and `depth`.

    The first sample of each split has no parts. The second and the third have null as materials and as depth.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 3)):
        (folder / split).mkdir(parents=True)
        with open(folder / split / "metadata.jsonl", "w") as metadata:
            for index in range(count):
                row = {"file_name": f"{index}.jpg"}
                maps = {
                    "image": rng.integers(0, 256, (32, 48, 3), np.uint8),
                    "parts": rng.integers(0, 3, (32, 48), np.uint8),
                    "materials": rng.integers(0, 3, (32, 48), np.uint8),
                    "depth": rng.integers(0, 3000, (32, 48), np.uint16),
                }
                Image.fromarray(maps.pop("image")).save(folder / split / row["file_name"])
                for position, (name, values) in enumerate(maps.items()):
                    if index == position:
                        row |= {f"{name}_file_name": None} if position else {}
                        continue
                    row[f"{name}_file_name"] = f"{index}_{name}.png"
                    Image.fromarray(values).save(folder / split / row[f"{name}_file_name"])
                metadata.write(json.dumps(row) + "\n")
