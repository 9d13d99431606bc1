"""Composition of the Rooms data set: rooms, what stands in them, their light and the camera's view."""

from dataclasses import dataclass, replace

import numpy as np

from .materials import FABRICS, WALLS, WOODS, fabric, plain, stripes, tiles, wood
from .objects import (
    GROUPS_AT_WALLS,
    SEMSEG_CLASSES,
    Item,
    Surface,
    bounds,
    chair,
    cloth,
    dining,
    door,
    pendant,
    person,
    pick,
    picture,
    rug,
    timber,
    toy_ball,
    window,
)
from .raycast import Box, Camera, Cluster, Shape, dot, sees, turn


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Light:
    """A lamp of linear RGB `power` at `position`.

    Its `radius` softens shadows. A lamp outdoors shines only through the shape `portal`.
    """

    position: np.ndarray
    power: np.ndarray
    radius: float
    portal: Shape | None = None

    def reaches(self, points, normals, offset, blockers: list[Cluster]) -> np.ndarray:
        """Which points `(3, ...)` with normals `(3, ...)` the light at `position + offset` shines on, `(...)` bool."""
        source, shape = self.position + offset, points.shape[1:]
        points, normals = points.reshape(3, -1), normals.reshape(3, -1)
        path = points - source.astype(np.float32)[:, None]
        facing = np.flatnonzero(dot(path, normals) < 0)
        if self.portal is not None:
            facing = facing[self.portal.intersect(source, path[:, facing]) < 1]
        reached = np.zeros(points.shape[1], bool)
        reached[facing] = sees(source, points[:, facing], blockers)
        return reached.reshape(shape)


@dataclass(frozen=True)
class Room:
    """A furnished room in front of a camera. Surfaces of the same `instance` belong to one object."""

    camera: Camera
    surfaces: list[Surface]
    lights: list[Light]
    ambient: np.ndarray
    exposure: float

    @property
    def blockers(self) -> list[Cluster]:
        """What casts shadows: the opaque parts of each object. The shell does not: all that is lit is inside."""
        shell = [SEMSEG_CLASSES.index(name) for name in ("wall", "floor", "ceiling")]
        objects = {}
        for surface in self.surfaces:
            if surface.opaque and surface.label not in shell:
                objects.setdefault(surface.instance, []).append(surface.shape)
        return [Cluster(shapes) for shapes in objects.values()]


class _Plan:
    """The floor plan of a room of the given size: what stands where, and what is on the walls.

    Wall k is wall 0 (at y = 0, facing +y) after k quarter turns to the left.
    """

    def __init__(self, rng, size):
        self.rng, self.size = rng, size
        self.items: list[Item] = []
        self.footprints: list[np.ndarray] = []  # corners (4, 2) of rectangles
        self.on_walls: list[tuple] = []  # wall, left, right, bottom, top

    def put(self, items, at, yaw):
        self.items += [item.moved(at, yaw) for item in items]

    def stand_against_wall(self, items):
        """Puts a group with its back to a free part of a wall, if one is found."""
        (x0, y0, _), (x1, y1, _) = bounds(items)
        height = bounds([item for item in items if item.bounds[0, 1] < y0 + 0.3])[1, 2]
        for _ in range(12):
            wall = self.rng.integers(4)
            spare = self.size[wall % 2] - (x1 - x0) - 0.1
            if spare < 0:
                continue
            left = 0.05 + self.rng.uniform(0, spare)
            at, yaw = self._pose(wall, left - x0)
            at = at + (0.03 - y0) * _inward(yaw)[:2]
            footprint = _rectangle((x0, y0), (x1, y1), at, yaw)
            if self.is_free(footprint, 0.06) and self._claim(wall, left, left + x1 - x0, 0, height):
                self.footprints.append(footprint)
                self.put(items, at, yaw)
                break

    def stand_freely(self, items):
        """Puts a group anywhere on the floor, if a free place is found."""
        (x0, y0, _), (x1, y1, _) = bounds(items)
        for _ in range(20):
            at, yaw = self.rng.uniform(0.3, self.size[:2] - 0.3), self.rng.uniform(0, 2 * np.pi)
            footprint = _rectangle((x0, y0), (x1, y1), at, yaw)
            if self.is_free(footprint, 0.06):
                self.footprints.append(footprint)
                self.put(items, at, yaw)
                break

    def hang(self, item, bottom, clear=0.0):
        """Fixes an item to a wall and keeps the floor free up to `clear` in front of it.

        Returns:
            Its position and yaw, or `None` if no place is found.
        """
        (x0, _, low), (x1, _, high) = item.bounds
        for _ in range(8):
            wall = self.rng.integers(4)
            along = self.rng.uniform(0.25 - x0, self.size[wall % 2] - x1 - 0.25)
            if self._claim(wall, along + x0, along + x1, bottom + low, bottom + high):
                at, yaw = self._pose(wall, along)
                self.put([item], (*at, bottom), yaw)
                if clear:
                    self.footprints.append(_rectangle((x0, 0), (x1, clear), at, yaw))
                return at, yaw
        return None

    def is_free(self, footprint, gap):
        inside = np.all(footprint > 0) and np.all(footprint < self.size[:2])
        return inside and not any(_overlap(footprint, other, gap) for other in self.footprints)

    def _claim(self, wall, left, right, bottom, top):
        """Reserves part of a wall, unless it is too close to what is there. Returns whether it did."""
        gap = 0.08
        for other, x0, x1, z0, z1 in self.on_walls:
            if wall == other and left < x1 + gap and right > x0 - gap and bottom < z1 + gap and top > z0 - gap:
                return False
        self.on_walls.append((wall, left, right, bottom, top))
        return True

    def _pose(self, wall, along):
        width, depth = self.size[:2]
        yaw = wall * np.pi / 2
        return np.array([(0, 0), (width, 0), (width, depth), (0, depth)][wall]) + along * turn(yaw)[:2, 0], yaw


def _rectangle(low, high, at, yaw):
    corners = np.array([(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])])
    return corners @ turn(yaw)[:2, :2].T + at[:2]


def _overlap(a, b, gap):
    """Whether two rectangles `(4, 2)` come closer than `gap`, by the separating axis theorem."""
    for axis in (a[1] - a[0], a[2] - a[1], b[1] - b[0], b[2] - b[1]):
        axis = axis / np.linalg.norm(axis)
        p, q = a @ axis, b @ axis
        if p.max() + gap <= q.min() or q.max() + gap <= p.min():
            return False
    return True


def _shell(rng, size) -> list[Item]:
    """Floor, ceiling and four walls: slabs around the room that overlap at its edges."""
    width, depth, height = size
    color = np.array(pick(rng, WALLS))
    paper = plain(color, grain=0.02) if rng.random() < 0.8 else stripes(color, color * 0.93, rng.uniform(0.12, 0.3))
    accent = plain(pick(rng, FABRICS + WALLS), grain=0.02) if rng.random() < 0.25 else paper
    stone = pick(rng, [(0.8, 0.77, 0.72), (0.55, 0.53, 0.5), (0.72, 0.62, 0.52)])
    boards = wood(pick(rng, WOODS), gloss=0.35, plank=rng.uniform(0.09, 0.2))
    stones = tiles(stone, np.array(stone) * pick(rng, [1.0, 0.97, 0.6]), rng.uniform(0.3, 0.6))
    ground = pick(rng, [boards, boards, stones, fabric(pick(rng, FABRICS))])
    t = 0.1  # thickness
    floor, ceiling, walls = Item("floor"), Item("ceiling"), [Item("wall") for _ in range(4)]
    floor.box((-t, -t, -t), (width + t, depth + t, 0), ground)
    ceiling.box((-t, -t, height), (width + t, depth + t, height + t), plain((0.95, 0.95, 0.94), grain=0.01))
    walls[0].box((-t, -t, -t), (width + t, 0, height + t), accent)
    walls[1].box((width, -t, -t), (width + t, depth + t, height + t), paper)
    walls[2].box((-t, depth, -t), (width + t, depth + t, height + t), paper)
    walls[3].box((-t, -t, -t), (0, depth + t, height + t), paper)
    return [floor, ceiling, *walls]


def _camera(rng, plan, shell) -> Camera | None:
    """The best of a few views at eye height: many objects, none of them too large, and much of the room."""
    items = shell + plan.items
    boxes = [
        Box(low_high.mean(0), np.eye(3), np.diff(low_high, axis=0)[0] / 2)
        for low_high in (item.bounds for item in items)
    ]
    worth = np.array([0.0] * len(shell) + [2.0 if item.label == "person" else 1.0 for item in plan.items])
    focal = 0.5 / np.tan(np.radians(rng.uniform(60, 80)) / 2)
    views, scores = [], []
    for _ in range(60):
        position, target = rng.uniform((0.4, 0.4, 1.25), (*plan.size[:2] - 0.4, 1.75)), rng.uniform(0.2, 0.8, 2)
        heading = target * plan.size[:2] - position[:2]
        if np.hypot(*heading) < 1.2 or not plan.is_free(_rectangle((-0.05, -0.05), (0.05, 0.05), position, 0.0), 0.4):
            continue
        yaw, pitch, roll = np.arctan2(heading[1], heading[0]), rng.uniform(-0.36, -0.08), rng.normal(0, 0.02)
        views.append(Camera.looking(position, yaw, pitch, roll, focal))
        depth, hit = views[-1].cast(boxes, (15, 20))
        share = np.bincount(hit.ravel(), minlength=len(items)) / hit.size
        crowding = max(0.0, share[len(shell) :].max() - 0.3) + np.mean(depth < 1)
        scores.append(worth @ np.sqrt(np.minimum(share, 0.1)) + 0.3 * min(depth.mean(), 4) - 3 * crowding)
        if len(views) == 6:
            break
    return views[np.argmax(scores)] if views else None


def sample_room(split: str, index: int) -> Room:
    """Room number `index` of a split, the same on every call."""
    rng = np.random.default_rng([SPLITS.index(split), index])
    while (room := _furnish(rng)) is None:
        pass
    return room


def _furnish(rng) -> Room | None:
    """A random room, or None if it has no place for a camera."""
    size = rng.uniform((3.2, 3.2, 2.4), (6.0, 5.2, 2.8))
    daylight = rng.uniform(0.5, 1.0) if rng.random() < 0.75 else 0.03  # or night
    plan = _Plan(rng, size)
    plan.hang(door(rng), 0.0, clear=0.6)
    windows = []
    for _ in range(rng.integers(1, 3)):
        opening = rng.uniform((0.7, 0.9), (1.8, 1.3))
        pose = plan.hang(window(rng, *opening, brightness=2.2 * daylight), 0.9)
        if pose is not None:
            windows.append((*pose, opening))

    kind = pick(rng, ["living", "bed", "study", "dining"])
    for group in GROUPS_AT_WALLS[kind]:
        plan.stand_against_wall(group(rng))
    if kind == "dining" or rng.random() < 0.2:
        plan.stand_freely(dining(rng))
    for k in rng.permutation(len(GROUPS_AT_WALLS["any"]))[: rng.integers(2, 5)]:
        plan.stand_against_wall(GROUPS_AT_WALLS["any"][k](rng))
    for _ in range(pick(rng, [0, 0, 1, 1, 2])):
        plan.stand_freely([person(rng)])
    for _ in range(pick(rng, [0, 0, 1, 2])):
        plan.stand_freely([toy_ball(rng)])
    if rng.random() < 0.3:
        plan.stand_freely([chair(rng, timber(rng), cloth(rng))])
    for _ in range(rng.integers(1, 5)):
        plan.hang(picture(rng), rng.uniform(1.2, 1.5))
    shell = _shell(rng, size)
    camera = _camera(rng, plan, shell)
    if camera is None:
        return None

    if rng.random() < 0.6:
        half = rng.uniform((0.8, 0.6), (1.3, 0.95))
        plan.put([rug(rng, half)], size[:2] / 2 + rng.uniform(-0.4, 0.4, 2), pick(rng, [0, np.pi / 2]))
    below = size[:2] / 2 + rng.uniform(-0.4, 0.4, 2)
    lamp = pendant(rng, size[2])
    plan.put([lamp], below, 0.0)
    warm = rng.uniform((1.0, 0.78, 0.55), (1.0, 0.95, 0.85)) * rng.uniform(2.0, 4.0) * (1.3 - daylight)
    lights = [Light(np.array([*below, lamp.bounds[0, 2]]), warm, 0.15)]
    if daylight > 0.1:
        for at, yaw, (width, height) in windows:
            sky = np.array([0.85, 0.94, 1.05]) * 1.6 * daylight * width * height
            lights.append(Light(np.array([*at, 0.9 + height / 2]) + 0.25 * _inward(yaw), sky, 0.35))
        if windows and rng.random() < 0.7:
            lights.append(_sun(rng, *windows[0], daylight))

    surfaces = []
    for instance, item in enumerate(shell + plan.items):
        surfaces += [replace(surface, instance=instance) for surface in item.surfaces]
    ambient = np.array([1.0, 0.97, 0.93]) * rng.uniform(0.16, 0.26)
    return Room(camera, surfaces, lights, ambient, exposure=rng.uniform(0.44, 0.72))


def _inward(yaw):
    return turn(yaw) @ [0.0, 1.0, 0.0]


def _sun(rng, at, yaw, opening, daylight) -> Light:
    """A distant lamp that shines through a window."""
    middle = np.array([*at, 0.9 + opening[1] / 2])
    position = middle + turn(yaw) @ rng.uniform((-15, -27, 12), (15, -12, 27))
    distance = np.linalg.norm(position - middle)
    portal = Box(middle, turn(yaw), np.array([opening[0] / 2, 0.02, opening[1] / 2]))
    return Light(position, np.array([1.0, 0.92, 0.78]) * 2.5 * daylight * distance**2, 0.2, portal)
