"""Depth as a surface that can be turned."""

import numpy as np
import trimesh
from PIL import Image
from torch import Tensor
from trimesh.visual.material import PBRMaterial
from trimesh.visual.texture import TextureVisuals

from ..visualization.geometry import viewing_rays


# Vertices along the longer side
SURFACE_SIDE = 200
# Two neighbours are on different objects if one is this many times as far away as the other.
DEPTH_JUMP = 1.1


def depth_surface(depth: Tensor, picture: Image.Image) -> trimesh.Trimesh | None:
    """The surface that a depth map shows, with a picture on it.

    The camera is assumed to have a field of view of `FIELD_OF_VIEW` degrees across the image's longer side. The
    surface is torn where one of two neighbours is `DEPTH_JUMP` times as far away, and where depth is unknown.

    Args:
        depth: metres along the optical axis, `(height, width)`.
        picture: of the same aspect ratio.

    Returns:
        In metres, with the axes of glTF: x to the right, y up, z towards the camera, which is at the origin. `None`
        if there is no surface.
    """
    height, width = depth.shape
    step = -(-max(height, width) // SURFACE_SIDE)
    rows, columns = np.meshgrid(np.arange(0, height, step), np.arange(0, width, step), indexing="ij")
    z = depth.numpy()[rows, columns]
    x, y = viewing_rays((height, width)).numpy()[:, rows, columns] * z

    index = np.arange(z.size).reshape(z.shape)
    corners = np.stack([index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]], axis=-1).reshape(-1, 4)
    nearest, farthest = z.flat[corners].min(axis=1), z.flat[corners].max(axis=1)
    corners = corners[(nearest > 0) & (farthest < DEPTH_JUMP * nearest)]
    if not len(corners):
        return None
    texture = np.stack([(columns + 0.5) / width, 1 - (rows + 0.5) / height], axis=-1)
    # It shines by itself, so that no light changes the picture's colours.
    material = PBRMaterial(
        baseColorFactor=(0, 0, 0, 255),
        emissiveTexture=picture,
        emissiveFactor=(1, 1, 1),
        metallicFactor=0,
        roughnessFactor=1,
        doubleSided=True,
    )
    surface = trimesh.Trimesh(
        vertices=np.stack([x, -y, -z], axis=-1).reshape(-1, 3),
        faces=np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]]),
        visual=TextureVisuals(uv=texture.reshape(-1, 2), material=material),
        process=False,
    )
    surface.remove_unreferenced_vertices()
    return surface
