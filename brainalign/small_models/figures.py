"""People with faces, and bodies and limbs without."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .canvas import Canvas, Colour, dark, light, mix

__all__ = ["BODIES", "HAIR", "PEOPLE", "SKIN", "Look", "body", "person", "portrait"]

SKIN: dict[str, Colour] = {
    "pale": (246, 214, 190),
    "light": (232, 186, 152),
    "tanned": (204, 150, 108),
    "brown": (156, 104, 70),
    "dark": (104, 68, 48),
}
HAIR: dict[str, Colour] = {
    "black": (36, 30, 30),
    "brown": (98, 62, 36),
    "blond": (226, 188, 104),
    "red": (182, 78, 36),
    "grey": (176, 176, 178),
}
PEOPLE = ("man", "woman", "boy", "girl", "old man", "old woman")
BODIES = ("torso", "headless body", "arm", "hand", "leg", "foot")
POSES = ("standing", "running", "dancing", "waving")


@dataclass
class Look:
    """How a person looks; colours by value, styles by name."""

    kind: str = "man"
    skin: Colour = SKIN["light"]
    hair: Colour = HAIR["brown"]
    style: str = "short"  # short, long, bun, curly, bald
    shirt: Colour = (60, 100, 180)
    trousers: Colour = (60, 66, 96)
    expression: str = "neutral"  # smiling, neutral, surprised
    glasses: bool = False
    hat: bool = False
    beard: bool = False
    pose: str = "standing"
    eyes: Colour = field(default=(86, 62, 44))


def _hair_behind(c: Canvas, look: Look) -> None:
    if look.style == "long":
        c.blob(
            [
                (-0.52, -0.35),
                (-0.3, -0.82),
                (0.3, -0.82),
                (0.52, -0.35),
                (0.56, 0.3),
                (0.5, 0.62),
                (0.25, 0.5),
                (-0.25, 0.5),
                (-0.5, 0.62),
                (-0.56, 0.3),
            ],
            dark(look.hair, 0.15),
        )
    elif look.style == "bun":
        c.ellipse(0, -0.88, 0.2, 0.18, dark(look.hair, 0.1))
    elif look.style == "curly":
        for angle in np.linspace(160, 380, 11):
            a = np.radians(angle)
            c.ellipse(0.47 * np.cos(a), -0.25 + 0.5 * np.sin(a), 0.17, 0.17, dark(look.hair, 0.1))


def _hair_front(c: Canvas, look: Look) -> None:
    if look.style == "bald":
        return
    top = [
        (-0.46, -0.22),
        (-0.46, -0.52),
        (-0.28, -0.8),
        (0, -0.87),
        (0.28, -0.8),
        (0.46, -0.52),
        (0.46, -0.22),
    ]
    if look.style in ("long", "bun"):
        c.blob([*top, (0.36, -0.45), (0.1, -0.62), (-0.05, -0.62), (-0.36, -0.4)], look.hair)
    elif look.style == "curly":
        for angle in np.linspace(190, 350, 8):
            a = np.radians(angle)
            c.ellipse(0.36 * np.cos(a), -0.34 + 0.38 * np.sin(a), 0.14, 0.14, look.hair)
    else:
        c.blob([*top, (0.4, -0.46), (0.2, -0.56), (-0.1, -0.52), (-0.38, -0.5)], look.hair)


def head(c: Canvas, look: Look) -> None:
    """Draw a head with its face; it fills about x -0.5..0.5, y -0.9..0.45 of the frame."""
    skin, shade = look.skin, dark(look.skin, 0.18)
    _hair_behind(c, look)
    c.ellipse(-0.45, -0.12, 0.09, 0.14, shade)
    c.ellipse(0.45, -0.12, 0.09, 0.14, shade)
    jaw = 0.3 if "man" in look.kind and "woman" not in look.kind else 0.24
    c.blob(
        [
            (-0.44, -0.3),
            (-0.34, -0.68),
            (0, -0.8),
            (0.34, -0.68),
            (0.44, -0.3),
            (0.41, 0.08),
            (jaw, 0.34),
            (0, 0.44),
            (-jaw, 0.34),
            (-0.41, 0.08),
        ],
        skin,
    )
    if look.beard:
        c.blob(
            [
                (-0.42, -0.02),
                (-0.3, 0.14),
                (0, 0.1),
                (0.3, 0.14),
                (0.42, -0.02),
                (0.38, 0.3),
                (0.2, 0.5),
                (0, 0.55),
                (-0.2, 0.5),
                (-0.38, 0.3),
            ],
            look.hair,
        )
    c.ellipse(-0.27, 0.08, 0.09, 0.06, mix(skin, (226, 110, 100), 0.25))
    c.ellipse(0.27, 0.08, 0.09, 0.06, mix(skin, (226, 110, 100), 0.25))
    wide = 0.1 if look.expression == "surprised" else 0.075
    for x in (-0.19, 0.19):
        c.ellipse(x, -0.16, 0.11, wide, (250, 250, 248))
        c.ellipse(x, -0.16, 0.062, 0.066, look.eyes)
        c.ellipse(x, -0.16, 0.032, 0.036, (16, 14, 14))
        c.ellipse(x + 0.022, -0.185, 0.016, 0.016, (255, 255, 255))
        lift = -0.36 if look.expression == "surprised" else -0.3
        outer = x + 0.12 * np.sign(x)
        inner = x - 0.1 * np.sign(x)
        brow = dark(look.hair, 0.25)
        c.curve([(inner, lift), (x, lift - 0.04), (outer, lift + 0.02)], 0.045, brow)
        if "woman" in look.kind or look.kind == "girl":
            c.curve([(inner, -0.2), (x, -0.25), (outer, -0.2)], 0.03, (30, 24, 24))
    c.curve([(0.01, -0.12), (0.06, 0.04), (-0.03, 0.07)], 0.035, shade)
    lips = (178, 66, 72) if "woman" in look.kind else mix(skin, (150, 60, 56), 0.6)
    if look.expression == "smiling":
        c.ellipse(0, 0.17, 0.19, 0.13, (122, 34, 40), start=0, stop=180)
        c.ellipse(0, 0.175, 0.16, 0.06, (250, 248, 244), start=0, stop=180)
        c.arc(0, 0.17, 0.19, 0.13, 0, 180, 0.03, lips)
    elif look.expression == "surprised":
        c.ellipse(0, 0.24, 0.09, 0.12, lips)
        c.ellipse(0, 0.24, 0.06, 0.085, (92, 26, 32))
    else:
        c.curve([(-0.14, 0.22), (0, 0.235), (0.14, 0.22)], 0.05, lips)
    _hair_front(c, look)
    if look.kind.startswith("old"):
        for x in (-1, 1):
            c.curve([(x * 0.17, 0.1), (x * 0.24, 0.18), (x * 0.24, 0.26)], 0.02, shade)
            c.curve([(x * 0.2, -0.04), (x * 0.28, -0.06)], 0.02, shade)
        c.curve([(-0.2, -0.46), (0, -0.48), (0.2, -0.46)], 0.02, shade)
    if look.glasses:
        for x in (-0.2, 0.2):
            c.ring(x, -0.16, 0.155, 0.035, (30, 30, 36))
        c.line([(-0.05, -0.17), (0.05, -0.17)], 0.035, (30, 30, 36))
    if look.hat:
        tone = dark(look.shirt, 0.25)
        c.blob([(-0.45, -0.5), (-0.4, -0.98), (0, -1.06), (0.4, -0.98), (0.45, -0.5)], tone)
        c.ellipse(0, -0.52, 0.68, 0.1, tone)
        c.rect(-0.44, -0.64, 0.44, -0.54, light(look.shirt, 0.35))


def portrait(c: Canvas, look: Look) -> None:
    """Draw head and shoulders."""
    if look.style == "long":
        with c.frame(0, 0):
            _hair_behind(c, look)
    width = 0.78 if "man" in look.kind and "woman" not in look.kind else 0.66
    c.blob(
        [
            (-width, 1.25),
            (-width, 0.82),
            (-0.4, 0.6),
            (0, 0.56),
            (0.4, 0.6),
            (width, 0.82),
            (width, 1.25),
        ],
        look.shirt,
    )
    neck = dark(look.skin, 0.12)
    c.rect(-0.17, 0.2, 0.17, 0.66, neck, 0.06)
    c.ellipse(0, 0.62, 0.2, 0.12, neck)
    c.curve([(-0.24, 0.58), (0, 0.8), (0.24, 0.58)], 0.05, dark(look.shirt, 0.25))
    head(c, look)


# Of each pose: shoulder, elbow, wrist of both arms, then hip, knee, ankle of both legs.
_LIMBS = ("left arm", "right arm", "left leg", "right leg")
_JOINTS: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "standing": (
        ((-0.2, -0.42), (-0.27, -0.12), (-0.26, 0.14)),
        ((0.2, -0.42), (0.27, -0.12), (0.26, 0.14)),
        ((-0.1, 0.12), (-0.11, 0.5), (-0.12, 0.88)),
        ((0.1, 0.12), (0.11, 0.5), (0.12, 0.88)),
    ),
    "running": (
        ((-0.18, -0.42), (-0.36, -0.2), (-0.2, -0.02)),
        ((0.18, -0.42), (0.34, -0.18), (0.5, -0.36)),
        ((-0.08, 0.12), (-0.2, 0.46), (-0.52, 0.56)),
        ((0.08, 0.12), (0.34, 0.36), (0.24, 0.8)),
    ),
    "dancing": (
        ((-0.2, -0.42), (-0.46, -0.5), (-0.52, -0.82)),
        ((0.2, -0.42), (0.48, -0.34), (0.6, -0.62)),
        ((-0.1, 0.12), (-0.3, 0.44), (-0.34, 0.86)),
        ((0.1, 0.12), (0.38, 0.34), (0.26, 0.66)),
    ),
    "waving": (
        ((-0.2, -0.42), (-0.28, -0.12), (-0.26, 0.14)),
        ((0.2, -0.42), (0.44, -0.52), (0.44, -0.86)),
        ((-0.1, 0.12), (-0.13, 0.5), (-0.15, 0.88)),
        ((0.1, 0.12), (0.12, 0.5), (0.14, 0.88)),
    ),
}


def figure(c: Canvas, look: Look) -> None:
    """Draw a whole body from the neck down, y -0.6 to 0.95 of the frame."""
    joints = dict(zip(_LIMBS, _JOINTS[look.pose], strict=True))
    skirt = look.kind in ("woman", "girl", "old woman") and look.style in ("long", "bun")
    leg_tone = look.skin if skirt else look.trousers
    for side in ("left", "right"):
        hip, knee, ankle = joints[f"{side} leg"]
        c.line([hip, knee], 0.17, leg_tone)
        c.line([knee, ankle], 0.13, leg_tone)
        toe = 0.07 if ankle[0] > 0 or look.pose == "running" else -0.07
        c.line([(ankle[0], ankle[1] + 0.04), (ankle[0] + toe, ankle[1] + 0.05)], 0.1, (48, 38, 36))
    c.rect(-0.07, -0.6, 0.07, -0.4, dark(look.skin, 0.12), 0.03)
    c.blob(
        [
            (-0.25, -0.46),
            (0, -0.5),
            (0.25, -0.46),
            (0.23, -0.2),
            (0.17, 0.0),
            (0.19, 0.2),
            (0, 0.23),
            (-0.19, 0.2),
            (-0.17, 0.0),
            (-0.23, -0.2),
        ],
        look.shirt,
    )
    if skirt:
        c.poly(
            [(-0.18, 0.08), (0.18, 0.08), (0.34, 0.52), (-0.34, 0.52)], dark(look.trousers, 0.05)
        )
    else:
        c.rect(-0.19, 0.1, 0.19, 0.24, look.trousers, 0.05)
    for side in ("left", "right"):
        shoulder, elbow, wrist = joints[f"{side} arm"]
        c.line([elbow, wrist], 0.085, look.skin)
        c.ellipse(*wrist, 0.06, 0.065, look.skin)
        c.line([shoulder, elbow], 0.12, dark(look.shirt, 0.08))


def person(c: Canvas, look: Look) -> None:
    """Draw a person from head to toe."""
    if look.style == "long":
        with c.frame(0, -0.68, 0.36):
            _hair_behind(c, look)
    figure(c, look)
    with c.frame(0, -0.68, 0.36):
        head(c, look)


def _hand(c: Canvas, skin: Colour, gesture: str) -> None:
    shade = dark(skin, 0.2)
    c.rect(-0.2, 0.35, 0.2, 1.1, skin, 0.1)
    fingers = {
        "open": ((-0.27, -0.62), (-0.1, -0.8), (0.1, -0.78), (0.28, -0.58)),
        "pointing": ((-0.27, 0.0), (-0.1, -0.02), (0.1, 0.0), (0.28, -0.72)),
        "victory": ((-0.27, 0.02), (-0.1, 0.0), (0.06, -0.78), (0.42, -0.7)),
    }[gesture]
    for i, (x, y) in enumerate(fingers):
        base = -0.26 + 0.175 * i
        c.line([(base, 0.1), (x, y)], 0.16, skin)
        if y < -0.3:
            c.line([(x - 0.03, y - 0.02), (x + 0.03, y - 0.02)], 0.06, light(skin, 0.45))
    c.blob([(-0.36, 0.0), (0, -0.06), (0.36, 0.0), (0.34, 0.4), (0.18, 0.6), (-0.18, 0.6),
            (-0.34, 0.4)], skin)  # fmt: skip
    thumb = (0.66, -0.06) if gesture == "open" else (0.24, 0.22)
    c.line([(0.26, 0.42), ((0.26 + thumb[0]) / 2 + 0.06, 0.24), thumb], 0.17, skin)
    if gesture != "open":
        for i in range(3 if gesture == "pointing" else 2):
            c.arc(-0.26 + 0.175 * i, 0.06, 0.08, 0.1, 0, 180, 0.03, shade)
    c.curve([(-0.22, 0.24), (0, 0.16), (0.2, 0.22)], 0.025, shade)
    c.curve([(-0.18, 0.4), (0, 0.32), (0.1, 0.42)], 0.025, shade)


def body(c: Canvas, kind: str, look: Look, variant: str) -> None:
    """Draw a body or a part of one, never with a head.

    Parameters
    ----------
    c : Canvas
        Where to draw.
    kind : str
        One of `BODIES`.
    look : Look
        Skin and clothes; the pose of a headless body.
    variant : str
        Gesture of a hand ("open", "pointing", "victory"), "bare" or "clothed" otherwise.
    """
    skin, shade = look.skin, dark(look.skin, 0.2)
    bare = variant == "bare"
    if kind == "headless body":
        figure(c, look)
    elif kind == "torso":
        cloth = skin if bare else look.shirt
        c.rect(-0.15, -0.95, 0.15, -0.6, skin, 0.05)
        for s in (-1, 1):
            c.line([(s * 0.58, -0.48), (s * 0.72, 0.1), (s * 0.66, 0.62)], 0.2, skin)
            if not bare:
                c.line([(s * 0.56, -0.48), (s * 0.66, -0.12)], 0.27, dark(cloth, 0.08))
        c.blob(
            [
                (-0.6, -0.58),
                (-0.2, -0.7),
                (0.2, -0.7),
                (0.6, -0.58),
                (0.54, -0.1),
                (0.4, 0.3),
                (0.46, 0.75),
                (-0.46, 0.75),
                (-0.4, 0.3),
                (-0.54, -0.1),
            ],
            cloth,
        )
        c.rect(-0.47, 0.62, 0.47, 1.05, look.trousers, 0.06)
        if bare:
            c.curve([(-0.42, -0.22), (-0.2, -0.1), (-0.03, -0.2)], 0.03, shade)
            c.curve([(0.42, -0.22), (0.2, -0.1), (0.03, -0.2)], 0.03, shade)
            c.line([(0, -0.2), (0, 0.4)], 0.025, shade)
            c.ellipse(0, 0.46, 0.03, 0.04, shade)
            for s in (-1, 1):
                c.ellipse(s * 0.25, -0.2, 0.04, 0.035, mix(skin, (120, 50, 50), 0.5))
        else:
            c.curve([(-0.2, -0.7), (0, -0.52), (0.2, -0.7)], 0.06, dark(cloth, 0.3))
            c.line([(0, -0.5), (0, 0.6)], 0.025, dark(cloth, 0.25))
            for y in (-0.3, 0.0, 0.3):
                c.ellipse(0.0, y, 0.03, 0.03, light(cloth, 0.6))
    elif kind == "arm":
        c.line([(-0.95, 0.55), (-0.1, 0.5)], 0.36, skin)
        c.line([(-0.1, 0.5), (0.3, -0.4)], 0.27, skin)
        c.ellipse(-0.42, 0.38, 0.28, 0.16, skin)
        if not bare:
            c.line([(-1.0, 0.55), (-0.5, 0.53)], 0.46, look.shirt)
            c.line([(-0.4, 0.32), (-0.4, 0.74)], 0.07, dark(look.shirt, 0.2))
        with c.frame(0.42, -0.66, 0.42, 22):
            _hand(c, skin, "open")
        c.curve([(-0.2, 0.36), (-0.08, 0.32), (0, 0.24)], 0.03, shade)
    elif kind == "hand":
        _hand(c, skin, variant)
    elif kind == "leg":
        c.line([(-0.28, -0.95), (0.12, -0.05)], 0.46, skin)
        c.line([(0.12, -0.05), (-0.18, 0.72)], 0.3, skin)
        c.ellipse(-0.1, 0.25, 0.2, 0.3, skin, rotation=20)
        c.blob([(-0.32, 0.66), (0.0, 0.66), (0.16, 0.78), (0.42, 0.86), (0.42, 0.96), (-0.3, 0.96)],
               skin)  # fmt: skip
        if not bare:
            c.poly([(-0.62, -1.05), (0.06, -1.05), (0.3, -0.42), (-0.22, -0.24)], look.trousers)
        c.arc(0.14, -0.08, 0.13, 0.11, -60, 120, 0.03, shade)
        for x in (0.3, 0.36):
            c.line([(x, 0.9), (x + 0.05, 0.9)], 0.02, shade)
    elif kind == "foot":
        if not bare:
            c.rect(-0.56, -1.1, 0.02, -0.55, look.trousers, 0.05)
        c.blob(
            [
                (-0.48, -0.95),
                (-0.08, -0.95),
                (-0.04, -0.2),
                (0.25, 0.1),
                (0.7, 0.24),
                (0.92, 0.42),
                (0.84, 0.56),
                (0.2, 0.56),
                (-0.4, 0.56),
                (-0.62, 0.36),
                (-0.5, -0.1),
            ],
            skin,
        )
        for i in range(5):
            x, r = 0.88 - 0.15 * i, 0.105 - 0.011 * i
            c.ellipse(x, 0.46 - 0.005 * i, r, r, skin)
            c.ellipse(x + 0.015, 0.41, r * 0.45, r * 0.32, light(skin, 0.5))
            c.arc(x - r, 0.47, 0.02, 0.07, 0, 360, 0.015, shade)
        c.arc(-0.3, -0.02, 0.11, 0.12, 150, 330, 0.03, shade)
        c.curve([(-0.1, 0.5), (0.2, 0.4), (0.45, 0.5)], 0.025, shade)
        if not bare:
            c.rect(-0.6, -1.1, 0.04, -0.5, look.trousers, 0.05)
    else:
        raise KeyError(kind)
