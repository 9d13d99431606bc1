import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from transformers_degmix.data.rooms import render_room
from transformers_degmix.data.rooms.scene import sample_room
from transformers_degmix.visualization.geometry import (
    FIELD_OF_VIEW,
    depth_normals_angles,
    first_of_kind,
    normals_from_depth,
    viewing_rays,
)


TASKS = {"range": {"kind": "depth"}, "second": {"kind": "depth"}, "up": {"kind": "normals"}}


def plane(normal: torch.Tensor, distance: float, size: tuple[int, int], field_of_view: float) -> torch.Tensor:
    """Depth of the plane with a unit normal, z towards the camera, at a distance from the camera."""
    rays = viewing_rays(size, field_of_view)
    towards = torch.cat([rays, -torch.ones(1, *size)])  # with the normal's z axis
    return -distance / (normal.view(3, 1, 1) * towards).sum(dim=0)


def angles_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Degrees between unit vectors `(3, ...)`."""
    return F.cosine_similarity(a.double(), b.double(), dim=0).clamp(-1, 1).acos().rad2deg()


def test_rays_span_the_field_of_view():
    rays = viewing_rays((3, 5), 90)
    # Pixel borders are at 45 degrees, the last pixel's centre half a pixel within.
    assert rays[0, 1].tolist() == pytest.approx([-0.8, -0.4, 0, 0.4, 0.8])
    assert rays[1, :, 0].tolist() == pytest.approx([-0.4, 0, 0.4])
    for angle in (0, 180, -60, float("nan")):
        with pytest.raises(ValueError, match="`field_of_view`"):
            viewing_rays((3, 5), angle)


def test_rays_are_those_of_the_renderer():
    camera = sample_room("train", 0).camera
    field_of_view = 2 * np.degrees(np.arctan(0.5 / camera.focal))
    rays = np.tensordot(camera.rotation.T, camera.rays((30, 40)), 1)
    np.testing.assert_allclose(viewing_rays((30, 40), field_of_view), rays[:2], atol=1e-5)


def test_directions_of_the_axes():
    wall = normals_from_depth(torch.full((5, 8), 3.0))
    torch.testing.assert_close(wall, torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand(3, 5, 8))
    x, y = viewing_rays((41, 60))
    floor = normals_from_depth(1 / y.clamp(min=1e-3))[:, 22:]
    torch.testing.assert_close(floor, torch.tensor([0.0, -1, 0]).view(3, 1, 1).expand_as(floor), atol=1e-3, rtol=0)
    left = normals_from_depth(-1 / x.clamp(max=-1e-3))[..., :28]  # a wall on the left, which looks to the right
    torch.testing.assert_close(left, torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand_as(left), atol=1e-3, rtol=0)


@settings(max_examples=40)
@given(
    st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.3, 1)),
    st.floats(0.5, 20),
    st.tuples(st.integers(8, 20), st.integers(8, 20)),
    st.floats(20, 120),
    st.integers(1, 4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_planes_are_exact(normal, distance, size, field_of_view, step, dtype):
    normal = torch.tensor(normal)
    normal = F.normalize(normal, dim=0)
    depth = plane(normal, distance, size, field_of_view)
    assume(((depth > 0.1) & (depth < 1000)).all())
    found = normals_from_depth(depth.to(dtype), field_of_view, step)
    assert found.dtype == torch.float32
    assert angles_between(found, normal.view(3, 1, 1).expand_as(found)).max() < 0.2


def test_at_an_edge_each_pixel_keeps_the_normal_of_its_surface():
    tilted = plane(F.normalize(torch.tensor([0.3, -0.4, 1.0]), dim=0), 2.0, (20, 30), 60)
    depth = torch.where(torch.arange(30) < 13, tilted, torch.tensor(9.0))
    depth[:6] = 1.0
    found = normals_from_depth(depth, 60)
    parts = {(0.0, 0.0, 1.0): (depth == 1) | (depth == 9), (0.3, -0.4, 1.0): depth == tilted}
    for normal, where in parts.items():
        expected = F.normalize(torch.tensor(normal), dim=0)[:, None].expand(3, int(where.sum()))
        assert angles_between(found[:, where], expected).max() < 0.1


def test_unknown_depth_has_no_normal_and_spoils_no_other():
    depth = torch.full((2, 6, 8), 3.0)
    depth[0, 2:4, 3:5], depth[1, 0, 0] = 0, torch.nan
    normals = normals_from_depth(depth)
    assert normals.shape == (2, 3, 6, 8)
    lengths = normals.norm(dim=1)
    assert torch.equal(lengths == 0, ~(depth > 0)) and (normals[:, 2] == lengths).all()
    # Nor has a pixel without known neighbours, in one direction.
    assert not normals_from_depth(torch.full((1, 5), 2.0)).any()
    assert not normals_from_depth(torch.full((3, 3), 2.0), step=3).any()


def test_rooms_depth_and_normals_agree():
    angles, wrong_camera = [], []
    for index in range(4):
        room, camera = render_room("test", index, (96, 128)), sample_room("test", index).camera
        depth, normals = torch.from_numpy(room["depth"]), torch.from_numpy(room["normals"]).permute(2, 0, 1)
        true = 2 * float(np.degrees(np.arctan(0.5 / camera.focal)))
        angles.append(angles_between(normals_from_depth(depth, true), normals))
        wrong_camera.append(angles_between(normals_from_depth(depth, true / 2), normals))
    angles = torch.stack(angles)
    assert angles.median() < 0.05 and (angles < 1).double().mean() > 0.75
    assert torch.stack(wrong_camera).median() > 3


def test_angles_are_of_the_first_depth_and_normals_by_kind():
    assert first_of_kind(TASKS, "depth") == "range" and first_of_kind(TASKS, "boundary") is None
    for name in ("range", "up"):
        assert depth_normals_angles({}, {name: TASKS[name]}) is None
    normal = F.normalize(torch.tensor([0.2, 0.4, 1.0]), dim=0)
    other = F.normalize(torch.tensor([0.2, 0.4, 1.0]) + torch.linalg.cross(normal, torch.tensor([0.0, 0, 1])), dim=0)
    maps = {
        "range": plane(normal, 3.0, (40, 64), FIELD_OF_VIEW),
        "second": torch.ones(40, 64),
        "up": other.view(3, 1, 1).repeat(1, 40, 64),
    }
    expected = angles_between(normal, other).item()
    torch.testing.assert_close(
        depth_normals_angles(maps, TASKS), torch.full((40, 64), expected, dtype=torch.float32), atol=0.05, rtol=0
    )
    assert depth_normals_angles(maps, TASKS, 30).median().sub(expected).abs() > 1
    # As 255 in labels, 0 in depth, the zero vector
    maps["range"][0, 5], maps["range"][1, 5], maps["up"][:, 2, 5], maps["up"][:, 3, 5] = 255, 0, 0, 255
    unknown = torch.zeros(40, 64, dtype=torch.bool)
    unknown[:4, 5] = True
    assert torch.equal(depth_normals_angles(maps, TASKS).isnan(), unknown)
    maps["up"] = F.normalize(normals_from_depth(maps["range"]), dim=0).to(torch.bfloat16)
    assert depth_normals_angles({**maps, "range": torch.full((40, 64), 2.0)}, TASKS)[10, 10] < 90
