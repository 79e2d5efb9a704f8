"""A renderer of small scenes with captions: people, bodies, places, words, food and objects.

Every scene follows from ``(seed, index)`` alone, so any subset of a set can be rendered again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from brainalign.errors import ConfigError, UnknownNameError, near

from .backgrounds import BACKGROUNDS, field, paint
from .canvas import Canvas, Colour, compose, dark, light, mix
from .figures import BODIES, HAIR, PEOPLE, POSES, SKIN, Look, body, person, portrait
from .places import MOMENTS, PLACES, place
from .things import COLOURS, FOOD, OBJECTS, Thing

if TYPE_CHECKING:
    from brainalign.data.stimuli import StimulusSet

__all__ = [
    "CATEGORIES",
    "SUBCATEGORIES",
    "Scene",
    "captions",
    "name_of",
    "render_scene",
    "render_scenes",
    "write_scenes",
]

CATEGORIES = ("people", "bodies", "places", "words", "food", "objects")
SUBCATEGORIES: dict[str, tuple[str, ...]] = {
    "people": PEOPLE,
    "bodies": BODIES,
    "places": PLACES,
    "words": ("word", "letters", "number", "sign", "page of text"),
    "food": tuple(FOOD),
    "objects": tuple(OBJECTS),
}
_WORDS = (
    "APPLE OCEAN TIGER PIANO RIVER CLOUD STONE BREAD LIGHT MUSIC PAPER HORSE TRAIN WATER GREEN "
    "HOUSE NIGHT DREAM SUGAR CHAIR PLANT SMILE BRAIN VOICE EARTH WORLD MAGIC LEMON SHIP BIRD "
    "TREE MOON STAR FIRE SNOW WIND ROAD BOOK FISH LION DOOR HAND TIME LOVE OPEN STOP HELLO EXIT "
    "CAFE SHOP HOTEL BANK TAXI MARKET GARDEN WINTER SUMMER BRIDGE FLOWER ANIMAL PLANET SCHOOL"
).split()
_NUMBERS = {1: "one", 2: "two", 3: "three"}
_LIGHTS = ("soft", "bright", "dim", "warm", "cool")


@dataclass(frozen=True)
class Scene:
    """A rendered picture with what it shows.

    Attributes
    ----------
    image : numpy.ndarray of shape (size, size, 3), uint8
    caption : str
        A full sentence-like description.
    category, subcategory : str
        One of `CATEGORIES`, and one of its `SUBCATEGORIES`.
    attributes : dict
        What was varied: colour, number, position, background, light and the category's own.
    seed, index : int
        Where it stands in its set.
    """

    image: np.ndarray
    caption: str
    category: str
    subcategory: str
    attributes: dict[str, Any]
    seed: int
    index: int

    @property
    def stimulus_id(self) -> str:
        """A name unique to the scene's seed and index."""
        return f"scene-{self.seed}-{self.index:06d}"


def _pick(rng: np.random.Generator, names: Iterable[str]) -> str:
    names = list(names)
    return names[int(rng.integers(len(names)))]


def _jitter(rng: np.random.Generator, colour: Colour) -> Colour:
    moved = np.asarray(colour) + rng.normal(0, 9, 3)
    return tuple(int(v) for v in np.clip(moved, 0, 255))  # type: ignore[return-value]


def _shade(rng: np.random.Generator, colour: Colour) -> Colour:
    """Return the same hue, a little lighter or darker."""
    return mix(
        colour, (255, 240, 226) if rng.random() < 0.5 else (40, 20, 10), rng.uniform(0, 0.12)
    )


def _distant(colour: str) -> list[str]:
    """Return the backgrounds on which a thing of this colour name stands out."""
    clash = {
        "white": ("white", "sand", "stripes", "sky"), "black": ("dark",),
        "grey": ("grey", "stripes", "room", "pink"), "blue": ("blue", "sky"),
        "pink": ("pink", "stripes"), "yellow": ("yellow", "sand", "stripes"),
        "green": ("grass",), "brown": ("table", "bricks"), "red": ("bricks",),
        "orange": ("bricks", "table"),
    }  # fmt: skip
    return [b for b in BACKGROUNDS if b not in clash.get(colour, ())]


def _layout(rng: np.random.Generator, number: int, scale: float) -> tuple[str, list[Any]]:
    """Return the position's name and (x, y, scale, rotation, flip) for each of `number` things."""
    if number > 1:
        size = {2: 0.46, 3: 0.36}[number] * scale / 0.7
        xs: tuple[float, ...] = {2: (-0.48, 0.48), 3: (-0.6, 0.02, 0.6)}[number]
        ys = rng.uniform(-0.12, 0.2, number) if number == 2 else rng.uniform(-0.35, 0.4, number)
    else:
        size = scale
        shift = max(0.0, 0.86 - scale)
        name = _pick(rng, ("left", "right", "centre", "centre", "centre"))
        dx = {"left": -1, "right": 1, "centre": 0}[name] * min(0.42, shift)
        if abs(dx) < 0.2:
            name, dx = "centre", 0.0
        xs, ys = (dx,), np.array([rng.uniform(-0.3, 0.4) * shift])
    spots = [
        (x + rng.uniform(-0.05, 0.05), y, size * rng.uniform(0.93, 1.05), rng.normal(0, 7),
         bool(rng.random() < 0.5))
        for x, y in zip(xs, ys, strict=True)
    ]  # fmt: skip
    return (name if number == 1 else "row"), spots


def _things(
    kinds: dict[str, Thing], rng: np.random.Generator, side: int
) -> tuple[Canvas, dict[str, Any]]:
    kind = _pick(rng, kinds)
    thing = kinds[kind]
    colour = _pick(rng, thing.colours) if thing.colours else ""
    number = int(rng.choice([1, 2, 3], p=[0.68, 0.2, 0.12]))
    scale = rng.uniform(0.48, 0.86)
    position, spots = _layout(rng, number, scale if number == 1 else 0.7)
    c = Canvas(side)
    plated = kinds is FOOD and rng.random() < 0.4
    if plated:
        with c.frame(0 if number > 1 else spots[0][0], 0.1 if number > 1 else spots[0][1]):
            r = 0.97 if number > 1 else min(0.97, spots[0][2] * 1.28)
            rim = _jitter(rng, (238, 240, 244))
            c.ellipse(0, 0.05, r, r * 0.92, dark(rim, 0.18))
            c.ellipse(0, 0.02, r, r * 0.92, rim)
            c.ellipse(0, 0.04, r * 0.72, r * 0.66, light(dark(rim, 0.06), 0.3))
    for x, y, size, turn, flip in spots:
        with c.frame(x, y, size, turn, flip=flip and kind != "clock"):
            thing.draw(c, _jitter(rng, COLOURS[colour]) if colour else (0, 0, 0), rng)
    return c, {
        "subcategory": kind, "colour": colour, "number": number, "position": position,
        "size": "large" if number == 1 and scale > 0.74 else "small" if scale < 0.56 else "medium",
        "on_plate": plated,
    }  # fmt: skip


def _look(kind: str, rng: np.random.Generator) -> tuple[Look, dict[str, Any]]:
    old = kind.startswith("old")
    female = "woman" in kind or kind == "girl"
    skin, shirt = _pick(rng, SKIN), _pick(rng, [k for k in COLOURS if k != "brown"])
    hair = "grey" if old else _pick(rng, ("black", "brown", "blond", "red"))
    style = _pick(
        rng,
        ("long", "long", "bun", "curly") if female and not old
        else ("bun", "curly", "long") if female
        else ("short", "bald", "short") if kind == "old man"
        else ("short", "short", "short", "curly"),
    )  # fmt: skip
    beard = "man" in kind and not female and rng.random() < (0.6 if old else 0.3)
    expression = _pick(rng, ("smiling", "smiling", "neutral", "surprised"))
    glasses = bool(rng.random() < (0.45 if old else 0.18))
    hat = bool(rng.random() < 0.14)
    trousers = _pick(rng, ("blue", "black", "brown", "grey", "green"))
    pose = _pick(rng, POSES)
    look = Look(
        kind=kind, skin=_shade(rng, SKIN[skin]), hair=_shade(rng, HAIR[hair]), style=style,
        shirt=_jitter(rng, COLOURS[shirt]), trousers=dark(_jitter(rng, COLOURS[trousers]), 0.2),
        expression=expression, glasses=glasses, hat=hat, beard=bool(beard), pose=pose,
        eyes=[(86, 62, 44), (70, 112, 150), (84, 120, 76)][int(rng.integers(3))],
    )  # fmt: skip
    return look, {
        "skin": skin, "hair": hair if style != "bald" else "no", "style": style, "colour": shirt,
        "expression": expression, "glasses": glasses, "hat": hat, "beard": bool(beard),
        "pose": pose, "trousers": trousers,
    }  # fmt: skip


def _people(rng: np.random.Generator, side: int) -> tuple[Canvas, dict[str, Any]]:
    kind = _pick(rng, PEOPLE)
    look, what = _look(kind, rng)
    child = kind in ("boy", "girl")
    c = Canvas(side)
    number = int(rng.choice([1, 2], p=[0.82, 0.18]))
    face = number == 1 and rng.random() < 0.68
    if face:
        scale = rng.uniform(0.68, 0.95) * (0.9 if child else 1)
        position = _pick(rng, ("left", "right", "centre", "centre"))
        dx = {"left": -0.32, "right": 0.32, "centre": 0.0}[position]
        with c.frame(
            dx, 1.04 - 1.0 * scale, scale, rng.normal(0, 4), flip=bool(rng.random() < 0.5)
        ):
            portrait(c, look)
        view = "portrait"
    else:
        view = "full body"
        scale = rng.uniform(0.74, 0.95) * (0.8 if child else 1)
        position = "row" if number == 2 else _pick(rng, ("left", "right", "centre"))
        dx = {"left": -0.42, "right": 0.42, "centre": 0.0, "row": -0.44}[position]
        with c.frame(dx, 0.98 - scale, scale, flip=bool(rng.random() < 0.5)):
            person(c, look)
        if number == 2:
            other, _ = _look(kind, rng)
            with c.frame(0.44, 0.98 - scale * 0.97, scale * 0.97, flip=bool(rng.random() < 0.5)):
                person(c, other)
    return c, {**what, "subcategory": kind, "number": number, "view": view, "position": position}


def _bodies(rng: np.random.Generator, side: int) -> tuple[Canvas, dict[str, Any]]:
    kind = _pick(rng, BODIES)
    look, what = _look(_pick(rng, ("man", "woman")), rng)
    variant = (
        _pick(rng, ("open", "pointing", "victory")) if kind == "hand"
        else _pick(rng, ("bare", "clothed"))
    )  # fmt: skip
    if kind == "headless body":
        variant = "clothed"
    number = 2 if kind in ("hand", "foot", "leg", "headless body") and rng.random() < 0.25 else 1
    scale = rng.uniform(0.74, 0.97)
    c = Canvas(side)
    position = "row" if number == 2 else _pick(rng, ("left", "right", "centre", "centre"))
    turn = 6 if kind in ("headless body", "torso") else 24
    for k in range(number):
        size = scale * (0.66 if number == 2 else 1)
        x = (-0.48 + 0.96 * k) if number == 2 else {"left": -0.26, "right": 0.26}.get(position, 0.0)
        y = (
            0.98 - 0.95 * scale
            if kind == "headless body" and number == 1
            else rng.uniform(-0.08, 0.12)
        )
        with c.frame(x, y, size, rng.normal(0, turn), flip=(k == 1) ^ bool(rng.random() < 0.5)):
            body(c, kind, look, variant)
    return c, {
        "subcategory": kind, "number": number, "position": position, "skin": what["skin"],
        "colour": what["colour"] if variant == "clothed" else "", "variant": variant,
        "trousers": what["trousers"], "pose": what["pose"] if kind == "headless body" else "",
    }  # fmt: skip


def _letters(rng: np.random.Generator, n: int, alphabet: str) -> str:
    return "".join(alphabet[int(i)] for i in rng.integers(0, len(alphabet), n))


def _words(rng: np.random.Generator, side: int) -> tuple[Canvas, dict[str, Any]]:
    kind = _pick(rng, SUBCATEGORIES["words"])
    colour = _pick(rng, COLOURS)
    ink = _jitter(rng, COLOURS[colour])
    c = Canvas(side)
    stroke, shear = rng.choice([0.0, 0.02, 0.05, 0.08]), rng.choice([0.0, 0.0, 0.25])
    position = _pick(rng, ("top", "bottom", "centre", "centre"))
    y = {"top": -0.5, "bottom": 0.5, "centre": rng.uniform(-0.1, 0.1)}[position]
    number = 1
    if kind == "page of text":
        colour, position = "black", ""
        with c.frame(rng.uniform(-0.08, 0.08), 0, rng.uniform(0.75, 0.9), rng.normal(0, 5)):
            c.rect(-0.8, -0.98, 0.8, 0.98, (248, 246, 238))
            text = _pick(rng, _WORDS)
            with c.frame(0, -0.78):
                c.text(text, 1.2, 0.26, (34, 34, 40), stroke=0.05)
            rows = int(rng.integers(5, 8))
            for r in range(rows):
                count = int(rng.integers(2, 4))
                line = " ".join(_pick(rng, _WORDS).lower() for _ in range(count))
                with c.frame(0, -0.46 + 1.34 * r / (rows - 1) * 0.95):
                    c.text(line, 1.34, 1.1 / rows, (50, 50, 58))
    else:
        if kind == "number":
            text = _letters(rng, int(rng.integers(2, 5)), "0123456789")
        elif kind == "letters":
            text = _letters(rng, int(rng.integers(3, 7)), "BCDFGHJKLMNPQRSTVWXZ")
        else:
            text = _pick(rng, _WORDS)
            number = int(rng.choice([1, 2], p=[0.75, 0.25])) if kind == "word" else 1
        if rng.random() < 0.35:
            text = text.lower() if rng.random() < 0.6 else text.capitalize()
        with c.frame(rng.uniform(-0.05, 0.05), y if number == 1 else 0, 1, rng.normal(0, 6)):
            if kind == "sign":
                board = _jitter(rng, COLOURS[colour])
                letters: Colour = (250, 250, 248) if sum(board) < 480 else (30, 30, 36)
                if rng.random() < 0.5:
                    c.rect(-0.05, 0.2, 0.05, 2.0, (118, 112, 106))
                c.rect(-0.88, -0.36, 0.88, 0.36, letters, 0.12)
                c.rect(-0.83, -0.31, 0.83, 0.31, board, 0.09)
                c.text(text, 1.42, 0.4, letters, stroke=0.03)
            elif number == 2:
                second = _pick(rng, _WORDS)
                with c.frame(0, -0.34):
                    c.text(text, 1.65, 0.46, ink, stroke=stroke, shear=shear)
                with c.frame(0, 0.34):
                    c.text(second, 1.65, 0.46, ink, stroke=stroke, shear=shear)
                text = f"{text} {second}"
            else:
                width = rng.uniform(1.2, 1.8)
                c.text(text, width, 0.75, ink, stroke=stroke, shear=shear)
    return c, {
        "subcategory": kind, "text": text, "colour": colour, "number": number, "position": position,
    }  # fmt: skip


def _light(image: Image.Image, kind: str, noise: float, rng: np.random.Generator) -> np.ndarray:
    side = image.width
    gain = {"soft": 1.0, "bright": 1.1, "dim": 0.72, "warm": 1.0, "cool": 0.98}[kind]
    tint = {"warm": (1.07, 1.0, 0.86), "cool": (0.9, 0.99, 1.1)}.get(kind, (1.0, 1.0, 1.0))
    uneven = 1 + 0.08 * field(rng, side, 2)[..., None]
    rgb = np.asarray(image, np.float32) * gain * np.asarray(tint, np.float32) * uneven
    rgb = rgb + noise * rng.standard_normal(rgb.shape, dtype=np.float32)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def render_scene(index: int, *, seed: int, size: int = 96, category: str | None = None) -> Scene:
    """Render one scene.

    Parameters
    ----------
    index : int
        Its place in the set, from 0.
    seed : int
        Names the set; scenes of different seeds share nothing.
    size : int
        Side of the picture in pixels, at least 16.
    category : str, optional
        One of `CATEGORIES`; by default they take turns.

    Returns
    -------
    Scene

    Raises
    ------
    UnknownNameError
        If `category` is not one of `CATEGORIES`.
    """
    if category is None:
        category = CATEGORIES[index % len(CATEGORIES)]
    _check((category,), size)
    rng = np.random.default_rng([seed, index, CATEGORIES.index(category)])
    side = size * max(2, round(256 / size))
    light_kind = _pick(rng, _LIGHTS)
    noise = float(rng.choice([0.0, 2.0, 5.0]))
    if category == "places":
        kind = _pick(rng, PLACES)
        indoors = kind in ("kitchen", "bedroom")
        moment = _pick(rng, ("day", "day", "night") if indoors else MOMENTS)
        colour = _pick(rng, ("red", "yellow", "white", "blue", "green", "pink", "orange"))
        number = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])) if kind == "house" else 1
        wall = mix(_jitter(rng, COLOURS[colour]), (230, 224, 212), 0.25)
        picture = place(kind, moment, wall, number, rng, side)
        if kind not in ("house", "kitchen", "bedroom"):
            colour = ""
        what: dict[str, Any] = {
            "subcategory": kind, "colour": colour, "number": number, "moment": moment,
            "background": "", "position": "",
        }  # fmt: skip
    else:
        if category == "people":
            layer, what = _people(rng, side)
        elif category == "bodies":
            layer, what = _bodies(rng, side)
        elif category == "words":
            layer, what = _words(rng, side)
        else:
            layer, what = _things(FOOD if category == "food" else OBJECTS, rng, side)
        fits = _distant(str(what["colour"]))
        if category == "words":
            fits = [b for b in fits if b not in ("cloth", "bricks")]
        what["background"] = _pick(rng, fits)
        angle = rng.uniform(np.pi, 2 * np.pi)
        flat = category == "words"
        picture = compose(
            paint(str(what["background"]), rng, side), layer.image,
            (float(np.cos(angle)), float(np.sin(angle))),
            shadow=0.25 if flat else rng.uniform(0.3, 0.5), relief=0.0 if flat else 0.5,
        )  # fmt: skip
    small = picture.resize((size, size), Image.Resampling.BOX)
    image = _light(small, light_kind, noise, rng)
    subcategory = str(what.pop("subcategory"))
    what = {**what, "light": light_kind, "noise": noise}
    caption = _describe(category, subcategory, what, rng, full=True)
    return Scene(image, caption, category, subcategory, what, seed, index)


def _check(categories: Sequence[str], size: int) -> None:
    for name in categories:
        if name not in CATEGORIES:
            raise UnknownNameError(
                f"No category of scenes is called {name!r}; there are {', '.join(CATEGORIES)}."
                + near(name, CATEGORIES)
            )
    if not categories or size < 16:
        raise ConfigError(
            f"Scenes need a category and a size of 16 pixels or more; got {len(categories)} "
            f"categories and size {size}."
        )


_GENERIC: dict[str, tuple[str, ...]] = {
    "people": ("people", "a person", "people with faces"),
    "bodies": ("bodies", "a body", "body parts", "a body part"),
    "places": ("places", "a place", "a scene of a place"),
    "words": ("words", "text", "letters and words", "writing"),
    "food": ("food", "something to eat", "food to eat"),
    "objects": ("objects", "an object", "a thing", "an everyday object"),
}
_PREFIXES = ("a picture of ", "a photo of ", "an image of ", "a drawing of ")


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _plural(noun: str) -> str:
    irregular = {
        "man": "men", "woman": "women", "old man": "old men", "old woman": "old women",
        "foot": "feet", "headless body": "headless bodies", "torso": "torsos", "box": "boxes",
    }  # fmt: skip
    return irregular.get(noun, noun + "s")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _noun(category: str, kind: str, what: dict[str, Any], keep: Any) -> str:
    """Return the noun phrase; `keep()` says of each detail whether it is told."""
    many = int(what.get("number", 1))
    number = _NUMBERS[many]
    colour = str(what.get("colour", ""))
    if category in ("food", "objects"):
        thing = (FOOD if category == "food" else OBJECTS)[kind]
        named = colour + " " if colour and keep() else ""
        size = what["size"] + " " if what["size"] != "medium" and keep() else ""
        noun = kind if many == 1 else thing.plural or _plural(kind)
        phrase = f"{size}{named}{noun}"
        phrase = _article(phrase) if many == 1 else f"{number} {phrase}"
        return phrase + (" on a plate" if what.get("on_plate") and keep() else "")
    if category == "people":
        mood = what["expression"]
        lead = f"{mood} " if mood != "neutral" and many == 1 and keep() else ""
        phrase = _article(lead + kind) if many == 1 else f"{number} {_plural(kind)}"
        if many > 1:
            return phrase
        details = []
        if keep():
            style = what["style"] + " " if what["style"] in ("long", "curly", "short") else ""
            details.append("no hair" if what["hair"] == "no" else f"{style}{what['hair']} hair")
        if what["beard"] and keep():
            details.append("a beard")
        if what["glasses"] and keep():
            details.append("glasses")
        if what["hat"] and keep():
            details.append("a hat")
        if details:
            phrase += " with " + _join(details)
        if keep():
            phrase += f" in {_article(colour)} shirt"
        if what["view"] == "full body" and keep():
            phrase += f", {what['pose']}"
        return phrase
    if category == "bodies":
        if kind == "hand":
            lead = what["variant"] + " " if what["variant"] != "victory" and keep() else ""
            tail = " showing two fingers" if what["variant"] == "victory" and keep() else ""
        else:
            lead = "bare " if what["variant"] == "bare" and keep() else ""
            tail = ""
            if what["variant"] == "clothed" and keep():
                tail = (
                    f" in {what['trousers']} trousers" if kind in ("leg", "foot")
                    else f" in {_article(colour)} shirt"
                )  # fmt: skip
        if what["pose"] and keep():
            tail += f", {what['pose']}"
        if keep():
            tail += f", {what['skin']} skin"
        noun = lead + (kind if many == 1 else _plural(kind))
        return (_article(noun) if many == 1 else f"{number} {noun}") + tail
    if category == "places":
        if kind == "mountains":
            phrase = kind
        elif kind == "house":
            named = f"{colour} " if keep() else ""
            phrase = _article(named + kind) if many == 1 else f"{number} {named}{kind}s"
        elif kind == "kitchen":
            phrase = "a kitchen" + (f" with {colour} cupboards" if keep() else "")
        elif kind == "bedroom":
            phrase = "a bedroom" + (f" with {_article(colour)} bed" if keep() else "")
        else:
            phrase = _article(kind)
        indoors = kind in ("kitchen", "bedroom")
        told = "by day" if indoors and what["moment"] == "day" else MOMENTS[what["moment"]]
        return phrase + (f" {told}" if keep() else "")
    text = str(what.get("text", "")).lower()
    if kind == "page of text":
        return "a page of text"
    if kind == "sign":
        named = f"{colour} " if keep() else ""
        return f"{_article(named + 'sign')}" + (f" that says {text}" if keep() else "")
    lead = {"word": "the word" if many == 1 else "the words", "letters": "the letters",
            "number": "the number"}[kind]  # fmt: skip
    plain = {"word": "a word" if many == 1 else "two words", "letters": "letters",
             "number": "a number"}[kind]  # fmt: skip
    phrase = f"{lead} {text}" if keep() else plain
    return phrase + (f" in {colour}" if keep() else "")


def _describe(
    category: str, kind: str, what: dict[str, Any], rng: np.random.Generator, *, full: bool
) -> str:
    share = rng.uniform(0.2, 0.8)

    def keep() -> bool:
        return full or bool(rng.random() < share)

    if not full and rng.random() < 0.12:
        generic = _pick(rng, _GENERIC[category])
        return (_pick(rng, _PREFIXES) if rng.random() < 0.7 else "") + generic
    phrase = _noun(category, kind, what, keep)
    where = {
        "left": "on the left", "right": "on the right", "top": "at the top",
        "bottom": "at the bottom",
    }.get(str(what["position"]))  # fmt: skip
    if where and keep():
        phrase += f" {where}"
    if what["background"] and keep():
        phrase += f", {BACKGROUNDS[what['background']]}"
    if full:
        return phrase
    draw = rng.random()
    if draw < 0.2:
        return f"{_pick(rng, _GENERIC[category])}: {phrase}"
    return _pick(rng, _PREFIXES) + phrase if draw < 0.55 else phrase


def name_of(category: str, subcategory: str | None = None, *, variant: int = 0) -> str:
    """Return how a caption names a category, or a sub-category, and nothing else.

    Parameters
    ----------
    category : str
        One of `CATEGORIES`.
    subcategory : str, optional
        One of its `SUBCATEGORIES`.
    variant : int
        Which of the ways to name a category and to begin a sentence; any number will do.
    """
    start = ("", *_PREFIXES)[variant % (len(_PREFIXES) + 1)]
    if subcategory is None:
        ways = _GENERIC[category]
        return start + ways[variant // (len(_PREFIXES) + 1) % len(ways)]
    plain = subcategory in ("mountains", "letters")
    return start + (subcategory if plain else _article(subcategory))


def captions(scene: Scene, n: int, *, seed: int = 0) -> list[str]:
    """Return `n` different ways of saying what a scene shows, some short, some long.

    Parameters
    ----------
    scene : Scene
    n : int
        How many; they may repeat where the scene has little to tell.
    seed : int
        Draws which details are told.
    """
    rng = np.random.default_rng([seed, scene.seed, scene.index, 7])
    return [
        _describe(scene.category, scene.subcategory, scene.attributes, rng, full=False)
        for _ in range(n)
    ]


def render_scenes(
    n: int, *, seed: int = 0, size: int = 96, categories: Sequence[str] = CATEGORIES, start: int = 0
) -> list[Scene]:
    """Render `n` scenes whose categories take turns.

    Parameters
    ----------
    n : int
        Number of scenes.
    seed : int
        Names the set.
    size : int
        Side of the pictures in pixels.
    categories : sequence of str
        Which of `CATEGORIES` to render.
    start : int
        Index of the first scene: ``render_scenes(n, start=k)`` continues a set.

    Returns
    -------
    list of Scene
        Scene ``k = start + i`` at place ``i``, of category ``categories[k % len(categories)]``.

    Raises
    ------
    UnknownNameError
        If a category is not one of `CATEGORIES`.
    ConfigError
        If there is no category or the size is below 16.
    """
    categories = tuple(categories)
    _check(categories, size)
    return [
        render_scene(i, seed=seed, size=size, category=categories[i % len(categories)])
        for i in range(start, start + n)
    ]


def write_scenes(
    folder: Path | str,
    n: int,
    *,
    seed: int = 0,
    size: int = 96,
    categories: Sequence[str] = CATEGORIES,
) -> StimulusSet:
    """Render scenes and write them as an images artefact (PNG files and their index).

    Parameters
    ----------
    folder : path
        Written whole or not at all.
    n, seed, size, categories
        As in `render_scenes`.

    Returns
    -------
    StimulusSet
        Its index has the columns caption, category and subcategory beside the files' names and
        hashes.
    """
    from brainalign.data.stimuli import write_stimuli

    scenes = render_scenes(n, seed=seed, size=size, categories=categories)
    return write_stimuli(
        Path(folder),
        [scene.image for scene in scenes],
        [scene.stimulus_id for scene in scenes],
        extra={
            "caption": [scene.caption for scene in scenes],
            "category": [scene.category for scene in scenes],
            "subcategory": [scene.subcategory for scene in scenes],
        },
    )
