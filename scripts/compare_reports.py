"""`degmix compare` of this clone."""

from transformers_degmix.cli import main


if __name__ == "__main__":
    main("compare")
