"""Makes ``images.jsonl``: pictures of coloured shapes, with a four-way question about each.

    python evals/builtin/make_images.py

What is drawn and asked follows from the seed alone. The PNG files' bytes are those of the Pillow in
`requirements/development.txt`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
SEED = 20261130
ITEMS = 60
"""Items of each kind of question."""
SIZE = 224
"""Pixels of a side."""

_COLORS = {
    "red": (220, 30, 30), "green": (30, 150, 60), "blue": (30, 70, 220), "yellow": (240, 200, 20),
    "black": (20, 20, 20), "purple": (140, 40, 170),
}  # fmt: skip
_SHAPES = ("circle", "square", "triangle", "cross")
_CORNERS = {"top left": (0, 0), "top right": (2, 0), "bottom left": (0, 2), "bottom right": (2, 2)}
_PALETTE = [(255, 255, 255), *_COLORS.values()]
_CELL = SIZE // 3

Cell = tuple[int, int]
_GRID: Sequence[Cell] = [(column, row) for row in range(3) for column in range(3)]


@dataclass(frozen=True)
class Shape:
    """One shape in a cell of the grid of three by three."""

    kind: str
    color: str
    cell: Cell


@dataclass(frozen=True)
class Item:
    """A picture, and a question about it with its choices; ``answer`` is the index of the right one."""

    id: str
    shapes: tuple[Shape, ...]
    question: str
    choices: tuple[str, ...]
    answer: int


def main() -> None:
    """Write the file, and its digest among the others."""
    path = HERE / "images.jsonl"
    path.write_text("".join(json.dumps(row(item)) + "\n" for item in items()), encoding="utf-8")
    digests = json.loads((HERE / "digests.json").read_text(encoding="utf-8"))
    digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (HERE / "digests.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def items() -> list[Item]:
    """Return every item. Each letter is right as often, in random order: a part of the file has no favorite either."""
    found = []
    for kind, make in _KINDS.items():
        answers = random.Random(f"{SEED}:{kind}").sample(range(ITEMS), ITEMS)
        for number, answer in enumerate(answers):
            found.append(make(f"{kind}-{number:02}", random.Random(f"{SEED}:{kind}:{number}"), answer % 4))
    return found


def draw(shapes: Sequence[Shape]) -> Image.Image:
    """Return the picture, with a palette."""
    picture = Image.new("P", (SIZE, SIZE), 0)
    picture.putpalette([value for color in _PALETTE for value in color])
    pen = ImageDraw.Draw(picture)
    for shape in shapes:
        _draw_shape(pen, shape)
    return picture


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    fill = 1 + list(_COLORS).index(shape.color)
    left, top = (part * _CELL + _CELL // 8 for part in shape.cell)
    right, bottom = (edge + _CELL * 3 // 4 for edge in (left, top))
    if shape.kind == "circle":
        pen.ellipse((left, top, right, bottom), fill)
    elif shape.kind == "square":
        pen.rectangle((left, top, right, bottom), fill)
    elif shape.kind == "triangle":
        pen.polygon([((left + right) // 2, top), (left, bottom), (right, bottom)], fill)
    else:
        third = (right - left) // 3
        pen.rectangle((left + third, top, right - third, bottom), fill)
        pen.rectangle((left, top + third, right, bottom - third), fill)


def row(item: Item) -> dict[str, object]:
    """Return the item as a line of data, its picture as a PNG."""
    data = io.BytesIO()
    draw(item.shapes).save(data, "PNG", optimize=True, bits=4)
    image = base64.b64encode(data.getvalue()).decode()
    return {
        "id": item.id, "image": image, "question": item.question, "choices": item.choices, "answer": item.answer,
    }  # fmt: skip


def _count(name: str, rng: random.Random, answer: int) -> Item:
    """How often a shape is there, among others."""
    asked = rng.choice(_SHAPES)
    others = [rng.choice([kind for kind in _SHAPES if kind != asked]) for _ in range(rng.randint(2, 4))]
    kinds = [asked] * (answer + 1) + others
    cells = rng.sample(_GRID, len(kinds))
    shapes = tuple(Shape(kind, rng.choice(list(_COLORS)), cell) for kind, cell in zip(kinds, cells, strict=True))
    question = f"How many {asked}{'es' if asked == 'cross' else 's'} are in the picture?"
    return Item(name, shapes, question, ("1", "2", "3", "4"), answer)


def _color(name: str, rng: random.Random, answer: int) -> Item:
    """The color of a shape, among those in the picture."""
    shapes = _four(rng, rng.sample(_GRID, 4))
    choices = tuple(shape.color for shape in shapes)
    return Item(name, _mixed(shapes, rng), f"What color is the {shapes[answer].kind}?", choices, answer)


def _shape(name: str, rng: random.Random, answer: int) -> Item:
    """The shape that has a color."""
    shapes = _four(rng, rng.sample(_GRID, 4))
    choices = tuple(shape.kind for shape in shapes)
    return Item(name, _mixed(shapes, rng), f"Which shape is {shapes[answer].color}?", choices, answer)


def _place(name: str, rng: random.Random, answer: int) -> Item:
    """The corner that a shape stands in."""
    corners = rng.sample(list(_CORNERS), 4)
    shapes = _four(rng, [_CORNERS[corner] for corner in corners])
    asked = shapes[answer]
    return Item(name, shapes, f"Where is the {asked.color} {asked.kind}?", tuple(corners), answer)


def _four(rng: random.Random, cells: Sequence[Cell]) -> tuple[Shape, ...]:
    """Four shapes that differ in kind and in color."""
    kinds, colors = rng.sample(_SHAPES, 4), rng.sample(list(_COLORS), 4)
    return tuple(Shape(*each) for each in zip(kinds, colors, cells, strict=True))


def _mixed(shapes: Sequence[Shape], rng: random.Random) -> tuple[Shape, ...]:
    return tuple(rng.sample(shapes, len(shapes)))


_KINDS: dict[str, Callable[[str, random.Random, int], Item]] = {
    "count": _count, "color": _color, "shape": _shape, "place": _place,
}  # fmt: skip

if __name__ == "__main__":
    main()
