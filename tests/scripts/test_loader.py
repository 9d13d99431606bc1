import re

import pytest
from commands import run_script
from PIL import Image


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Runs the script's `main` in this process: arguments -> its output, or the message with which it exits."""

    def run(*args):
        capsys.readouterr()
        return run_script(monkeypatch, "benchmarks/loader.py", *args) or capsys.readouterr().out

    return run


def test_stages_make_up_the_whole(benchmark):
    rate, *stages = benchmark("--num-images", "3", "--size", "32", "48").splitlines()
    per_second = re.fullmatch(r"([\d.]+) samples per second on one core: 32 x 48, semseg, depth, normals, edge", rate)
    milliseconds = [float(re.match(r" *([\d.]+) ms +\d+%  \w+", stage)[1]) for stage in stages]
    assert len(stages) == 7 and min(milliseconds) > 0
    assert sum(milliseconds) == pytest.approx(1000 / float(per_second[1]), rel=0.05)


@pytest.mark.parametrize("torchvision", [False, pytest.param(True, marks=pytest.mark.vision)])
def test_processors_are_compared(benchmark, torchvision):
    heading, *rows = benchmark("--processors", "--size", "12", "16").splitlines()
    backends = heading.removeprefix("photo         resized with").split()
    assert backends == (["pil", "torchvision"] if torchvision else ["pil"])
    photos = [re.match(r" *(\d+ x +\d+) +(-|[A-Z]+) ", row).groups() for row in rows]
    filters = [filter.name for filter in Image.Resampling]
    assert photos[0] == ("12 x   16", "-")
    assert photos[1:] == [(size, name) for size in ("24 x   32", "48 x   64") for name in filters]
    assert all(len(re.findall(r"\d\.\d ms", row)) == len(backends) for row in rows)


def test_rooms_that_cannot_be(benchmark):
    assert "error: `num_images` must be 1 or more, got 0" in benchmark("--num-images", "0")
    assert "error: `image_size` must be" in benchmark("--size", "16", "48")
