"""Rooms: the labels against independent geometry, and the data set built from them."""

import hashlib
import subprocess
import sys

import datasets
import numpy as np
import pytest

from transformers_degmix.data.benchmarks import HUMAN_PARTS
from transformers_degmix.data.rooms import ROOMS_TASKS, load_rooms, render_room, sample_room
from transformers_degmix.data.rooms import dataset as rooms_dataset
from transformers_degmix.data.rooms.objects import SEMSEG_CLASSES
from transformers_degmix.data.rooms.raycast import Box, Capsule, Ellipsoid, sees, visible


SIZE = (48, 64)
PERSON = SEMSEG_CLASSES.index("person")


def digest(room):
    return hashlib.sha256(b"".join(room[key].tobytes() for key in sorted(room))).hexdigest()


def look(split, index, size=SIZE):
    """A room, and for each pixel its z-depth, its surface's number and its ray `(3, height, width)`."""
    room = sample_room(split, index)
    depth, hit = room.camera.cast([surface.shape for surface in room.surfaces], size)
    return room, depth, hit, room.camera.rays(size)


def roots(a, b, c):
    """Real solutions of a t^2 + 2 b t + c = 0, inf for those that do not exist."""
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(b * b - a * c)
        return [np.where(np.isnan(root), np.inf, (sign * root - b) / a) for sign in (-1, 1)]


def enter(shape, origin, directions):
    """Where rays `(3, n)` enter a shape, in float64 and by textbook formulas: the least parameter above 0 of all
    crossings with the shape's bounding surfaces that lie on the shape; inf for none."""
    o, d = shape.rotation.T @ (origin - shape.centre), shape.rotation.T @ directions.astype(float)
    crossings = []  # parameters, and whether the point there belongs to the shape

    def at(t):
        with np.errstate(invalid="ignore"):
            return o[:, None] + t * d

    if isinstance(shape, Box):
        for axis in range(3):
            for side in (-1, 1):
                t = (side * shape.half[axis] - o[axis]) / d[axis]
                others = np.arange(3) != axis
                crossings.append((t, np.all(np.abs(at(t))[others] <= shape.half[others, None], axis=0)))
    elif isinstance(shape, Ellipsoid):
        p, q = o / shape.half, d / shape.half[:, None]
        crossings += [(t, np.isfinite(t)) for t in roots((q * q).sum(0), p @ q, p @ p - 1)]
    elif isinstance(shape, Capsule):
        radius, length = shape.half[0], shape.half[2] - shape.half[0]
        for t in roots((d[:2] ** 2).sum(0), o[:2] @ d[:2], o[:2] @ o[:2] - radius**2):
            crossings.append((t, np.abs(at(t)[2]) <= length))
        for end in (-length, length):
            p = o - [0, 0, end]
            crossings += [(t, np.isfinite(t)) for t in roots((d * d).sum(0), p @ d, p @ p - radius**2)]
    else:
        slope = (shape.top - shape.bottom) / (2 * shape.half[2])
        r, dr = (shape.top + shape.bottom) / 2 + slope * o[2], slope * d[2]
        for t in roots((d[:2] ** 2).sum(0) - dr**2, o[:2] @ d[:2] - r * dr, o[:2] @ o[:2] - r * r):
            crossings.append((t, np.abs(at(t)[2]) <= shape.half[2]))
        for end, radius in ((-shape.half[2], shape.bottom), (shape.half[2], shape.top)):
            t = (end - o[2]) / d[2]
            crossings.append((t, np.hypot(*at(t)[:2]) <= radius))
    return np.min([np.where(on_shape & (t > 0), t, np.inf) for t, on_shape in crossings], axis=0)


@pytest.mark.parametrize("index", range(4))
def test_cast_agrees_with_unculled_reference(index):
    room, depth, hit, rays = look("train", index, (72, 96))
    every = np.array([enter(s.shape, room.camera.position, rays.reshape(3, -1)) for s in room.surfaces])
    first, second = np.partition(every, 1, axis=0)[:2]
    np.testing.assert_allclose(depth.ravel(), first, rtol=1e-5)
    distinct = second > first * (1 + 1e-4)
    assert distinct.mean() > 0.95
    np.testing.assert_array_equal(hit.ravel()[distinct], np.argmin(every, axis=0)[distinct])


def test_all_primitives_occur():
    kinds = {type(s.shape).__name__ for index in range(4) for s in sample_room("train", index).surfaces}
    assert kinds == {"Box", "Ellipsoid", "Capsule", "Frustum"}


@pytest.mark.parametrize("index", range(3))
def test_shadows_agree_with_unculled_reference(index):
    room, depth, _, rays = look("validation", index)
    points = (room.camera.position.astype(np.float32)[:, None, None] + depth * rays).reshape(3, -1)
    blockers, margin = room.blockers, 3e-3
    for light in room.lights:
        path = points - light.position[:, None]
        distance = np.sqrt((path**2).sum(0))
        nearest = np.min(
            [enter(s, light.position, path / distance) for cluster in blockers for s in cluster.shapes], axis=0
        )
        clear = np.abs(nearest - (distance - margin)) > 1e-4  # all but the margin's own rounding
        expected = nearest > distance - margin
        assert clear.mean() > 0.9
        seen = sees(light.position, points, blockers, margin)
        assert np.count_nonzero((seen != expected)[clear]) <= 1  # a ray along an outline may go either way
        assert 0.05 < seen.mean() <= 1
    # Something is shaded, or the comparison says nothing.
    assert not sees(room.lights[0].position, points, blockers).all()


def test_sun_shines_through_its_window_only():
    room, depth, _, rays = next(
        view for view in (look("train", index) for index in range(20)) if view[0].lights[-1].portal is not None
    )
    sun = room.lights[-1]
    points = room.camera.position.astype(np.float32)[:, None, None] + depth * rays
    towards_sun = sun.position.astype(np.float32)[:, None, None] - points
    reached = sun.reaches(points, towards_sun, np.zeros(3), room.blockers)
    through = np.isfinite(enter(sun.portal, sun.position, -towards_sun.reshape(3, -1))).reshape(SIZE)
    assert reached.any()
    assert not np.any(reached & ~through)


@pytest.mark.parametrize("index", range(3))
def test_normals_agree_with_depth(index):
    size = (120, 160)
    room, _, hit, _ = look("test", index, size)
    labels = render_room("test", index, size)
    pixels = np.stack([*np.indices(size)[::-1], np.ones(size)]).reshape(3, -1)
    rays = np.linalg.inv(room.camera.intrinsics(size)) @ pixels
    points = (rays * labels["depth"].ravel()).reshape(3, *size)  # right, down, forward
    right, down = points[:, 1:-1, 2:] - points[:, 1:-1, :-2], points[:, 2:, 1:-1] - points[:, :-2, 1:-1]
    estimate = np.cross(down, right, axis=0)  # right x down is forward, away from the viewer
    estimate *= -np.sign((estimate * points[:, 1:-1, 1:-1]).sum(0)) / np.linalg.norm(estimate, axis=0)
    estimate = np.moveaxis(estimate * np.array([1, 1, -1])[:, None, None], 0, -1)
    inside, normals = np.ones((size[0] - 2, size[1] - 2), bool), labels["normals"]
    for i, j in ((0, 1), (2, 1), (1, 0), (1, 2)):
        window = np.s_[i : i + size[0] - 2, j : j + size[1] - 2]
        inside &= hit[window] == hit[1:-1, 1:-1]
        inside &= np.all(np.abs(normals[window] - normals[1:-1, 1:-1]) < 1e-5, axis=-1)  # same face: planar
    assert inside.mean() > 0.4
    cosine = (estimate * normals[1:-1, 1:-1]).sum(-1)[inside]
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 1


def test_normals_follow_nyud_axes():
    labels = render_room("train", 3, SIZE)
    floor = labels["normals"][labels["semseg"] == SEMSEG_CLASSES.index("floor")]
    ceiling = labels["normals"][labels["semseg"] == SEMSEG_CLASSES.index("ceiling")]
    assert len(floor) and floor[:, 1].max() < -0.9
    assert len(ceiling) and ceiling[:, 1].min() > 0.9
    assert labels["normals"][..., 2].mean() > 0


@pytest.mark.parametrize("index", range(6))
def test_labels_are_valid(index):
    room, depth, _, rays = look("train", index)
    labels = render_room("train", index, SIZE)
    dtypes = {"image": "uint8", "semseg": "uint8", "human_parts": "uint8", "sal": "uint8", "edge": "uint8"}
    dtypes |= {"depth": "float32", "normals": "float32"}
    assert {key: str(value.dtype) for key, value in labels.items()} == dtypes
    for key, value in labels.items():
        assert value.shape == (*SIZE, 3) if key in ("image", "normals") else SIZE
    assert labels["semseg"].max() < len(SEMSEG_CLASSES)
    assert labels["human_parts"].max() < len(HUMAN_PARTS)
    np.testing.assert_array_equal(labels["human_parts"] > 0, labels["semseg"] == PERSON)
    assert set(np.unique(labels["sal"])) == {0, 1}
    assert set(np.unique(labels["edge"])) == {0, 1}
    assert labels["depth"].min() > 0.3 and labels["depth"].max() < 10
    np.testing.assert_array_equal(labels["depth"], depth)
    normals = np.moveaxis(labels["normals"], -1, 0)
    np.testing.assert_allclose((normals**2).sum(0), 1, atol=1e-5)
    in_camera = np.tensordot(room.camera.rotation.T, rays, 1)  # right, down, forward
    assert np.all((normals * in_camera * np.array([1, 1, -1])[:, None, None]).sum(0) < 0)
    assert 60 < labels["image"].mean() < 220


def test_people_are_salient_before_all_else():
    seen = set()
    for index in range(12):
        labels = render_room("validation", index, SIZE)
        people = labels["semseg"] == PERSON
        if people.mean() > 0.1:
            assert not np.any(labels["sal"][~people])
            seen.add("people")
        elif not people.any():
            assert len(np.unique(labels["semseg"][labels["sal"] == 1])) == 1
            seen.add("object")
    assert seen == {"people", "object"}


@pytest.mark.parametrize("index", range(3))
def test_boundaries_agree_with_plain_loop(index):
    room, depth, hit, rays = look("test", index)
    points = np.moveaxis(room.camera.position.astype(np.float32)[:, None, None] + depth * rays, 0, -1)
    normals = np.empty((*SIZE, 3))
    for k, pixels in visible(hit):
        shape = room.surfaces[k].shape
        normals[pixels] = shape.normals(room.camera.position, rays[:, *pixels], depth[pixels]).T
    expected, kinds = np.zeros(SIZE, np.uint8), set()
    for i in range(SIZE[0]):
        for j in range(SIZE[1]):
            for other in ((i, j + 1), (i + 1, j)):
                if other[0] == SIZE[0] or other[1] == SIZE[1]:
                    continue
                one, two = room.surfaces[hit[i, j]], room.surfaces[hit[other]]
                step = points[other] - points[i, j]
                offset = min(abs(step @ normals[i, j]), abs(step @ normals[other]))
                width = min(depth[i, j], depth[other]) / (room.camera.focal * SIZE[1])
                if one.instance != two.instance:
                    kinds.add("between")
                elif one is not two and offset > 0.03 + 2 * width:
                    kinds.add("within")
                else:
                    continue
                expected[(i, j) if depth[i, j] <= depth[other] else other] = 1
    np.testing.assert_array_equal(render_room("test", index, SIZE)["edge"], expected)
    assert "between" in kinds and (index or kinds == {"between", "within"})


def test_room_does_not_depend_on_size():
    small, large = render_room("train", 5, (40, 56)), render_room("train", 5, (120, 168))
    # Every ninth ray of the larger image is a ray of the smaller one.
    for key in ("semseg", "human_parts"):
        assert np.mean(small[key] != large[key][1::3, 1::3]) < 1e-3
    close = np.isclose(small["depth"], large["depth"][1::3, 1::3], rtol=1e-4)
    assert close.mean() > 0.999


def test_same_pixels_again_and_in_another_process():
    code = (
        "import hashlib; from transformers_degmix.data.rooms import render_room;"
        "room = render_room('test', 7, (48, 64));"
        "print(hashlib.sha256(b''.join(room[key].tobytes() for key in sorted(room))).hexdigest())"
    )
    command = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first = digest(render_room("test", 7, SIZE))
    assert first == digest(render_room("test", 7, SIZE)) == command.stdout.strip()


def test_splits_and_indices_differ():
    rendered = [render_room(split, index, (32, 32)) for split in ("train", "validation", "test") for index in (0, 1)]
    assert len({labels["depth"].tobytes() for labels in rendered}) == 6


def test_every_class_appears():
    seen, parts = set(), set()
    for index in range(30):
        labels = render_room("train", index, (36, 48))
        seen |= set(np.unique(labels["semseg"]).tolist())
        parts |= set(np.unique(labels["human_parts"]).tolist())
    assert seen == set(range(len(SEMSEG_CLASSES)))
    assert parts == set(range(len(HUMAN_PARTS)))


def test_tasks_name_the_classes():
    assert ROOMS_TASKS["semseg"]["num_labels"] == len(SEMSEG_CLASSES) >= 12
    assert ROOMS_TASKS["semseg"]["id2label"][PERSON] == "person"
    assert ROOMS_TASKS["human_parts"]["id2label"][1] == "head"
    assert [task["kind"] for task in ROOMS_TASKS.values()] == [
        "segmentation",
        "segmentation",
        "saliency",
        "depth",
        "normals",
        "boundary",
    ]


def test_dataset_holds_the_rendered_arrays(tmp_path):
    dataset = load_rooms("validation", 3, SIZE, cache_dir=str(tmp_path))
    assert dataset.split == "validation"
    assert dataset["image_id"][:] == ["validation_000000", "validation_000001", "validation_000002"]
    assert dataset.features["semseg_classes"].feature.names == list(SEMSEG_CLASSES)
    assert dataset.features["human_parts_classes"].feature.names == list(HUMAN_PARTS)
    for index, row in enumerate(dataset):
        room = render_room("validation", index, SIZE)
        assert [row[key].mode for key in ("image", "semseg", "depth", "normals", "edge")] == [
            "RGB",
            "L",
            "F",
            "RGB",
            "L",
        ]
        for key in ("image", "semseg", "human_parts", "sal", "depth"):
            np.testing.assert_array_equal(np.asarray(row[key]), room[key])
        np.testing.assert_array_equal(np.asarray(row["edge"]), 255 * room["edge"])
        assert np.abs(2 * (np.asarray(row["normals"]) / 255) - 1 - room["normals"]).max() <= 1 / 255 + 1e-6
        assert row["semseg_classes"] == np.unique(room["semseg"]).tolist()
        assert row["human_parts_classes"] == np.unique(room["human_parts"]).tolist()


def test_processes_do_not_change_the_dataset(tmp_path):
    one = load_rooms("train", 5, (32, 48), cache_dir=str(tmp_path / "one"))
    two = load_rooms("train", 5, (32, 48), num_proc=2, cache_dir=str(tmp_path / "two"))
    tables = [d.with_format("arrow")[:] for d in (one, two)]
    assert tables[0].equals(tables[1])


def test_dataset_is_rendered_once_and_whole(tmp_path, monkeypatch):
    def load():
        return load_rooms("train", 3, (32, 32), cache_dir=str(tmp_path))

    def interrupted(split, index, image_size):
        if index == 2:
            raise KeyboardInterrupt
        return render_room(split, index, image_size)

    def never(*_):
        raise AssertionError("rendered again")

    monkeypatch.setattr(rooms_dataset, "render_room", interrupted)
    with pytest.raises((KeyboardInterrupt, datasets.exceptions.DatasetGenerationError)):
        load()
    monkeypatch.setattr(rooms_dataset, "render_room", render_room)
    assert load()["image_id"][:] == ["train_000000", "train_000001", "train_000002"]
    monkeypatch.setattr(rooms_dataset, "render_room", never)
    assert len(load()) == 3
    monkeypatch.setattr(rooms_dataset, "RENDERER_VERSION", rooms_dataset.RENDERER_VERSION + 1)
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        load()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: render_room("val", 0), "'train', 'validation', 'test'.*'val'"),
        (lambda: render_room("train", -1), "`index`.*-1"),
        (lambda: render_room("train", 0, (31, 64)), "32.*31"),
        (lambda: render_room("train", 0, (64, 64, 3)), "height and a width"),
        (lambda: load_rooms("dev", 1), "'train', 'validation', 'test'.*'dev'"),
        (lambda: load_rooms("train", 0), "`num_images`.*0"),
        (lambda: load_rooms("train", -2), "`num_images`.*-2"),
        (lambda: load_rooms("train", 1, (64, 16)), "32.*16"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
