"""How settings are declared, checked and built from several sources."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from draccus import ChoiceRegistry

from sophia_levanter.config.build import build, encode, flat, schema
from sophia_levanter.config.files import Setting
from sophia_levanter.config.settings import Settings, free_settings, setting
from sophia_levanter.errors import InputError

FILE = Path("a.yaml")


@dataclass(frozen=True)
class Shape(Settings, ChoiceRegistry):
    section: ClassVar[str] = "shape"
    color: str = setting("red", "its color", choices=("red", "blue"))


@Shape.register_subclass("circle")
@dataclass(frozen=True)
class Circle(Shape):
    radius: float = setting(1.0, "its radius", above=0, below=9)
    border: float | Literal["auto"] = setting(1.0, "its border", above=0, choices=("auto",))
    line_width: int = setting(1, "of its border")


@Shape.register_subclass("polygon")
@dataclass(frozen=True)
class Polygon(Shape):
    sides: int = setting(3, "number of sides", low=3, high=12, free=True)
    label: str | None = setting(None, "a name", choices=("a", "b"), empty="leave it out for none")
    tags: tuple[str, ...] = setting((), "words")


@dataclass(frozen=True)
class Drawing:
    shape: Shape = field(default_factory=Circle)


def made(*layers: dict, file: Path | None = FILE) -> Drawing:
    return build(Drawing, [{key: Setting(value, file) for key, value in layer.items()} for layer in layers])


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (Circle, {"radius": 0.0}, "shape.radius is 0.0; it must be in (0, 9)"),
        (Circle, {"radius": float("nan")}, "shape.radius is nan; it must be in (0, 9)"),
        (Circle, {"border": "wide"}, "shape.border is 'wide'; it must be a number or auto"),
        (Circle, {"border": 0.0}, "shape.border is 0.0; it must be above 0"),
        (Circle, {"color": "green"}, "shape.color is 'green'; it must be red or blue"),
        (Polygon, {"sides": 2}, "shape.sides is 2; it must be between 3 and 12"),
        (Polygon, {"label": "c"}, "shape.label is 'c'; it must be one of a, b, or null"),
        (Polygon, {"label": ""}, "shape.label is empty; leave it out for none"),
    ],
)
def test_a_value_out_of_its_bounds(cls, values, message):
    with pytest.raises(InputError) as error:
        cls(**values)
    assert str(error.value) == message


def test_free_settings():
    assert free_settings(Polygon()) == ["shape.sides"]


def test_a_section_of_a_chosen_type():
    assert made({"shape.type": "polygon", "shape.sides": 5}) == Drawing(Polygon(sides=5))
    assert made({"shape": "polygon"}) == Drawing(Polygon())
    assert made({}) == Drawing()


def test_another_type_keeps_what_all_types_have():
    below = {"shape.color": "blue", "shape.radius": 2.0}
    assert made(below, {"shape.type": "polygon"}) == Drawing(Polygon(color="blue"))
    assert made(below, {"shape.type": "circle"}) == Drawing(Circle(color="blue", radius=2.0))


def test_lists_on_a_command_line_have_commas():
    assert made({"shape.type": "polygon", "shape.tags": "a,b"}, file=None).shape.tags == ("a", "b")
    with pytest.raises(InputError, match=r"a\.yaml: shape\.tags is 'a,b'; it must be a list of strings"):
        made({"shape.type": "polygon", "shape.tags": "a,b"})


@pytest.mark.parametrize(("value", "border"), [("auto", "auto"), ("2", 2.0)])
def test_a_word_beside_the_numbers(value, border):
    assert made({"shape.border": value}, file=None).shape.border == border
    assert flat(made({"shape.border": border}))["shape.border"] == border


def test_another_word_is_refused():
    with pytest.raises(InputError, match=r"a\.yaml: shape\.border is 'wide'; it must be a finite number or auto"):
        made({"shape.border": "wide"})


def test_encoded_configurations_are_built_again():
    drawing = Drawing(Polygon(tags=("a",)))
    assert encode(drawing) == {"shape": {"type": "polygon", "color": "red", "sides": 3, "label": None, "tags": ["a"]}}
    assert made(flat(drawing)) == drawing
    assert list(schema(Drawing).fields) == [
        "shape.type",
        "shape.color",
        "shape.radius",
        "shape.border",
        "shape.line_width",
    ]


def test_unknown_keys():
    with pytest.raises(InputError, match=r"a\.yaml: unknown key 'shape\.radios'; did you mean shape\.radius\?"):
        made({"shape.radios": 1})
    with pytest.raises(InputError, match=r"did you mean shape\.line_width\?"):
        made({"shape.lw": 1})
    with pytest.raises(InputError, match=r"unknown option '--lw'; did you mean --shape\.line_width\?"):
        made({"lw": 1}, file=None)
    with pytest.raises(
        InputError, match=r"valid fields for shape \(type polygon\) are type, color, sides, label, tags"
    ):
        made({"shape.type": "polygon", "shape.zzz": 1})
