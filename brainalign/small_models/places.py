"""Places: whole views, outdoors and indoors, by day, at sunset, at night and in snow."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .backgrounds import gradient
from .canvas import Canvas, Colour, dark, light, mix
from .things import COLOURS

__all__ = ["MOMENTS", "PLACES", "place"]

PLACES = ("house", "street", "mountains", "beach", "forest", "desert", "kitchen", "bedroom")
#: Name of a moment -> how a caption says it. Indoors only day and night are used.
MOMENTS = {
    "day": "on a sunny day",
    "sunset": "at sunset",
    "night": "at night",
    "snow": "in the snow",
}
_SKY: dict[str, tuple[Colour, Colour]] = {
    "day": ((84, 152, 222), (198, 226, 244)),
    "sunset": ((96, 78, 140), (252, 160, 96)),
    "night": ((12, 18, 46), (46, 58, 104)),
    "snow": ((168, 182, 200), (226, 232, 238)),
}


def _sky(c: Canvas, moment: str, rng: np.random.Generator) -> None:
    c.image.paste(gradient(c.side, *_SKY[moment]))
    x = rng.uniform(-0.8, 0.8)
    if moment == "day":
        c.ellipse(x, -0.72, 0.15, 0.15, (255, 240, 150))
        for cx, cy in zip(rng.uniform(-0.9, 0.9, 3), rng.uniform(-0.85, -0.4, 3), strict=True):
            for dx, r in ((-0.14, 0.08), (0, 0.11), (0.14, 0.08)):
                c.ellipse(cx + dx, cy, r * 1.3, r * 0.8, (248, 250, 252))
    elif moment == "sunset":
        c.ellipse(x, -0.1, 0.24, 0.24, (255, 214, 120))
    elif moment == "night":
        for sx, sy in rng.uniform(-1, 1, (26, 2)):
            c.ellipse(sx, sy * 0.5 - 0.5, 0.012, 0.012, (236, 236, 250))
        c.ellipse(x, -0.68, 0.13, 0.13, (244, 240, 214))
        c.ellipse(x + 0.06, -0.71, 0.11, 0.11, (20, 26, 58))


def _tint(colour: Colour, moment: str) -> Colour:
    if moment == "night":
        return mix(colour, (16, 22, 52), 0.55)
    if moment == "sunset":
        return mix(colour, (150, 80, 70), 0.3)
    return colour


def _ground(moment: str) -> Colour:
    return (238, 242, 248) if moment == "snow" else _tint((104, 160, 76), moment)


def _tree(c: Canvas, x: float, y: float, s: float, moment: str, *, fir: bool) -> None:
    with c.frame(x, y, s):
        c.rect(-0.09, -0.3, 0.09, 0.1, _tint((98, 66, 42), moment))
        leaf = _tint((44, 112, 62) if fir else (72, 142, 64), moment)
        snow = moment == "snow"
        if fir:
            for k in range(3):
                top, half = -1.15 + 0.3 * k, 0.3 + 0.13 * k
                c.poly([(0, top), (half, top + 0.48), (-half, top + 0.48)], leaf)
                if snow:
                    c.poly([(0, top), (half * 0.5, top + 0.24), (-half * 0.5, top + 0.24)],
                           (246, 250, 252))  # fmt: skip
        else:
            for dx, dy, r in ((-0.25, -0.55, 0.32), (0.25, -0.55, 0.32), (0, -0.8, 0.36)):
                c.ellipse(dx, dy, r, r, leaf)
            c.ellipse(-0.1, -0.85, 0.2, 0.16, (246, 250, 252) if snow else light(leaf, 0.2))


def _house(c: Canvas, wall: Colour, roof: Colour, moment: str, rng: np.random.Generator) -> None:
    wall_t = _tint(wall, moment)
    roof_t = (244, 247, 250) if moment == "snow" else _tint(roof, moment)
    glass = (255, 224, 120) if moment == "night" else (176, 212, 232)
    c.rect(0.32, -0.98, 0.5, -0.5, _tint((140, 84, 70), moment))
    c.rect(-0.72, -0.3, 0.72, 0.6, wall_t)
    c.poly([(-0.88, -0.28), (0.88, -0.28), (0.5, -0.86), (-0.5, -0.86)]
           if rng.random() < 0.4
           else [(-0.88, -0.28), (0.88, -0.28), (0, -0.98)], roof_t)  # fmt: skip
    c.rect(-0.14, 0.1, 0.14, 0.6, _tint((112, 66, 42), moment))
    c.ellipse(0.08, 0.36, 0.025, 0.025, (240, 206, 110))
    for x in (-0.46, 0.46):
        c.rect(x - 0.17, -0.12, x + 0.17, 0.22, _tint((248, 246, 240), moment))
        c.rect(x - 0.13, -0.08, x + 0.13, 0.18, glass)
        c.line([(x, -0.08), (x, 0.18)], 0.03, (244, 242, 236))
        c.line([(x - 0.13, 0.05), (x + 0.13, 0.05)], 0.03, (244, 242, 236))


def _street(c: Canvas, moment: str, rng: np.random.Generator) -> None:
    horizon = rng.uniform(-0.05, 0.15)
    c.rect(-1, horizon, 1, 1, _tint((176, 172, 166), moment))
    for s in (-1, 1):
        near = 1.05
        for _ in range(4):
            far = near * rng.uniform(0.62, 0.74)
            tone = _tint(
                mix(list(COLOURS.values())[int(rng.integers(9))], (206, 176, 150), 0.6), moment
            )
            height = rng.uniform(0.85, 1.5)
            face = [(s * near, horizon - height * near), (s * far, horizon - height * far),
                    (s * far, horizon + 0.35 * far), (s * near, horizon + 0.35 * near)]  # fmt: skip
            c.poly(face, tone)
            lit = (255, 222, 120) if moment == "night" else (120, 152, 180)
            for u in (0.25, 0.7):
                for v in np.arange(0.2, height, 0.32):
                    a = near + (far - near) * u
                    b = near + (far - near) * (u + 0.2)
                    c.poly([(s * a, horizon - (v + 0.17) * a), (s * b, horizon - (v + 0.17) * b),
                            (s * b, horizon - v * b), (s * a, horizon - v * a)],
                           lit if rng.random() < 0.8 else dark(tone, 0.4))  # fmt: skip
            near = far
    road = (226, 230, 236) if moment == "snow" else _tint((84, 86, 92), moment)
    c.poly([(-0.06, horizon), (0.06, horizon), (0.75, 1), (-0.75, 1)], road)
    for y0, y1 in ((0.15, 0.25), (0.4, 0.56), (0.75, 0.98)):
        a, b = horizon + (1 - horizon) * y0, horizon + (1 - horizon) * y1
        c.poly([(-0.02 * y0 - 0.005, a), (0.02 * y0 + 0.005, a), (0.04 * y1, b), (-0.04 * y1, b)],
               (244, 230, 150))  # fmt: skip


def _mountains(c: Canvas, moment: str, rng: np.random.Generator) -> None:
    for layer in range(3):
        base = 0.1 + 0.16 * layer
        tone = _tint(mix((138, 150, 176), (88, 100, 104), layer / 2), moment)
        for x in rng.uniform(-1, 1, 3 - layer // 2):
            h, w = rng.uniform(0.5, 0.95) - 0.14 * layer, rng.uniform(0.5, 0.8)
            c.poly([(x, base - h), (x + w, base + 0.1), (x - w, base + 0.1)], tone)
            c.poly([(x, base - h), (x + w, base + 0.1), (x + 0.1 * w, base + 0.1)], dark(tone, 0.2))
            if layer < 2:
                t = 0.28
                c.poly([(x, base - h), (x + t * w, base - h * (1 - t)),
                        (x + 0.1 * w, base - h * 0.78), (x - 0.05 * w, base - h * 0.7),
                        (x - t * w, base - h * (1 - t))],
                       _tint((250, 252, 254), moment))  # fmt: skip
        c.rect(-1, base + 0.09, 1, 1, tone if layer < 2 else _ground(moment))
    c.ellipse(rng.uniform(-0.5, 0.5), 0.85, 0.6, 0.13, _tint((110, 162, 206), moment))
    for x in rng.uniform(-0.95, 0.95, 4):
        _tree(c, x, rng.uniform(0.55, 0.7), 0.22, moment, fir=True)


def _beach(c: Canvas, moment: str, rng: np.random.Generator) -> None:
    sea = _tint((40, 128, 176), moment)
    horizon = rng.uniform(-0.15, 0.1)
    for k in range(8):
        y = horizon + 0.07 * k
        c.rect(-1, y, 1, 1, mix(sea, (126, 208, 214), k / 9))
    sand = (240, 244, 248) if moment == "snow" else _tint((236, 210, 156), moment)
    shore = horizon + 0.48
    wave = [
        (x, shore + 0.05 * np.sin(5 * x + rng.uniform(0, 0.4))) for x in np.linspace(-1.1, 1.1, 12)
    ]
    c.poly([*[(x, y - 0.05) for x, y in wave], (1.1, 1.1), (-1.1, 1.1)], (248, 250, 250))
    c.poly([*wave, (1.1, 1.1), (-1.1, 1.1)], sand)
    s = rng.choice([-1, 1])
    x = s * rng.uniform(0.4, 0.8)
    trunk = _tint((124, 88, 56), moment)
    top = (x - s * 0.2, -0.45)
    c.curve([(x, 0.7), (x + s * 0.06, 0.1), top], 0.08, trunk)
    for a in np.radians([200, 240, 290, 330, 10, 170]):
        tip = (top[0] + 0.5 * np.cos(a), top[1] + 0.36 * np.sin(a) + 0.12)
        mid = (top[0] + 0.3 * np.cos(a), top[1] + 0.34 * np.sin(a) - 0.08)
        c.curve([top, mid, tip], 0.09, _tint((62, 140, 66), moment))
    if rng.random() < 0.6:
        with c.frame(-s * rng.uniform(0.2, 0.6), horizon + 0.02, 0.24):
            c.poly(
                [(-0.7, 0.0), (0.7, 0.0), (0.45, 0.35), (-0.45, 0.35)], _tint((150, 70, 60), moment)
            )
            c.poly([(0.02, -1.2), (0.02, -0.08), (0.6, -0.08)], (248, 246, 240))
            c.poly([(-0.05, -1.0), (-0.05, -0.08), (-0.5, -0.08)], (236, 228, 214))


def _forest(c: Canvas, moment: str, rng: np.random.Generator) -> None:
    c.rect(-1, 0.05, 1, 1, _ground(moment))
    path = (214, 220, 228) if moment == "snow" else _tint((186, 150, 104), moment)
    bend = rng.uniform(-0.3, 0.3)
    c.blob(
        [(bend, 0.08), (bend + 0.06, 0.08), (0.1, 0.5), (0.4, 1.1), (-0.4, 1.1), (-0.1, 0.5)], path
    )
    fir = rng.random() < 0.5
    for y in np.sort(rng.uniform(0.08, 1.05, 15)):
        x = rng.uniform(-1.05, 1.05)
        if abs(x) > 0.32 * y + 0.08:
            _tree(c, x, y, 0.3 + 0.55 * y, moment, fir=fir)


def _desert(c: Canvas, moment: str, rng: np.random.Generator) -> None:
    for k in range(3):
        y = 0.0 + 0.28 * k
        tone = _tint(mix((232, 190, 128), (206, 150, 86), k / 2), moment)
        if moment == "snow":
            tone = mix(tone, (244, 246, 250), 0.6)
        phase = rng.uniform(0, 6)
        ridge = [(x, y + 0.1 * np.sin(2.4 * x + phase)) for x in np.linspace(-1.1, 1.1, 14)]
        c.poly([*ridge, (1.1, 1.1), (-1.1, 1.1)], tone)
    for _ in range(int(rng.integers(1, 4))):
        with c.frame(rng.uniform(-0.8, 0.8), rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.6)):
            green = _tint((76, 134, 78), moment)
            c.line([(0, 0.3), (0, -0.8)], 0.24, green)
            c.line([(-0.02, -0.1), (-0.4, -0.1), (-0.4, -0.5)], 0.17, green)
            c.line([(0.02, 0.05), (0.4, 0.05), (0.4, -0.35)], 0.17, green)


def _indoors(c: Canvas, wall: Colour, moment: str, rng: np.random.Generator) -> float:
    tone = mix(wall, (20, 22, 40), 0.45) if moment == "night" else mix(wall, (240, 236, 226), 0.5)
    c.rect(-1, -1, 1, 1, tone)
    c.poly([(-1, -1), (-0.62, -0.72), (-0.62, 0.4), (-1, 1)], dark(tone, 0.14))
    c.poly([(1, -1), (0.62, -0.72), (0.62, 0.4), (1, 1)], dark(tone, 0.08))
    c.poly([(-1, -1), (1, -1), (0.62, -0.72), (-0.62, -0.72)], light(tone, 0.4))
    floor = (70, 54, 50) if moment == "night" else (180, 138, 98)
    c.poly([(-0.62, 0.4), (0.62, 0.4), (1, 1), (-1, 1)], floor)
    for x in np.linspace(-0.62, 0.62, 8):
        c.line([(x, 0.4), (x * 1.62, 1)], 0.012, dark(floor, 0.2))
    x = rng.uniform(-0.3, 0.3)
    c.rect(x - 0.24, -0.58, x + 0.24, -0.1, (246, 244, 238))
    c.rect(x - 0.2, -0.54, x + 0.2, -0.14, (26, 34, 72) if moment == "night" else (160, 208, 238))
    c.line([(x, -0.54), (x, -0.14)], 0.03, (246, 244, 238))
    c.line([(x - 0.2, -0.34), (x + 0.2, -0.34)], 0.03, (246, 244, 238))
    return x


def _kitchen(c: Canvas, moment: str, colour: Colour, rng: np.random.Generator) -> None:
    _indoors(c, (214, 214, 196), moment, rng)
    tone = mix(colour, (16, 20, 44), 0.4) if moment == "night" else colour
    s = rng.choice([-1, 1])
    c.rect(-0.62, 0.12, 0.62, 0.5, tone)
    c.rect(-0.64, 0.06, 0.64, 0.13, (92, 88, 88))
    for x in np.linspace(-0.5, 0.5, 5):
        c.rect(x - 0.1, 0.2, x + 0.1, 0.44, light(tone, 0.15), 0.02)
        c.ellipse(x, 0.24, 0.018, 0.018, (230, 226, 214))
    fridge = (232, 234, 236) if moment != "night" else (110, 114, 136)
    with c.frame(0.72 * s, 0, 1):
        c.rect(-0.2, -0.62, 0.2, 0.62, fridge, 0.03)
        c.line([(-0.2, -0.2), (0.2, -0.2)], 0.02, dark(fridge, 0.3))
        c.line([(-0.14, -0.1), (-0.14, 0.1)], 0.03, dark(fridge, 0.45))
    c.rect(-0.6 * s - 0.17, -0.1, -0.6 * s + 0.17, 0.06, (120, 122, 128))
    c.rect(-0.6 * s - 0.2, -0.66, -0.6 * s + 0.24, -0.3, light(tone, 0.15), 0.02)
    c.ellipse(0, 0.82, 0.5, 0.12, dark((180, 138, 98), 0.35))
    c.ellipse(0, 0.78, 0.5, 0.12, light((180, 138, 98), 0.15))


def _bedroom(c: Canvas, moment: str, colour: Colour, rng: np.random.Generator) -> None:
    _indoors(c, (200, 206, 220), moment, rng)
    tone = mix(colour, (16, 20, 44), 0.4) if moment == "night" else colour
    x = rng.uniform(-0.25, 0.25)
    c.rect(x - 0.5, 0.02, x + 0.5, 0.5, (112, 76, 50), 0.08)
    c.poly([(x - 0.45, 0.32), (x + 0.45, 0.32), (x + 0.6, 0.86), (x - 0.6, 0.86)], tone)
    c.poly([(x - 0.6, 0.86), (x + 0.6, 0.86), (x + 0.6, 0.97), (x - 0.6, 0.97)], dark(tone, 0.3))
    for p in (-0.22, 0.22):
        c.rect(x + p - 0.18, 0.2, x + p + 0.18, 0.38, (248, 246, 240), 0.08)
    c.poly([(x - 0.47, 0.4), (x + 0.47, 0.4), (x + 0.49, 0.48), (x - 0.49, 0.48)], light(tone, 0.5))
    s = 1 if x < 0 else -1
    lamp = s * 0.72
    c.rect(lamp - 0.13, 0.3, lamp + 0.13, 0.6, (124, 86, 56), 0.02)
    c.line([(lamp, 0.3), (lamp, 0.12)], 0.03, (90, 80, 70))
    c.poly([(lamp - 0.07, -0.06), (lamp + 0.07, -0.06), (lamp + 0.14, 0.14), (lamp - 0.14, 0.14)],
           (255, 232, 150) if moment == "night" else (240, 222, 190))  # fmt: skip


def place(
    kind: str, moment: str, colour: Colour, count: int, rng: np.random.Generator, side: int
) -> Image.Image:
    """Return a view of a place as an RGB picture.

    Parameters
    ----------
    kind : str
        One of `PLACES`.
    moment : str
        One of `MOMENTS`.
    colour : tuple of int
        Colour of the houses' walls, or of the furniture.
    count : int
        Number of houses, 1 to 3; other places ignore it.
    rng : numpy.random.Generator
        Draws the details.
    side : int
        Side of the picture in pixels.
    """
    c = Canvas(side)
    _sky(c, moment, rng)
    if kind == "house":
        horizon = rng.uniform(0.15, 0.35)
        hill = [
            (x, horizon + 0.06 * np.sin(3 * x + rng.uniform(0, 0.3)))
            for x in np.linspace(-1.1, 1.1, 9)
        ]
        c.poly([*hill, (1.1, 1.1), (-1.1, 1.1)], _ground(moment))
        roofs = [(164, 66, 52), (96, 78, 74), (84, 96, 120)]
        fir = rng.random() < 0.5
        for x in rng.uniform(-1, 1, 3):
            _tree(c, x, horizon + 0.12, rng.uniform(0.35, 0.55), moment, fir=fir)
        scale = {1: rng.uniform(0.6, 0.85), 2: 0.48, 3: 0.34}[count]
        places = {1: [rng.uniform(-0.25, 0.25)], 2: [-0.5, 0.5], 3: [-0.66, 0.0, 0.66]}[count]
        if count == 1:
            c.poly([(places[0] - 0.1, horizon + 0.3), (places[0] + 0.1, horizon + 0.3), (0.35, 1.1),
                    (-0.2, 1.1)], _tint((200, 178, 140), moment))  # fmt: skip
        for x in places:
            with c.frame(x, horizon + 0.38 - 0.6 * scale + rng.uniform(-0.03, 0.03), scale):
                _house(c, colour, roofs[int(rng.integers(3))], moment, rng)
    elif kind == "street":
        _street(c, moment, rng)
    elif kind == "mountains":
        _mountains(c, moment, rng)
    elif kind == "beach":
        _beach(c, moment, rng)
    elif kind == "forest":
        _forest(c, moment, rng)
    elif kind == "desert":
        _desert(c, moment, rng)
    elif kind == "kitchen":
        _kitchen(c, moment, colour, rng)
    elif kind == "bedroom":
        _bedroom(c, moment, colour, rng)
    else:
        raise KeyError(kind)
    return c.image.convert("RGB")
