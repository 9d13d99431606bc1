from test_nyud import write_nyud

from transformers_degmix.data.nyud import NYUD
from transformers_degmix.data.prepare import Rooms, describe
from transformers_degmix.hub.model_card import DATA, UNKNOWN_DATA
from transformers_degmix.training.card import describe_data
from transformers_degmix.training.sources import Source


def test_data_are_a_benchmark_if_their_folder_says_so(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    source = Source(dataset=str(folder), train_split="train", eval_split="validation")
    unknown = {"id": "mine", "title": "mine", "holds": "`mine`.", **UNKNOWN_DATA}
    assert describe_data(source) == unknown
    card = describe(NYUD(write_nyud(tmp_path)), {"train": 3}, [], "degmix prepare")
    for text, expected in (
        (card, DATA["nyud"]),
        (card.replace("pretty_name: NYUD-v2", "pretty_name: Predictions for NYUD-v2"), unknown),
        (describe(Rooms("2,1"), {"train": 2}, [], "degmix prepare"), DATA["rooms"]),
    ):
        (folder / "README.md").write_text(text)
        assert describe_data(source) == expected
