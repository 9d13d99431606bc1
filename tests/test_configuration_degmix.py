import json

import pytest
from small_models import ALL_KINDS, BACKBONES
from transformers import AutoConfig, SwinConfig

from transformers_degmix import DeGMixConfig


def test_defaults_are_swin_t_on_nyud():
    config = DeGMixConfig()
    assert config.backbone_config.model_type == "swin"
    assert config.backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    assert {name: task["kind"] for name, task in config.tasks.items()} == {
        "semseg": "segmentation",
        "depth": "depth",
        "normals": "normals",
        "edge": "boundary",
    }
    assert [task["loss_weight"] for task in config.tasks.values()] == [1, 1, 10, 50]
    assert [task["num_labels"] for task in config.tasks.values()] == [40, 1, 3, 1]
    assert config.tasks["edge"]["pos_weight"] == 0.8


def test_every_kind_has_the_weight_of_the_paper():
    tasks = DeGMixConfig(tasks=ALL_KINDS).tasks
    assert [task["loss_weight"] for task in tasks.values()] == [1, 2, 5, 1, 10, 50]


def test_file_keeps_everything_and_the_order_of_tasks(tmp_path):
    tasks = {name: ALL_KINDS[name] for name in ("normals", "semseg", "edge", "depth")}
    config = DeGMixConfig(
        tasks=tasks, backbone_config=BACKBONES["convnextv2"], interaction_scope="image", hidden_size=64
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DeGMixConfig
    assert loaded.tasks == config.tasks and list(loaded.tasks) == list(tasks)
    assert loaded.tasks["semseg"]["id2label"][4] == "class 4"
    assert loaded.backbone_config.model_type == "convnextv2" and loaded.hidden_size == 64
    assert loaded.to_json_string() == config.to_json_string()
    assert json.loads((tmp_path / "config.json").read_text())["tasks"][0]["name"] == "normals"


def test_tasks_attend_to_all_or_to_some(tmp_path):
    tasks = {name: dict(ALL_KINDS[name]) for name in ("semseg", "depth", "normals", "edge")}
    tasks["depth"]["attends_to"] = ["depth", "semseg"]
    tasks["semseg"]["attends_to"] = ["semseg", "depth"]
    tasks["edge"]["attends_to"] = ["edge"]
    config = DeGMixConfig(tasks=tasks)
    config.save_pretrained(tmp_path)
    for same in (config, AutoConfig.from_pretrained(tmp_path)):
        assert [same.attended(task) for task in tasks] == [["semseg", "depth"]] * 2 + [list(tasks), ["edge"]]
    # all of them, in whatever order, is the default
    config = DeGMixConfig(tasks={"edge": {**ALL_KINDS["edge"], "attends_to": ["edge"]}})
    assert config.tasks["edge"]["attends_to"] is None


@pytest.mark.parametrize(
    "attends_to",
    [
        {"depth": ["depth", "nothing"]},  # no such task
        {"depth": ["semseg"]},  # not itself
        {"depth": ["depth", "semseg"]},  # semseg would bring the others
        {"depth": ["depth", "depth", "semseg"], "semseg": ["semseg"]},  # twice
        {"depth": []},
        {"depth": "depth"},
    ],
)
def test_tasks_cannot_attend_to_that(attends_to):
    tasks = {name: {**ALL_KINDS[name], "attends_to": attends_to.get(name)} for name in ("semseg", "depth", "normals")}
    with pytest.raises(ValueError, match=r"`tasks\['depth'\]\['attends_to'\]` must be"):
        DeGMixConfig(tasks=tasks)


def test_backbone_as_dict():
    backbone = SwinConfig(embed_dim=48, out_features=["stage2", "stage4"])
    config = DeGMixConfig(backbone_config=backbone.to_dict())
    assert config.backbone_config.to_dict() == backbone.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": {}}, "`tasks` is empty"),
        ({"tasks": {"keys": {"kind": "depth"}}}, "'keys'"),
        ({"tasks": [{"kind": "depth"}]}, "`tasks` as a list.* `name`.*None"),
        ({"tasks": [{"name": "d", "kind": "depth"}] * 2}, "`tasks` as a list.* different `name`.*'d', 'd'"),
        ({"tasks": {"d": {"kind": ["depth"]}}}, r"`tasks\['d'\]\['kind'\]`.*\['depth'\]"),
        ({"tasks": {"two words": {"kind": "depth"}}}, "'two words'"),
        ({"tasks": {"d": {"kind": "dept"}}}, r"`tasks\['d'\]\['kind'\]`.*boundary.*'dept'"),
        ({"tasks": {"d": {}}}, r"`tasks\['d'\]\['kind'\]`.*None"),
        ({"tasks": {"d": {"kind": "depth", "pos_weight": 0.5}}}, r"tasks\['d'\].*pos_weight.*loss_weight"),
        ({"tasks": {"d": {"kind": "depth", "num_labels": 2}}}, r"\['num_labels'\]` must be 1.*got 2"),
        ({"tasks": {"d": {"kind": "depth", "loss_weight": -1}}}, r"\['loss_weight'\].*-1"),
        ({"tasks": {"d": {"kind": "depth", "loss_weight": float("nan")}}}, r"\['loss_weight'\].*nan"),
        ({"tasks": {"s": {"kind": "segmentation"}}}, r"\['num_labels'\].*None"),
        ({"tasks": {"s": {"kind": "segmentation", "num_labels": 256}}}, r"\['num_labels'\].*256"),
        ({"tasks": {"s": {"kind": "segmentation", "num_labels": True}}}, r"\['num_labels'\].*True"),
        ({"tasks": {"s": {"kind": "segmentation", "num_labels": 2, "id2label": {0: "a"}}}}, r"\['id2label'\]"),
        ({"tasks": {"s": {"kind": "segmentation", "num_labels": 1, "id2label": ["a"]}}}, r"id2label.*dictionary"),
        ({"tasks": {"s": {"kind": "segmentation", "num_labels": 1, "id2label": {"a": "b"}}}}, r"\['id2label'\]"),
        (
            {"tasks": {"s": {"kind": "segmentation", "num_labels": 2, "id2label": {0: 1, 1: "b"}}}},
            r"\['id2label'\]` must be names that are texts",
        ),
        ({"tasks": [{"name": True, "kind": "depth"}]}, "name True: names must be identifiers"),
        ({"tasks": {"image": {"kind": "depth"}}}, "'image', which data sets have for another column"),
        (
            {"tasks": {"d": {"kind": "depth"}, "d_confidence": {"kind": "depth"}}},
            "'d_confidence', which data sets have for a column about 'd'",
        ),
        ({"tasks": {"d": {"kind": "depth", "loss_weight": True}}}, r"\['loss_weight'\].*True"),
        ({"tasks": {"s": {"kind": "segmentation", "num_labels": 2, "ignore_empty": 1}}}, r"\['ignore_empty'\].*got 1"),
        ({"tasks": {"d": {"kind": "depth", "ignore_empty": True}}}, r"tasks\['d'\].*ignore_empty.*loss_weight"),
        ({"tasks": {"d": {"kind": "depth", "log_loss": 1}}}, r"\['log_loss'\].*true or false.*got 1"),
        ({"tasks": {"d": {"kind": "depth", "gradient_weight": -1}}}, r"\['gradient_weight'\].*at least 0.*-1"),
        ({"tasks": {"n": {"kind": "normals", "gradient_weight": 1}}}, r"tasks\['n'\].*gradient_weight.*loss_weight"),
        ({"tasks": {"e": {"kind": "boundary", "pos_weight": 1.0}}}, r"\['pos_weight'\].*1.0"),
        ({"hidden_size": 0}, "`hidden_size`.*0"),
        ({"hidden_size": 15, "num_attention_heads": 1}, "`hidden_size`.*even.*15"),
        ({"num_attention_heads": 3}, r"`num_attention_heads`.*256.*3"),
        ({"num_mixer_layers": -1}, "`num_mixer_layers`.*-1"),
        ({"gating_intermediate_size": 33}, "`gating_intermediate_size`.*33"),
        ({"interaction_scope": "pixel"}, "`interaction_scope`.*token.*'pixel'"),
        ({"interaction_reduction": 2}, "`interaction_reduction`.*image.*2"),
        ({"attention_norm_eps": 0.0}, "`attention_norm_eps` must be above 0, got 0.0"),
        ({"attention_norm_eps": float("nan")}, "`attention_norm_eps`.*nan"),
        ({"head_hidden_size": 0}, "`head_hidden_size`.*0"),
        ({"backbone_config": {"model_type": "swim"}}, "`backbone_config`.*'swim'"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DeGMixConfig(**fields)
