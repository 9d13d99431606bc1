"""Released checkpoints -> configuration, parameters and model directories; everything else is refused by name."""

import os
import pickle
import re
import subprocess
import sys
import types
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from commands import DEGMIX, run_command
from released_weights import MODELS, load_fixture, nyud_shapes, released_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel

import transformers_degmix  # noqa: F401 (registers the model)
from transformers_degmix import DeGMixForMultiTaskDensePrediction
from transformers_degmix.files import whole_directory
from transformers_degmix.hub.conversion import convert_checkpoint, convert_state_dict, load_released_checkpoint


NYUD, PASCAL, DEMT = MODELS
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nyud() -> dict[str, torch.Tensor]:
    return released_state_dict(NYUD)


@pytest.fixture(scope="module")
def pascal() -> dict[str, torch.Tensor]:
    return released_state_dict(PASCAL)


@pytest.fixture(scope="module")
def expected(nyud) -> dict[str, torch.Tensor]:
    return convert_state_dict(nyud)[1]


def assert_same(parameters: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def on_meta(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


# Architecture


@pytest.mark.parametrize(
    ("embed_dim", "depths", "num_heads", "window_size", "num_parameters"),
    [
        (96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 33_198_779),
        (96, [2, 2, 18, 2], [3, 6, 12, 24], 7, 54_516_683),
        (128, [2, 2, 18, 2], [4, 8, 16, 32], 7, 93_102_117),
        (192, [2, 2, 18, 2], [6, 12, 24, 48], 7, 202_713_305),
        (128, [2, 2, 18, 2], [4, 8, 16, 32], 12, None),
    ],
    ids=["tiny", "small", "base", "large", "base-window12"],
)
def test_full_size_architectures(embed_dim, depths, num_heads, window_size, num_parameters):
    config, parameters = convert_state_dict(on_meta(nyud_shapes(embed_dim, depths, num_heads, window_size)))
    swin = config.backbone_config
    assert (swin.embed_dim, swin.depths, swin.num_heads) == (embed_dim, depths, num_heads)
    assert (swin.window_size, swin.patch_size, swin.mlp_ratio, swin.qkv_bias) == (window_size, 4, 4.0, True)
    with torch.device("meta"):
        model = DeGMixForMultiTaskDensePrediction(config)
    unused = {name for name in model.state_dict() if name not in parameters}
    assert unused == {"model.backbone.swin.layernorm.weight", "model.backbone.swin.layernorm.bias"}
    if num_parameters is not None:
        assert model.num_parameters() == num_parameters + 2 * 8 * embed_dim


def test_degmix_architecture(pascal):
    config, _ = convert_state_dict(pascal)
    assert (config.hidden_size, config.num_mixer_layers, config.num_attention_heads) == (256, 2, 2)
    assert (config.use_gating, config.gating_intermediate_size, config.head_hidden_size) == (True, 512, 45)
    assert list(config.tasks) == ["semseg", "human_parts", "sal", "normals", "edge"]
    assert [task["loss_weight"] for task in config.tasks.values()] == [1, 2, 5, 10, 50]
    assert config.tasks["semseg"]["id2label"][20] == "tv monitor"
    assert config.tasks["human_parts"]["id2label"][1] == "head"
    assert config.tasks["human_parts"]["ignore_empty"] and not config.tasks["semseg"]["ignore_empty"]
    assert config.tasks["edge"]["pos_weight"] == 0.95


def test_demt_architecture():
    config, _ = convert_state_dict(released_state_dict(DEMT))
    assert (config.num_mixer_layers, config.num_attention_heads, config.use_gating) == (1, 4, False)
    assert config.tasks["semseg"]["id2label"][39] == "other prop"
    assert config.tasks["edge"]["pos_weight"] == 0.8


def test_other_widths_are_read_off(nyud):
    sizes = {256: 64, 512: 128, 768: 192, 45: 10}  # the gate's half is a 256, too
    resized = {
        key: tensor.new_zeros([sizes.get(size, size) for size in tensor.shape]) if key.startswith("head.") else tensor
        for key, tensor in nyud.items()
    }
    config, _ = convert_state_dict(resized)
    assert (config.hidden_size, config.gating_intermediate_size, config.head_hidden_size) == (64, 128, 10)


def test_order_of_tasks_is_that_of_the_keys(nyud):
    order = ["edge", "semseg", "normals", "depth"]
    key = "head.final_logits.{}.{}".format
    last = {key(task, name): nyud[key(task, name)] for task in order for name in ("weight", "bias")}
    config, parameters = convert_state_dict({**{k: v for k, v in nyud.items() if k not in last}, **last})
    assert list(config.tasks) == order
    released = nyud["head.task_querys.0.out_proj.weight"]
    assert torch.equal(parameters["model.query.attentions.edge.out_proj.weight"], released)


# Data sets


def with_classes(state_dict: dict[str, torch.Tensor], count: int, tasks: list[str]) -> dict[str, torch.Tensor]:
    """Another number of semseg classes, and the first of the tasks only."""
    kept = {
        key: tensor
        for key, tensor in state_dict.items()
        if not any(f".{task}." in key for task in ("semseg", "depth", "normals", "edge") if task not in tasks)
        and not any(
            f".{module}.{index}." in key
            for module in ("defor_mixers", "task_querys", "smlp2")
            for index in range(len(tasks), 4)
        )
    }
    final_logits = "head.final_logits.semseg."
    return kept | {final_logits + "weight": torch.zeros(count, 45, 1, 1), final_logits + "bias": torch.zeros(count)}


@pytest.mark.parametrize(("count", "name"), [(19, "bicycle"), (7, "vehicle")])
@pytest.mark.parametrize("dataset", ["cityscapes", None])
def test_cityscapes(nyud, count, name, dataset):
    config, _ = convert_state_dict(with_classes(nyud, count, ["semseg", "depth"]), dataset)
    assert list(config.tasks) == ["semseg", "depth"]
    assert config.tasks["semseg"]["id2label"][count - 1] == name


def test_unknown_class_count_has_no_class_names(nyud):
    config, _ = convert_state_dict(with_classes(nyud, 13, ["semseg", "depth"]))
    assert config.tasks["semseg"]["num_labels"] == 13
    assert config.tasks["semseg"]["id2label"] is None


@pytest.mark.parametrize(
    ("count", "tasks", "dataset", "message"),
    [
        (21, ["semseg", "depth", "normals", "edge"], "nyud", "21 semseg classes, the data set 40"),
        (40, ["semseg", "depth"], "cityscapes", "40 semseg classes, the data set 19 or 7"),
        (21, ["semseg", "depth"], "pascal_context", r"tasks \['depth'\], the data set only \['semseg', 'human_parts'"),
        (40, ["semseg", "depth"], "taskonomy", r"one of \['nyud', .*'taskonomy'"),
    ],
)
def test_wrong_data_set(nyud, count, tasks, dataset, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(with_classes(nyud, count, tasks), dataset)


# Files


def test_lightning_checkpoint(tmp_path, nyud, expected):
    extra = {"criterion.edge.pos_weight": torch.ones(1), "metrics.semseg.confusion": torch.zeros(40, 40)}
    path = tmp_path / "epoch=1.ckpt"
    torch.save({"state_dict": {**extra, **nyud}, "epoch": 1, "optimizer_states": [], "callbacks": {}}, path)
    assert_same(convert_state_dict(load_released_checkpoint(path))[1], expected)


def test_plain_state_dict(tmp_path, nyud, expected):
    torch.save(nyud, tmp_path / "model.pth")
    assert_same(convert_state_dict(load_released_checkpoint(tmp_path / "model.pth"))[1], expected)


@pytest.mark.parametrize("prefix", ["model.", "module.net."])
def test_prefix(nyud, expected, prefix):
    prefixed = {prefix + key: tensor for key, tensor in nyud.items()}
    assert_same(convert_state_dict({**prefixed, "criterion.weight": torch.ones(1)})[1], expected)


def test_two_models_in_a_checkpoint(nyud):
    with pytest.raises(ValueError, match=r"several models.*'ema\.', 'model\.'"):
        convert_state_dict({prefix + key: tensor for prefix in ("model.", "ema.") for key, tensor in nyud.items()})


@pytest.mark.parametrize("name", [NYUD, PASCAL])
def test_safetensors_has_the_benchmarks_order_of_tasks(tmp_path, name):
    state_dict = released_state_dict(name)
    save_file(state_dict, tmp_path / "model.safetensors")
    config, parameters = convert_state_dict(load_released_checkpoint(tmp_path / "model.safetensors"))
    reference_config, reference = convert_state_dict(state_dict)
    assert list(config.tasks) == list(reference_config.tasks)
    assert_same(parameters, reference)


def test_safetensors_of_other_tasks_has_no_order(tmp_path, nyud):
    save_file(with_classes(nyud, 40, ["semseg", "normals"]), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="order of its tasks"):
        load_released_checkpoint(tmp_path / "model.safetensors")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_checkpoint_is_not_run(tmp_path, nyud):
    torch.save({"state_dict": nyud, "hyper_parameters": Malicious(tmp_path / "owned")}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ValueError, match="could run code"):
            load_released_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_lightning_objects_are_passed_over(tmp_path, nyud, expected, monkeypatch):
    # Classes that name callbacks, and hyperparameters in a class of their own, on a machine without Lightning
    module = types.ModuleType("pytorch_lightning.callbacks")
    for name, base in (("ModelCheckpoint", object), ("AttributeDict", dict)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    hyperparameters = module.AttributeDict(lr=1e-3)
    hyperparameters.note = "an attribute"
    checkpoint = {
        "state_dict": nyud,
        "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
        "hyper_parameters": hyperparameters,
        "hparams": Namespace(lr=1e-3),
    }
    with monkeypatch.context() as with_lightning:
        with_lightning.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
        with_lightning.setitem(sys.modules, module.__name__, module)
        torch.save(checkpoint, tmp_path / "a.ckpt")
    _, parameters = convert_state_dict(load_released_checkpoint(tmp_path / "a.ckpt"))
    assert_same(parameters, expected)


def test_objects_in_a_checkpoint_are_refused_with_a_way_out(tmp_path, nyud):
    torch.save({"state_dict": nyud, "hyper_parameters": Fraction(1, 3)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"torch\.save\(.*'state_dict'"):
        load_released_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 damaged", bytes(1000)])
def test_files_of_another_kind(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_released_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {"state_dict": 3}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="neither a state dict nor"):
        load_released_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_no_file(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        load_released_checkpoint(tmp_path / name)


# Fit. Some tensors tell the architecture, the others are checked against it: whichever is wrong is named.


@pytest.fixture(scope="module")
def shapes(nyud) -> dict[str, torch.Tensor]:
    """The state dict on the meta device, without what is not read."""
    unread = ("relative_position_index", ".offset")
    return {key: torch.empty_like(tensor, device="meta") for key, tensor in nyud.items() if not key.endswith(unread)}


def one_of_each_kind(keys) -> list[str]:
    """Keys that differ in more than numbers and tasks."""
    return list({re.sub(r"\d+|semseg|depth|normals|edge", "*", key): key for key in keys}.values())


def test_each_missing_tensor_is_named(shapes):
    for key in one_of_each_kind(shapes):
        with pytest.raises(ValueError) as error:
            convert_state_dict({other: tensor for other, tensor in shapes.items() if other != key})
        assert key in str(error.value)


def test_each_misshapen_tensor_is_named_with_its_shape(shapes):
    for key in one_of_each_kind(shapes):
        wrong = torch.empty([size + 1 for size in shapes[key].shape] or [2], device="meta")
        with pytest.raises(ValueError) as error:
            convert_state_dict({**shapes, key: wrong})
        assert f"{key} {tuple(wrong.shape)}" in str(error.value)


def test_misshapen_tensors_are_listed_with_the_expected_shape(shapes):
    keys = ["backbone.stages.1.blocks.0.attn.w_msa.qkv.weight", "head.gmlps.gating.0.fn.sgu_0.proj.weight"]
    wrong = {keys[0]: torch.empty(145, 48, device="meta"), keys[1]: torch.empty(256, 256, device="meta")}
    with pytest.raises(ValueError) as error:
        convert_state_dict({**shapes, **wrong})
    assert f"{keys[0]} (145, 48), expected (144, 48)" in str(error.value)
    assert f"{keys[1]} (256, 256), expected (256, 256, 1)" in str(error.value)


def test_unexpected_tensors_are_named(shapes):
    extra = ["backbone.absolute_pos_embed", "backbone.stages.4.norm.weight", "head.stl.weight"]
    with pytest.raises(ValueError) as error:
        convert_state_dict({**shapes, **{key: torch.empty(2, device="meta") for key in extra}})
    assert all(f"{key} (2,)" in str(error.value) for key in extra)


def test_long_lists_are_cut(shapes):
    without_queries = {key: tensor for key, tensor in shapes.items() if not re.search("smlp2|task_querys", key)}
    with pytest.raises(ValueError, match=r"Missing: [^;]*(; [^;]*){19}; and 12 more$"):
        convert_state_dict(without_queries)


def test_heads_that_do_not_divide_the_channels(shapes):
    key = "backbone.stages.3.blocks.0.attn.w_msa.relative_position_bias_table"
    with pytest.raises(ValueError, match=re.escape(f"{key} (169, 5): 5 heads")):
        convert_state_dict({**shapes, key: torch.empty(169, 5, device="meta")})


def test_unknown_task(nyud):
    renamed = {key.replace(".depth.", ".disparity."): tensor for key, tensor in nyud.items()}
    with pytest.raises(ValueError, match=r"unknown tasks \['disparity'\]"):
        convert_state_dict(renamed)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="not a released DeGMix or DeMT"):
        convert_state_dict({"backbone.patch_embed.projection.weight": torch.zeros(24, 3, 4, 4)})


# Directories


def test_directory_has_the_names_of_published_swins(tmp_path, nyud):
    """Transformers renames Swin's parameters when it loads and saves: files of one version load in every other."""
    torch.save(nyud, tmp_path / "model.pth")
    convert_checkpoint(tmp_path / "model.pth").save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.backbone.encoder.layers.0.blocks.0.attention.self.query.weight" in names
    assert not any("q_proj" in name for name in names)


def test_whole_directory_appears_at_the_end(tmp_path):
    path = tmp_path / "runs" / "last"
    with whole_directory(path) as directory:
        (directory / "a").write_text("new")
        assert not path.exists()
    assert (path / "a").read_text() == "new"
    assert os.listdir(tmp_path / "runs") == ["last"]
    assert path.stat().st_mode & 0o777 == (tmp_path / "runs").stat().st_mode & 0o777


def test_whole_directory_replaces_only_what_it_may(tmp_path):
    path = tmp_path / "last"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(FileExistsError, match="not empty"), whole_directory(path):
        pass
    with whole_directory(path, overwrite=True) as directory:
        (directory / "new").touch()
        assert os.listdir(path) == ["old"]
    assert os.listdir(path) == ["new"]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not a directory"), whole_directory(tmp_path / "file", overwrite=True):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_whole_directory_leaves_nothing_after_an_error(tmp_path, overwrite):
    if overwrite:
        (tmp_path / "last").mkdir()
        (tmp_path / "last" / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "last", overwrite) as directory:
        (directory / "new").touch()
        raise KeyboardInterrupt
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["last", "last/old"] * overwrite


# The command


def convert(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*DEGMIX, "convert", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
    )


def test_script_writes_a_directory_that_loads(tmp_path, nyud):
    torch.save({"state_dict": nyud}, tmp_path / "a.ckpt")
    output = tmp_path / "models" / "nyud"
    result = convert(tmp_path / "a.ckpt", output, "--dataset", "nyud")
    assert (result.returncode, result.stderr) == (0, "")
    model = AutoModel.from_pretrained(output)
    assert str(output) in result.stdout and f"{model.num_parameters():,}" in result.stdout
    assert os.listdir(tmp_path / "models") == ["nyud"]
    data = [name for name in os.listdir(output) if not name.endswith(".py")]
    assert sorted(data) == ["config.json", "model.safetensors", "preprocessor_config.json"]

    fixture = load_fixture(NYUD)
    expected = convert_checkpoint(tmp_path / "a.ckpt", "nyud")
    with torch.no_grad():
        logits = model(torch.from_numpy(fixture["x"])).logits
        expected_logits = expected(torch.from_numpy(fixture["x"])).logits
    assert all(torch.equal(logits[task], expected_logits[task]) for task in expected_logits)
    assert model.config.to_dict()["tasks"] == expected.config.to_dict()["tasks"]
    # `AutoImageProcessor` is for another module to register.
    assert "semseg" in (output / "preprocessor_config.json").read_text()


@pytest.fixture
def incomplete(tmp_path, nyud) -> Path:
    torch.save({key: tensor for key, tensor in nyud.items() if key != "head.smlp.0.bias"}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_script_refuses_in_one_line_and_leaves_nothing(tmp_path, incomplete):
    result = convert(incomplete, tmp_path / "new" / "out")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"error: .*Missing: head\.smlp\.0\.bias \(256,\)\n", result.stderr)
    assert list(tmp_path.iterdir()) == [incomplete]


@pytest.mark.parametrize(
    ("checkpoint", "output", "options", "message"),
    [
        ("a.ckpt", "used", (), "error: .*used exists and is not empty"),
        ("a.ckpt", "a.ckpt", (), "error: .*a.ckpt exists and is not a directory"),
        ("none.ckpt", "out", (), "error: .*none.ckpt.*"),
        ("a.ckpt", "out", ("--dataset", "pascal_context"), "error: .*'pascal_context'.*"),
    ],
)
def test_script_refuses(tmp_path, incomplete, monkeypatch, checkpoint, output, options, message):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    error = run_command(monkeypatch, "convert", tmp_path / checkpoint, tmp_path / output, *options)
    assert re.fullmatch(message, error)
    assert sorted(tmp_path.rglob("*")) == before
