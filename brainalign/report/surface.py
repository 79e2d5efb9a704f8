"""Maps on the inflated fsaverage5: the mesh that every figure shares, and pictures of it."""

from __future__ import annotations

import base64
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["N_VERTICES", "Mesh", "colour_vertices", "inflated", "mesh_record", "picture"]

#: Vertices of fsaverage5 per hemisphere.
N_VERTICES = 10242

#: Title, hemisphere, direction towards the viewer, direction up.
VIEWS: tuple[tuple[str, str, tuple[int, int, int], tuple[int, int, int]], ...] = (
    ("Left lateral", "L", (-1, 0, 0), (0, 0, 1)),
    ("Left medial", "L", (1, 0, 0), (0, 0, 1)),
    ("Right medial", "R", (-1, 0, 0), (0, 0, 1)),
    ("Right lateral", "R", (1, 0, 0), (0, 0, 1)),
    ("Left ventral", "L", (0, 0, -1), (-1, 0, 0)),
    ("Left posterior", "L", (0, -1, 0), (0, 0, 1)),
    ("Right posterior", "R", (0, -1, 0), (0, 0, 1)),
    ("Right ventral", "R", (0, 0, -1), (1, 0, 0)),
)


@dataclass(frozen=True)
class Mesh:
    """One inflated hemisphere.

    Parameters
    ----------
    coordinates : ndarray (10242, 3), mm
    faces : ndarray (20480, 3), int
    sulcus : ndarray (10242,), 0 on a gyrus to 1 in a sulcus
    """

    coordinates: np.ndarray
    faces: np.ndarray
    sulcus: np.ndarray


@functools.cache
def inflated() -> dict[str, Mesh]:
    """Return the inflated fsaverage5, which nilearn ships, as ``{"L": Mesh, "R": Mesh}``."""
    from nilearn import datasets, surface

    files = datasets.fetch_surf_fsaverage("fsaverage5")
    meshes = {}
    for hemisphere, side in (("L", "left"), ("R", "right")):
        mesh = surface.load_surf_mesh(files[f"infl_{side}"])
        depth = np.asarray(surface.load_surf_data(files[f"sulc_{side}"]), dtype=np.float32)
        meshes[hemisphere] = Mesh(
            np.asarray(mesh.coordinates, dtype=np.float32),
            np.asarray(mesh.faces, dtype=np.int32),
            np.clip(depth / 0.8 + 0.5, 0, 1),
        )
    return meshes


def _packed(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode()


def mesh_record() -> dict[str, Any]:
    """Return both hemispheres for the page: coordinates in tenths of mm, faces, sulci, packed."""
    meshes = inflated()
    return {
        "n": N_VERTICES,
        "faces": {h: _packed(m.faces, "<u2") for h, m in meshes.items()},
        "xyz": {h: _packed(np.round(m.coordinates * 10), "<i2") for h, m in meshes.items()},
        "sulcus": {h: _packed(m.sulcus * 255, "<u1") for h, m in meshes.items()},
    }


def pack_values(values: np.ndarray) -> dict[str, Any]:
    """Return values as 16-bit steps between their ends, 65535 for none."""
    finite = np.isfinite(values)
    low = float(values[finite].min()) if finite.any() else 0.0
    step = (float(values[finite].max()) - low) / 65534 if finite.any() else 1.0
    steps = np.full(values.shape, 65535, dtype=np.uint16)
    steps[finite] = np.round((values[finite] - low) / (step or 1.0))
    # As text: the page must not lose digits of a step that is counted 65,534 times.
    return {"low": repr(low), "step": repr(step), "steps": _packed(steps, "<u2")}


def cortex_grey(sulcus: np.ndarray) -> np.ndarray:
    """Return the grey of bare cortex, (n, 3) of 0..255: light on gyri, darker in sulci."""
    return (205 - 50 * sulcus)[:, None] * np.ones(3)


def colour_vertices(
    values: np.ndarray, table: np.ndarray, low: float, high: float, sulcus: np.ndarray
) -> np.ndarray:
    """Return the colour of every vertex, (n, 3) of 0..255: the map's, or the cortex's where NaN."""
    colours = cortex_grey(sulcus)
    has = np.isfinite(values)
    place = np.clip((values[has] - low) / (high - low), 0, 1) * (len(table) - 1)
    colours[has] = table[np.round(place).astype(int)]
    return colours


@functools.cache
def _projection(view: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one view once: which triangle, where in it, and how bright, for every pixel.

    Every triangle is covered by a lattice of points finer than the pixels; the nearest point to
    the viewer wins its pixel.

    Returns
    -------
    face : (height, width) int, -1 where nothing is seen
    weights : (height, width, 3), barycentric
    shade : (height, width)
    """
    _, hemisphere, towards, up = VIEWS[view]
    mesh = inflated()[hemisphere]
    d, u = np.array(towards, float), np.array(up, float)
    axes = np.stack([np.cross(u, d), u, d], axis=1)
    xyz = mesh.coordinates @ axes
    span = np.ptp(xyz[:, :2], axis=0)
    # All views at one scale: the longest side of the brain fills the width.
    scale = (width - 4) / 218.0
    height = int(np.ceil(span[1] * scale)) + 4
    xy = xyz[:, :2] - (xyz[:, :2].min(0) + xyz[:, :2].max(0)) / 2
    px = xy[:, 0] * scale + width / 2
    py = height / 2 - xy[:, 1] * scale
    edges = xyz[mesh.faces]
    normals = np.cross(edges[:, 1] - edges[:, 0], edges[:, 2] - edges[:, 0])
    smooth = np.zeros_like(xyz)
    for corner in range(3):
        np.add.at(smooth, mesh.faces[:, corner], normals)
    smooth /= np.linalg.norm(smooth, axis=1, keepdims=True)
    if np.mean(np.sum(smooth * (xyz - xyz.mean(0)), axis=1)) < 0:
        smooth = -smooth
    corners = np.stack([px, py], axis=1)[mesh.faces]
    longest = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(axis=1)
    steps = 2 * np.ceil(longest * 0.75).astype(int)
    seen = smooth[mesh.faces, 2].max(axis=1) > 0
    pixels, depths, faces, weights = [], [], [], []
    for n in np.unique(steps[seen]):
        i, j = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
        inside = i + j <= n
        lattice = np.stack([i[inside], j[inside], n - i[inside] - j[inside]], axis=1) / n
        chosen = np.flatnonzero(seen & (steps == n))
        points = (lattice @ corners[chosen]).astype(int)
        pixels.append((points[..., 1] * width + points[..., 0]).ravel())
        depths.append((xyz[mesh.faces[chosen], 2] @ lattice.T).ravel())
        faces.append(np.repeat(chosen, len(lattice)))
        weights.append(np.tile(lattice.astype(np.float32), (len(chosen), 1)))
    pixel, depth = np.concatenate(pixels), np.concatenate(depths)
    # Written from far to near: what is nearest stays.
    order = np.argsort(depth.astype(np.float32), kind="stable")
    winner = np.full(height * width, -1)
    winner[pixel[order]] = order
    face = np.where(winner < 0, -1, np.concatenate(faces)[winner])
    weight = np.concatenate(weights)[winner]
    normal = np.einsum("pk,pkc->pc", weight, smooth[mesh.faces[np.maximum(face, 0)]])
    light = np.array([-0.25, 0.45, 0.86])
    shade = 0.55 + 0.5 * np.clip(normal @ (light / np.linalg.norm(light)), 0, 1)
    shape = (height, width)
    return face.reshape(shape), weight.reshape(*shape, 3), shade.reshape(shape)


def draw_view(view: int, colours: dict[str, np.ndarray], width: int, fine: int = 2) -> Image:
    """Return one view as a transparent picture `width` pixels wide, `fine` times oversampled."""
    from PIL import Image

    face, weights, shade = _projection(view, width * fine)
    hemisphere = VIEWS[view][1]
    seen = face >= 0
    corners = colours[hemisphere].astype(np.float32)[inflated()[hemisphere].faces[face[seen]]]
    rgba = np.zeros((*face.shape, 4), dtype=np.float32)
    rgba[seen, :3] = (weights[seen][:, :, None] * corners).sum(axis=1) * shade[seen][:, None]
    rgba[seen, 3] = 255
    # Colours are zero outside, so a mean over alpha takes no colour from there at the rim.
    small = np.array(face.shape) // fine
    box = rgba[: small[0] * fine, : small[1] * fine].reshape(small[0], fine, small[1], fine, 4)
    mean = box.mean(axis=(1, 3))
    alpha = mean[..., 3:] / 255
    mean[..., :3] = np.divide(
        mean[..., :3], alpha, out=np.zeros_like(mean[..., :3]), where=alpha > 0
    )
    return Image.fromarray(np.clip(mean, 0, 255).astype(np.uint8), "RGBA")


def _font(size: int) -> Any:
    from matplotlib import font_manager
    from PIL import ImageFont

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def picture(
    colours: dict[str, np.ndarray],
    *,
    table: np.ndarray,
    ends: tuple[str, str] | None,
    title: str,
    labels: list[str] | None = None,
    tile: int = 380,
) -> Image:
    """Return eight views of both hemispheres with a colour bar, on a transparent ground.

    Parameters
    ----------
    colours : dict of hemisphere to ndarray (10242, 3)
        Colour of every vertex, 0..255.
    table : ndarray (n, 3), uint8
        The colour map.
    ends : pair of str or None
        What the colour bar's ends say; None for a categorical map.
    title : str
        What the colours mean, with the unit.
    labels : list of str, optional
        The categories of a categorical map, one colour each.
    tile : int
        Width of one view in pixels.
    """
    from PIL import Image, ImageDraw

    grey = (118, 122, 128, 255)
    font, gap, caption = _font(19), 18, 34
    tiles = [draw_view(i, colours, tile) for i in range(len(VIEWS))]
    rows = [tiles[:4], tiles[4:]]
    heights = [max(t.height for t in row) + caption for row in rows]
    foot = 74 if labels is None else 44 * (1 + (len(labels) - 1) // 4) + 10
    width = 4 * tile + 3 * gap
    canvas = Image.new("RGBA", (width, sum(heights) + gap + foot), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    y = 0
    for r, row in enumerate(rows):
        for c, part in enumerate(row):
            x = c * (tile + gap)
            inner = heights[r] - caption
            canvas.alpha_composite(part, (x, y + (inner - part.height) // 2))
            name = VIEWS[4 * r + c][0]
            pen.text((x + tile / 2, y + inner + 14), name, fill=grey, font=font, anchor="mm")
        y += heights[r] + gap
    if labels is None and ends is not None:
        bar = Image.fromarray(np.ascontiguousarray(np.tile(table[None], (16, 1, 1))))
        bar = bar.resize((420, 16)).convert("RGBA")
        x = (width - 420) // 2
        canvas.alpha_composite(bar, (x, y + 6))
        pen.text((x - 12, y + 14), ends[0], fill=grey, font=font, anchor="rm")
        pen.text((x + 432, y + 14), ends[1], fill=grey, font=font, anchor="lm")
        pen.text((width / 2, y + 44), title, fill=grey, font=font, anchor="mm")
    for i, label in enumerate(labels or []):
        x, top = (i % 4) * (tile + gap) + 30, y + 44 * (i // 4)
        pen.rounded_rectangle((x, top, x + 24, top + 24), 5, fill=(*map(int, table[i]), 255))
        pen.text((x + 36, top + 12), label, fill=grey, font=font, anchor="lm")
    return canvas
