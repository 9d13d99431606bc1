"""The documentation: its commands and its Python run, its recipes are recipes, and its links lead somewhere.

A fenced block is run, or `<!-- not run: REASON -->` stands in the line before it. The blocks of a page run in their
order and in one folder, which has what the page presupposes.
"""

import re
import shlex
from fractions import Fraction
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from commands import run_command
from PIL import Image
from small_data import save_folder
from small_models import BACKBONES, save_small_model

from transformers_degmix.data.rooms import ROOMS_TASKS
from transformers_degmix.inference.video import VideoWriter
from transformers_degmix.training.arguments import parse_arguments


REPO = Path(__file__).parents[1]
README = REPO / "README.md"
PAGES = [README, REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]

BLOCK = re.compile(r"^(?:<!-- not run: (.+) -->\n)?```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Languages of what is read but not run
SHOWN = ("text", "bibtex")

# What makes pages quick: words of theirs -> others, and options of `degmix train` that come last
SMALLER = {
    "--num-images 96 --image-size 96 128": "--num-images 2 --image-size 32 48",
    'load_rooms("train", 32, (96, 128))': 'load_rooms("train", 2, (32, 48))',
}
SHORT_TRAINING = (
    "--max_steps 2 --batch_size 2 --num_train_images 2 --num_eval_images 2 --num_logged_images 1 --num_workers 0 "
    "--image_size [32,48]"
)


class Block(NamedTuple):
    line: int
    language: str
    text: str
    reason_not_to_run: str | None
    file: str | None  # that the paragraph before it names as the recipe


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    blocks = []
    for m in BLOCK.finditer(text):
        paragraph = text[: m.start()].rstrip().rpartition("\n\n")[2]
        file = re.search(r"`(\w+\.yaml)`", paragraph)
        blocks.append(Block(text.count("\n", 0, m.start(3)) + 1, m[2], m[3], m[1], file and file[1]))
    assert text.count("```") == 2 * len(blocks), f"{page.name} has fences that are not at the start of a line"
    return blocks


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """What `make demo` writes, as a small random model of the tasks that the pages name."""
    path = tmp_path_factory.mktemp("demo")
    tasks = {name: ROOMS_TASKS[name] for name in ("semseg", "depth")}
    for name in ("best", "last"):
        save_small_model(path / name, tasks=tasks, backbone_config=BACKBONES["resnet"], num_mixer_layers=1)
    return path


@pytest.fixture
def folder(tmp_path, demo, monkeypatch) -> Path:
    """The current folder, with what the pages presuppose."""
    monkeypatch.chdir(tmp_path)
    rows, columns = np.mgrid[:320, :420]
    photo = Image.fromarray(np.stack([rows % 256, columns % 256, (rows + columns) % 256], axis=2).astype(np.uint8))
    photo.save("photo.jpg")
    Path("photos").mkdir()
    photo.resize((64, 48)).save("photos/small.jpg")
    with open("clip.mp4", "wb") as file, VideoWriter(file, Fraction(25)) as writer:
        for index in range(2):
            writer.write(photo.resize((64, 48)), index / 25)
    Path("outputs").mkdir()
    Path("outputs/demo").symlink_to(demo)
    for name in ("my_data", "my_scans"):
        save_folder(tmp_path / name)
    return tmp_path


def run_commands(monkeypatch, text: str):
    for line in text.replace("\\\n", " ").splitlines():
        if not (words := shlex.split(line, comments=True)):
            continue
        program, command, *words = words
        assert program == "degmix", f"`{program}` is not run here: mark the block"
        words = [name for word in words for name in sorted(glob(word)) or [word]]
        words += SHORT_TRAINING.split() if command == "train" else []
        assert run_command(monkeypatch, command, *words) in (None, 0), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, folder, monkeypatch):
    names = {}
    for line, language, text, reason_not_to_run, file in read_blocks(page):
        if reason_not_to_run or language in SHOWN:
            continue
        for full, smaller in SMALLER.items():
            text = text.replace(full, smaller)
        if language == "python":
            exec(compile("\n" * (line - 1) + text, page, "exec"), names)
        elif language == "bash":
            run_commands(monkeypatch, text)
        elif language == "yaml":
            assert file, f"{page.name}, line {line}: the paragraph before a recipe must name its file"
            Path(file).write_text(text)
            parse_arguments([file])
        else:
            pytest.fail(f"{page.name}, line {line}: a block of language {language!r} is neither run nor marked")


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links {link}"


def test_readme_is_short_and_links_every_page():
    assert README.stat().st_size <= 10_000
    assert {f"docs/{page.name}" for page in (REPO / "docs").glob("*.md")} <= set(LINK.findall(prose(README)))


def test_pages_begin_with_what_they_are_for():
    for page in (REPO / "docs").glob("*.md"):
        assert re.match(r"# .+\n\nAfter this page you can ", page.read_text()), page.name


def test_figures_in_the_readme_are_those_of_the_results():
    section = README.read_text().split("\n## Results\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows and set(rows) <= set((REPO / "docs/results.md").read_text().splitlines())
