"""What a release consists of besides the code."""

import re
from importlib.resources import files
from pathlib import Path

import yaml

import transformers_degmix


REPO = Path(__file__).parents[1]


def test_version_is_in_one_place_and_has_a_section_in_the_changelog():
    version = transformers_degmix.__version__
    assert re.search(r"^## (\S+)", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert "version" not in yaml.safe_load((REPO / "CITATION.cff").read_text())


def test_package_has_its_data():
    package = files(transformers_degmix)
    for name in ("py.typed", "hub/model_card_template.md", "recipes/nyud_lite.yaml", "recipes/parts/swin_base.yaml"):
        assert (package / name).is_file(), name
