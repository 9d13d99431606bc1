"""A folder of images and label maps as `docs/own_data.md` describes it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


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
