import math

import pytest
import yaml

from transformers_degmix.training.arguments import RecipeLoader, TrainingArguments, parse_arguments


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, text) for text in ("no", "yes", "on", "Off", "y", "truer", "1.5.2", "1e", "e3")],
        *[("true", True), ("False", False), ("null", None), ("12", 12), ("-3", -3), ("1_000", 1000)],
        *[(text, text) for text in ("2024-02-30", "2024-02-03", "0x1F", "0b1", "1:30", "1_0:3")],
        *[("010", 10.0), ("0", 0), ("+7", 7)],
        *[("1e-3", 0.001), ("-1E5", -1e5), (".5", 0.5), ("1.", 1.0), ("1.0e+10", 1e10), ("-.inf", -math.inf)],
    ],
)
def test_values_mean_what_they_look_like(text, value):
    read = yaml.load(text, RecipeLoader)
    assert read == value and type(read) is type(value)


def test_words_and_numbers_in_recipes(config):
    path = config("output_dir: out\nmixed_precision: no\nweight_decay: 0\ndataset: d\ncolumns: {depth: {scale: 1e-3}}")
    args = parse_arguments([path, "--learning_rate", "1e-2", "--columns.depth.invalid", ".nan"])
    assert args.mixed_precision == "no" and args.learning_rate == 0.01 and type(args.weight_decay) is float
    assert args.columns["depth"]["scale"] == 0.001 and math.isnan(args.columns["depth"]["invalid"])
    assert parse_arguments([path, "--mixed_precision", "no"]).mixed_precision == "no"


def test_texts_on_the_command_line_are_taken_as_they_are(config):
    path = config("output_dir: out\ndataset: d\n")
    for text in ("runs/exp #2", "2024", "[a", "a: b", "no", '"a"', "1e-3"):
        args = parse_arguments([path, "--output_dir", text, "--dataset", text, "--train_split", text])
        assert args.output_dir == args.dataset == args.train_split == text
    args = parse_arguments([path, "--output_dir", "null", "--benchmark", "null", "--dataset", "null"])
    assert (args.output_dir, args.benchmark, args.dataset) == ("null", None, "rooms")
    assert parse_arguments([path, "--dataset", "x"], dataset="null").dataset == "null"


def test_columns_from_file_and_command_line(config):
    path = config("output_dir: out\ndataset: folder\ncolumns:\n  image: rgb\n  depth: {column: d, scale: 0.001}\n")
    args = parse_arguments([path, "--columns.depth.invalid", "0", "--columns.semseg", "{ignore: -1}"])
    assert args.columns == {
        "image": "rgb",
        "depth": {"column": "d", "scale": 0.001, "invalid": 0},
        "semseg": {"ignore": -1},
    }


def test_later_files_come_before_earlier_ones(config, tmp_path):
    (tmp_path / "a.yaml").write_text(
        "output_dir: a\nmax_steps: 5\nmodel: {hidden_size: 8, backbone_config: {depth: 1, x: 1}}"
    )
    (tmp_path / "b.yaml").write_text("base: a.yaml\nmax_steps: 6\nmodel: {backbone_config: {depth: 2}}")
    (tmp_path / "c.yaml").write_text("model: {use_gating: false}\nseed: 3")
    args = parse_arguments([config("base: [b.yaml, c.yaml]\noutput_dir: out"), "--seed", "4"])
    assert (args.output_dir, args.max_steps, args.seed) == ("out", 6, 4)
    assert args.model == {"hidden_size": 8, "backbone_config": {"depth": 2, "x": 1}, "use_gating": False}


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        *[([], False), (["--resume"], True), (["--resume", "--seed", "1"], True)],
        *[(["--resume", word], word.lower() == "true") for word in ("true", "True", "false", "False")],
    ],
)
def test_resume_needs_no_value(config, words, resume):
    assert parse_arguments([config("output_dir: out"), "--max_steps", "2", *words]).resume is resume


def test_sizes_are_those_of_the_benchmark():
    sizes = [TrainingArguments(output_dir="out", benchmark=name).image_size for name in (None, "pascal_context")]
    assert sizes == [[425, 560], [512, 512]]
    assert TrainingArguments(output_dir="out", benchmark="cityscapes", image_size=[64, 96]).image_size == [64, 96]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("output_dir: out\nlearning_rat: 1", [], r"\['learning_rat'\].*learning_rate"),
        ("output_dir: out", ["--max_stepz", "3"], "max_stepz"),
        ("output_dir: out", ["--max_steps"], "--field value"),
        ("output_dir: out\noptimizer: adam", [], "`optimizer`.*adamw.*'adam'"),
        ("output_dir: out\nlr_scheduler: linear", [], "`lr_scheduler`.*cosine.*'linear'"),
        ("output_dir: out\nmax_steps: 0", [], "`max_steps`.*0"),
        ("output_dir: out\nnum_train_images: -1", [], "`num_train_images` must be at least 1, got -1"),
        ("output_dir: out\nseed: -1", [], "`seed` must be at least 0, got -1"),
        ("output_dir: out\nmax_steps: many", [], "max_steps.*int.*'many'"),
        ("output_dir: out\nlearning_rate: -1", [], "`learning_rate`.*-1"),
        ("output_dir: out\nlearning_rate: fast", [], "learning_rate.*'fast'"),
        ("output_dir: out\npretrained: a\nmodel: {hidden_size: 8}", [], "`pretrained`"),
        ("output_dir: out\nimage_processor: {mean: 0.5}", [], r"`image_processor`.*\['mean'\].*'image_mean'"),
        ("output_dir: out\nimage_processor: {tasks: {}}", [], r"`image_processor`.*\['tasks'\]"),
        ("output_dir: out\nstreaming: true", [], "`streaming`.*rooms"),
        ("output_dir: out\ndataset: d\nstreaming: true\nskip_unreadable: true", [], "`skip_unreadable`.*`streaming`"),
        ("output_dir: out\nmax_unreadable: 1", [], "`max_unreadable`.*1"),
        ("output_dir: out\nshuffle_buffer_size: 0", [], "`shuffle_buffer_size`.*0"),
        ("output_dir: out\nmodel: {tasks: [depth]}", [], r"`model.tasks`.*\['depth'\]"),
        ("output_dir: out\npretrained: a\nnew_tasks: [depth]", [], "new_tasks"),
        ("output_dir: out\npretrained: a\nnew_tasks: {depth: null}", [], "`new_tasks`.*None"),
        ("output_dir: out\nnew_tasks: {depth: {}}", [], "`new_tasks`.*`pretrained`.*`model.tasks`"),
        ("output_dir: out\nmodel: {tasks: {depth: null}}", [], "`model.tasks`.*None"),
        ("output_dir: out\naugmentation: {scales: [1, 2]}", [], r"`augmentation`.*\['scales'\].*flip_probability"),
        ("output_dir: out\nbenchmark: ade20k", [], "`benchmark`.*cityscapes.*'ade20k'"),
        ("output_dir: out\ntask_balancing: learned", [], "`task_balancing`.*uncertainty.*'learned'"),
        ("output_dir: out\nlog_with: [mlflow]", [], r"`log_with`.*tensorboard.*\['mlflow'\]"),
        ("output_dir: out\nbackbone_learning_rate: -1", [], "`backbone_learning_rate`.*-1"),
        ("output_dir: out\nema_decay: 1", [], "`ema_decay`.*below 1.*1"),
        ("output_dir: out\ngradient_accumulation_steps: 0", [], "`gradient_accumulation_steps`.*0"),
        ("output_dir: out\nearly_stopping_patience: 2", [], "`early_stopping_patience`.*`single_task_scores`"),
        ("output_dir: out\npretrained: a\ntasks: [depth]", [], "`pretrained`.*`tasks`"),
        ("max_steps: 3", [], "output_dir"),
        ("- a\n- b", [], "field: value.*list"),
        ("output_dir: [", [], "run.yaml is not YAML"),
        ("output_dir: out", ["--tasks", "[depth"], "`--tasks` is not YAML.*expected ',' or ']'"),
        ("output_dir: out", ["--seed", "!!int x"], "`--seed` is not YAML"),
        ("output_dir: out\nbatch_size: 010", [], "batch_size.*int.*10.0"),
        ("output_dir: out\nseed: 1\nseed: 2", [], "run.yaml is not YAML: seed is given twice.* line 3"),
        ("output_dir: out\ncolumns: {semseg: {classes: {7: 0, 7: 1}}}", [], "is not YAML: 7 is given twice"),
        ("output_dir: out", ["--model", "{hidden_size: 8, hidden_size: 9}"], "`--model` is not YAML: hidden_size is"),
        ("output_dir: out\nseed: 2", ["--seed.x", "1"], "`--seed.x`: `seed` is 2, which has no fields"),
        ("output_dir: out", ["--seed.x", "1"], "seed.*int.*'x'"),
        ("output_dir: out\ndatasets: [{name: a}]", ["--datasets.0.name", "b"], "`--datasets.0.name`.*no fields"),
        ("output_dir: out\ncolumns: {depth: d}", ["--columns.depth.scale", "2"], "`depth` is 'd', which has"),
        ("output_dir: out", ["--resume", "yes"], "resume.*bool.*'yes'"),
        ("1: 2\na: 3\noutput_dir: out", [], r"\[1, 'a'\]"),
        ("output_dir: out\nmodel: {1: 2, hidden_size: 3}", [], r"model.key.*str.*1"),
        ("output_dir: out\nmodel: {hidden_sizze: 3}", [], r"`model`.*\['hidden_sizze'\].*'hidden_size'"),
        ("output_dir: out\nmodel: 3", [], "model.*dict.*int"),
        ("output_dir: out\nbatch_size: 2.5", [], "batch_size.*int.*2.5"),
        ("output_dir: out\ntasks: depth", [], "tasks.*'depth'.*list"),
        ("output_dir: out\nfreeze: [1]", [], r"freeze\[0\].*str.*1"),
        ("output_dir: out\ncolumns: [a]", [], "columns.*dict.*list"),
        ("output_dir: out\nimage_size: 212", [], "image_size.*212.*list"),
        ("output_dir: out\nimage_size: [212]", [], r"`image_size`.*\[212\]"),
        ("output_dir: out\nimage_size: [0, 5]\naugmentation: null", [], r"`image_size`.*\[0, 5\]"),
        ("output_dir: out", ["--augmentation.scale", "2"], "`augmentation`: `scale`.*range.*2"),
        ("output_dir: out\naugmentation: {size: 3}", [], "`augmentation`: `size`.*3"),
        ("output_dir: out\nimage_processor: {image_mean: x}", [], "`image_processor`: .*image_mean.*'x'.*float"),
        *[
            (
                f"output_dir: out\nimage_processor: {{{name}: {value}}}",
                [],
                f"`image_processor`: `{name}` must be {rule}",
            )
            for name, value, rule in (
                ("image_mean", "[0.5, 0.5]", r"1 or 3 finite numbers, got \[0.5, 0.5\]"),
                ("image_mean", ".nan", "1 or 3 finite numbers, got nan"),
                ("image_std", "0", "1 or 3 finite numbers above 0, got 0"),
                ("image_std", "[1, 1, -1]", r"1 or 3 finite numbers above 0, got \[1, 1, -1\]"),
            )
        ],
        ("output_dir: out\nimage_processor: {do_resize: maybe}", [], "`image_processor`: .*do_resize.*bool.*'maybe'"),
    ],
)
def test_bad_runs_are_refused(config, text, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([config(text), *overrides])
    assert "\n" not in str(caught.value)


def test_files_that_are_the_base_of_each_other(config, tmp_path):
    (tmp_path / "a.yaml").write_text("base: run.yaml")
    for base, between in (("run.yaml", ""), ("a.yaml", ".*a.yaml -> ")):
        with pytest.raises(ValueError, match=f"run.yaml is its own `base`: .*run.yaml -> {between}.*run.yaml$"):
            parse_arguments([config(f"base: {base}\noutput_dir: out")])
    # Several may have the same base.
    (tmp_path / "a.yaml").write_text("base: [b.yaml, c.yaml]")
    (tmp_path / "b.yaml").write_text("base: c.yaml")
    (tmp_path / "c.yaml").write_text("seed: 5")
    assert parse_arguments([config("base: a.yaml\noutput_dir: out")]).seed == 5


def test_recipes_of_the_package_as_base(config):
    args = parse_arguments([config("base: rooms_tiny\noutput_dir: out")])
    assert args == parse_arguments(["rooms_tiny", "--output_dir", "out"])


@pytest.mark.parametrize("base", ["3", "null", "[3]", "{a: b}", "nyud_swin_tiny"])
def test_bases_that_are_no_recipes(config, base):
    with pytest.raises(OSError, match="there is no file .*, and the recipes of the package are .*nyud_swin_base"):
        parse_arguments([config(f"base: {base}\noutput_dir: out")])


def test_fields_that_override_those_of_an_alias_are_not_given_twice():
    read = yaml.load("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", RecipeLoader)
    assert read == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}


def test_fields_of_what_is_null(config):
    args = parse_arguments([config("output_dir: out\naugmentation: null"), "--augmentation.scale", "[1, 1]"])
    assert args.augmentation == {"scale": [1, 1]}


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"output_dir: \xff")
    with pytest.raises(ValueError, match="run.yaml is not YAML.*invalid start byte"):
        parse_arguments([str(tmp_path / "run.yaml")])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        parse_arguments([str(tmp_path / "nowhere.yaml")])
