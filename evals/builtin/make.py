"""Makes the built-in data from three of Debian 12's packages: WordNet, Python's documentation and its library.

    python evals/builtin/make.py FOLDER

FOLDER holds the packages (``apt-get download`` of each name below); their digests are checked. The same packages give
the same bytes. What a text is used for is decided by its page, module or WordNet entry, so that calibration and
held-out text share none; what still shares a run of words with calibration text is left out of the held-out sets.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import random
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from evals.drift.overlap import pooled, runs

PACKAGES = {
    "wordnet-base": "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "python3.11-doc": "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
    "libpython3.11-stdlib": "890b3540dad8a1ccc0deeca025db735bcc82629a76adacbe3b50fcc06ed528ca",
}
HERE = Path(__file__).parent
SEED = 20261130
CALIBRATION = {"prose": 160, "code": 128, "chat": 160}
HELD_OUT = {"prose": 96, "code": 32}
CLOZE = 1000
LONGEST = 1500  # characters of a document: about 400 tokens
SHORTEST = 700

_DOCUMENTATION = "usr/share/doc/python3.11/html/_sources"
_LIBRARY = "usr/lib/python3.11"
_ROLE = re.compile(r":[a-z:]+:`[!~]?(?:[^`<]*?\s*<[^`>]*>|([^`]*))`")
_TITLED_ROLE = re.compile(r":[a-z:]+:`([^`<]+?)\s*<[^`>]*>`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_UNWANTED = re.compile(r"(/home/|/root/|/usr/|/tmp/|[a-z]:\\|https?:|pypi|\|\w+\||[^\x20-\x7e\n])", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+")

Row = dict[str, object]
Entry = tuple[str, str, tuple[str, ...]]
T = TypeVar("T")


def main() -> None:
    """Write ``calibration.jsonl``, ``heldout.jsonl`` and ``cloze.jsonl`` beside this file, and their digests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages lie")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for name, digest in PACKAGES.items():
            _unpack(next(folder.glob(f"{name}_*.deb")), digest, root)
        sets = _sets(root)
    for name, rows in sets.items():
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    digests = json.loads((HERE / "digests.json").read_text(encoding="utf-8"))
    digests |= {f"{name}.jsonl": hashlib.sha256((HERE / f"{name}.jsonl").read_bytes()).hexdigest() for name in sets}
    (HERE / "digests.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _unpack(package: Path, digest: str, root: Path) -> None:
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != digest:
        raise SystemExit(f"{package.name}: expected sha256 {digest}, found {found}")
    subprocess.run(["dpkg-deb", "-x", package, root], check=True)


def _sets(root: Path) -> dict[str, list[Row]]:
    entries = list(_entries(root / "usr/share/wordnet"))
    documents = {
        "prose": [*_prose(root / _DOCUMENTATION), *_explained(entries)],
        "code": list(_code(root / _LIBRARY)),
        "chat": [*_asked(root / _DOCUMENTATION), *_defined(entries)],
    }
    calibration: list[Row] = []
    for kind, count in CALIBRATION.items():
        texts = [text for name, text in documents[kind] if not _is_held_out(name)]
        calibration += [{"text": text} for text in _drawn(texts, count, kind)]
    random.Random(SEED).shuffle(calibration)  # so that the first rows are a mixture too
    known = pooled(str(row["text"]) for row in calibration)
    held_out: list[Row] = []
    for kind, count in HELD_OUT.items():
        fresh = [(n, text) for n, text in documents[kind] if _is_held_out(n) and not runs(text) & known]
        held_out += [{"id": name, "text": text} for name, text in _drawn(fresh, count, f"held-out {kind}")]
    cloze = [item for item in _cloze(entries) if not runs(f"{item['context']} {item['choices']}") & known]
    return {"calibration": calibration, "heldout": held_out, "cloze": _drawn(cloze, CLOZE, "cloze")}


def _is_held_out(name: str) -> bool:
    """Whether a page, module or entry is for the held-out sets: a third of all, by name."""
    return hashlib.sha256(name.partition("#")[0].encode()).digest()[0] % 3 == 0


def _drawn(items: Sequence[T], count: int, what: str) -> list[T]:
    if len(items) < count:
        raise SystemExit(f"{what}: {len(items)} of {count} could be cut")
    chosen = sorted(random.Random(f"{SEED}:{what}").sample(range(len(items)), count))
    return [items[index] for index in chosen]


def _pages(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The pages of Python's documentation: name and paragraphs without markup, headings as ``# TEXT``."""
    for part in ("faq", "howto", "library", "reference", "tutorial"):
        for path in sorted((folder / part).glob("*.rst.txt")):
            yield f"{part}/{path.name.removesuffix('.rst.txt')}", _paragraphs(path.read_text(encoding="utf-8"))


def _paragraphs(text: str) -> list[str]:
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        if len(lines) >= 2 and re.fullmatch(r"([=\-~^*#\"])\1{3,}", lines[-1].strip()):
            found.append(f"# {_plain(lines[-2])}")
        elif lines and not lines[0].startswith((" ", "\t", "..", "*", "-", "+", "|", "=", ">>>", "#")):
            found.append(_plain(" ".join(lines)))
    return found


def _plain(text: str) -> str:
    """Return reStructuredText without its inline markup."""
    text = _LINK.sub(r"\1", _TITLED_ROLE.sub(r"\1", text))
    text = _ROLE.sub(lambda match: match[1] or "", text).replace("``", "`").replace("*", "")
    return " ".join(text.replace("--", "-").replace("`", "").removesuffix("::").split())


def _prose(folder: Path) -> Iterator[tuple[str, str]]:
    for name, paragraphs in _pages(folder):
        sentences = [each for each in paragraphs if not each.startswith("#") and each.endswith((".", "?", "!"))]
        yield from _cut(name, [each for each in sentences if not _UNWANTED.search(each)], "\n\n")


def _cut(name: str, parts: Iterable[str], between: str) -> Iterator[tuple[str, str]]:
    """Join consecutive parts to documents of `SHORTEST` to `LONGEST` characters, called ``NAME#NUMBER``."""
    number, held = 0, ""
    for part in parts:
        if len(part) > LONGEST:
            continue
        if len(held) + len(part) > LONGEST and len(held) >= SHORTEST:
            yield f"{name}#{number}", held
            number, held = number + 1, ""
        held = f"{held}{between}{part}" if held else part
        held = held if len(held) <= LONGEST else part
    if len(held) >= SHORTEST:
        yield f"{name}#{number}", held


def _code(folder: Path) -> Iterator[tuple[str, str]]:
    """Functions, methods and small classes of the library, whole."""
    for path in sorted(folder.glob("[a-z]*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        last = 0
        for node in sorted(
            (each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.FunctionDef | ast.ClassDef)),
            key=lambda each: each.lineno,
        ):
            source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
            if node.lineno > last and SHORTEST <= len(source) <= LONGEST and not _UNWANTED.search(source):
                last = node.end_lineno or node.lineno
                yield f"{path.name}#{node.lineno}", source


def _asked(folder: Path) -> Iterator[tuple[str, str]]:
    """Questions of Python's FAQ with their answers."""
    for name, paragraphs in _pages(folder):
        if not name.startswith("faq/"):
            continue
        question, answer = "", list[str]()
        for paragraph in [*paragraphs, "# "]:
            if not paragraph.startswith("#"):
                answer.append(paragraph)
                continue
            told = "\n\n".join(answer)[:LONGEST]
            if question.endswith("?") and len(told) > 200 and not _UNWANTED.search(question + told):
                yield f"{name}#{question}", f"Question: {question}\n\nAnswer: {told.rpartition('.')[0]}."
            question, answer = paragraph.removeprefix("# "), []


def _entries(folder: Path) -> Iterator[Entry]:
    """WordNet's entries with an example: a word, what it means, and the examples."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="ascii").splitlines():
            if line.startswith(" "):
                continue  # the license
            head, _, gloss = line.partition(" | ")
            meaning, *quoted = gloss.split('"')
            examples = tuple(each.strip() for each in quoted[::2] if each.strip())
            word = head.split(" ")[4].partition("(")[0].replace("_", " ")
            if examples and not _UNWANTED.search(gloss) and word.islower():
                yield word, meaning.strip(" ;"), examples


def _explained(entries: Iterable[Entry]) -> Iterator[tuple[str, str]]:
    """Definitions with their examples, a dozen a document; entries of one initial stay together."""
    for initial, group in itertools.groupby(sorted(entries), key=lambda entry: entry[0][:3]):
        told = [f"{word.capitalize()}: {meaning}. {' '.join(map(_sentence, shown))}" for word, meaning, shown in group]
        yield from _cut(f"wordnet/{initial}", told, "\n")


def _defined(entries: Iterable[Entry]) -> Iterator[tuple[str, str]]:
    """Questions about words, answered; several a document."""
    for initial, group in itertools.groupby(sorted(entries), key=lambda entry: entry[0][:3]):
        told = [
            f'Question: What does "{word}" mean in "{shown[0]}"?\n\nAnswer: It means: {meaning}.'
            for word, meaning, shown in group
        ]
        yield from _cut(f"wordnet/{initial}", told, "\n\n")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}" + ("" if text.endswith((".", "?", "!")) else ".")


def _cloze(entries: Iterable[Entry]) -> Iterator[Row]:
    """Four-way items: an example of a word against itself with two different words swapped, three ways."""
    for word, meaning, shown in sorted(entries):
        name = f"wordnet/{word[:3]}"
        example = _sentence(max(shown, key=len))
        if not _is_held_out(name) or not 7 <= len(_WORD.findall(example)) <= 20:
            continue
        rng = random.Random(f"{SEED}:{word}:{meaning}")
        wrong = _swapped(example, rng)[:3]
        answer = rng.randrange(4)
        context = f'The word "{word}" means: {meaning}. An example:'
        choices = [*wrong[:answer], example, *wrong[answer:]]
        identity = hashlib.sha256(f"{word}:{meaning}".encode()).hexdigest()[:12]
        yield {"id": f"{name}#{identity}", "context": context, "choices": [f" {c}" for c in choices], "answer": answer}


def _swapped(line: str, rng: random.Random) -> list[str]:
    """Every line that swapping two different words gives, in random order; all choices hold the same words."""
    results = set()
    for first, second in itertools.combinations(_WORD.finditer(line), 2):
        if first.group().lower() != second.group().lower():
            middle = line[first.end() : second.start()]
            results.add(line[: first.start()] + second.group() + middle + first.group() + line[second.end() :])
    return rng.sample(sorted(results - {line}), len(results - {line}))


if __name__ == "__main__":
    main()
