"""What the documentation tells a reader to type is what the code takes, and what it takes from the code is current."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import click
import jsonschema_rs
import pytest
import yaml
from dagster import validate_run_config

from checkout import CHECKOUT
from containers.gateway import config as gateway
from containers.gateway.metrics import Metrics
from containers.gateway.router import Router
from pipeline.cli import main
from pipeline.definitions import defs
from pipeline.serving.deployment import cluster
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.workers.launchers.placement import placement
from registry import policy
from registry.__main__ import EXIT_STATUSES, _parser

DOCS = CHECKOUT / "docs"
GENERATED = DOCS / "reference"
PAGES = sorted([
    *CHECKOUT.glob("*.md"),
    *(page for page in DOCS.rglob("*.md") if page.parent != GENERATED),
    *(page for folder in ("containers", "evals", "pipeline", "registry") for page in (CHECKOUT / folder).rglob("*.md")),
])  # fmt: skip
DEMO = CHECKOUT / "models" / "demo.yaml"
SCHEMA = json.loads((DOCS / "model.schema.json").read_text())
# What the pages call beside ours.
OTHERS = {
    "base64", "bash", "cat", "cd", "cosign", "curl", "docker", "git", "helm", "jq", "kubectl", "model_signing",
    "openssl", "printf", "python", "python3", "rm", "tar", "uv",
}  # fmt: skip


class Block:
    """A fenced block of a page: its language, its title, its text."""

    def __init__(self, page: Path, info: str, text: str) -> None:
        self.page = page.relative_to(CHECKOUT)
        self.language, _, rest = info.partition(" ")
        self.title = rest.removeprefix('title="').removesuffix('"')
        self.text = text


def blocks(*languages: str) -> list[Any]:
    """Every block in one of the languages, for `parametrize`."""
    found = [
        Block(page, info, text)
        for page in PAGES
        for info, text in re.findall(r"^```(\w+[^\n]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    return [
        pytest.param(block, id=f"{block.page}-{number}")
        for number, block in enumerate(found)
        if block.language in languages
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, each as words; pipes and lists are several."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word in {"|", "&&"}:
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and what is left of them."""
    found: click.Command = main
    rest = list(words)
    while isinstance(found, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in found.commands, f"there is no `{' '.join(words)}`"
        found = found.commands[name]
    return found, rest


def slipway(words: list[str]) -> None:
    found, rest = command(words)
    found.make_context(" ".join(words), rest).close()


def slipway_registry(words: list[str]) -> None:
    _parser({}).parse_args(words)


def make(words: list[str]) -> None:
    targets = re.findall(r"^([\w./-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


def export(words: list[str]) -> None:
    """A variable is one of the settings', or stands in the table of those that clients honour."""
    known = {each.metadata["variable"] for each in fields(Settings) if each.metadata}
    known |= set(re.findall(r"`([A-Z_]+)`", (DOCS / "network.md").read_text())) | {"PATH"}
    assert {word.partition("=")[0] for word in words} <= known


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "slipway": slipway, "slipway-registry": slipway_registry, "make": make, "export": export,
}  # fmt: skip


@pytest.mark.parametrize("block", blocks("sh"))
def test_every_command_is_one_that_the_code_takes(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo-awq").mkdir()
    monkeypatch.chdir(tmp_path)
    for words in commands(block.text):
        name = words[0].removeprefix(".venv/bin/")
        if name in CHECKS:
            CHECKS[name](words[1:])
            continue
        assert name in OTHERS, f"nothing here knows `{name}`"
        if name.startswith("python") and words[1] == "-m":
            import_module(words[2])
        for word in words[1:]:
            if re.fullmatch(r"(benchmarks|tests|docs|requirements|registry)/[\w./-]+", word):
                assert (CHECKOUT / word).exists(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_every_command_within_a_sentence_exists_with_its_options(page: Path) -> None:
    for text in re.findall(r"`slipway ([a-z]+(?: [^`\n]*)?)`", page.read_text()):
        words = [word.strip("[]…") for word in text.split("|")[0].split()]
        found, _ = command([word for word in words if not word.startswith("-")])
        options = {name for each in found.params for name in each.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, text
    for target in re.findall(r"`make ([a-z-]+)`", page.read_text()):
        make([target])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_every_link_leads_to_a_file_of_the_checkout(page: Path) -> None:
    """Links of the site are checked, with their anchors, when it is built; this looks at all other pages, too."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_example_in_yaml_is_read_by_what_reads_it(block: Block, tmp_path: Path) -> None:
    document = yaml.safe_load(block.text)
    path = tmp_path / "example.yaml"
    path.write_text(block.text)
    if block.title.startswith("workers"):
        placement(path)
    elif block.title == "cluster.yaml":
        cluster(path)
    elif block.title == "the run's config":
        validate_run_config(defs.resolve_job_def("release_model"), document)
    elif block.title.startswith(("a model file's", "models/")):
        whole = block.title.endswith(".yaml")
        demo = yaml.safe_load(DEMO.read_text())
        replaced = {"evals", "calibration", "schemes"}
        others = {} if whole else {key: section for key, section in document.items() if key not in replaced}
        sections = {
            key: {**demo.get(key, {}), **section} if isinstance(section, dict) else section
            for key, section in others.items()
        }
        check_model(document if whole else {**demo, **document, **sections}, tmp_path)


def check_model(model: dict[str, Any], folder: Path) -> None:
    """A model file is taken by the editors' schema and by what reads it, beside files of the names that it says."""
    text = yaml.safe_dump(model)
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    text = re.sub(r"expires: [\d-]+", f"expires: {tomorrow}", text)
    vex = {
        "@context": "https://openvex.dev/ns/v0.2.0", "@id": "https://example.com/1", "author": "Example", "version": 1,
        "timestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "statements": [{
            "vulnerability": {"name": "CVE-2026-0001"}, "products": [{"@id": "pkg:deb/debian/libfoo1"}],
            "status": "not_affected", "justification": "component_not_present",
        }],
    }  # fmt: skip
    for name in re.findall(r"file:([\w./-]+)", text):
        (folder / name).parent.mkdir(exist_ok=True)
        if name != "demo/model":
            (folder / name).write_text(json.dumps(vex))
    path = folder / f"{model['model']}.yaml"
    path.write_text(text)
    load(path)
    jsonschema_rs.validate(SCHEMA, yaml_as_json(text))


def yaml_as_json(text: str) -> Any:  # noqa: ANN401 - any document
    """A YAML document as an editor's schema sees it: a day is text."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


@pytest.mark.parametrize("block", blocks("json", "toml", "python"))
def test_every_other_example_is_read_by_what_reads_it(block: Block) -> None:
    if block.title == "gateway.json":
        gateway.GatewaySettings.model_validate_json(block.text)
    elif block.title == "routes.json":
        gateway.Routes.model_validate_json(block.text)
    elif block.title == "policy.toml":
        document = tomllib.loads(block.text)
        assert all(content.keys() <= policy._KEYS[name] for name, content in document.items())
    else:
        assert block.language == "python"
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom):
                assert {each.name for each in node.names} <= set(dir(import_module(str(node.module))))


def test_the_editors_schema_takes_the_demo_and_no_misspelt_key() -> None:
    demo = yaml_as_json(DEMO.read_text())
    schema = jsonschema_rs.validator_for(SCHEMA)
    schema.validate(demo)
    assert (DEMO.parent / DEMO.read_text().partition("$schema=")[2].split()[0]).resolve() == DOCS / "model.schema.json"
    for misspelt in (
        {**demo, "calibraton": demo["calibration"]},
        {**demo, "schemes": {"awq": {**demo["schemes"]["awq"], "groupsize": 64}}},
        {**demo, "load": {**demo["load"], "slo": {"p95_latancy_ms": 2000}}},
        {**demo, "load": {**demo["load"], "profiles": ["quik"]}},
        {**demo, "evals": {"tasks": {"cloze": {"data": "file:x", "max_dropp": 0.1}}}},
        {key: value for key, value in demo.items() if key != "source"},
    ):
        assert not schema.is_valid(misspelt)


@pytest.mark.parametrize("page", ["model-file", "workers-file", "cluster-file", "gateway-files", "environment"])
def test_every_key_that_a_person_writes_is_described(page: str) -> None:
    rows = [line for line in (GENERATED / f"{page}.md").read_text().splitlines() if line.startswith("| `")]
    assert rows
    assert [line for line in rows if line.endswith("|  |")] == []


def test_what_the_documentation_takes_from_the_code_is_current() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "generator", "--check"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_test_that_security_names_exists() -> None:
    for path, name in re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", (CHECKOUT / "SECURITY.md").read_text()):
        assert f"def {name}" in (CHECKOUT / path).read_text(), f"{path}::{name}"


def test_the_gateways_metrics_are_those_in_its_guide() -> None:
    metrics = Metrics()
    metrics.show(cast("Router", SimpleNamespace(pools={}, everyone=list)), list)
    shown = {each.name.removeprefix("slipway_gateway_") for each in metrics.registry.collect()}
    table = (DOCS / "how-to" / "run-the-gateway.md").read_text().partition("## Metrics")[2]
    told = re.findall(r"`([a-z_]+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)))
    assert {name.removesuffix("_total") for name in told} == shown


def test_the_clients_readme_has_its_exit_statuses() -> None:
    rows = re.findall(r"^\| (\d) \| (.*) \|$", (CHECKOUT / "registry" / "README.md").read_text(), re.MULTILINE)
    assert {int(status): meaning for status, meaning in rows} == EXIT_STATUSES


def test_every_variable_that_is_read_is_declared() -> None:
    asked = set()

    class Recorded(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - as dict has it
            asked.add(key)
            return super().get(key, default)

    Settings.read(Recorded())
    assert asked == {each.metadata["variable"] for each in fields(Settings) if each.metadata}
