import pytest

from transformers_degmix.training.arguments import TrainingArguments, parse_arguments


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_are_the_published_recipe():
    args = TrainingArguments(output_dir="out")
    assert (args.optimizer, args.learning_rate, args.momentum, args.weight_decay) == ("sgd", 1e-3, 0.9, 5e-4)
    assert (args.lr_scheduler, args.lr_power, args.max_steps, args.batch_size) == ("polynomial", 0.9, 40_000, 8)


def test_file_and_command_line(config):
    path = config("output_dir: out\nlearning_rate: 1e-2\nmodel:\n  hidden_size: 64\n  use_gating: false\n")
    args = parse_arguments([path, "--max_steps", "7", "--model.hidden_size", "32", "--image_size", "[64, 96]"])
    assert args.learning_rate == 0.01 and args.max_steps == 7
    assert args.model == {"hidden_size": 32, "use_gating": False}
    assert args.image_size == [64, 96]


def test_columns_from_file_and_command_line(config):
    path = config("output_dir: out\ndataset: folder\ncolumns:\n  image: rgb\n  depth: {column: d, scale: 0.001}\n")
    args = parse_arguments([path, "--columns.depth.invalid", "0", "--columns.semseg", "{ignore: -1}"])
    assert args.columns == {
        "image": "rgb",
        "depth": {"column": "d", "scale": 0.001, "invalid": 0},
        "semseg": {"ignore": -1},
    }


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("output_dir: out\nlearning_rat: 1", [], r"\['learning_rat'\].*learning_rate"),
        ("output_dir: out", ["--max_stepz", "3"], "max_stepz"),
        ("output_dir: out", ["--max_steps"], "--field value"),
        ("output_dir: out\noptimizer: adam", [], "`optimizer`.*adamw.*'adam'"),
        ("output_dir: out\nlr_scheduler: linear", [], "`lr_scheduler`.*cosine.*'linear'"),
        ("output_dir: out\nmax_steps: 0", [], "`max_steps`.*0"),
        ("output_dir: out\nmax_steps: many", [], "(?s)max_steps.*int.*'many'"),
        ("output_dir: out\nlearning_rate: -1", [], "`learning_rate`.*-1"),
        ("output_dir: out\nlearning_rate: fast", [], "learning_rate.*'fast'"),
        ("output_dir: out\npretrained: a\nmodel: {hidden_size: 8}", [], "`pretrained`"),
        ("output_dir: out\ncolumns: {depth: d}", [], "`columns`.*rooms"),
        ("output_dir: out\nstreaming: true", [], "`streaming`.*rooms"),
        ("output_dir: out\nshuffle_buffer_size: 0", [], "`shuffle_buffer_size`.*0"),
        ("output_dir: out\nmodel: {tasks: [depth]}", [], r"`model.tasks`.*\['depth'\]"),
        ("output_dir: out\nmodel: {tasks: {depth: null}}", [], "`model.tasks`.*None"),
        ("output_dir: out\naugmentation: {scales: [1, 2]}", [], r"`augmentation`.*\['scales'\].*flip_probability"),
        ("max_steps: 3", [], "output_dir"),
        ("- a\n- b", [], "field: value.*list"),
        ("output_dir: [", [], "run.yaml"),
    ],
)
def test_bad_runs_are_refused(config, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments([config(text), *overrides])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse_arguments([str(tmp_path / "nowhere.yaml")])
