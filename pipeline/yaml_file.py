"""Reads a YAML file strictly; errors name the path of the key, and suggest a similar name."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from pipeline.errors import SpecError
from registry.suggestions import suggestion

# A model's file has some kilobytes and some hundred values; repeated aliases are counted each time.
_MOST_BYTES = 256 * 1024
_MOST_VALUES = 20_000
_MOST_DEPTH = 50
_LONGEST_SHOWN = 200
_MOST_SHOWN = 20  # problems of one file
_MERGE = "tag:yaml.org,2002:merge"


def read(path: Path) -> dict[str, Any]:
    """Parse a file that holds a mapping.

    Raises:
        SpecError: it can't be read; says where and why in one line.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise SpecError(f"{path} is too large: at most {_MOST_BYTES // 1024} KiB are read")
        document = yaml.load(data, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader that refuses duplicates
    except OSError as error:
        raise SpecError(f"can't read {path}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        place = f"{path}, line {error.problem_mark.line + 1}" if error.problem_mark else path
        raise SpecError(f"{place}: {error.problem}") from error
    except RecursionError as error:
        raise SpecError(f"{path} is nested too deeply: at most {_MOST_DEPTH} levels are read") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path} is not a mapping: expected `key: value` lines")
    return document


def listed(heading: str, problems: Iterable[str]) -> str:
    """The heading, and a line for each of the first problems; the rest is not looked at."""
    shown = list(itertools.islice(problems, _MOST_SHOWN + 1))
    if len(shown) > _MOST_SHOWN:
        shown[-1] = "and more"
    return "\n".join([heading, *(f"  {problem}" for problem in shown)])


def explain(detail: Any, known: Iterable[str]) -> str:  # noqa: ANN401 - pydantic's own error record
    """Describe a validation error, with a suggestion for an unknown key."""
    *above, key = [str(part) for part in detail["loc"]] or ["the file"]
    path = ".".join([*above, key])
    if detail["type"] == "extra_forbidden":
        return f"unknown key `{path}`{suggestion(key, known)}"
    if detail["type"] == "missing":
        return f"`{path}` is missing"
    if key == "[key]" and detail["type"] == "literal_error":
        return f"unknown key `{'.'.join(above)}`: expected {detail['ctx']['expected']}"
    found = "" if isinstance(detail["input"], BaseModel | dict) else f" (found {_shown(detail['input'])})"
    return f"`{path}`: {detail['msg'].removeprefix('Value error, ')}{found}"


def keys(model: type[BaseModel]) -> Iterator[str]:
    """Yield every key of a model and of the models in it."""
    for name, info in model.model_fields.items():
        yield name
        for part in [info.annotation, *getattr(info.annotation, "__args__", ())]:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part)


def _shown(value: object) -> str:
    found = repr(value)
    return found if len(found) <= _LONGEST_SHOWN else f"{found[:_LONGEST_SHOWN]}…"


class _StrictLoader(yaml.SafeLoader):
    """A loader that refuses what YAML allows and no person means.

    That is: a key that stands twice, of which YAML takes the last; a key that is a list or a mapping; aliases that
    repeat one another until a small file is a large document, or an endless one.
    """

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check_size(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401 - whatever the file holds
        """Construct a value; one that its type has not, as the 31st of November, is an error with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
            said = _shown(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            raise _problem(node, f"{said} can't be read: {error}") from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[object] = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _problem(key, "a key is a word here, not a list or a mapping")
            found = self.construct_object(key, deep=True)
            if found in keys:
                raise _problem(key, f"the key `{str(found)[:_LONGEST_SHOWN]}` stands twice")
            keys.add(found)
        return super().construct_mapping(node, deep)


def _check_size(root: yaml.Node) -> None:
    """Refuse a document that is too large or too deep once its aliases stand for what they name."""
    sizes: dict[int, tuple[int, int]] = {}

    def measure(node: yaml.Node, above: int) -> tuple[int, int]:
        """Values in a node and levels below it; of one that is being measured, an alias leads back to itself."""
        if id(node) not in sizes:
            if above > _MOST_DEPTH:
                raise _problem(node, f"nested too deeply: at most {_MOST_DEPTH} levels are read")
            sizes[id(node)] = (_MOST_VALUES + 1, 1)
            inner = [measure(child, above + 1) for child in _children(node)]
            sizes[id(node)] = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        size, depth = sizes[id(node)]
        if size > _MOST_VALUES or above + depth > _MOST_DEPTH + 2:
            raise _problem(node, f"its aliases repeat too much: at most {_MOST_VALUES} values are read")
        return size, depth

    measure(root, 0)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


def _problem(node: yaml.Node, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
