"""README and docs: links lead somewhere, and every block of code is run or says why not."""

import re
import shlex
from glob import glob
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from PIL import Image
from small_models import BACKBONES, small_model

from transformers_degmix import DeGMixImageProcessorPil
from transformers_degmix.data.rooms import ROOMS_TASKS
from transformers_degmix.hub.model_directory import save_model_directory
from transformers_degmix.training.arguments import parse_arguments


REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")

# Numbers of the docs -> smaller ones, so that it is quick.
SMALLER = {"--num-images 96": "--num-images 2"}
QUICK_TRAINING = (
    "--max_steps 1 --eval_steps 1 --warmup_steps 0 --batch_size 2 --num_train_images 4 --num_eval_images 2"
)


def names(paths) -> list[str]:
    return [path.name for path in paths]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(BLOCK.sub("", page.read_text())):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in headings(target), f"{path}#{anchor}"


def test_the_readme_is_short_and_leads_to_all_pages():
    text = (REPO / "README.md").read_text()
    assert len(text.encode()) <= 10_000
    assert {path for path, _ in LINK.findall(text)} >= {f"docs/{page.name}" for page in PAGES[1:]}


def test_a_block_is_run_or_says_why_not():
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            if block["language"] == "bash" and not block["reason"]:
                assert all(words[0] == "degmix" for words in commands(block["code"])), block["code"]
            assert block["language"] in ("", "python", "bash", "yaml", "bibtex"), block["language"]


def commands(code: str) -> list[list[str]]:
    for long, short in SMALLER.items():
        code = code.replace(long, short)
    lines = (shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pages take for granted: a photo, and the model of the demo, here a small random one."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (360, 480, 3), np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    tasks = {name: ROOMS_TASKS[name] for name in ("semseg", "depth")}  # all that the pages use, quick to export
    model = small_model(tasks=tasks, backbone_config=BACKBONES["resnet"], num_mixer_layers=1)
    save_model_directory("outputs/demo/best", model, DeGMixImageProcessorPil(tasks=model.config.tasks))


WITH_CODE = [page for page in PAGES if any(not block["reason"] for block in BLOCK.finditer(page.read_text()))]


@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_code_runs(page, folder, monkeypatch):
    namespace = {}
    for block in BLOCK.finditer(page.read_text()):
        if block["reason"]:
            continue
        if block["language"] == "python":
            exec(compile(block["code"], f"{page.name}: {block['code'][:40]!r}", "exec"), namespace)
        elif block["language"] == "bash":
            for _, command, *words in commands(block["code"]):
                words = [path for word in words for path in (sorted(glob(word)) if "*" in word else [word])]
                words += shlex.split(QUICK_TRAINING) if command == "train" else []
                assert run_command(monkeypatch, command, *words) in (None, 0), [command, *words]
        elif block["language"] == "yaml":
            Path("recipe.yaml").write_text(block["code"])
            assert parse_arguments(["recipe.yaml"]).model["tasks"]
