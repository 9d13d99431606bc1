"""Ray casting of convex primitives with NumPy: shapes, a pinhole camera, visibility and shadows.

World coordinates are metres with z up. Vectors are stored component first, `(3, ...)`, in float32. All rays of one
call share their origin (the camera or a light). What depends only on the shape and the origin is therefore computed
once, in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]).T  # (3, 8)
_EDGES = np.array([(i, j) for i in range(8) for j in range(i) if np.sum(_CORNERS[:, i] != _CORNERS[:, j]) == 1]).T
_NEAR = 0.05  # metres; nothing comes closer to a camera


def rotate(rotation: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """`rotation @ vectors` for vectors `(3, ...)`, element by element.

    The result for a vector depends only on that vector. A BLAS product, in blocks by the array's size, can differ.
    """
    x, y, z = rotation.T.astype(np.float32).reshape(3, 3, *[1] * (vectors.ndim - 1))
    return x * vectors[0] + y * vectors[1] + z * vectors[2]


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot product over the first axis, of length 2 or 3: `(3, ...) -> (...)`."""
    total = a[0] * b[0] + a[1] * b[1]
    return total + a[2] * b[2] if len(a) > 2 else total


def turn(yaw: float) -> np.ndarray:
    """Rotation `(3, 3)` by `yaw` radians about the vertical."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


@dataclass(frozen=True)
class Shape:
    """A convex primitive in a local frame.

    `centre` is `(3,)`, `rotation` `(3, 3)` has the local axes as columns, and `half` `(3,)` are the half extents of
    the bounding box along them. Subclasses give, in local coordinates, `_enter(origin, directions)`, the ray parameter
    where a ray enters the shape (inf for a miss), and `_normals(origin, directions, t)`, the outward normal there. The
    origin must be outside the shape.
    """

    centre: np.ndarray
    rotation: np.ndarray
    half: np.ndarray

    def moved(self, rotation: np.ndarray, translation: np.ndarray) -> "Shape":
        return replace(self, centre=rotation @ self.centre + translation, rotation=rotation @ self.rotation)

    @cached_property
    def corners(self) -> np.ndarray:
        """Corners `(3, 8)` of the bounding box."""
        return self.centre[:, None] + self.rotation @ (self.half[:, None] * _CORNERS)

    def local(self, points: np.ndarray) -> np.ndarray:
        """World points `(3, ...)` in the local frame, in metres."""
        return rotate(self.rotation.T, points) - (self.rotation.T @ self.centre).astype(np.float32).reshape(
            -1, *[1] * (points.ndim - 1)
        )

    def intersect(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Parameter t > 0 at which `origin + t * directions` enters the shape, `(3, ...) -> (...)`; inf for a miss."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = self._enter(self.rotation.T @ (origin - self.centre), rotate(self.rotation.T, directions))
            return np.where(t > 0, t, np.float32(np.inf))

    def normals(self, origin: np.ndarray, directions: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Outward unit normals `(3, ...)` in the world frame at the entry points with the given parameter `t`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            local = self._normals(self.rotation.T @ (origin - self.centre), rotate(self.rotation.T, directions), t)
        normals = rotate(self.rotation, local)
        return normals / np.sqrt(dot(normals, normals))


class Box(Shape):
    """A box, which fills its bounding box."""

    def _slabs(self, origin, directions):
        for o, d, h in zip(origin, 1 / directions, self.half):
            one, other = np.float32(-h - o) * d, np.float32(h - o) * d
            yield np.minimum(one, other), np.maximum(one, other)

    def _enter(self, origin, directions):
        near, far = zip(*self._slabs(origin, directions))
        near = np.maximum(np.maximum(near[0], near[1]), near[2])
        far = np.minimum(np.minimum(far[0], far[1]), far[2])
        return np.where(near <= far, near, np.float32(np.inf))

    def _normals(self, origin, directions, t):
        entered_last = np.argmax([near for near, _ in self._slabs(origin, directions)], axis=0)
        return np.stack([np.where(entered_last == axis, -np.sign(directions[axis]), 0) for axis in range(3)])


class Ellipsoid(Shape):
    """An ellipsoid with the radii `half`."""

    def _enter(self, origin, directions):
        half = self.half.astype(np.float32).reshape(-1, *[1] * (directions.ndim - 1))
        return _enter_sphere(origin / self.half, directions / half, 1.0)

    def _normals(self, origin, directions, t):
        return np.stack(
            [np.float32(o / h**2) + t * d / np.float32(h**2) for o, d, h in zip(origin, directions, self.half)]
        )


class Capsule(Shape):
    """A cylinder about the local z axis with hemispherical ends; `half` is `(r, r, half length + r)`."""

    def _enter(self, origin, directions):
        radius, length = self.half[0], self.half[2] - self.half[0]
        t = _enter_sphere(origin[:2], directions[:2], radius)
        z = np.float32(origin[2]) + t * directions[2]
        beyond = np.abs(z) > length
        if beyond.any():
            # A ray that enters the endless cylinder past an end can enter the capsule only through that end's ball.
            for end in (-length, length):
                ball = beyond & (z * np.float32(np.sign(end)) > 0) & np.isfinite(t)
                t[ball] = _enter_sphere(origin - [0, 0, end], directions[:, ball], radius)
        return t

    def _normals(self, origin, directions, t):
        length = np.float32(self.half[2] - self.half[0])
        x, y, z = (np.float32(o) + t * d for o, d in zip(origin, directions))
        return np.stack([x, y, z - np.clip(z, -length, length)])


@dataclass(frozen=True)
class Frustum(Shape):
    """A cone frustum about the local z axis with radius `bottom` at `-half[2]` and `top` at `half[2]`."""

    bottom: float
    top: float

    @property
    def _slope(self) -> float:
        """By how much the radius grows along z."""
        return (self.top - self.bottom) / (2 * self.half[2])

    def _radius(self, z):
        """Of the side, at `z`."""
        return np.float32(self._slope) * z + np.float32((self.top + self.bottom) / 2)

    def _surfaces(self, origin, directions):
        """Ray parameters of the entry through the side and through the flat ends."""
        height = np.float32(self.half[2])
        dx, dy, dz = directions
        # Starting at the point nearest to the centre keeps the quadratic's terms small, thus exact enough in float32.
        start = -dot(origin.astype(np.float32), directions) / dot(directions, directions)
        x, y, z = (np.float32(o) + start * d for o, d in zip(origin, directions))
        radius = self._radius(z)
        a = dx * dx + dy * dy - np.float32(self._slope**2) * dz * dz
        b = x * dx + y * dy - np.float32(self._slope) * dz * radius
        c = x * x + y * y - radius * radius
        root = np.sqrt(b * b - a * c)
        side = np.float32(np.inf)
        for s in (-root, root):
            t = (s - b) / a
            side = np.minimum(side, np.where(np.abs(z + t * dz) <= height, start + t, np.float32(np.inf)))
        upward = dz > 0
        t = (np.where(upward, -height, height) - np.float32(origin[2])) / dz
        x, y = (np.float32(o) + t * d for o, d in zip(origin[:2], directions))
        radius = np.where(upward, np.float32(self.bottom), np.float32(self.top))
        return side, np.where(x * x + y * y <= radius * radius, t, np.float32(np.inf))

    def _enter(self, origin, directions):
        return np.minimum(*self._surfaces(origin, directions))

    def _normals(self, origin, directions, t):
        side, ends = self._surfaces(origin, directions)
        x, y, z = (np.float32(o) + t * d for o, d in zip(origin, directions))
        outward = np.float32(-self._slope) * self._radius(z)
        flat = ends <= side
        return np.stack([np.where(flat, 0, x), np.where(flat, 0, y), np.where(flat, -np.sign(directions[2]), outward)])


def _enter_sphere(origin, directions, radius):
    """Entry into a ball (or, with two components, an endless cylinder) about 0."""
    origin = origin.astype(np.float32)
    squared = dot(directions, directions)
    nearest = -dot(origin, directions) / squared
    # From the nearest point, because |origin|^2 - radius^2 in the discriminant cancels in float32.
    offset = [o + nearest * d for o, d in zip(origin, directions)]
    t = nearest - np.sqrt((np.float32(radius**2) - dot(offset, offset)) / squared)
    return np.where(np.isnan(t), np.float32(np.inf), t)


def between(kind: type[Shape], a, b, radius: float, top: float | None = None) -> Shape:
    """The capsule or frustum whose axis runs from `a` to `b`; a frustum's radius goes from `radius` to `top`."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    length = np.sqrt(np.sum((b - a) ** 2))
    x, y, z = ((b - a) / length).tolist()
    # The two other axes of Duff et al. 2017, "Building an Orthonormal Basis, Revisited".
    sign = 1.0 if z >= 0 else -1.0
    p, q = -1 / (sign + z), -x * y / (sign + z)
    rotation = np.array([[1 + sign * x * x * p, q, x], [sign * q, sign + y * y * p, y], [-sign * x, -y, z]])
    if kind is Capsule:
        return Capsule((a + b) / 2, rotation, np.array([radius, radius, length / 2 + radius]))
    top = radius if top is None else top
    return Frustum((a + b) / 2, rotation, np.array([max(radius, top), max(radius, top), length / 2]), radius, top)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    `position` is `(3,)`; `rotation` `(3, 3)` has the camera's right, down and forward axes as columns; `focal` is the
    focal length in units of the image's longer side. The principal point is the image's centre.
    """

    position: np.ndarray
    rotation: np.ndarray
    focal: float

    @staticmethod
    def looking(position, yaw: float, pitch: float, roll: float, focal: float) -> "Camera":
        """A camera that looks along `yaw` (radians from the x axis), `pitch` upward, rolled clockwise by `roll`."""
        forward = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
        right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
        down = np.cross(forward, right)
        right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
        return Camera(np.asarray(position, float), np.stack([right, down, forward], axis=1), focal)

    def intrinsics(self, image_size: tuple[int, int]) -> np.ndarray:
        """Matrix `(3, 3)` from camera coordinates to pixels `(column, row, 1)`; integers are pixel centres."""
        height, width = image_size
        focal = self.focal * max(image_size)
        return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])

    def rays(self, image_size: tuple[int, int]) -> np.ndarray:
        """World directions `(3, height, width)` through the pixel centres.

        Their length along the optical axis is 1, so that a ray parameter is a z-depth.
        """
        (focal, _, column), (_, _, row), _ = self.intrinsics(image_size)
        x, y = (np.arange(image_size[1]) - column) / focal, (np.arange(image_size[0]) - row) / focal
        x, y = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
        return rotate(self.rotation, np.stack([x, y, np.ones_like(x)]))

    def windows(self, shapes: Sequence[Shape], image_size: tuple[int, int]) -> list[tuple[slice, slice]]:
        """For each shape the rows and columns that hold all of its pixels; empty slices if there are none."""
        corners = np.stack([shape.corners for shape in shapes], axis=1) - self.position[:, None, None]
        corners = np.tensordot(self.rotation.T, corners, 1)
        # The bounding boxes' edges, cut at the near plane, have the same projected extent as the boxes.
        a, b = corners[:, :, _EDGES[0]], corners[:, :, _EDGES[1]]
        with np.errstate(divide="ignore", invalid="ignore"):
            cut = (_NEAR - a[2]) / (b[2] - a[2])
            crossing = a + cut * (b - a)
            ends = np.concatenate([np.where(a[2] < _NEAR, crossing, a), np.where(b[2] < _NEAR, crossing, b)], axis=-1)
            hidden = np.tile((a[2] < _NEAR) & (b[2] < _NEAR), 2)
            matrix = self.intrinsics(image_size)
            slices = []
            for axis, size in ((1, image_size[0]), (0, image_size[1])):
                pixel = matrix[axis, axis] * ends[axis] / ends[2] + matrix[axis, 2]
                low = np.min(np.where(hidden, np.inf, pixel), axis=-1)
                high = np.max(np.where(hidden, -np.inf, pixel), axis=-1)
                start = np.clip(np.floor(low), 0, size).astype(int)
                stop = np.clip(np.ceil(high) + 1, 0, size).astype(int)
                slices.append([slice(i, max(i, j)) for i, j in zip(start.tolist(), stop.tolist())])
        return list(zip(*slices))

    def cast(self, shapes: Sequence[Shape], image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The nearest shape in each pixel.

        Returns:
            Its z-depth in metres, float32, and its position in `shapes`, int32, both `(height, width)`; inf and -1
            where there is none.
        """
        rays = self.rays(image_size)
        depth = np.full(image_size, np.inf, np.float32)
        hit = np.full(image_size, -1, np.int32)
        for k, (shape, window) in enumerate(zip(shapes, self.windows(shapes, image_size))):
            if depth[window].size:
                t = shape.intersect(self.position, rays[:, *window])
                nearer = t < depth[window]
                depth[window][nearer] = t[nearer]
                hit[window][nearer] = k
        return depth, hit


def visible(hit: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """The numbers that occur in `hit` `(height, width)`, each with the rows and columns of its pixels."""
    order = np.argsort(hit, axis=None, kind="stable")
    numbers, starts = np.unique(hit.ravel()[order], return_index=True)
    for k, pixels in zip(numbers.tolist(), np.split(order, starts[1:])):
        yield k, np.unravel_index(pixels, hit.shape)


@dataclass(frozen=True)
class Cluster:
    """Shapes that lie close together, such as the parts of one object."""

    shapes: list[Shape]

    @cached_property
    def balls(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounding spheres of the shapes: centres `(n, 3)` and radii `(n,)`."""
        halves = np.array([shape.half for shape in self.shapes])
        return np.array([shape.centre for shape in self.shapes]), np.sqrt(np.sum(halves**2, axis=1))

    @cached_property
    def ball(self) -> tuple[np.ndarray, float]:
        """Centre `(3,)` and radius of a bounding sphere of them all."""
        corners = np.concatenate([shape.corners for shape in self.shapes], axis=1)
        centre = (corners.min(1) + corners.max(1)) / 2
        return centre, np.sqrt(np.max(np.sum((corners - centre[:, None]) ** 2, axis=0)))


def sees(origin: np.ndarray, points: np.ndarray, clusters: list[Cluster], margin: float = 3e-3) -> np.ndarray:
    """Whether nothing stands between `origin` and each of the points.

    Args:
        origin: `(3,)`, outside of all shapes.
        points: `(3, n)` float32.
        clusters: the shapes that block the view.
        margin: metres by which a shape must be nearer than a point to hide it, so that a point's own surface does not.

    Returns:
        `(n,)` bool.
    """
    rays = points - origin.astype(np.float32)[:, None]
    distance = np.sqrt(dot(rays, rays))
    units = rays / distance
    limit = distance - np.float32(margin)
    free = np.ones(len(distance), bool)
    centres, radii = zip(*(cluster.ball for cluster in clusters)) if clusters else (np.empty((0, 3)), np.empty(0))
    for cluster, in_cone in zip(clusters, _in_shadow_cones(origin, np.array(centres), np.array(radii), units, limit)):
        near = np.flatnonzero(in_cone & free)
        if not near.size:
            continue
        near_units, near_limit, near_free = units[:, near], limit[near], free[near]
        for shape, in_cone in zip(cluster.shapes, _in_shadow_cones(origin, *cluster.balls, near_units, near_limit)):
            behind = np.flatnonzero(in_cone & near_free)
            if behind.size:
                near_free[behind] = shape.intersect(origin, near_units[:, behind]) > near_limit[behind]
        free[near] = near_free
    return free


def _in_shadow_cones(origin, centres, radii, units, limit):
    """For each of k balls the points that it could hide: far enough away, in its cone from `origin`. `(k, n)` bool."""
    offsets = centres - origin
    reach = np.sqrt(np.sum(offsets**2, axis=1))
    cosine = np.sqrt(np.maximum(1 - (radii / reach) ** 2, 0)) - 1e-6
    cosine[reach <= radii] = -2  # the origin is in the ball: any direction
    axes = (offsets / reach[:, None]).astype(np.float32)
    in_cone = dot(axes.T[:, :, None], units[:, None]) >= cosine.astype(np.float32)[:, None]
    in_cone &= limit >= (reach - radii).astype(np.float32)[:, None]
    return in_cone
