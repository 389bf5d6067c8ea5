"""What the code says of a field: type, limits and default as pydantic has them, meaning as the string below it."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Schema = dict[str, Any]
_LONGEST = 60
_SIZE = r"^\s*(\d*"  # as pydantic writes the form of a size
_NOTE = "<!-- Written by docs/generator from the code: change that, and run `make docs-reference`. -->"


def page(title: str, intro: str, parts: Iterable[str]) -> str:
    """Return a page of the reference."""
    return "\n\n".join(filter(None, [_NOTE, f"# {title}", intro, *parts])) + "\n"


def meanings(cls: type) -> dict[str, str]:
    """Return the string below each field of a class, those that it inherits among them."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] not in {"pipeline", "evals", "containers", "registry"}:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def described(schema: Schema, classes: Mapping[str, type]) -> Schema:
    """Return a schema with the meanings of its fields, and without what only pydantic wants."""
    sections = {**schema.get("$defs", {}), str(schema["title"]): schema}
    for name, section in sections.items():
        told = meanings(classes[name]) if name in classes else {}
        told |= {str(each.alias): told[key] for key, each in _fields(classes.get(name)) if each.alias and key in told}
        section.pop("title", None)
        section["description"] = one_line(section.get("description", ""))
        for key, field in section.get("properties", {}).items():
            field.pop("title", None)
            if key in told:
                field["description"] = one_line(told[key])
    return schema


def _fields(model: type | None) -> Iterable[tuple[str, Any]]:
    return getattr(model, "model_fields", {}).items()


def table(section: Schema) -> str:
    """Return a section's keys as a table; the meanings are left out where no key has one."""
    required, fields = section.get("required", ()), section.get("properties", {})
    told = any("description" in field for field in fields.values())
    rows = [row("key", "value", "default", *["meaning"] * told), "|---" * (3 + told) + "|"]
    for key, field in fields.items():
        default = "**required**" if key in required else _default(field)
        rows.append(row(code(key), kind(field), default, *[cell(field.get("description", ""))] * told))
    return "\n".join(rows)


def _default(field: Schema) -> str:
    if "default" not in field:
        return ""
    shown = code(field["default"])
    return shown if len(shown) <= _LONGEST else ""  # too long to be read in a table: its meaning says what it is


def kind(field: Schema) -> str:  # noqa: PLR0911 - a case a kind
    """Return what a field may hold, in words, with its limits."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[section](#{name.lower()})"
    if "const" in field:
        return code(field["const"])
    if "enum" in field:
        return ", ".join(code(value) for value in field["enum"])
    if "anyOf" in field or "oneOf" in field:
        kinds = dict.fromkeys(
            kind(each) for each in field.get("anyOf", field.get("oneOf")) if each.get("type") != "null"
        )
        return " or ".join(kinds)
    if field.get("type") == "array":
        items = field.get("items") or {}
        return f"list of {kind(items)}" if items else "list"
    if field.get("type") == "object" and {"additionalProperties", "patternProperties"} & field.keys():
        inner = field.get("additionalProperties") or next(iter(field["patternProperties"].values()))
        keys = field.get("propertyNames", {})
        named = f" by {kind(keys)}" if "enum" in keys else " by name"
        return kind(inner) + named if isinstance(inner, dict) else "mapping"
    if isinstance(field.get("type"), list):
        return " or ".join(kind({**field, "type": each}) for each in field["type"])
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "`true` or `false`",
        "object": "mapping",
    }
    formats = {"path": "path", "date": "day", "date-time": "time"}
    base = formats.get(field.get("format", ""), words.get(field.get("type", ""), "any"))
    return base + "".join(_limits(field))


def _limits(field: Schema) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    if found:
        yield f" ({', '.join(found)})"


def code(value: object) -> str:
    """Return a value as code, as one would type it in YAML."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{cell(text)}`"


def row(*cells: str) -> str:
    """Return a table's row."""
    return f"| {' | '.join(cells)} |"


def cell(text: str) -> str:
    """Return a text as a table's cell takes it."""
    return one_line(text).replace("|", "\\|")


def one_line(text: str) -> str:
    """Return a docstring's text in one line, its code in Markdown's single backticks."""
    return " ".join(text.replace("``", "`").split())
