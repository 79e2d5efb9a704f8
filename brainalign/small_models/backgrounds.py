"""What stands behind the things of a scene: plain, natural and man-made surfaces."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .canvas import Canvas, Colour, dark, light, mix

__all__ = ["BACKGROUNDS", "field", "gradient", "paint"]

#: Name of a background -> how a caption says it.
BACKGROUNDS = {
    "white": "on a white background",
    "grey": "on a grey background",
    "dark": "on a dark background",
    "blue": "on a blue background",
    "pink": "on a pink background",
    "yellow": "on a yellow background",
    "table": "on a wooden table",
    "grass": "on the grass",
    "sky": "against the sky",
    "bricks": "in front of a brick wall",
    "cloth": "on a checked cloth",
    "sand": "on the sand",
    "stripes": "on a striped background",
    "room": "in a room",
}

_PLAIN: dict[str, Colour] = {
    "white": (240, 240, 236),
    "grey": (150, 152, 156),
    "dark": (42, 44, 54),
    "blue": (120, 165, 215),
    "pink": (238, 178, 190),
    "yellow": (240, 215, 120),
}


def field(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Return a smooth random field in [-1, 1] of shape (side, side) with about `cells` bumps."""
    coarse = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def gradient(side: int, top: Colour, bottom: Colour) -> Image.Image:
    """Return a picture that runs from `top` to `bottom`."""
    t = np.linspace(0, 1, side)[:, None, None]
    rows = np.asarray(top) * (1 - t) + np.asarray(bottom) * t
    return Image.fromarray(np.broadcast_to(rows, (side, side, 3)).astype(np.uint8))


def _mottle(image: Image.Image, rng: np.random.Generator, amount: float, cells: int) -> Image.Image:
    side = image.width
    shade = field(rng, side, cells)
    out = np.asarray(image, np.float32) + amount * shade[..., None]
    return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))


def paint(name: str, rng: np.random.Generator, side: int) -> Image.Image:
    """Return one of `BACKGROUNDS` as an RGB picture of `side` x `side` pixels."""
    if name in _PLAIN:
        base = _PLAIN[name]
        return _mottle(gradient(side, light(base, 0.2), dark(base, 0.15)), rng, 8, 3)
    if name == "table":
        base = mix((176, 122, 72), (120, 78, 44), rng.uniform(0, 1))
        grain = field(rng, side, 4) * 0.6 + np.repeat(field(rng, side, 40)[:, :1], side, 1)
        rgb = np.asarray(base, np.float32) + 14 * grain[..., None]
        board = side // int(rng.integers(3, 6))
        rgb[::board] *= 0.6
        rgb[1::board] *= 0.7
        return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    if name == "grass":
        image = _mottle(gradient(side, (126, 176, 84), (74, 132, 56)), rng, 18, 12)
        canvas = Canvas(side, image.convert("RGBA"))
        for x, y in rng.uniform(-1, 1, (70, 2)):
            tone = mix((52, 112, 42), (150, 196, 96), rng.uniform(0, 1))
            canvas.line([(x, y), (x + rng.uniform(-0.03, 0.03), y - 0.09)], 0.012, tone)
        return canvas.image.convert("RGB")
    if name == "sky":
        image = gradient(side, (92, 150, 216), (190, 218, 240))
        cloud = np.clip(field(rng, side, 4) + 0.5 * field(rng, side, 9), 0, 1)[..., None]
        rgb = np.asarray(image, np.float32)
        return Image.fromarray((rgb + (250 - rgb) * 0.8 * cloud).astype(np.uint8))
    if name == "bricks":
        canvas = Canvas(side, Image.new("RGBA", (side, side), (196, 186, 174)))
        base = mix((168, 82, 62), (140, 98, 78), rng.uniform(0, 1))
        rows = int(rng.integers(7, 11))
        h = 2 / rows
        for r in range(rows):
            for k in range(-1, rows // 2 + 1):
                x = -1 + (k + 0.5 * (r % 2)) * 2.2 * h
                tone = mix(base, (90, 50, 40), rng.uniform(0, 0.45))
                y = -1 + r * h
                canvas.rect(x + 0.012, y + 0.012, x + 2.2 * h - 0.012, y + h - 0.012, tone)
        return canvas.image.convert("RGB")
    if name == "cloth":
        base = [(196, 60, 60), (70, 110, 180), (80, 150, 100)][int(rng.integers(3))]
        n = int(rng.integers(4, 8))
        band = (np.arange(side) * 2 * n // side) % 2
        both = (band[:, None] + band[None, :]) / 2
        rgb = (
            np.asarray((244, 240, 232)) * (1 - both[..., None]) + np.asarray(base) * both[..., None]
        )
        return Image.fromarray(rgb.astype(np.uint8))
    if name == "sand":
        image = gradient(side, (232, 208, 158), (212, 182, 126))
        wave = np.sin(np.arange(side)[:, None] / side * 50 + 3 * field(rng, side, 3))
        rgb = np.asarray(image, np.float32) + (7 * wave + 5 * field(rng, side, 20))[..., None]
        return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    if name == "stripes":
        a: Colour = [(236, 224, 200), (208, 226, 222), (230, 214, 226)][int(rng.integers(3))]
        b = mix(a, (120, 130, 150), 0.45)
        rows, columns = np.mgrid[:side, :side] / side
        turn = rng.uniform(0, np.pi)
        phase = (rows * np.sin(turn) + columns * np.cos(turn)) * rng.integers(5, 9)
        on = (np.floor(phase) % 2)[..., None]
        return Image.fromarray((np.asarray(a) * on + np.asarray(b) * (1 - on)).astype(np.uint8))
    if name == "room":
        wall = mix((214, 206, 190), (160, 186, 190), rng.uniform(0, 1))
        canvas = Canvas(side, gradient(side, wall, dark(wall, 0.12)).convert("RGBA"))
        floor = rng.uniform(0.35, 0.6)
        canvas.rect(-1, floor, 1, 1, (140, 104, 76))
        canvas.rect(-1, floor - 0.05, 1, floor, (238, 234, 226))
        for x in np.linspace(-2, 2, 11):
            canvas.line([(x * 0.7, floor), (x * 1.2, 1)], 0.012, (112, 82, 60))
        return canvas.image.convert("RGB")
    raise KeyError(name)
