"""Shading of the Rooms data set: the colour of what each pixel shows."""

import numpy as np

from .raycast import Cluster, dot, visible
from .scene import Light, Room


def shade(room: Room, rays, points, normals, hit) -> np.ndarray:
    """Computes the colour of each pixel.

    Args:
        room: the room.
        rays, points, normals: `(3, height, width)`, in the world frame: directions through the pixels, the points that
            they hit, and the normals there.
        hit: `(height, width)`, positions in `room.surfaces`.

    Returns:
        sRGB `(3, height, width)` float32 in 0..1.
    """
    albedo = np.empty_like(rays)
    for k, pixels in visible(hit):
        albedo[:, *pixels] = room.surfaces[k].albedo(points[:, *pixels], normals[:, *pixels])
    gloss = np.array([surface.material.gloss for surface in room.surfaces], np.float32)[hit]
    emission = np.array([surface.material.emission for surface in room.surfaces], np.float32)[hit]

    towards_camera = -rays / np.sqrt(dot(rays, rays))
    from_above = 0.85 + 0.15 * normals[2]
    diffuse = room.ambient.astype(np.float32)[:, None, None] * (_openness(points, normals) * from_above)
    specular = np.zeros_like(diffuse)
    blockers = room.blockers
    for light in room.lights:
        path = light.position.astype(np.float32)[:, None, None] - points
        squared = dot(path, path)
        path /= np.sqrt(squared)
        halfway = path + towards_camera
        halfway /= np.sqrt(dot(halfway, halfway))
        falloff = _visibility(light, points, normals, hit, blockers) / (squared + np.float32(0.4))
        power = light.power.astype(np.float32)[:, None, None] * falloff
        diffuse += power * np.maximum(dot(normals, path), 0)
        specular += power * (0.2 * gloss * np.maximum(dot(normals, halfway), 0) ** 40)
    radiance = albedo * (diffuse + emission) + specular

    # Luminance is capped here, so that a few bright pixels, such as windows, do not darken the picture.
    luminance = radiance.mean(0)
    exposure = room.exposure / np.mean(np.minimum(luminance, np.quantile(luminance, 0.9)))
    image = (1 - np.exp(-radiance * exposure)) ** np.float32(1 / 2.2)
    # The lens blurs a little.
    image[:, 1:-1] = 0.76 * image[:, 1:-1] + 0.12 * (image[:, :-2] + image[:, 2:])
    image[:, :, 1:-1] = 0.76 * image[:, :, 1:-1] + 0.12 * (image[:, :, :-2] + image[:, :, 2:])
    return image


def _visibility(light: Light, points, normals, hit, blockers: list[Cluster]) -> np.ndarray:
    """Share of the light's extent that each pixel sees, `(height, width)`.

    Each pixel of a block of 2 x 2 tests another one of four points of the light. A 3 x 3 tent filter, which gives the
    four equal weight, then averages over the pixels of the same surface.
    """
    height, width = hit.shape
    seen = np.zeros((height, width), np.float32)
    for k, offset in enumerate([(0.5, 0.3, 0.4), (-0.5, 0.6, -0.4), (0.4, -0.6, -0.5), (-0.6, -0.4, 0.5)]):
        every = np.s_[k // 2 :: 2, k % 2 :: 2]
        seen[every] = light.reaches(points[:, *every], normals[:, *every], np.array(offset) * light.radius, blockers)
    total, weight = np.zeros_like(seen), np.zeros_like(seen)
    padded, surface = np.pad(seen, 1), np.pad(hit, 1, constant_values=-1)
    for i, a in enumerate((1, 2, 1)):
        for j, b in enumerate((1, 2, 1)):
            shifted = np.s_[i : i + height, j : j + width]
            same = (surface[shifted] == hit) * np.float32(a * b)
            total += same * padded[shifted]
            weight += same
    return total / weight


def _openness(points, normals) -> np.ndarray:
    """Ambient occlusion `(height, width)`: 1 where the surface near a pixel is flat or convex, less in concave places.

    Twelve visible points, on three rings around the pixel, count by how far they rise above its tangent plane.
    """
    height, width = points.shape[1:]
    blocked = np.zeros((height, width), np.float32)
    for radius, start in ((0.02, 0.0), (0.05, 0.5), (0.1, 1.0)):
        for angle in start + np.arange(4) * np.pi / 2:
            dy, dx = round(radius * np.cos(angle) * width), round(radius * np.sin(angle) * width)
            here = np.s_[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
            there = np.s_[max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
            path = points[:, *there] - points[:, *here]
            squared = dot(path, path) + np.float32(1e-6)
            rise = dot(path, normals[:, *here]) / np.sqrt(squared)
            blocked[here] += np.maximum(rise - 0.1, 0) / (1 + 4 * squared)
    return 1 - 0.8 * np.minimum(0.18 * blocked, 1)
