"""The demo model's text: CPython's standard library, cut into training, calibration, held-out and cloze sets.

Every set is a pure function of the standard library of the interpreter that runs this file, so the same Python
release gives the same bytes anywhere. The split is by file: the last modules of the top level, in name order, are
held out from training, from the tokenizer and from calibration.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

HELD_OUT_MODULES = 12
CALIBRATION_SAMPLES = 128
CALIBRATION_TOKENS = 250
DOCUMENT_TOKENS = 240
CLOZE_ITEMS = 2000
CLOZE_CONTEXT_TOKENS = 40  # 96 is answered no better (0.859 against 0.856 at 32), and costs twice the time
CLOZE_LINE_TOKENS = 32
SEED = 20261123

# Left out: tests, what distributions ship apart or rewrite, tables of numbers, and modules that name package hosts.
_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"}
    | {"pydoc_data", "ensurepip", "distutils", "turtledemo"}
)
_EXCLUDED_NAMES = ("_sysconfigdata", "sitecustomize", "encodings/cp", "encodings/iso8859", "encodings/mac_")
_WORD = re.compile(r"[A-Za-z_]\w*")
# Lines that name a place on somebody's disk or a package host are of no use as evidence and look like leaks.
_UNWANTED = re.compile(r"(/home/|/root/|/usr/|/tmp/|[a-z]:\\|pypi\.)", re.IGNORECASE)


class Tokenizer(Protocol):
    """What the cuts below need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens."""


@dataclass(frozen=True)
class Source:
    """One standard-library module: its path from the library's root, with `/`, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Split:
    """Training and held-out modules; no module is in both."""

    training: tuple[Source, ...]
    held_out: tuple[Source, ...]

    def digest(self) -> str:
        """Return the sha256 over every path and text, in order: the identity of the text the model saw."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for source in part:
                digest.update(f"{source.path}\0{len(source.text.encode())}\0".encode())
                digest.update(source.text.encode())
            digest.update(b"\0--\0")
        return digest.hexdigest()


def standard_library(root: Path | None = None) -> Split:
    """Read the library below `root` (this interpreter's by default) and split it by file."""
    root = root or Path(sysconfig.get_path("stdlib"))
    sources = tuple(_sources(root))
    held_out = tuple(source for source in sources if "/" not in source.path)[-HELD_OUT_MODULES:]
    names = {source.path for source in held_out}
    return Split(tuple(source for source in sources if source.path not in names), held_out)


def calibration(split: Split, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Cut one sample of `CALIBRATION_TOKENS` tokens from each of as many training files, drawn with a fixed seed.

    AutoAWQ drops samples over its length limit, so a sample never exceeds `CALIBRATION_TOKENS` when encoded again.
    """
    order = list(split.training)
    random.Random(SEED).shuffle(order)
    samples: list[dict[str, object]] = []
    for source in order:
        blocks = [block for block in documents(source.text, tokenizer, CALIBRATION_TOKENS) if is_plain(block)]
        full = [block for block in blocks if len(tokenizer.encode(block)) >= CALIBRATION_TOKENS * 4 // 5]
        if full:
            samples.append({"text": random.Random(f"{SEED}:{source.path}").choice(full)})
        if len(samples) == CALIBRATION_SAMPLES:
            return samples
    raise ValueError(f"only {len(samples)} of {CALIBRATION_SAMPLES} calibration samples could be cut")


def held_out_documents(split: Split, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Cut the held-out modules into documents of whole lines, each at most `DOCUMENT_TOKENS` tokens.

    The model is trained on windows of 256 tokens; a longer document would measure what it never learnt.
    """
    documents: list[dict[str, object]] = []
    for source in split.held_out:
        blocks = [block for block in documents(source.text, tokenizer, DOCUMENT_TOKENS) if is_plain(block)]
        full = [block for block in blocks if len(tokenizer.encode(block)) >= DOCUMENT_TOKENS // 2]
        documents += [{"id": f"{source.path}#{index}", "text": block} for index, block in enumerate(full)]
    return documents


def cloze(split: Split, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Make `CLOZE_ITEMS` four-way items: the true next line against itself with two different words swapped.

    Every choice holds the same words, so word frequencies alone do no better than chance (0.25).
    """
    candidates = [item for source in split.held_out for item in _cloze_of(source, tokenizer)]
    chosen = sorted(random.Random(SEED).sample(range(len(candidates)), CLOZE_ITEMS))
    return [candidates[index] for index in chosen]


def documents(text: str, tokenizer: Tokenizer, limit: int) -> Iterator[str]:
    """Group whole lines greedily into blocks that encode to at most `limit` tokens."""
    block: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        tokens = len(tokenizer.encode(line))
        if tokens > limit:
            continue
        # A merge across the line break can only shorten; one token is kept in hand for the odd split that does not.
        if size + tokens > limit - 1:
            yield "".join(block)
            block, size = [], 0
        block.append(line)
        size += tokens
    if block:
        yield "".join(block)


def is_plain(text: str) -> bool:
    """Whether `text` names no place on a disk and no package host."""
    return _UNWANTED.search(text) is None


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write one JSON object a line, keys in the order given."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _sources(root: Path) -> Iterator[Source]:
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths):
        if _EXCLUDED & set(name.split("/")) or name.startswith(_EXCLUDED_NAMES) or name.startswith("config-"):
            continue
        try:
            text = paths[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Source(name, text)


def _cloze_of(source: Source, tokenizer: Tokenizer) -> Iterator[dict[str, object]]:
    lines = source.text.splitlines()
    for number, line in enumerate(lines):
        context = _context(lines[:number], tokenizer)
        if not context.strip() or not is_plain(context + line) or len(tokenizer.encode(line)) > CLOZE_LINE_TOKENS:
            continue
        rng = random.Random(f"{SEED}:{source.path}:{number}")
        wrong = _swapped(line, rng)
        if len(wrong) < 3:
            continue
        answer = rng.randrange(4)
        choices = [*wrong[:answer], line, *wrong[answer:3]]
        yield {"id": f"{source.path}:{number + 1}", "context": context, "choices": choices, "answer": answer}


def _context(before: Sequence[str], tokenizer: Tokenizer) -> str:
    """Return the last whole lines of `before`, at most `CLOZE_CONTEXT_TOKENS` tokens, ending in a line break."""
    kept: list[str] = []
    size = 0
    for line in reversed(before):
        size += len(tokenizer.encode(line + "\n"))
        if size > CLOZE_CONTEXT_TOKENS:
            break
        kept.append(line + "\n")
    return "".join(reversed(kept)) if len(kept) >= 2 else ""


def _swapped(line: str, rng: random.Random) -> list[str]:
    """Return every distinct line that swapping two different words of `line` gives, in random order."""
    words = list(_WORD.finditer(line))
    results: set[str] = set()
    for i, first in enumerate(words):
        for second in words[i + 1 :]:
            if first.group() != second.group():
                middle = line[first.end() : second.start()]
                swapped = second.group() + middle + first.group()
                results.add(line[: first.start()] + swapped + line[second.end() :])
    results.discard(line)
    return rng.sample(sorted(results), len(results))
