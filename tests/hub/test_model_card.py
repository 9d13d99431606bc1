"""The cards of published configurations: in the Hub's format, and no figure in them but those of the table."""

import re
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from commands import run_script
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from transformers import AutoModel

from transformers_degmix.hub.model_card import card_name, published_card
from transformers_degmix.hub.shipped import SHIPPED_MODELS


CARDS = Path(__file__).parents[2] / "model_cards"
PUBLISHED = {card_name(entry): entry for entry in yaml.safe_load((CARDS / "published.yaml").read_text())}
SECTIONS = [
    "Intended use", "Limits", "Bias", "How to get started", "Training data", "Training procedure", "Evaluation",
    "Environmental cost", "Citation",
]  # fmt: skip


def test_cards_are_what_the_script_writes(tmp_path, monkeypatch):
    assert run_script(monkeypatch, "make_model_cards.py", tmp_path) is None
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {f"{name}.md": (CARDS / f"{name}.md").read_text() for name in PUBLISHED}
    # Those of the models that come with the package are written by hand.
    assert {path.stem for path in CARDS.glob("*.md")} == {*PUBLISHED, *SHIPPED_MODELS}


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_card_of_a_model_that_comes_with_the_package(name):
    card, model = ModelCard.load(CARDS / f"{name}.md"), AutoModel.from_pretrained(SHIPPED_MODELS[name])
    assert [line[3:] for line in card.text.splitlines() if line.startswith("## ")] == SECTIONS
    assert f"{model.num_parameters():,} weights" in card.text
    # One score of each task, in the metadata as in the table
    rows = re.findall(r"\| `(\w+)` \| [^|]+ \| ([\d.]+) \|", card.text)
    scores = {result.task_name: (result.metric_value, result.metric_name) for result in card.data.eval_results}
    assert list(scores) == list(model.config.tasks)
    for task, (value, metric) in scores.items():
        assert (task, f"{value}") in rows and metric.endswith("(measured by us)")


@pytest.mark.parametrize("name", PUBLISHED)
def test_card(monkeypatch, name):
    # Refuses metadata and results that are not in its format.
    card, entry = ModelCard.load(CARDS / f"{name}.md"), PUBLISHED[name]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if not huggingface_hub.__version__.startswith("1."):  # which asks the real Hub alone
        with HubServer() as hub:
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            card.validate()
        assert hub.requests["POST", "/api/validate-yaml"] == 1

    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-segmentation", "other")
    assert data.license_name and data.datasets and ("recipe" in entry) == bool(data.base_model)
    assert {result.task_name: result.metric_value for result in data.eval_results} == entry["scores"]
    assert {result.metric_type for result in data.eval_results} == set(data.metrics)
    for result in data.eval_results:
        assert result.metric_name.endswith("(reported by the authors)") and result.source_url.startswith(
            "https://arxiv"
        )
    assert [line[3:] for line in card.text.splitlines() if line.startswith("## ")] == SECTIONS
    for task, score in entry["scores"].items():
        assert any(
            line.startswith(f"| `{task}` |") and line.endswith(f"| {score} |") for line in card.text.splitlines()
        )
    assert "### Measured by us\n\n**Nothing.**" in card.text
    assert "code has no licence" in card.text
    assert "recipe" not in entry or f"degmix train {entry['recipe']}" in card.text
    assert ("degmix convert" in card.text) == ("checkpoint" not in entry)


def test_our_measurements_stand_apart_from_those_of_the_authors():
    entry = PUBLISHED["demt_hrnet_18_nyud"]
    ours = {"scores": {"depth": 0.61}, "note": "`degmix evaluate` on the test split."}
    card = published_card({**entry, "measured": ours}, None)
    results = {(result.task_name, result.metric_name): result for result in card.data.eval_results}
    name = "RMSE m"
    assert results["depth", f"{name} (reported by the authors)"].metric_value == entry["scores"]["depth"]
    assert results["depth", f"{name} (measured by us)"].metric_value == 0.61
    assert len(results) == 5 and results["depth", f"{name} (measured by us)"].source_url is None
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    reported, measured = card.text.split("### Measured by us")
    assert "| 0.61 |" in measured and "Nothing" not in measured and ours["note"] in measured
    assert "| 0.61 |" not in reported and f"| {entry['scores']['depth']} |" in reported
