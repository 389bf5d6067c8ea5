"""A YAML file that a person writes: read strictly, its problems explained with their path and a near name."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pipeline.errors import SpecError


def read(path: Path) -> dict[str, Any]:
    """Parse a file that holds a mapping.

    Raises:
        SpecError: it can't be read; where and why, in one line.
    """
    try:
        document = yaml.load(path.read_bytes(), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader that refuses duplicates
    except OSError as error:
        raise SpecError(f"can't read {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        place = f"{path}, line {error.problem_mark.line + 1}" if error.problem_mark else path
        raise SpecError(f"{place}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path} holds no mapping: expected `key: value` lines")
    return document


def explain(detail: Any, known: Iterable[str]) -> str:  # noqa: ANN401 - pydantic's own error record
    """One problem as a person reads it, with a near name for a key that is unknown."""
    *above, key = [str(part) for part in detail["loc"]]
    path = ".".join([*above, key])
    if detail["type"] == "extra_forbidden":
        return f"unknown key `{path}`{hint(key, known)}"
    if detail["type"] == "missing":
        return f"`{path}` is missing"
    if key == "[key]" and detail["type"] == "literal_error":
        return f"unknown key `{'.'.join(above)}`: expected {detail['ctx']['expected']}"
    found = "" if isinstance(detail["input"], BaseModel | dict) else f" (found {detail['input']!r})"
    return f"`{path}`: {detail['msg'].removeprefix('Value error, ')}{found}"


def keys(model: type[BaseModel]) -> Iterator[str]:
    """Every key that may stand anywhere in a file that is such a model."""
    for name, info in model.model_fields.items():
        yield name
        for part in [info.annotation, *getattr(info.annotation, "__args__", ())]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part)


def hint(name: str, known: Iterable[str]) -> str:
    """What a wrong name was meant to be, or all that there are where they are few; nothing where neither helps."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f": did you mean `{near[0]}`?"
    return f": there are {', '.join(f'`{item}`' for item in known)}" if len(known) <= 12 and known else ""


class _StrictLoader(yaml.SafeLoader):
    """YAML lets a key stand twice and takes the last; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: list[object] = []
        for key, _ in node.value:
            found = self.construct_object(key, deep=True)
            if found in keys:
                raise yaml.MarkedYAMLError(problem=f"the key `{found}` stands twice", problem_mark=key.start_mark)
            keys.append(found)
        return super().construct_mapping(node, deep)
