"""Food and objects, each drawn in the unit frame in a colour of choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .canvas import Canvas, Colour, dark, light, mix

__all__ = ["COLOURS", "FOOD", "OBJECTS", "Thing"]

COLOURS: dict[str, Colour] = {
    "red": (206, 46, 44),
    "orange": (238, 138, 40),
    "yellow": (246, 208, 58),
    "green": (74, 158, 70),
    "blue": (52, 104, 196),
    "purple": (130, 74, 168),
    "pink": (240, 138, 172),
    "brown": (126, 80, 48),
    "white": (240, 240, 238),
    "black": (44, 44, 50),
    "grey": (146, 150, 156),
}
_PAINT = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")


@dataclass(frozen=True)
class Thing:
    """What is drawn, the colours it comes in (none: its own), and its plural."""

    draw: Callable[[Canvas, Colour, np.random.Generator], None]
    colours: tuple[str, ...] = ()
    plural: str = ""


def _apple(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.blob([(0, -0.42), (0.36, -0.6), (0.74, -0.34), (0.72, 0.2), (0.42, 0.72), (0, 0.68),
            (-0.42, 0.72), (-0.72, 0.2), (-0.74, -0.34), (-0.36, -0.6)], k)  # fmt: skip
    c.ellipse(0, -0.46, 0.2, 0.07, dark(k, 0.35))
    c.curve([(0, -0.44), (0.02, -0.7), (0.1, -0.88)], 0.08, (92, 60, 34))
    c.blob([(0.1, -0.74), (0.34, -0.96), (0.62, -0.86), (0.36, -0.68)], (86, 150, 60))
    c.ellipse(-0.4, -0.22, 0.1, 0.2, light(k, 0.55), rotation=20)


def _banana(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.blob([(-0.85, -0.42), (-0.7, -0.5), (-0.42, 0.02), (0.1, 0.2), (0.62, 0.02), (0.88, -0.3),
            (0.95, -0.22), (0.8, 0.26), (0.3, 0.62), (-0.3, 0.56), (-0.72, 0.16)], k)  # fmt: skip
    c.curve(
        [(-0.72, -0.2), (-0.4, 0.26), (0.1, 0.42), (0.6, 0.26), (0.86, -0.1)], 0.04, dark(k, 0.2)
    )
    c.line([(-0.8, -0.45), (-0.88, -0.62)], 0.13, (120, 96, 44))
    c.ellipse(0.92, -0.26, 0.06, 0.06, (84, 62, 34))


def _pizza(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.ellipse(0, 0, 0.92, 0.92, (198, 138, 74))
    c.ellipse(0, 0, 0.78, 0.78, (206, 70, 42))
    c.ellipse(0, 0, 0.74, 0.74, (248, 208, 104))
    for angle in np.linspace(0, 360, 8, endpoint=False) + rng.uniform(0, 45):
        a, r = np.radians(angle), rng.uniform(0.3, 0.58)
        c.ellipse(r * np.cos(a), r * np.sin(a), 0.14, 0.14, (178, 44, 38))
        c.ellipse(r * np.cos(a) - 0.03, r * np.sin(a) - 0.03, 0.08, 0.08, (204, 74, 60))
    for a, r in zip(rng.uniform(0, 6.3, 9), rng.uniform(0.05, 0.66, 9), strict=True):
        c.ellipse(r * np.cos(a), r * np.sin(a), 0.06, 0.035, (70, 130, 56), rotation=a * 57)
    for a in np.radians([20, 80, 140]):
        d = (0.9 * np.cos(a), 0.9 * np.sin(a))
        c.line([(-d[0], -d[1]), d], 0.018, (176, 112, 56))


def _burger(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    bun = (216, 148, 76)
    c.rect(-0.78, 0.36, 0.78, 0.72, dark(bun, 0.08), 0.16)
    c.rect(-0.84, 0.1, 0.84, 0.4, (104, 58, 34), 0.13)
    c.poly([(-0.8, 0.06), (0.8, 0.06), (0.5, 0.26), (0.28, 0.08), (-0.2, 0.08), (-0.44, 0.24)],
           (250, 196, 60))  # fmt: skip
    c.rect(-0.8, -0.06, 0.8, 0.08, (208, 54, 44), 0.06)
    c.curve([(-0.86, -0.06), (-0.6, 0.02), (-0.35, -0.1), (-0.1, 0.02), (0.2, -0.1), (0.5, 0.02),
             (0.86, -0.08)], 0.13, (112, 178, 72))  # fmt: skip
    c.ellipse(0, -0.12, 0.82, 0.68, bun, start=180, stop=360)
    for x, y in ((-0.45, -0.42), (-0.15, -0.6), (0.2, -0.46), (0.48, -0.36), (0.05, -0.34)):
        c.ellipse(x, y, 0.06, 0.035, (250, 232, 190), rotation=30)


def _ice_cream(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.poly([(-0.42, -0.02), (0.42, -0.02), (0, 0.95)], (222, 164, 92))
    for t in (-0.28, 0.0, 0.28):
        c.line([(t, 0), (t / 2 + 0.14, 0.48)], 0.025, (176, 118, 60))
        c.line([(t, 0), (t / 2 - 0.14, 0.48)], 0.025, (176, 118, 60))
    c.ellipse(0, -0.3, 0.5, 0.46, k)
    c.blob([(-0.5, -0.2), (0.5, -0.2), (0.44, 0.06), (0.2, 0.0), (0.05, 0.14), (-0.18, 0.0),
            (-0.42, 0.08)], k)  # fmt: skip
    c.ellipse(0, -0.62, 0.36, 0.3, light(k, 0.2))
    c.ellipse(0, -0.92, 0.1, 0.1, (198, 30, 50))


def _cake(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.poly([(-0.8, -0.2), (0.8, -0.2), (0.8, 0.66), (-0.8, 0.66)], (226, 184, 124))
    c.rect(-0.8, 0.14, 0.8, 0.28, k)
    c.rect(-0.86, -0.36, 0.86, -0.04, k, 0.12)
    for i, x in enumerate(np.linspace(-0.72, 0.72, 7)):
        c.ellipse(x, 0.0, 0.11, 0.12 + 0.1 * (i % 2), k)
    for x in (-0.45, 0.0, 0.45):
        c.rect(x - 0.04, -0.72, x + 0.04, -0.36, (250, 250, 250))
        c.line([(x - 0.03, -0.46), (x + 0.03, -0.52)], 0.03, (206, 60, 80))
        c.ellipse(x, -0.8, 0.05, 0.1, (255, 176, 40))


def _carrot(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    with c.frame(0, 0.05, 1.0, 25):
        for x, y in ((-0.3, -0.9), (-0.1, -1.0), (0.1, -1.0), (0.3, -0.88)):
            c.curve([(0, -0.45), (x * 0.6, -0.7), (x, y)], 0.09, (72, 146, 60))
        c.blob([(-0.3, -0.42), (0, -0.5), (0.3, -0.42), (0.22, 0.2), (0.02, 0.92), (-0.02, 0.92),
                (-0.22, 0.2)], (240, 126, 36))  # fmt: skip
        for y in (-0.2, 0.06, 0.34):
            c.line([(-0.2 + 0.1 * y, y), (0.02, y + 0.03)], 0.025, (196, 92, 22))


def _egg(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    n = 9
    r = rng.uniform(0.68, 0.9, n)
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    c.blob(list(zip(r * np.cos(a), 0.85 * r * np.sin(a), strict=True)), (252, 250, 244))
    c.ellipse(0.04, 0.0, 0.34, 0.33, (248, 178, 40))
    c.ellipse(-0.06, -0.1, 0.1, 0.08, (255, 226, 140))


def _grapes(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.curve([(0, -0.5), (0.04, -0.8), (0.2, -0.95)], 0.07, (104, 76, 40))
    c.blob([(0.05, -0.7), (0.4, -0.95), (0.7, -0.7), (0.35, -0.5)], (92, 154, 66))
    for row, count in enumerate((4, 5, 4, 3, 2, 1)):
        for i in range(count):
            x = (i - (count - 1) / 2) * 0.31
            y = -0.46 + row * 0.26
            c.ellipse(x, y, 0.19, 0.19, dark(k, 0.25))
            c.ellipse(x - 0.01, y - 0.01, 0.165, 0.165, k)
            c.ellipse(x - 0.06, y - 0.07, 0.045, 0.045, light(k, 0.6))


def _strawberry(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.blob([(0, -0.52), (0.46, -0.58), (0.68, -0.2), (0.42, 0.46), (0, 0.9), (-0.42, 0.46),
            (-0.68, -0.2), (-0.46, -0.58)], (214, 36, 52))  # fmt: skip
    for x, y in ((-0.35, -0.2), (0, -0.18), (0.36, -0.2), (-0.2, 0.1), (0.18, 0.1), (0, 0.36),
                 (-0.16, 0.56), (0.16, 0.56)):  # fmt: skip
        c.ellipse(x, y, 0.035, 0.055, (250, 216, 130))
    for x in (-0.55, -0.25, 0.05, 0.3, 0.58):
        c.blob([(-0.08, -0.6), (x * 0.5, -0.72), (x, -0.4), (0.08, -0.55)], (80, 154, 60))
    c.line([(0, -0.6), (0.04, -0.86)], 0.08, (80, 140, 56))


def _donut(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.ring(0, 0, 0.58, 0.56, (206, 148, 88))
    n = 12
    wobble = rng.uniform(-0.03, 0.03, n)
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    c.arc(0, 0, 0.57, 0.57, 0, 360, 0.42, k)
    for i in range(n):
        c.ellipse(
            (0.76 + wobble[i]) * np.cos(a[i]), (0.76 + wobble[i]) * np.sin(a[i]), 0.09, 0.09, k
        )
    for angle, r in zip(rng.uniform(0, 6.3, 16), rng.uniform(0.44, 0.72, 16), strict=True):
        x, y = r * np.cos(angle), r * np.sin(angle)
        tone = COLOURS[("yellow", "blue", "white", "green")[int(rng.integers(4))]]
        c.line([(x, y), (x + 0.07 * np.sin(angle * 5), y + 0.07 * np.cos(angle * 5))], 0.04, tone)


def _watermelon(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.ellipse(0, -0.4, 0.95, 0.98, (52, 128, 60), start=0, stop=180)
    c.ellipse(0, -0.4, 0.86, 0.87, (226, 240, 196), start=0, stop=180)
    c.ellipse(0, -0.4, 0.78, 0.78, (226, 58, 66), start=0, stop=180)
    for x, y in ((-0.5, -0.25), (-0.22, -0.2), (0.1, -0.26), (0.44, -0.2), (-0.3, 0.05),
                 (0.02, 0.0), (0.3, 0.06), (0, 0.22)):  # fmt: skip
        c.ellipse(x, y, 0.04, 0.065, (40, 26, 26))


def _car(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.blob([(-0.5, 0.0), (-0.36, -0.42), (0.2, -0.44), (0.5, 0.0)], k)
    c.rect(-0.95, -0.06, 0.95, 0.36, k, 0.16)
    c.poly([(-0.38, -0.06), (-0.28, -0.34), (-0.06, -0.35), (-0.06, -0.06)], (184, 216, 234))
    c.poly([(0.02, -0.06), (0.02, -0.35), (0.16, -0.34), (0.38, -0.06)], (184, 216, 234))
    c.line([(-0.02, -0.04), (-0.02, 0.32)], 0.02, dark(k, 0.35))
    c.rect(0.06, 0.04, 0.2, 0.08, dark(k, 0.45), 0.02)
    c.ellipse(0.88, 0.08, 0.08, 0.07, (252, 240, 178))
    c.ellipse(-0.9, 0.08, 0.05, 0.08, (230, 60, 50))
    for x in (-0.52, 0.52):
        c.ellipse(x, 0.36, 0.23, 0.23, (34, 34, 38))
        c.ellipse(x, 0.36, 0.11, 0.11, (190, 194, 200))


def _hammer(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    with c.frame(0, 0, 1, 30):
        c.rect(-0.09, -0.5, 0.09, 0.95, k, 0.07)
        c.rect(-0.08, 0.5, 0.08, 0.92, dark(k, 0.3), 0.06)
        c.rect(-0.2, -0.86, 0.3, -0.48, (120, 124, 132), 0.05)
        c.rect(0.28, -0.9, 0.56, -0.44, (150, 154, 162), 0.05)
        c.blob([(-0.16, -0.84), (-0.4, -0.8), (-0.68, -0.56), (-0.42, -0.6), (-0.16, -0.54)],
               (120, 124, 132))  # fmt: skip


def _cup(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.arc(0.5, 0.02, 0.3, 0.32, -90, 90, 0.13, dark(k, 0.1))
    c.poly([(-0.62, -0.5), (0.58, -0.5), (0.46, 0.62), (-0.5, 0.62)], k)
    c.ellipse(-0.02, 0.62, 0.48, 0.12, k)
    c.ellipse(-0.02, -0.5, 0.6, 0.16, light(k, 0.3))
    c.ellipse(-0.02, -0.48, 0.52, 0.12, (84, 52, 32))
    for x in (-0.25, 0.1):
        c.curve([(x, -0.62), (x + 0.08, -0.74), (x - 0.02, -0.84), (x + 0.06, -0.95)], 0.03,
                (226, 226, 230))  # fmt: skip


def _chair(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    leg = dark(k, 0.35)
    c.line([(-0.4, 0.1), (-0.5, 0.92)], 0.1, leg)
    c.line([(0.5, 0.1), (0.6, 0.92)], 0.1, leg)
    c.line([(-0.2, 0.0), (-0.24, 0.72)], 0.08, dark(leg, 0.2))
    c.line([(0.34, 0.0), (0.38, 0.72)], 0.08, dark(leg, 0.2))
    c.line([(-0.42, 0.1), (-0.5, -0.9)], 0.1, leg)
    c.line([(0.22, 0.0), (0.18, -0.92)], 0.1, leg)
    for y in (-0.78, -0.5, -0.22):
        c.line([(-0.48, y), (0.18, y - 0.04)], 0.13, k)
    c.poly([(-0.5, 0.02), (0.26, -0.08), (0.62, 0.12), (-0.42, 0.24)], k)
    c.poly([(-0.42, 0.24), (0.62, 0.12), (0.62, 0.22), (-0.42, 0.34)], dark(k, 0.2))


def _clock(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.ellipse(0, 0, 0.88, 0.88, k)
    c.ellipse(0, 0, 0.72, 0.72, (250, 248, 240))
    for i in range(12):
        a = np.radians(30 * i)
        inner = 0.54 if i % 3 == 0 else 0.6
        c.line([(inner * np.sin(a), inner * np.cos(a)), (0.66 * np.sin(a), 0.66 * np.cos(a))],
               0.05 if i % 3 == 0 else 0.03, (50, 50, 56))  # fmt: skip
    hour, minute = rng.uniform(0, 2 * np.pi, 2)
    c.line([(0, 0), (0.34 * np.sin(hour), -0.34 * np.cos(hour))], 0.08, (30, 30, 34))
    c.line([(0, 0), (0.52 * np.sin(minute), -0.52 * np.cos(minute))], 0.05, (30, 30, 34))
    c.ellipse(0, 0, 0.06, 0.06, (200, 50, 50))


def _umbrella(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.line([(0, -0.8), (0, 0.7)], 0.06, (96, 70, 48))
    c.arc(0.13, 0.7, 0.13, 0.18, 0, 180, 0.07, (96, 70, 48))
    c.ellipse(0, 0.0, 0.92, 0.76, k, start=180, stop=360)
    c.ellipse(0, 0.0, 0.32, 0.76, light(k, 0.25), start=180, stop=360)
    for x in (-0.62, 0.0, 0.62):
        c.ellipse(x, 0.0, 0.31, 0.1, dark(k, 0.3), start=0, stop=180)
    c.line([(0, -0.76), (0, -0.9)], 0.05, (60, 60, 66))


def _key(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    with c.frame(0, 0, 1, -25):
        c.ring(-0.56, 0, 0.28, 0.16, k)
        c.line([(-0.28, 0), (0.85, 0)], 0.14, k)
        for x, h in ((0.5, 0.26), (0.68, 0.2), (0.84, 0.3)):
            c.line([(x, 0), (x, h)], 0.11, k)


def _bicycle(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    for x in (-0.55, 0.55):
        c.ring(x, 0.32, 0.36, 0.06, (40, 40, 46))
        for a in np.radians(np.arange(0, 180, 45)):
            d = (0.34 * np.cos(a), 0.34 * np.sin(a))
            c.line([(x - d[0], 0.32 - d[1]), (x + d[0], 0.32 + d[1])], 0.012, (130, 132, 138))
    frame = 0.075
    c.line([(-0.55, 0.32), (-0.2, -0.28), (0.36, -0.28), (0.0, 0.32), (-0.55, 0.32)], frame, k)
    c.line([(0.0, 0.32), (-0.24, -0.4)], frame, k)
    c.line([(0.55, 0.32), (0.32, -0.48)], frame, k)
    c.line([(0.32, -0.48), (0.5, -0.56), (0.58, -0.46)], 0.06, (40, 40, 46))
    c.line([(-0.38, -0.44), (-0.12, -0.42)], 0.1, (40, 34, 32))
    c.ellipse(0.0, 0.34, 0.09, 0.09, (90, 92, 98))


def _lamp(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.line([(0, -0.1), (0, 0.76)], 0.09, (120, 116, 108))
    c.ellipse(0, 0.8, 0.4, 0.12, (104, 100, 94))
    c.ellipse(0, -0.1, 0.58, 0.13, (255, 240, 180))
    c.poly([(-0.3, -0.86), (0.3, -0.86), (0.62, -0.1), (-0.62, -0.1)], k)
    c.poly([(-0.08, -0.86), (0.08, -0.86), (0.18, -0.1), (-0.18, -0.1)], light(k, 0.35))


def _book(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    with c.frame(0, 0, 1, -8):
        c.rect(-0.6, -0.8, 0.68, 0.86, dark(k, 0.35), 0.04)
        c.rect(-0.54, -0.74, 0.72, 0.8, (244, 238, 222), 0.02)
        c.rect(-0.66, -0.84, 0.58, 0.78, k, 0.04)
        c.rect(-0.66, -0.84, -0.5, 0.78, dark(k, 0.25), 0.02)
        c.ellipse(0.04, -0.1, 0.28, 0.3, light(k, 0.5))
        c.ellipse(0.04, -0.1, 0.2, 0.22, k)


def _bottle(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.blob([(-0.12, -0.7), (0.12, -0.7), (0.14, -0.36), (0.34, -0.1), (0.34, 0.84), (0, 0.92),
            (-0.34, 0.84), (-0.34, -0.1), (-0.14, -0.36)], k)  # fmt: skip
    c.rect(-0.13, -0.92, 0.13, -0.68, dark(k, 0.45), 0.04)
    c.rect(-0.34, 0.1, 0.34, 0.56, (246, 240, 224))
    c.ellipse(0, 0.33, 0.14, 0.14, mix(k, (246, 240, 224), 0.3))
    c.line([(-0.22, -0.06), (-0.22, 0.02)], 0.06, light(k, 0.6))


def _ball(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    turn = int(rng.integers(60))
    for i in range(6):
        edge = np.radians(np.linspace(turn + 60 * i, turn + 60 * i + 60, 12))
        tone = k if i % 2 == 0 else (246, 246, 244)
        c.poly([(0, 0), *zip(0.85 * np.cos(edge), 0.85 * np.sin(edge), strict=True)], tone)
    c.ellipse(0, 0, 0.14, 0.14, dark(k, 0.1))


def _guitar(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    with c.frame(0, 0, 1, 35):
        c.rect(-0.07, -0.9, 0.07, 0.2, (84, 54, 36))
        c.rect(-0.12, -1.05, 0.12, -0.82, (60, 40, 30), 0.03)
        c.blob([(-0.2, 0.02), (0.2, 0.02), (0.3, 0.2), (0.24, 0.38), (0.46, 0.66), (0.3, 0.95),
                (-0.3, 0.95), (-0.46, 0.66), (-0.24, 0.38), (-0.3, 0.2)], k)  # fmt: skip
        c.ellipse(0, 0.4, 0.15, 0.15, (44, 30, 24))
        c.rect(-0.16, 0.7, 0.16, 0.76, (60, 40, 30))
        for x in (-0.04, 0.0, 0.04):
            c.line([(x, -0.9), (x, 0.72)], 0.01, (230, 226, 214))


def _pan(c: Canvas, k: Colour, rng: np.random.Generator) -> None:
    c.line([(0.4, -0.04), (1.0, -0.3)], 0.13, (44, 40, 40))
    c.rect(-0.72, -0.24, 0.5, 0.5, k, 0.14)
    c.ellipse(-0.11, -0.24, 0.62, 0.16, light(k, 0.3))
    c.ellipse(-0.11, -0.22, 0.54, 0.12, dark(k, 0.45))
    c.line([(-0.74, -0.06), (-0.88, -0.06), (-0.88, 0.08), (-0.74, 0.08)], 0.06, (44, 40, 40))


FOOD: dict[str, Thing] = {
    "apple": Thing(_apple, ("red", "green", "yellow")),
    "banana": Thing(_banana, ("yellow",)),
    "pizza": Thing(_pizza),
    "burger": Thing(_burger),
    "ice cream": Thing(_ice_cream, ("pink", "white", "brown", "green", "yellow"), "ice creams"),
    "cake": Thing(_cake, ("pink", "white", "brown", "purple", "blue")),
    "carrot": Thing(_carrot),
    "fried egg": Thing(_egg),
    "bunch of grapes": Thing(_grapes, ("purple", "green", "red"), "bunches of grapes"),
    "strawberry": Thing(_strawberry, (), "strawberries"),
    "donut": Thing(_donut, ("pink", "brown", "white", "purple")),
    "slice of watermelon": Thing(_watermelon, (), "slices of watermelon"),
}
OBJECTS: dict[str, Thing] = {
    "car": Thing(_car, _PAINT),
    "hammer": Thing(_hammer, ("brown", "red", "yellow", "blue")),
    "cup": Thing(_cup, _PAINT),
    "chair": Thing(_chair, ("brown", "red", "blue", "green", "white", "black", "yellow")),
    "clock": Thing(_clock, _PAINT),
    "umbrella": Thing(_umbrella, _PAINT),
    "key": Thing(_key, ("yellow", "grey", "brown", "black")),
    "bicycle": Thing(_bicycle, ("red", "blue", "green", "yellow", "purple", "black")),
    "lamp": Thing(_lamp, ("red", "yellow", "green", "blue", "pink", "white", "purple")),
    "book": Thing(_book, _PAINT),
    "bottle": Thing(_bottle, ("green", "brown", "blue", "white", "red")),
    "ball": Thing(_ball, ("red", "blue", "green", "yellow", "purple", "orange", "pink")),
    "guitar": Thing(_guitar, ("brown", "red", "black", "blue", "yellow")),
    "saucepan": Thing(_pan, ("grey", "red", "blue", "black", "green")),
}
