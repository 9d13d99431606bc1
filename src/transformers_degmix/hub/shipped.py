"""The model that comes with the package.

`from_pretrained(DEGMIX_LITE0_NYUD)` of any class loads it. `pipeline("multi-task-dense-prediction")` without a model
does too. On command lines and in recipes it has a name.
"""

from pathlib import Path


# EfficientNet-Lite0, trained on the photographs of NYUD-v2. Its card is model_cards/degmix_lite0_nyud.md.
DEGMIX_LITE0_NYUD = str(Path(__file__).parents[1] / "checkpoints" / "degmix_lite0_nyud")

# By name.
SHIPPED_MODELS = {"degmix_lite0_nyud": DEGMIX_LITE0_NYUD}
DEFAULT_MODEL = "degmix_lite0_nyud"


def find_model(name: str) -> str:
    """The name of a shipped model -> its directory. Other names, of directories or on the Hub, stay as they are."""
    return SHIPPED_MODELS.get(name, name)
