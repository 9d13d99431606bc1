import pytest
import torch
from small_models import ALL_KINDS, BACKBONES, small_model
from torch._dynamo.testing import CompileCounterWithBackend


TASKS = {name: ALL_KINDS[name] for name in ("semseg", "depth")}


def small_resnet(**fields):
    return small_model(backbone_config=BACKBONES["resnet"], tasks=TASKS, num_mixer_layers=1, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"interaction_scope": "token"},
        {"interaction_scope": "task"},
        {"interaction_scope": "image", "interaction_reduction": 2},
        {"use_gating": False},
    ],
)
# A batch of one image has a graph of its own: torch.compile takes sizes of 1 for constants.
def test_one_graph_for_all_sizes(fields):
    torch._dynamo.reset()
    model = small_resnet(**fields)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 64, 96), (3, 3, 70, 98), (2, 3, 101, 77)):
        pixel_values = torch.randn(shape)
        with torch.no_grad():
            expected, actual = model(pixel_values).logits, compiled(pixel_values).logits
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 1
