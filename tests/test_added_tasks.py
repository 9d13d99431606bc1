"""`add_task` and `remove_task` of the model: what was there before stays as it is, to the last bit."""

import copy

import pytest
import torch
from small_models import ALL_KINDS, random_labels, small_model
from transformers import AutoModel

from transformers_degmix import DeGMixImageProcessorPil


OLD = {name: ALL_KINDS[name] for name in ("semseg", "depth")}
SCOPES = [("token", 1), ("task", 1), ("image", 2)]
# more pixels than a portion holds, at a stride of 4
PIXELS = torch.randn(2, 3, 132, 140, generator=torch.Generator().manual_seed(0))


def grown_model(scope=("token", 1), train_only_new=True, **fields):
    model = small_model(
        tasks=OLD, interaction_scope=scope[0], interaction_reduction=scope[1], num_mixer_layers=1, **fields
    )
    return copy.deepcopy(model), add_normals(model, train_only_new)


def add_normals(model, train_only_new=True):
    torch.manual_seed(1)
    model.add_task("normals", ALL_KINDS["normals"], train_only_new)
    return model


@torch.no_grad()
def predict(model, **options):
    return model(PIXELS, **options)


def assert_same(logits, expected):
    for task, maps in expected.items():
        assert torch.equal(logits[task], maps), task


@pytest.mark.parametrize("scope", SCOPES)
def test_outputs_of_old_tasks_stay_the_same_through_training_and_files(tmp_path, scope):
    before, model = grown_model(scope)
    expected = predict(before).logits
    assert list(predict(model).logits) == ["semseg", "depth", "normals"]
    assert_same(predict(model).logits, expected)

    labels = random_labels({"normals": ALL_KINDS["normals"]}, 2, *PIXELS.shape[-2:])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    first = predict(model).logits["normals"]
    model.train()
    for _ in range(2):
        model(PIXELS, labels=labels).loss.backward()
        optimizer.step()
    assert not torch.equal(predict(model.eval()).logits["normals"], first)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.tasks == model.config.tasks
    outputs = predict(loaded, output_hidden_states=True)
    assert torch.equal(outputs.logits["normals"], predict(model).logits["normals"])
    assert_same(outputs.logits, expected)

    for grown in (model, loaded):
        grown.remove_task("normals")
        assert grown.config.tasks == before.config.tasks
        assert grown.state_dict().keys() == before.state_dict().keys()
        assert_same(predict(grown).logits, expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_new_task_attends_to_all_and_no_other_to_it(scope):
    _, model = grown_model(scope)
    attentions = predict(model, output_attentions=True).attentions[0]
    assert (attentions[:, 2] > 0).all()
    assert (attentions[:, :2, :, 2] == 0).all() and (attentions[:, :2, :, :2] > 0).all()
    torch.testing.assert_close(attentions.sum(dim=3), torch.ones_like(attentions.sum(dim=3)))

    with torch.no_grad():
        changed, old = copy.deepcopy(model), copy.deepcopy(model)
        changed.model.mixers["depth"][0].channel_norm.bias += 1
        old.model.mixers["normals"][0].channel_norm.bias += 1
    assert not torch.allclose(predict(changed).logits["normals"], predict(model).logits["normals"])
    assert_same(predict(old).logits, {task: predict(model).logits[task] for task in OLD})


def test_only_the_new_parts_are_trained_batch_norms_included():
    _, model = grown_model(use_gating=True)
    new = ("model.mixers.normals.", "model.query.attentions.normals.", "heads.normals.")
    assert all(parameter.requires_grad == name.startswith(new) for name, parameter in model.named_parameters())
    assert 0 < model.num_parameters(only_trainable=True) < 0.3 * model.num_parameters()
    model.train()
    leaves = {f"{name}.": module for name, module in model.named_modules() if not list(module.children())}
    assert all(module.training == name.startswith(new) for name, module in leaves.items())
    model.requires_grad_(True).train()
    unread = "model.backbone.swin.layernorm"
    assert all(module.training == (name != unread) for name, module in model.named_modules())

    _, model = grown_model(train_only_new=False)
    assert all(parameter.requires_grad == (unread not in name) for name, parameter in model.named_parameters())
    assert model.train().model.mixers["depth"].training


def test_new_parts_start_as_those_of_a_new_model():
    model = small_model(tasks=OLD, hidden_size=64).to(torch.bfloat16)
    add_normals(model)
    query = model.model.query.attentions["normals"]
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert query.in_proj.weight.abs().max() <= bound and query.in_proj.weight.float().std() > 0.5 * bound
    assert not query.in_proj.bias.any() and not model.heads["normals"].classifier.bias.any()
    assert not model.model.mixers["normals"][1].spatial_mixing.point_offsets.weight.any()
    assert model.heads["normals"].classifier.weight.std().item() == pytest.approx(0.01, rel=0.5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_new_parts_recompute_as_the_old_ones_do():
    model = small_model(tasks=OLD, num_mixer_layers=1).train()
    model.gradient_checkpointing_enable()
    add_normals(model, train_only_new=False)
    states = {
        name: x.gradient_checkpointing for name, x in model.named_modules() if hasattr(x, "gradient_checkpointing")
    }
    assert any("normals" in name for name in states) and all(states.values()), states
    model(PIXELS[:, :, :64, :64]).logits["normals"].sum().backward()
    assert model.heads["normals"].classifier.weight.grad is not None


def test_models_without_decoder_grow_too():
    before, model = grown_model(use_decoder=False)
    assert_same(predict(model).logits, predict(before).logits)
    model.remove_task("normals")
    assert_same(predict(model).logits, predict(before).logits)


def test_tasks_added_one_after_the_other_go_in_any_order():
    _, model = grown_model(("task", 1))
    expected = predict(model).logits
    model.add_task("edge", ALL_KINDS["edge"])
    model.add_task("sal", {"kind": "saliency", "attends_to": ["sal"]})
    assert [model.config.attended(task) for task in ("normals", "edge", "sal")] == [
        [*OLD, "normals"], [*OLD, "normals", "edge"], ["sal"],
    ]  # fmt: skip
    assert_same(predict(model).logits, expected)
    grown = predict(model).logits
    with pytest.raises(ValueError, match=r"the tasks \['edge'\] attend to 'normals'.*`keep_outputs=False` allows"):
        model.remove_task("normals")
    assert_same(predict(model).logits, grown)
    model.remove_task("normals", keep_outputs=False)
    assert list(model.config.tasks) == [*OLD, "edge", "sal"]
    assert_same(predict(model).logits, {task: grown[task] for task in ("semseg", "depth", "sal")})
    assert not torch.equal(predict(model).logits["edge"], grown["edge"])


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("depth", {"kind": "depth"}, "the model has a task 'depth'; its tasks are"),
        ("parts", {"kind": "segmentation"}, r"`tasks\['parts'\]\['num_labels'\]` must be"),
        ("sal", {"kind": "saliency", "attends_to": ["sal", "normals"]}, r"`tasks\['sal'\]\['attends_to'\]` must be"),
    ],
)
def test_tasks_that_cannot_be_added_leave_the_model_alone(name, task, message):
    model = small_model(tasks=OLD)
    names, tasks = list(model.state_dict()), copy.deepcopy(model.config.tasks)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.add_task(name, task)
    assert list(model.state_dict()) == names and model.config.tasks == tasks
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_tasks_that_cannot_be_removed_leave_the_model_alone():
    model = small_model(tasks={"depth": {"kind": "depth"}})
    for name, message in (("sal", "the model has no task 'sal'"), ("depth", "`tasks` is empty")):
        with pytest.raises(ValueError, match=message):
            model.remove_task(name)
    assert list(model.config.tasks) == ["depth"] and list(model.heads) == ["depth"]


def test_the_processor_takes_the_new_tasks(tmp_path):
    before, model = grown_model()
    DeGMixImageProcessorPil(tasks=before.config.tasks).save_pretrained(tmp_path)
    processor = DeGMixImageProcessorPil.from_pretrained(tmp_path, tasks=model.config.tasks)
    assert processor.post_process_dense_prediction(predict(model))[1]["normals"].shape == (3, *PIXELS.shape[-2:])


@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_pass_through_the_attention_that_is_returned(scope):
    _, model = grown_model(scope)
    model.requires_grad_(True).double()
    pixel_values = PIXELS.double()
    outputs = model(pixel_values, output_attentions=True)
    outputs.attentions[0].retain_grad()
    losses = [
        sum(x.square().mean() for x in logits.values()) for logits in (outputs.logits, model(pixel_values).logits)
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    queries = list(model.model.query.parameters())
    gradients = [torch.autograd.grad(loss, queries, retain_graph=True) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    losses[0].backward()
    gradient = outputs.attentions[0].grad
    assert (gradient[:, 2] != 0).all() and (gradient[:, :2, :, :2] != 0).all()
    assert (gradient[:, :2, :, 2] == 0).all()


def test_portions_do_not_depend_on_the_number_of_tasks():
    model = small_model(tasks={"depth": ALL_KINDS["depth"]})
    model.model.CPU_PORTION = 3  # of one pixel, a product with a matrix takes another way, and rounds otherwise
    pixel_values = PIXELS[:1, :, :64, :72]
    with torch.no_grad():
        before = model(pixel_values).logits["depth"]
        assert torch.equal(add_normals(model)(pixel_values).logits["depth"], before)
