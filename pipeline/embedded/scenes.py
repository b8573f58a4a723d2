"""Procedural scenes: coloured shapes on a 3 x 3 grid, with questions whose answers are known.

The embedded base model learns from these, and the demo and the tests draw their submissions from them. A scene is a pure function
of its random generator, so a seed names a data set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from pipeline.embedded.textures import random_background

SIZE = 64
"""Side of a scene, pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 220, 40),
    "orange": (250, 140, 20),
    "purple": (140, 50, 170),
    "cyan": (40, 200, 210),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "brown": (125, 75, 40),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
CELLS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
KINDS = ("colour", "shape", "count", "position", "yesno", "caption")
_CAPTION_OBJECTS = 2
_SUPERSAMPLING = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One shape: what it is, and where it lies (row and column of the 3 x 3 grid; centre and radius in pixels)."""

    colour: str
    shape: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return CELLS[self.row][self.column]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture of `SIZE` x `SIZE` RGB pixels and the objects on it, in reading order."""

    image: Image.Image
    objects: tuple[SceneObject, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnswer:
    """A question of one of `KINDS` with its only right answer."""

    kind: str
    question: str
    answer: str


def draw_scene(rng: np.random.Generator, max_objects: int = 5) -> Scene:
    """A random scene of 1 to `max_objects` (at most 9) shapes on a random background."""
    background = random_background(rng, SIZE)
    number = int(rng.integers(1, max_objects + 1))
    cells = sorted(int(c) for c in rng.choice(9, size=number, replace=False))
    names = list(COLOURS)
    cell = SIZE / 3
    objects = []
    for index in cells:
        row, column = divmod(index, 3)
        colour = _visible_colour(rng, names, background, row, column)
        objects.append(
            SceneObject(
                colour=colour,
                shape=str(rng.choice(SHAPES)),
                row=row,
                column=column,
                x=(column + 0.5) * cell + float(rng.uniform(-1, 1)),
                y=(row + 0.5) * cell + float(rng.uniform(-1, 1)),
                radius=float(rng.uniform(7.0, 10.0)),
            )
        )
    image = Image.fromarray(background).resize((SIZE * _SUPERSAMPLING,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for item in objects:
        _draw_shape(draw, item, rng)
    return Scene(image=image.resize((SIZE, SIZE), Image.Resampling.BOX), objects=tuple(objects))


def _visible_colour(rng: np.random.Generator, names: list[str], background: np.ndarray, row: int, column: int) -> str:
    """A colour that stands out from the mean of the background under its cell."""
    step = SIZE // 3
    patch = background[row * step : (row + 1) * step, column * step : (column + 1) * step].reshape(-1, 3).mean(axis=0)
    while True:
        name = names[int(rng.integers(len(names)))]
        if np.abs(np.asarray(COLOURS[name], dtype=float) - patch).sum() > 130:
            return name


def _draw_shape(draw: ImageDraw.ImageDraw, item: SceneObject, rng: np.random.Generator) -> None:
    s = _SUPERSAMPLING
    x, y, r = item.x * s, item.y * s, item.radius * s
    shade = rng.integers(-12, 13, size=3)
    fill = tuple(int(v) for v in np.clip(np.asarray(COLOURS[item.colour]) + shade, 0, 255))
    match item.shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "ring":
            draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, int(r * 0.38)))
        case "square":
            draw.rectangle((x - r * 0.85, y - r * 0.85, x + r * 0.85, y + r * 0.85), fill=fill)
        case "triangle":
            draw.polygon([(x, y - r), (x + r, y + r * 0.8), (x - r, y + r * 0.8)], fill=fill)
        case "cross":
            w = r * 0.36
            draw.rectangle((x - r, y - w, x + r, y + w), fill=fill)
            draw.rectangle((x - w, y - r, x + w, y + r), fill=fill)
        case "star":
            points = []
            for k in range(10):
                length = r * 1.1 if k % 2 == 0 else r * 0.45
                angle = math.pi * (k / 5 - 0.5)
                points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
            draw.polygon(points, fill=fill)
        case _:
            raise ValueError(f"no such shape: {item.shape}")


def caption(scene: Scene) -> str:
    """`a red circle, a blue star and a green ring`, in reading order."""
    parts = [f"{'an' if o.colour == 'orange' else 'a'} {o.name}" for o in scene.objects]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> QuestionAnswer | None:
    """A random question of one kind about a scene; None where the kind has no unambiguous question for it.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in _ASKERS:
        raise ValueError(f"no such kind of question: {kind}; there are {', '.join(KINDS)}")
    return _ASKERS[kind](scene, rng)


def _ask_colour(scene: Scene, rng: np.random.Generator) -> QuestionAnswer | None:
    item = _one_of_a_kind(scene, [o.shape for o in scene.objects], rng)
    if item is None:
        return None
    question = _phrase(rng, f"what color is the {item.shape}?", f"which color does the {item.shape} have?")
    return QuestionAnswer(kind="colour", question=question, answer=item.colour)


def _ask_shape(scene: Scene, rng: np.random.Generator) -> QuestionAnswer | None:
    item = _one_of_a_kind(scene, [o.colour for o in scene.objects], rng)
    if item is None:
        return None
    question = _phrase(rng, f"what shape is the {item.colour} object?", f"what is the {item.colour} thing?")
    return QuestionAnswer(kind="shape", question=question, answer=item.shape)


def _ask_count(scene: Scene, rng: np.random.Generator) -> QuestionAnswer:
    colours = [o.colour for o in scene.objects]
    if rng.random() < 0.5:
        question = _phrase(rng, "how many objects are there?", "count the objects in the picture.")
        return QuestionAnswer(kind="count", question=question, answer=str(len(colours)))
    colour = colours[int(rng.integers(len(colours)))] if rng.random() < 0.7 else str(rng.choice(list(COLOURS)))
    question = _phrase(rng, f"how many {colour} objects are there?", f"how many {colour} things do you see?")
    return QuestionAnswer(kind="count", question=question, answer=str(colours.count(colour)))


def _ask_position(scene: Scene, rng: np.random.Generator) -> QuestionAnswer | None:
    item = _one_of_a_kind(scene, [o.name for o in scene.objects], rng)
    if item is None:
        return None
    question = _phrase(rng, f"where is the {item.name}?", f"in which part of the picture is the {item.name}?")
    return QuestionAnswer(kind="position", question=question, answer=item.place)


def _ask_caption(scene: Scene, rng: np.random.Generator) -> QuestionAnswer | None:
    if len(scene.objects) > _CAPTION_OBJECTS:
        return None
    question = _phrase(rng, "describe the picture.", "what is in the image?")
    return QuestionAnswer(kind="caption", question=question, answer=caption(scene))


def _one_of_a_kind(scene: Scene, names: list[str], rng: np.random.Generator) -> SceneObject | None:
    """A random object whose name (one per object) no other has."""
    unique = [item for item, name in zip(scene.objects, names, strict=True) if names.count(name) == 1]
    return unique[int(rng.integers(len(unique)))] if unique else None


def _ask_presence(scene: Scene, rng: np.random.Generator) -> QuestionAnswer | None:
    """`is there a ...?`, answered yes and no equally often; None where it would be no, and nothing is absent."""
    yes = rng.random() < 0.5
    form = int(rng.integers(3))
    present = {0: {o.shape for o in scene.objects}, 1: {o.colour for o in scene.objects}, 2: {o.name for o in scene.objects}}[form]
    everything = {0: list(SHAPES), 1: list(COLOURS), 2: [f"{c} {s}" for c in COLOURS for s in SHAPES]}[form]
    pool = sorted(present) if yes else [name for name in everything if name not in present]
    if not pool:
        return None
    name = str(pool[int(rng.integers(len(pool)))])
    thing = f"something {name}" if form == 1 else f"{'an' if name[0] == 'o' else 'a'} {name}"
    question = _phrase(rng, f"is there {thing}?", f"do you see {thing} in the picture?")
    return QuestionAnswer(kind="yesno", question=question, answer="yes" if yes else "no")


def _phrase(rng: np.random.Generator, *phrases: str) -> str:
    return phrases[int(rng.integers(len(phrases)))]


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], QuestionAnswer | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "position": _ask_position,
    "yesno": _ask_presence,
    "caption": _ask_caption,
}
