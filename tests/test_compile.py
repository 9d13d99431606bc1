import copy

import pytest
import torch
from small_models import ALL_KINDS, random_labels, small_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import ResNetConfig


def compile_small_model(backend, stages, **fields):
    """A model with a backbone of so many stages, the same compiled, and the counter of its graphs."""
    torch._dynamo.reset()
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8] * stages,
        depths=[1] * stages,
        layer_type="basic",
        out_features=[f"stage{stage}" for stage in range(1, stages + 1)],
    )
    model = small_model(backbone_config=backbone, num_mixer_layers=1, **fields)
    counter = CompileCounterWithBackend(backend)
    return model, torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True, dynamic=True), counter


@pytest.fixture(autouse=True)
def floats_are_constants():
    # Otherwise the numbers among the layers' settings are traced as variables first and as constants in a second pass,
    # which takes twice as long and counts as another graph.
    with torch._dynamo.config.patch(specialize_float=True):
        yield


# Two graphs for all sizes: torch.compile takes sizes of 1 for constants, so that a single image has its own.
# On a CPU, PyTorch's convolutions choose their kernel by the batch: from 16 images there is a third.
@pytest.mark.slow
@pytest.mark.parametrize(
    "stages, fields",
    [
        (2, {"interaction_scope": "token"}),
        (1, {"interaction_scope": "task", "use_gating": False}),
        (1, {"interaction_scope": "image", "interaction_reduction": 2}),
    ],
    ids=["token", "task", "image"],
)
def test_one_graph_for_all_sizes(stages, fields):
    # depth as if it had been added later
    tasks = {"semseg": {**ALL_KINDS["semseg"], "attends_to": ["semseg"]}, "depth": ALL_KINDS["depth"]}
    model, compiled, counter = compile_small_model("eager", stages, tasks=tasks, **fields)
    batches = [((2, 64, 96), 1), ((3, 70, 98), 1), ((15, 33, 35), 1)]
    if fields["interaction_scope"] == "token":
        batches += [((1, 64, 96), 2), ((1, 70, 98), 2), ((1, 101, 77), 2)]
    for (batch_size, height, width), graphs in batches:
        pixel_values = torch.randn(batch_size, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=1e-4)
        assert counter.frame_count == graphs


@pytest.mark.slow
def test_training_is_one_graph_with_the_same_gradients():
    tasks = {name: ALL_KINDS[name] for name in ("semseg", "normals", "edge")}  # the kinds with the longest losses
    model, compiled, counter = compile_small_model("aot_eager", 1, tasks=tasks)
    model, compiled = model.double().train(), compiled.double().train()
    for batch_size, height, width in ((2, 64, 96), (3, 70, 98)):
        pixel_values = torch.randn(batch_size, 3, height, width, dtype=torch.float64)
        labels = random_labels(tasks, batch_size, height, width)
        outputs = []
        for module in (compiled, model):
            loss = module(pixel_values, labels=labels).loss
            loss.backward()
            gradients = {name.removeprefix("_orig_mod."): x.grad for name, x in module.named_parameters()}
            outputs.append({"loss": loss, **gradients})
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1
