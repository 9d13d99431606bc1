"""Objects of the Rooms data set: furniture, people, fixtures, and the groups in which furniture stands."""

from dataclasses import dataclass, field, replace

import numpy as np

from ..benchmarks import HUMAN_PARTS
from .materials import (
    BRIGHT,
    FABRICS,
    HAIRS,
    SHIRTS,
    SKINS,
    WALLS,
    WOODS,
    Material,
    carpet,
    fabric,
    outdoors,
    painting,
    plain,
    stripes,
    tiles,
    wood,
)
from .raycast import Box, Capsule, Ellipsoid, Frustum, Shape, between, rotate, turn


SEMSEG_CLASSES = (
    "wall", "floor", "ceiling", "door", "window", "picture", "rug", "table", "chair", "sofa", "bed", "bookcase",
    "cabinet", "lamp", "tv", "plant", "ball", "person",
)  # fmt: skip


@dataclass(frozen=True)
class Surface:
    """One primitive of an object, with its material.

    `label` is its position in `SEMSEG_CLASSES`, `part` in `HUMAN_PARTS`, and `instance` the number of its object. Only
    `opaque` surfaces cast shadows.
    """

    shape: Shape
    material: Material
    label: int
    part: int = 0
    opaque: bool = True
    instance: int = -1

    def albedo(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Linear RGB `(3, n)` at world points `(3, n)` of the surface with the given normals."""
        (x, y, z), half = self.shape.local(points), self.shape.half
        face = np.argmax(np.abs(rotate(self.shape.rotation.T, normals)), axis=0)
        u, v = np.where(face == 0, y, x), np.where(face == 2, y, z)
        if self.material.grain:
            across = np.where(face == 0, half[1], half[0]) < np.where(face == 2, half[1], half[2])
            u, v = np.where(across, v, u), np.where(across, u, v)
        return np.maximum(self.material.pattern(np.stack([u, v])), 0)


@dataclass
class Item:
    """An object in its local frame: x to its right, y to its front, z up from the floor."""

    label: str
    surfaces: list[Surface] = field(default_factory=list)

    def add(self, shape: Shape, material: Material, part: str = "background", opaque: bool = True) -> None:
        ids = SEMSEG_CLASSES.index(self.label), HUMAN_PARTS.index(part)
        self.surfaces.append(Surface(shape, material, *ids, opaque))

    def box(self, low, high, material: Material, **kwargs) -> None:
        low, high = np.asarray(low, float), np.asarray(high, float)
        self.add(Box((low + high) / 2, np.eye(3), (high - low) / 2), material, **kwargs)

    def ball(self, centre, radii, material: Material, yaw: float = 0.0, **kwargs) -> None:
        radii = np.broadcast_to(np.asarray(radii, float), 3)
        self.add(Ellipsoid(np.asarray(centre, float), turn(yaw), radii), material, **kwargs)

    def capsule(self, a, b, radius, material: Material, **kwargs) -> None:
        self.add(between(Capsule, a, b, radius), material, **kwargs)

    def frustum(self, a, b, radius, material: Material, top=None, **kwargs) -> None:
        self.add(between(Frustum, a, b, radius, top), material, **kwargs)

    def moved(self, at, yaw: float = 0.0) -> "Item":
        at = np.array([*at, 0.0][:3], float)
        return Item(self.label, [replace(s, shape=s.shape.moved(turn(yaw), at)) for s in self.surfaces])

    @property
    def bounds(self) -> np.ndarray:
        """Lowest and highest coordinates, `(2, 3)`."""
        return bounds([self])


def bounds(items: list[Item]) -> np.ndarray:
    """Lowest and highest coordinates `(2, 3)` of all items."""
    corners = np.concatenate([surface.shape.corners for item in items for surface in item.surfaces], axis=1)
    return np.stack([corners.min(1), corners.max(1)])


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def timber(rng):
    return wood(pick(rng, WOODS), gloss=rng.uniform(0.1, 0.4))


def cloth(rng, colors=FABRICS):
    color = pick(rng, colors)
    if rng.random() < 0.2:
        return stripes(color, np.sqrt(color), rng.uniform(0.06, 0.16))
    return fabric(color)


def _table(rng, width, depth, height, material) -> Item:
    table, leg = Item("table"), rng.uniform(0.025, 0.04)
    x, y = width / 2, depth / 2
    table.box((-x, -y, height - 0.04), (x, y, height), material)
    legs = material if rng.random() < 0.6 else plain((0.2, 0.2, 0.22), gloss=0.5)
    for sx in (-1, 1):
        for sy in (-1, 1):
            foot = np.array([sx * (x - 0.07), sy * (y - 0.07)])
            if leg > 0.032:
                table.box((*(foot - leg), 0), (*(foot + leg), height - 0.04), legs)
            else:
                table.frustum((*foot, 0), (*foot, height - 0.04), 0.6 * leg, legs, top=leg)
    return table


def _round_table(rng, radius, height, material) -> Item:
    table = Item("table")
    table.frustum((0, 0, height - 0.04), (0, 0, height), radius, material)
    table.frustum((0, 0, 0.03), (0, 0, height - 0.04), 0.05, material)
    table.frustum((0, 0, 0), (0, 0, 0.03), radius * 0.55, material)
    return table


def chair(rng, frame, seat) -> Item:
    chair, w = Item("chair"), 0.21
    chair.box((-w, -w, 0.41), (w, w, 0.46), seat)
    for x in (-w + 0.025, w - 0.025):
        chair.frustum((x, w - 0.03, 0), (x, w - 0.03, 0.41), 0.015, frame, top=0.022)
        chair.box((x - 0.02, -w - 0.02, 0), (x + 0.02, -w + 0.02, 0.95), frame)
    if rng.random() < 0.5:
        chair.box((-w + 0.045, -w - 0.015, 0.6), (w - 0.045, -w + 0.01, 0.93), seat)
    else:
        for z in (0.58, 0.7, 0.82):
            chair.box((-w + 0.045, -w - 0.01, z), (w - 0.045, -w + 0.01, z + 0.07), frame)
    return chair


def _sofa(rng, seats) -> Item:
    sofa, cover, x = Item("sofa"), cloth(rng), 0.32 * seats + 0.18
    sofa.box((-x, -0.45, 0.08), (x, 0.4, 0.28), cover)
    sofa.box((-x, -0.45, 0.28), (x, -0.25, 0.82), cover)
    for side in (-1, 1):
        sofa.box((side * x - 0.09, -0.45, 0.08), (side * x + 0.09, 0.42, 0.58), cover)
        sofa.capsule((side * x, -0.36, 0.58), (side * x, 0.33, 0.58), 0.09, cover)
        for y in (-0.4, 0.36):
            sofa.frustum((side * (x - 0.05), y, 0), (side * (x - 0.05), y, 0.08), 0.02, plain((0.2, 0.15, 0.1)))
    for k in range(seats):
        middle = 0.64 * (k - (seats - 1) / 2)
        sofa.box((middle - 0.312, -0.25, 0.28), (middle + 0.312, 0.43, 0.44), cover)
    for side in (-1, 1):
        if rng.random() < 0.6:
            pillow, at = cloth(rng), (side * (x - 0.3), -0.16, 0.6)
            sofa.ball(at, (0.21, 0.09, 0.18), pillow, yaw=side * 0.2)
    return sofa


def _bed(rng, width) -> Item:
    bed, frame, cover = Item("bed"), timber(rng), cloth(rng)
    sheet = fabric((0.92, 0.91, 0.89))
    x, length = width / 2, 2.0
    bed.box((-x, 0, 0.12), (x, length + 0.08, 0.32), frame)
    bed.box((-x - 0.03, -0.06, 0), (x + 0.03, 0, rng.uniform(0.85, 1.2)), frame)
    for sx in (-1, 1):
        bed.box((sx * (x - 0.04) - 0.04, length, 0), (sx * (x - 0.04) + 0.04, length + 0.08, 0.12), frame)
    bed.box((-x + 0.03, 0.02, 0.32), (x - 0.03, length, 0.5), sheet)
    fold = rng.uniform(0.6, 0.9)
    bed.box((-x - 0.01, fold, 0.25), (x + 0.01, length + 0.03, 0.56), cover)
    bed.box((-x - 0.015, fold - 0.12, 0.3), (x + 0.015, fold + 0.15, 0.575), sheet)
    for at in (-width / 4, width / 4) if width > 1.2 else (0,):
        bed.ball((at, 0.26, 0.58), (0.33, 0.2, 0.1), fabric(pick(rng, [(0.93, 0.92, 0.9), *FABRICS])))
    return bed


def _bookcase(rng) -> Item:
    case, frame = Item("bookcase"), timber(rng)
    width, depth, shelves = rng.uniform(0.7, 1.3), 0.32, int(rng.integers(4, 6))
    height = 0.36 * shelves + 0.1
    x = width / 2
    case.box((-x, 0, 0), (x, 0.02, height), frame)
    for side in (-1, 1):
        case.box((side * (x - 0.015) - 0.015, 0.02, 0), (side * (x - 0.015) + 0.015, depth, height), frame)
    for k in range(shelves + 1):
        z = 0.06 + 0.36 * k
        case.box((-x + 0.03, 0.02, z), (x - 0.03, depth, z + 0.025), frame)
        if k == shelves:
            break
        at, end = -x + 0.04, rng.uniform(-0.2 * x, x - 0.08)
        while at < end and rng.random() < 0.97:
            thickness = rng.uniform(0.03, 0.075)
            reach, top = rng.uniform(0.22, 0.28), z + rng.uniform(0.2, 0.3)
            color = np.clip(np.array(pick(rng, BRIGHT + FABRICS + WALLS)) * rng.uniform(0.6, 1), 0, 1)
            # Shadows of books would hardly show, and cost more than all others.
            case.box((at, 0.04, z + 0.025), (at + thickness, reach, top), plain(color), opaque=False)
            at += thickness + 0.003
    return case


def _cabinet(rng, width, depth, height) -> Item:
    cabinet, body = Item("cabinet"), timber(rng)
    front = body if rng.random() < 0.6 else wood(pick(rng, WOODS))
    knob, x = plain((0.75, 0.72, 0.65), gloss=0.8), width / 2
    cabinet.box((-x, 0, 0.06), (x, depth - 0.02, height), body)
    cabinet.box((-x + 0.04, 0.04, 0), (x - 0.04, depth - 0.06, 0.06), body)
    columns = max(1, round(width / 0.5))
    rows = 1 if height > 1.3 else max(1, round(height / 0.3))
    for i in range(columns):
        for j in range(rows):
            left, low = -x + width * i / columns, 0.06 + (height - 0.06) * j / rows
            right, high = left + width / columns, low + (height - 0.06) / rows
            cabinet.box((left + 0.01, depth - 0.02, low + 0.01), (right - 0.01, depth, high - 0.01), front)
            side = (left + right) / 2 if rows > 1 else (right - 0.06 if i % 2 == 0 else left + 0.06)
            cabinet.ball((side, depth + 0.012, (low + high) / 2), 0.016, knob, opaque=False)
    return cabinet


def _table_lamp(rng) -> Item:
    lamp = Item("lamp")
    lamp.frustum((0, 0, 0), (0, 0, 0.02), 0.07, plain((0.6, 0.55, 0.45), gloss=0.6))
    lamp.ball((0, 0, 0.12), (0.06, 0.06, 0.11), plain(pick(rng, FABRICS), gloss=0.6))
    lamp.frustum((0, 0, 0.22), (0, 0, 0.4), 0.14, _shade(rng), top=0.09, opaque=False)
    return lamp


def _shade(rng):
    return plain(
        pick(rng, [(0.96, 0.92, 0.82), (0.95, 0.85, 0.65), (0.93, 0.93, 0.9)]), emission=rng.uniform(0.5, 1.2)
    )


def _floor_lamp(rng) -> Item:
    lamp, metal, height = Item("lamp"), plain(pick(rng, [(0.2, 0.2, 0.2), (0.7, 0.6, 0.4)]), gloss=0.7), 1.6
    lamp.frustum((0, 0, 0), (0, 0, 0.03), 0.15, metal)
    lamp.frustum((0, 0, 0.03), (0, 0, height - 0.25), 0.015, metal)
    lamp.frustum((0, 0, height - 0.3), (0, 0, height), 0.22, _shade(rng), top=0.15, opaque=False)
    return lamp


def pendant(rng, height) -> Item:
    """A ceiling lamp; the frame's origin is at the floor below it."""
    lamp, drop = Item("lamp"), rng.uniform(0.15, 0.6)
    radius = rng.uniform(0.16, 0.26)
    lamp.frustum((0, 0, height - 0.03), (0, 0, height), 0.06, plain((0.9, 0.9, 0.9)), opaque=False)
    lamp.frustum((0, 0, height - drop), (0, 0, height - 0.03), 0.008, plain((0.15, 0.15, 0.15)), opaque=False)
    if rng.random() < 0.5:
        lamp.ball((0, 0, height - drop - radius * 0.8), radius * 0.8, _shade(rng), opaque=False)
    else:
        low = height - drop - 0.2
        lamp.frustum((0, 0, low), (0, 0, height - drop), radius, _shade(rng), top=radius * 0.6, opaque=False)
    return lamp


def _screen(rng, width) -> Item:
    tv, black, height = Item("tv"), plain((0.05, 0.05, 0.06), gloss=0.9), width * 0.58
    picture = painting(rng, (width / 2, height / 2))
    lit = rng.random() < 0.5
    tv.box((-width * 0.25, -0.1, 0), (width * 0.25, 0.1, 0.015), black)
    tv.box((-0.03, -0.03, 0.015), (0.03, 0.0, 0.1), black)
    tv.box((-width / 2, -0.02, 0.08), (width / 2, 0.025, 0.08 + height), black)
    face = replace(picture, gloss=0.9, emission=0.8) if lit else plain((0.03, 0.035, 0.04), gloss=1.0)
    tv.box((-width / 2 + 0.02, 0.02, 0.1), (width / 2 - 0.02, 0.028, 0.06 + height), face)
    return tv


def _plant(rng, size) -> Item:
    plant, green = Item("plant"), np.array([0.25, 0.5, 0.2]) * rng.uniform(0.6, 1.2, 3)
    pot = plain(pick(rng, [(0.72, 0.4, 0.27), (0.92, 0.91, 0.88), (0.3, 0.32, 0.34), *FABRICS]), gloss=0.3)
    top = 0.3 * size
    plant.frustum((0, 0, 0), (0, 0, top), 0.12 * size, pot, top=0.16 * size)
    plant.frustum((0, 0, top), (0, 0, top + 0.01), 0.14 * size, plain((0.25, 0.18, 0.12)))
    for angle in np.arange(rng.integers(8, 13)) * 2.4 + rng.uniform(0, 6):
        outward = np.array([np.cos(angle), np.sin(angle), 0]) * rng.uniform(0.1, 0.26) * size
        tip = np.array([0, 0, top]) + outward + [0, 0, rng.uniform(0.2, 0.75) * size]
        leaf = plain(green * rng.uniform(0.7, 1.25), grain=0.1)
        plant.capsule((0, 0, top), tip, 0.008 * size, plain(green * 0.6))
        plant.ball(tip, np.array([0.13, 0.06, 0.1]) * size * rng.uniform(0.7, 1.2), leaf, yaw=angle)
    return plant


def rug(rng, half) -> Item:
    rug, colors = Item("rug"), rng.permutation(FABRICS)
    if rng.random() < 0.25:
        rug.frustum((0, 0, 0), (0, 0, 0.012), min(half), fabric(colors[0]))
    else:
        rug.box((-half[0], -half[1], 0), (half[0], half[1], 0.012), carpet(colors[0], colors[1], half))
    return rug


def toy_ball(rng) -> Item:
    ball, radius = Item("ball"), rng.uniform(0.1, 0.26)
    a, b = rng.permutation(BRIGHT)[:2]
    look = [plain(a, gloss=0.7), stripes(a, b, radius * 0.8), tiles(a, b, radius * 0.6)]
    ball.ball((0, 0, radius), radius, pick(rng, look), yaw=rng.uniform(0, 6))
    return ball


def person(rng, seat: float | None = None) -> Item:
    """A figure that stands or walks on the floor, or sits with its hips at the origin on a seat of height `seat`."""
    person, s = Item("person"), rng.uniform(0.9, 1.06)
    skin, hair = plain(pick(rng, SKINS), grain=0.01), plain(pick(rng, HAIRS), grain=0.2)
    shirt, trousers = cloth(rng, SHIRTS), fabric(np.array(pick(rng, FABRICS)) * rng.uniform(0.35, 0.9))
    shoes = plain(pick(rng, [(0.12, 0.1, 0.1), (0.85, 0.85, 0.85), (0.4, 0.25, 0.15)]))
    short_sleeves = rng.random() < 0.5
    walk = rng.uniform(0.3, 0.55) * (rng.random() < 0.5)
    lean = rng.uniform(-0.12, 0.05) if seat is not None else rng.uniform(0, 0.08)

    def swing(length, angle, outward=0.0):
        """Vector along a limb: it hangs down at `angle` 0, and points to the front at pi/2."""
        sine, cosine = np.sin(outward), np.cos(outward)
        return s * length * np.array([sine, cosine * np.sin(angle), -cosine * np.cos(angle)])

    legs = []  # hip, knee, ankle, with the hips' middle at the origin
    for side in (-1, 1):
        if seat is None:
            thigh = side * walk + rng.uniform(-0.05, 0.05)
            shin = thigh - rng.uniform(0.05, 0.6) * walk / 0.4 - 0.03
        else:
            thigh, shin = rng.uniform(1.42, 1.55), rng.uniform(-0.15, 0.25)
        hip = s * np.array([side * 0.095, 0, 0])
        knee = hip + swing(0.43, thigh, side * rng.uniform(0.02, 0.1))
        legs.append((hip, knee, knee + swing(0.41, shin)))
    lift = -min(leg[2][2] for leg in legs) + 0.075 * s if seat is None else seat + 0.11 * s
    up = np.array([0, 0, lift])
    for hip, knee, ankle in legs:
        hip, knee, ankle = hip + up, knee + up, ankle + up
        person.capsule(hip, knee, 0.075 * s, trousers, part="upper leg")
        person.capsule(knee + 0.02 * (ankle - knee), ankle, 0.052 * s, trousers, part="lower leg")
        heel, toe = ankle + s * np.array([0, -0.03, -0.033]), ankle + s * np.array([0, 0.14, -0.035])
        person.capsule(heel, toe, 0.04 * s, shoes, part="lower leg")

    def spine(height):
        return up + s * height * np.array([0, np.sin(lean), np.cos(lean)])

    person.ball(spine(0.02), s * np.array([0.165, 0.115, 0.12]), trousers, part="torso")
    person.ball(spine(0.2), s * np.array([0.16, 0.112, 0.27]), shirt, part="torso")
    person.ball(spine(0.34), s * np.array([0.178, 0.12, 0.2]), shirt, part="torso")
    half_shoulders = np.array([0.13 * s, 0, 0])
    person.capsule(spine(0.46) - half_shoulders, spine(0.46) + half_shoulders, 0.065 * s, shirt, part="torso")
    person.frustum(spine(0.48), spine(0.6), 0.052 * s, skin, part="torso")
    head = spine(0.68) + s * np.array([0, 0.02, 0])
    person.ball(head, s * np.array([0.078, 0.098, 0.118]), skin, part="head")
    person.ball(head + s * np.array([0, -0.022, 0.03]), s * np.array([0.086, 0.098, 0.108]), hair, part="head")
    person.ball(head + s * np.array([0, 0.1, -0.015]), s * np.array([0.014, 0.02, 0.022]), skin, part="head")
    for side in (-1, 1):
        shoulder = spine(0.46) + s * np.array([side * 0.185, 0, 0])
        raised = seat is None and rng.random() < 0.2
        angle = rng.uniform(0.2, 0.6) if seat is not None else -side * walk + rng.uniform(-0.1, 0.15)
        angle, flex = (rng.uniform(0.8, 1.8), rng.uniform(0.3, 1.4)) if raised else (angle, rng.uniform(0.15, 0.6))
        if seat is not None:
            flex += 0.6
        elbow = shoulder + swing(0.29, angle, side * rng.uniform(0.08, 0.3))
        wrist = elbow + swing(0.25, angle + flex, -side * rng.uniform(-0.05, 0.15))
        person.capsule(shoulder, elbow, 0.052 * s, shirt, part="upper arm")
        person.capsule(elbow, wrist, 0.04 * s, skin if short_sleeves else shirt, part="lower arm")
        person.ball(wrist + 0.16 * (wrist - elbow), 0.048 * s, skin, part="lower arm")
    return person


# What is fixed to the walls, with the wall at y = 0


def door(rng) -> Item:
    door, leaf = Item("door"), wood(pick(rng, [(0.93, 0.92, 0.9), *WOODS]))
    x, height = 0.42, 2.03
    frame = leaf if rng.random() < 0.5 else plain((0.93, 0.92, 0.9))
    door.box((-x, 0, 0), (x, 0.03, height), leaf)
    for side in (-1, 1):
        door.box((side * (x + 0.04) - 0.04, 0, 0), (side * (x + 0.04) + 0.04, 0.05, height), frame)
    door.box((-x - 0.08, 0, height), (x + 0.08, 0.05, height + 0.08), frame)
    for low, high in ((0.2, 0.9), (1.1, 1.85)):
        door.box((-x + 0.12, 0.03, low), (x - 0.12, 0.038, high), leaf)
    handle = x - 0.07
    door.capsule((handle, 0.07, 1.02), (handle - 0.1, 0.07, 1.02), 0.011, plain((0.7, 0.68, 0.62), gloss=0.9))
    door.capsule((handle, 0.03, 1.02), (handle, 0.07, 1.02), 0.011, plain((0.7, 0.68, 0.62), gloss=0.9))
    return door


def window(rng, width, height, brightness) -> Item:
    window, frame, x = Item("window"), plain(pick(rng, [(0.95, 0.95, 0.94), (0.6, 0.45, 0.3)])), width / 2
    window.box((-x, 0, 0), (x, 0.012, height), outdoors(rng, brightness), opaque=False)
    for side in (-1, 1):
        window.box((side * x - 0.03, 0, -0.03), (side * x + 0.03, 0.05, height + 0.03), frame)
    for z in (0, height):
        window.box((-x + 0.03, 0, z - 0.03), (x - 0.03, 0.05, z + 0.03), frame)
    window.box((-x - 0.06, 0, -0.06), (x + 0.06, 0.13, -0.03), frame)
    for at in np.linspace(-x, x, 1 + max(1, round(width / 0.7)))[1:-1]:
        window.box((at - 0.02, 0, 0.03), (at + 0.02, 0.04, height - 0.03), frame)
    return window


def picture(rng) -> Item:
    picture, half = Item("picture"), rng.uniform(0.18, 0.5, 2)
    edge = plain(pick(rng, [(0.1, 0.1, 0.1), (0.75, 0.62, 0.35), (0.9, 0.9, 0.88), (0.4, 0.27, 0.17)]), gloss=0.3)
    picture.box((-half[0], 0, 0), (half[0], 0.025, 2 * half[1]), edge)
    inner = half - 0.03
    picture.box((-inner[0], 0.01, 0.03), (inner[0], 0.028, 2 * half[1] - 0.03), painting(rng, inner))
    return picture


# Groups of objects, with the back at the least y and the front towards +y


def dining(rng) -> list[Item]:
    material, frame, seat, height = timber(rng), timber(rng), cloth(rng), rng.uniform(0.72, 0.78)
    if rng.random() < 0.35:
        radius = rng.uniform(0.45, 0.65)
        items = [_round_table(rng, radius, height, material)]
        places = [(angle, radius) for angle in np.arange(rng.integers(2, 5)) * np.pi / 2]
    else:
        width, depth = rng.uniform(1.1, 1.8), rng.uniform(0.75, 0.95)
        items = [_table(rng, width, depth, height, material)]
        places = [(0, depth / 2), (np.pi, depth / 2), (np.pi / 2, width / 2), (-np.pi / 2, width / 2)]
        places = places[: rng.integers(2, 5)]
    table = items[0]
    for angle, reach in places:
        # An empty chair may be pushed in; a taken one leaves room for knees above the seat.
        taken = rng.random() < 0.25
        at = turn(angle) @ [rng.uniform(-0.08, 0.08), -reach - (0.2 if taken else rng.uniform(0.05, 0.3)), 0]
        facing = angle + rng.uniform(-0.2, 0.2)
        items.append(chair(rng, frame, seat).moved(at, facing))
        if taken:
            items.append(person(rng, 0.46).moved(at, facing))
    if rng.random() < 0.7:
        top = pick(rng, [_table_lamp(rng), _plant(rng, 0.4), _plant(rng, 0.55)])
        items.append(top.moved((0, 0, table.bounds[1, 2])))
    return items


def _lounge(rng) -> list[Item]:
    seats = int(rng.integers(1, 4))
    items = [_sofa(rng, seats)]
    for k in range(seats):
        if rng.random() < 0.22:
            items.append(person(rng, 0.44).moved((0.64 * (k - (seats - 1) / 2), -0.02)))
    if seats > 1 and rng.random() < 0.8:
        at, height = (rng.uniform(-0.1, 0.1), rng.uniform(1.2, 1.35)), rng.uniform(0.38, 0.46)
        width, depth = rng.uniform(0.8, 1.2), rng.uniform(0.45, 0.6)
        material = timber(rng)
        low = (
            _table(rng, width, depth, height, material)
            if rng.random() < 0.7
            else _round_table(rng, depth * 0.7, height, material)
        )
        items.append(low.moved(at))
        if rng.random() < 0.5:
            items.append(_plant(rng, 0.4).moved((*at, height)))
    return items


def _sleeping(rng) -> list[Item]:
    width = pick(rng, [0.95, 1.45, 1.65])
    items = [_bed(rng, width)]
    depth, height = 0.4, rng.uniform(0.42, 0.55)
    for side in (-1, 1):
        if rng.random() < 0.7:
            at = (side * (width / 2 + 0.32), -0.05)
            items.append(_cabinet(rng, 0.45, depth, height).moved(at))
            if rng.random() < 0.75:
                items.append(_table_lamp(rng).moved((at[0], at[1] + depth / 2, height)))
    return items


def _desk(rng) -> list[Item]:
    width, depth, height = rng.uniform(1.1, 1.5), rng.uniform(0.6, 0.7), 0.74
    items = [_table(rng, width, depth, height, timber(rng))]
    items.append(_screen(rng, rng.uniform(0.5, 0.65)).moved((rng.uniform(-0.15, 0.15), -0.12, height)))
    if rng.random() < 0.6:
        items.append(_table_lamp(rng).moved((pick(rng, [-1, 1]) * (width / 2 - 0.17), -0.1, height)))
    at, facing = (rng.uniform(-0.1, 0.1), depth / 2 + rng.uniform(0.2, 0.4)), np.pi + rng.uniform(-0.4, 0.4)
    items.append(chair(rng, timber(rng), cloth(rng)).moved(at, facing))
    if rng.random() < 0.35:
        items.append(person(rng, 0.46).moved(at, facing))
    return items


def _media(rng) -> list[Item]:
    width, height = rng.uniform(1.2, 1.9), rng.uniform(0.4, 0.6)
    items = [_cabinet(rng, width, 0.42, height)]
    items.append(_screen(rng, rng.uniform(0.8, min(1.3, width - 0.1))).moved((0, 0.2, height)))
    return items


def _sideboard(rng) -> list[Item]:
    width, height = rng.uniform(0.7, 1.4), rng.uniform(0.7, 1.0)
    items = [_cabinet(rng, width, 0.42, height)]
    for at in rng.permutation([-0.3, 0.0, 0.3])[: rng.integers(0, 3)] * width:
        items.append(pick(rng, [_table_lamp(rng), _plant(rng, 0.45)]).moved((at, 0.2, height)))
    return items


def _wardrobe(rng) -> list[Item]:
    return [_cabinet(rng, rng.uniform(0.8, 1.6), 0.58, rng.uniform(1.8, 2.1))]


GROUPS_AT_WALLS = {
    "living": (_lounge, _media),
    "bed": (_sleeping, _wardrobe),
    "study": (_desk, lambda rng: [_bookcase(rng)]),
    "dining": (_sideboard,),
    "any": (
        lambda rng: [_bookcase(rng)],
        lambda rng: [_floor_lamp(rng)],
        lambda rng: [_plant(rng, rng.uniform(0.8, 1.4))],
        _sideboard,
        lambda rng: [_sofa(rng, 1)],
        _wardrobe,
        _desk,
    ),
}
