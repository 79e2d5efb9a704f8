"""A drawing surface with nested frames: shapes are given in unit coordinates, y down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

__all__ = ["Canvas", "Colour", "compose", "mix"]

Colour = tuple[int, int, int]
Point = tuple[float, float]


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return `a` moved by `share` (0..1) of the way to `b`."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def dark(colour: Colour, share: float = 0.3) -> Colour:
    """Return `colour` moved towards black."""
    return mix(colour, (0, 0, 0), share)


def light(colour: Colour, share: float = 0.35) -> Colour:
    """Return `colour` moved towards white."""
    return mix(colour, (255, 255, 255), share)


def _smooth(points: Sequence[Point], *, closed: bool, steps: int = 8) -> list[Point]:
    """Sample a Catmull-Rom curve through `points`."""
    p = np.asarray(points, float)
    p = np.vstack([p[-1:], p, p[:2]]) if closed else np.vstack([p[:1], p, p[-1:]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    parts = []
    for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True):
        parts.append(
            0.5
            * (
                2 * b
                + (c - a) * t
                + (2 * a - 5 * b + 4 * c - d) * t**2
                + (3 * b - a - 3 * c + d) * t**3
            )
        )
    if not closed:
        parts.append(p[-2][None])
    return [(x, y) for x, y in np.vstack(parts).tolist()]


class Canvas:
    """A square RGBA layer on which shapes are drawn in the coordinates of the current frame.

    The outermost frame spans [-1, 1] x [-1, 1] with y pointing down.

    Parameters
    ----------
    side : int
        Side of the layer in pixels.
    image : PIL.Image.Image, optional
        Draw on this RGBA picture rather than on an empty layer.
    """

    def __init__(self, side: int, image: Image.Image | None = None) -> None:
        self.side = side
        self.image = image or Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)
        half = side / 2
        self._matrix = np.array([[half, 0, half], [0, half, half], [0, 0, 1.0]])

    @contextmanager
    def frame(
        self,
        x: float = 0.0,
        y: float = 0.0,
        scale: float = 1.0,
        rotation: float = 0.0,
        *,
        flip: bool = False,
    ) -> Iterator[Canvas]:
        """Draw in a frame moved by (x, y), scaled, turned by `rotation` degrees and mirrored."""
        before = self._matrix
        c, s = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
        sx = -scale if flip else scale
        self._matrix = before @ np.array(
            [[c * sx, -s * scale, x], [s * sx, c * scale, y], [0, 0, 1.0]]
        )
        try:
            yield self
        finally:
            self._matrix = before

    def _map(self, points: Sequence[Point]) -> list[Point]:
        p = np.asarray(points, float) @ self._matrix[:2, :2].T + self._matrix[:2, 2]
        return [(x, y) for x, y in p.tolist()]

    @property
    def _unit(self) -> float:
        return math.sqrt(abs(np.linalg.det(self._matrix[:2, :2])))

    def poly(self, points: Sequence[Point], fill: Colour) -> None:
        """Fill a polygon."""
        self._draw.polygon(self._map(points), fill=fill)

    def blob(self, points: Sequence[Point], fill: Colour) -> None:
        """Fill the smooth closed curve through `points`."""
        self._draw.polygon(self._map(_smooth(points, closed=True)), fill=fill)

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        fill: Colour,
        *,
        start: float = 0.0,
        stop: float = 360.0,
        rotation: float = 0.0,
    ) -> None:
        """Fill an ellipse, or the part of it from angle `start` to `stop` (degrees, clockwise)."""
        angle = np.radians(np.linspace(start, stop, 41))
        c, s = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
        ex, ey = rx * np.cos(angle), ry * np.sin(angle)
        self.poly(list(zip(x + c * ex - s * ey, y + s * ex + c * ey, strict=True)), fill)

    def rect(
        self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0.0
    ) -> None:
        """Fill a rectangle with corners rounded by `radius`."""
        r = min(radius, (x1 - x0) / 2, (y1 - y0) / 2)
        if r <= 0:
            self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)
            return
        points: list[Point] = []
        for cx, cy, start in (
            (x1 - r, y0 + r, -90),
            (x1 - r, y1 - r, 0),
            (x0 + r, y1 - r, 90),
            (x0 + r, y0 + r, 180),
        ):
            for angle in np.radians(np.linspace(start, start + 90, 7)):
                points.append((cx + r * math.cos(angle), cy + r * math.sin(angle)))
        self.poly(points, fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """Draw a poly-line with round ends and joints; `width` in frame units."""
        mapped = self._map(points)
        w = max(1.0, width * self._unit)
        self._draw.line(mapped, fill=fill, width=max(1, round(w)), joint="curve")
        for x, y in mapped:
            self._draw.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=fill)

    def curve(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """Draw a smooth open curve through `points`."""
        self.line(_smooth(points, closed=False), width, fill)

    def arc(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        start: float,
        stop: float,
        width: float,
        fill: Colour,
    ) -> None:
        """Draw the arc of an ellipse from angle `start` to `stop` (degrees, clockwise)."""
        angle = np.radians(np.linspace(start, stop, 31))
        self.line(
            list(zip(x + rx * np.cos(angle), y + ry * np.sin(angle), strict=True)), width, fill
        )

    def ring(self, x: float, y: float, r: float, width: float, fill: Colour) -> None:
        """Draw a circle's outline."""
        self.arc(x, y, r, r, 0, 360, width, fill)

    def text(
        self,
        text: str,
        width: float,
        height: float,
        fill: Colour,
        *,
        stroke: float = 0.0,
        shear: float = 0.0,
    ) -> None:
        """Write one line centred on the frame's origin, as large as `width` x `height` allow.

        Parameters
        ----------
        text : str
            What is written.
        width, height : float
            The box the letters must fit in, in frame units.
        fill : tuple of int
            Colour of the letters.
        stroke : float
            Thickening, as a share of the letters' height.
        shear : float
            Slant: 0 is upright, 0.3 like italics.
        """
        pixels = 96
        font = ImageFont.load_default(pixels)
        weight = round(stroke * pixels)
        left, top, right, bottom = map(round, font.getbbox(text, stroke_width=weight))
        w, h = right - left + 2, bottom - top + 2
        mask = Image.new("L", (w, h), 0)
        ImageDraw.Draw(mask).text(
            (1 - left, 1 - top), text, fill=255, font=font, stroke_width=weight
        )
        scale = min(width / w, height / h)
        local = np.array([[scale, -shear * scale, 0], [0, scale, 0], [0, 0, 1.0]]) @ np.array(
            [[1, 0, -w / 2], [0, 1, -h / 2], [0, 0, 1.0]]
        )
        inverse = np.linalg.inv(self._matrix @ local)
        shrink = max(1, int(1 / (scale * self._unit)))
        if shrink > 1:  # the affine map below takes one sample a pixel: avoid aliasing
            mask = mask.resize((max(1, w // shrink), max(1, h // shrink)), Image.Resampling.BOX)
            inverse = np.diag([mask.width / w, mask.height / h, 1.0]) @ inverse
        placed = mask.transform(
            (self.side, self.side),
            Image.Transform.AFFINE,
            tuple(inverse[:2].ravel().tolist()),
            resample=Image.Resampling.BILINEAR,
        )
        self.image.paste((*fill, 255), (0, 0), placed)


def compose(
    background: Image.Image,
    layer: Image.Image,
    towards_light: Point,
    *,
    shadow: float = 0.45,
    relief: float = 0.5,
) -> Image.Image:
    """Lay `layer` on `background` with a cast shadow and a soft relief lit from one side.

    Parameters
    ----------
    background : PIL.Image.Image
        RGB picture.
    layer : PIL.Image.Image
        RGBA picture of the same size.
    towards_light : tuple of float
        Direction in which the light stands, x right and y down, of about unit length.
    shadow, relief : float
        Strength of the shadow and of the relief; 0 is none.
    """
    side = background.width
    alpha = layer.getchannel("A")
    height = np.asarray(alpha.filter(ImageFilter.BoxBlur(side * 0.05)), np.float32) / 255
    gy, gx = np.gradient(height)
    slope = np.asarray(-(gx * towards_light[0] + gy * towards_light[1]) * side * 0.1)
    shade = 1 + relief * np.clip(slope, -0.9, 0.6)
    rgb = np.asarray(layer.convert("RGB"), np.float32) * shade[..., None]
    lit = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    out = background.copy()
    if shadow > 0:
        cast = Image.new("L", alpha.size, 0)
        offset = (round(-towards_light[0] * side * 0.03), round(-towards_light[1] * side * 0.03))
        cast.paste(alpha, offset)
        cast = cast.filter(ImageFilter.GaussianBlur(side * 0.02)).point(lambda v: v * shadow)
        out.paste((0, 0, 0), (0, 0), cast)
    out.paste(lit, (0, 0), alpha)
    return out
