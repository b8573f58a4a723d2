"""The scenes: drawn from the generator alone, and every answer follows from the objects."""

from __future__ import annotations

import collections
import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from pipeline.embedded.scenes import (
    CELLS,
    COLOURS,
    KINDS,
    SHAPES,
    SIZE,
    QuestionAnswer,
    Scene,
    SceneObject,
    ask,
    caption,
    draw_scene,
)

SCENES = 300
FULL = 9
PATTERNS = {
    "colour": ["what color is the (?P<shape>.+)?", "which color does the (?P<shape>.+) have?"],
    "shape": ["what shape is the (?P<colour>.+) object?", "what is the (?P<colour>.+) thing?"],
    "count": [
        "how many objects are there?",
        "count the objects in the picture.",
        "how many (?P<colour>.+) objects are there?",
        "how many (?P<colour>.+) things do you see?",
    ],
    "position": ["where is the (?P<name>.+)?", "in which part of the picture is the (?P<name>.+)?"],
    "yesno": [
        "is there something (?P<colour>.+)?",
        "do you see something (?P<colour>.+) in the picture?",
        "is there an? (?P<thing>.+)?",
        "do you see an? (?P<thing>.+) in the picture?",
    ],
    "caption": ["describe the picture.", "what is in the image?"],
}
"""Every form of question; `?` and `.` at the end stand for themselves."""


def scenes(count: int, most: int = 5, seed: int = 0) -> list[Scene]:
    return [draw_scene(np.random.default_rng([seed, k]), max_objects=most) for k in range(count)]


def scene_of(*names: str) -> Scene:
    """A scene that is made by hand: `red circle` and so on, in the cells from the top left."""
    objects = []
    for index, name in enumerate(names):
        colour, shape = name.split()
        row, column = divmod(index, 3)
        objects.append(SceneObject(colour=colour, shape=shape, row=row, column=column, x=0.0, y=0.0, radius=8.0))
    return Scene(image=Image.new("RGB", (SIZE, SIZE)), objects=tuple(objects))


def answer_of(scene: Scene, asked: QuestionAnswer) -> str:
    """The answer, found from question and objects without the code that asks; an ambiguous question fails."""
    forms = (re.fullmatch(form[:-1] + re.escape(form[-1]), asked.question) for form in PATTERNS[asked.kind])
    said = next(form.groupdict() for form in forms if form)
    things = [(o.colour, o.shape, CELLS[o.row][o.column]) for o in scene.objects]
    if asked.kind == "colour":
        (found,) = [colour for colour, shape, _ in things if shape == said["shape"]]
    elif asked.kind == "shape":
        (found,) = [shape for colour, shape, _ in things if colour == said["colour"]]
    elif asked.kind == "count":
        found = str(sum(colour == said.get("colour", colour) for colour, _, _ in things))
    elif asked.kind == "position":
        (found,) = [place for colour, shape, place in things if f"{colour} {shape}" == said["name"]]
    elif asked.kind == "yesno":
        present = {colour for colour, _, _ in things if "colour" in said}
        present |= {name for colour, shape, _ in things if "thing" in said for name in (shape, f"{colour} {shape}")}
        found = "yes" if said.get("colour", said.get("thing")) in present else "no"
    else:
        named = [f"an {c} {s}" if c == "orange" else f"a {c} {s}" for c, s, _ in things]
        found = " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
    return found


def test_a_scene_is_of_its_generator_alone() -> None:
    first, again = draw_scene(np.random.default_rng(5)), draw_scene(np.random.default_rng(5))
    assert first.objects == again.objects
    assert first.image.tobytes() == again.image.tobytes()
    assert [ask(first, kind, np.random.default_rng(1)) for kind in KINDS] == [
        ask(again, kind, np.random.default_rng(1)) for kind in KINDS
    ]
    assert draw_scene(np.random.default_rng(6)).image.tobytes() != first.image.tobytes()


def test_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    scene = draw_scene(np.random.default_rng(0))
    for kind in KINDS:
        ask(scene, kind, np.random.default_rng(0))
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize("most", [1, 5, FULL])
def test_objects_lie_in_cells_of_their_own_in_reading_order(most: int) -> None:
    drawn = scenes(60, most)
    assert {len(scene.objects) for scene in drawn} == set(range(1, most + 1))
    for scene in drawn:
        assert scene.image.size == (SIZE, SIZE)
        assert scene.image.mode == "RGB"
        cells = [(o.row, o.column) for o in scene.objects]
        assert cells == sorted(set(cells))
        for item in scene.objects:
            assert item.colour in COLOURS
            assert item.shape in SHAPES
            assert item.place == CELLS[item.row][item.column]
            assert (int(item.y / (SIZE / 3)), int(item.x / (SIZE / 3))) == (item.row, item.column)
            assert min(item.x, item.y) - item.radius > -1
            assert max(item.x, item.y) + item.radius < SIZE + 1


def outlines(item: SceneObject) -> dict[str, np.ndarray]:
    """Which pixels each shape would cover in this object's place, bool (SIZE, SIZE)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    across, down = (x - item.x) / item.radius, (y - item.y) / item.radius
    far, turned = np.hypot(across, down), np.arctan2(across, -down) % (0.4 * np.pi)
    off = np.minimum(turned, 0.4 * np.pi - turned)  # angle to the nearest tip of the star
    tip, notch = 1.1, 0.45 * np.exp(0.2j * np.pi)
    edge = notch - tip
    star = edge.real * far * np.sin(off) - edge.imag * (far * np.cos(off) - tip) >= 0
    return {
        "circle": far <= 1,
        "ring": (far <= 1) & (far >= 0.62),
        "square": np.maximum(abs(across), abs(down)) <= 0.85,
        "triangle": (down <= 0.8) & (down + 1 >= 1.8 * abs(across)),
        "cross": (np.minimum(abs(across), abs(down)) <= 0.36) & (np.maximum(abs(across), abs(down)) <= 1),
        "star": star,
    }


def test_the_picture_shows_what_the_objects_say() -> None:
    """The pixels of an object's colour are most like the outline of its shape."""
    right = []
    for scene in scenes(60, FULL, seed=1):
        pixels = np.asarray(scene.image).astype(int)
        for item in scene.objects:
            cell = np.zeros((SIZE, SIZE), bool)
            cell[max(0, round(item.y - 11)) : round(item.y + 11), max(0, round(item.x - 11)) : round(item.x + 11)] = True
            like = cell & (np.abs(pixels - COLOURS[item.colour]).max(axis=-1) <= 16)
            overlap = {shape: (like & mask).sum() / (like | mask).sum() for shape, mask in outlines(item).items()}
            right.append(max(overlap, key=lambda shape: overlap[shape]) == item.shape)
    assert len(right) > 250
    assert all(right)


def test_objects_stand_out_from_the_background() -> None:
    """Their colour is not that of the pixels around them."""
    least = []
    for scene in scenes(80, FULL, seed=2):
        pixels, cell = np.asarray(scene.image).astype(int), np.arange(SIZE) // (SIZE / 3)
        free = ~np.logical_or.reduce([mask for item in scene.objects for mask in outlines(item).values()])
        for item in scene.objects:
            around = free & (cell[:, None] == item.row) & (cell == item.column)
            least.append(np.abs(pixels[around].mean(axis=0) - COLOURS[item.colour]).sum())
    assert min(least) > 90


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_follows_from_the_objects(kind: str) -> None:
    rng = np.random.default_rng(3)
    asked = [(scene, question) for scene in scenes(SCENES, FULL) if (question := ask(scene, kind, rng)) is not None]
    assert len(asked) > SCENES / 5
    for scene, question in asked:
        assert question.kind == kind
        assert question.answer == answer_of(scene, question), question
    used = {next(f for f in PATTERNS[kind] if re.fullmatch(f[:-1] + re.escape(f[-1]), q.question)) for _, q in asked}
    assert used == set(PATTERNS[kind]), "every form is asked"


def test_answers_are_varied() -> None:
    rng = np.random.default_rng(4)
    found: dict[str, set[str]] = collections.defaultdict(set)
    for scene in scenes(SCENES):
        for kind in KINDS:
            asked = ask(scene, kind, rng)
            found[kind] |= {asked.answer} if asked else set()
    assert found["colour"] == set(COLOURS)
    assert found["shape"] == set(SHAPES)
    assert found["count"] == set("012345")
    assert found["position"] == {place for row in CELLS for place in row}
    assert found["yesno"] == {"yes", "no"}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("colour", ("red circle", "blue circle")),
        ("shape", ("red circle", "red star")),
        ("position", ("red circle", "red circle")),
        ("caption", ("red circle", "blue star", "green ring")),
    ],
)
def test_an_ambiguous_scene_is_not_asked_about(kind: str, names: tuple[str, ...]) -> None:
    for seed in range(10):
        assert ask(scene_of(*names), kind, np.random.default_rng(seed)) is None


@pytest.mark.parametrize(
    ("kind", "names", "question", "answer"),
    [
        ("colour", ("red circle", "blue circle", "red star"), "star", "red"),
        ("shape", ("red circle", "red star", "blue circle"), "blue", "circle"),
        ("position", ("red circle", "red circle", "red star"), "red star", "top right"),
    ],
)
def test_only_what_is_unique_is_asked_about(kind: str, names: tuple[str, ...], question: str, answer: str) -> None:
    for seed in range(10):
        asked = ask(scene_of(*names), kind, np.random.default_rng(seed))
        assert asked is not None
        assert f"the {question}" in asked.question
        assert asked.answer == answer


def test_yes_and_no_are_balanced() -> None:
    rng = np.random.default_rng(5)
    by_form: dict[str, list[bool]] = collections.defaultdict(list)
    for scene in scenes(SCENES):
        for _ in range(5):
            asked = ask(scene, "yesno", rng)
            assert asked is not None
            words = re.sub(r"^.*?(?:something|an?) | in the picture|\?", "", asked.question).split()
            form = "colour and shape" if len(words) == 2 else "shape" if words[0] in SHAPES else "colour"
            by_form[form].append(asked.answer == "yes")
    assert len(by_form) == 3
    for form, answers in by_form.items():
        assert np.mean(answers) == pytest.approx(0.5, abs=0.1), form
    assert np.mean([answer for answers in by_form.values() for answer in answers]) == pytest.approx(0.5, abs=0.05)


def test_where_every_shape_is_there_no_question_about_an_absent_one() -> None:
    full = scene_of(*(f"red {shape}" for shape in SHAPES))
    asked = [ask(full, "yesno", np.random.default_rng(seed)) for seed in range(60)]
    assert None in asked
    for question in asked:
        assert question is None or question.answer == answer_of(full, question)


def test_captions() -> None:
    assert caption(scene_of("red circle")) == "a red circle"
    assert caption(scene_of("orange star", "blue ring")) == "an orange star and a blue ring"
    assert caption(scene_of("red circle", "orange star", "blue ring")) == "a red circle, an orange star and a blue ring"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no such kind of question: size; there are colour, shape, .*caption"):
        ask(scene_of("red circle"), "size", np.random.default_rng(0))


def test_an_unknown_shape_is_not_drawn() -> None:
    from PIL import ImageDraw

    from pipeline.embedded.scenes import _draw_shape

    scene = scene_of("red circle")
    blob = dataclasses.replace(scene.objects[0], shape="blob")
    with pytest.raises(ValueError, match="no such shape: blob"):
        _draw_shape(ImageDraw.Draw(scene.image), blob, np.random.default_rng(0))
