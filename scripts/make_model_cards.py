"""Writes a card for each configuration in model_cards/published.yaml: `python scripts/make_model_cards.py [DIR]`."""

import argparse
from pathlib import Path

import yaml

from transformers_degmix.cli import run_script
from transformers_degmix.hub.model_card import card_name, published_card
from transformers_degmix.training.arguments import find_recipe, read_config


REPO = Path(__file__).parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", nargs="?", type=Path, default=REPO / "model_cards", help="receives the cards")
    output_dir = parser.parse_args().output_dir
    for entry in yaml.safe_load((REPO / "model_cards" / "published.yaml").read_text()):
        recipe = read_config(find_recipe(entry["recipe"])) if "recipe" in entry else None
        published_card(entry, recipe).save(output_dir / f"{card_name(entry)}.md")


if __name__ == "__main__":
    run_script(main)
