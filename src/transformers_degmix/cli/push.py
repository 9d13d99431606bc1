"""Puts a model directory on the Hub.

    degmix push MODEL_DIR REPO [--private]

Weights, configuration, image processor, code, card and pictures go up in one commit: all of them, or none.
"""

import argparse

from ..hub.model_directory import push_model_directory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", help="what training or `degmix convert` wrote, with a card as README.md")
    parser.add_argument("repo", help="id of the repository, which is created if it is missing")
    parser.add_argument("--private", action="store_true", help="make it private if it is new")
    args = parser.parse_args()
    try:
        print(push_model_directory(args.model_dir, args.repo, args.private))
    except OSError as error:
        raise OSError(f"{args.model_dir} is not pushed; the same command tries again: {error}") from error
