"""What a source must hold to be a model, and which of its files are pulled.

Only safetensors, JSON and tokenizer files at its top level are pulled. Pickles can run code when they are loaded, and
GGUF files can't be quantized again: a source with nothing else is refused. Code that comes with a model is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compatibility.backends import is_supported
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import (
    INDEX,
    SINGLE,
    HeaderError,
    read_index,
    read_model,
    weight_files,
)
from pipeline.errors import SourceError
from registry.bounded_json import Bounds, DocumentError, read_json
from registry.progress import Progress

# A tokenizer of 262,144 words takes 35 MB and two million values.
_DOCUMENT = Bounds(bytes=128 << 20, values=8_000_000, depth=64)
# A file name at the top level: no other folder, no control character, not too long for file systems.
_PLAIN = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,200}")
_TOKENIZER = re.compile(r"(tokenizer|spiece|sentencepiece|.+\.bpe)\.model|(merges|vocab)\.txt|.+\.(jinja|tiktoken)")
# Supported forms of a tokenizer, each with all of its files; other forms need sentencepiece or tiktoken.
_TOKENIZER_FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_PICKLE = re.compile(r".+\.(bin|pt|pth|ckpt|pkl|pickle|joblib)")


@dataclass(frozen=True)
class Contents:
    """What a source holds: which of its files are pulled, and what must be true of them.

    ``weights`` names the files with the weights, from all names and the start of an index; ``is_taken`` says whether a
    file is pulled, given those. ``require`` checks the names that are taken, ``check`` the pulled files. All three that
    check raise ``SourceError``.
    """

    weights: Callable[[str, list[str], Callable[[], bytes]], list[str]]
    is_taken: Callable[[str, Collection[str]], bool]
    require: Callable[[str, list[str]], None]
    check: Callable[[Path, Progress], None]


def missing_weights(uri: str, names: list[str], wanted: str) -> SourceError:
    """Return the error of a source that has no safetensors, perhaps only pickles or GGUF files."""
    if gguf := [name for name in names if name.lower().endswith(".gguf")]:
        return SourceError(
            f"{uri} has no safetensors, only {listed(gguf)}: the weights of a GGUF file are quantized already, for "
            "llama.cpp, and can't be quantized again without loss; name the model that it was made from"
        )
    if found := pickles(names):
        return SourceError(
            f"{uri} has no safetensors, only {listed(found)}: a pickle can run code when it is loaded; "
            "choose a revision with safetensors, or convert it"
        )
    return SourceError(f"{uri} has no {wanted}: it holds {listed(names) if names else 'nothing'}")


def pickles(names: list[str]) -> list[str]:
    """Return the names that are those of pickles."""
    return [name for name in names if _PICKLE.fullmatch(name)]


def is_hidden(path: Path) -> bool:
    """Whether a file is hidden, or what Python leaves."""
    return any((part.startswith(".") and part != "..") or part == "__pycache__" for part in path.parts)


def listed(names: list[str]) -> str:
    """Return the first of these names, and how many there are beside them."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _is_taken(name: str, weights: Collection[str]) -> bool:
    if _PLAIN.fullmatch(name) is None:
        return False
    if name.endswith(".json"):
        return name == INDEX or not name.endswith(".index.json")
    return name in weights or _TOKENIZER.fullmatch(name) is not None


def _weights(uri: str, names: list[str], index: Callable[[], bytes]) -> list[str]:
    """The files that hold the weights; ``SourceError`` if there are none, or only pickles."""
    if not any(name.endswith(".safetensors") for name in names):
        raise missing_weights(uri, names, SINGLE)
    try:
        return weight_files(names, read_index(index()) if INDEX in names else None)
    except HeaderError as error:
        raise SourceError(f"{uri}: {error}") from error


def _is_taken_to_draft(name: str, weights: Collection[str]) -> bool:
    return name in {"config.json", INDEX} or (_PLAIN.fullmatch(name) is not None and name in weights)


def _require_configuration(uri: str, taken: list[str]) -> None:
    if "config.json" not in taken:
        raise SourceError(f"{uri} has no config.json: it holds {listed(taken)}")


def _require(uri: str, taken: list[str]) -> None:
    """Check that there is a configuration, and a tokenizer in a form that every worker can read."""
    _require_configuration(uri, taken)
    if any(all(name in taken for name in form) for form in _TOKENIZER_FORMS):
        return
    found = [name for name in taken if _TOKENIZER.fullmatch(name)]
    raise SourceError(
        f"{uri} has no tokenizer.json"
        + (f", only {listed(found)}, which no worker can read" if found else "")
        + ": add it, or write it with transformers (`AutoTokenizer.from_pretrained(…).save_pretrained(…)`)"
    )


def _check_content(folder: Path, progress: Progress) -> None:
    """Parse headers and configuration: weights complete, an output head, a valid tokenizer, no code to run."""
    problems: list[str] = []
    documents: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            with path.open("rb") as stream:
                documents[path.name] = read_json(stream.read(_DOCUMENT.bytes + 1), _DOCUMENT)
        except DocumentError as error:
            problems.append(f"{path.name} can't be read: {error}")
    config = documents.get("config.json", {})
    if not isinstance(config, dict):
        problems.append("config.json is not a JSON object")
        config = {}
    model = ModelDescription(config, {})
    try:
        model = ModelDescription(config, read_model(folder))
    except HeaderError as error:
        problems += str(error).splitlines()
    if model.lacks_head:
        problems.append(
            "the weights have no output head, and config.json does not tie it to the embedding: weights are missing"
        )
    if "tokenizer.json" in documents and not _is_tokenizer(documents["tokenizer.json"]):
        problems.append("tokenizer.json is not a valid tokenizer: expected an object with `model` and its `vocab`")
    for name, document in documents.items():
        if not isinstance(document, dict) or not document.get("auto_map"):
            continue
        if is_supported(model.architecture):
            progress(f"{name}: `auto_map` is ignored: transformers supports `{model.architecture}` itself")
        else:
            problems.append(
                f"{name} has `auto_map`, and transformers does not support `{model.architecture[:60]}` itself: code "
                "that "
                "comes with a model is never run; choose another model"
            )
    if problems:
        raise SourceError(f"the source can't be used: {'; '.join(problems)}")


def _check_headers(folder: Path, _progress: Progress) -> None:
    try:
        read_model(folder)
    except HeaderError as error:
        raise SourceError(f"the source can't be used: {'; '.join(str(error).splitlines())}") from error


def _is_tokenizer(document: object) -> bool:
    """Whether a tokenizer.json has the form that the library `tokenizers` can read."""
    model = document.get("model") if isinstance(document, dict) else None
    return isinstance(model, dict) and isinstance(model.get("vocab"), dict | list)


MODEL: Contents = Contents(_weights, _is_taken, _require, _check_content)
"""A model: weights, configuration and tokenizer."""
DRAFT_MODEL = Contents(_weights, _is_taken_to_draft, _require_configuration, _check_headers)
"""A model, or a head, that drafts tokens: weights and configuration. It reads the tokens of the model it drafts for."""
