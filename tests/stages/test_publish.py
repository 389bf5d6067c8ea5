"""A release is published on a stand-in hub, in moto's S3 and in a real container registry, and pulled from each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hub_cards
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import HfApi, ModelCard
from real_server import BUCKET, s3_server

from containers.image.distribution import Registry
from pipeline.cli import main
from pipeline.errors import PublishError
from pipeline.publishing.card import BILL, CONFIGURATION, card
from pipeline.publishing.places import _BucketPlace
from pipeline.publishing.publish import publish
from pipeline.settings import Settings
from pipeline.stages import promotion
from pipeline.stages.run import run
from pipeline.stages.table import RELEASE
from pipeline.trust import trust_of
from registry import seal
from registry.manifest import MANIFEST, Manifest, MergedAdapter
from registry.verify import verify
from stages.loopback_registry import serving as serving_registry
from unit.pipeline import hub_server
from unit.pipeline.release_evidence import Made, settings_of

FAMILIES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "model_families.json").read_text())[
    "families"
]
NAME, SECRET, OTHER = "demo-gptq", "hf_secret", "hf_other"
GIT = b"*.safetensors filter=lfs\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A home with a champion."""
    made = Made(settings_of(tmp_path_factory.mktemp("publish") / "home"))
    promotion.promote(made.context, run(RELEASE, made.context, made.artifacts()))
    return made


@pytest.fixture
def hub() -> Iterator[hub_server.StandInHub]:
    with hub_server.serving({".gitattributes": GIT}) as hub:
        yield hub


@dataclass(frozen=True)
class Command:
    """`slipway` in the home."""

    made: Made

    def __call__(self, *words: str, **variables: str) -> Result:
        environment = {"SLIPWAY_HOME": str(self.made.settings.home), **variables}
        return CliRunner().invoke(main, list(words), env=environment, catch_exceptions=False)


def check_place(place: str, made: Made, tmp_path: Path, **variables: str) -> None:
    """Publish twice, and pull what is there."""
    slipway = Command(made)
    shown = slipway("publish", NAME, place, "--dry-run", "--json", **variables)
    assert shown.exit_code == 0, shown.output
    first = slipway("publish", NAME, place, **variables)
    assert (first.exit_code, first.stdout.startswith(f"published to {place}")) == (0, True), first.output
    again = slipway("publish", f"{NAME}@champion", place, **variables)
    assert (again.exit_code, "already: nothing was written" in again.stdout) == (0, True), again.output
    pulled = slipway("pull", place, str(tmp_path / "pulled"), **variables)
    assert pulled.exit_code == 0, pulled.output
    manifest = verify(tmp_path / "pulled", trust_of(made.settings)).manifest
    assert manifest.name == NAME
    assert json.loads(shown.stdout)["manifest_digest"] == manifest.digest


def cancel(owner: object, method: str, place: str, settings: Settings) -> None:
    """Publish, and press Ctrl-C where ``method`` is called, which comes last."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, interrupt)
        with pytest.raises(KeyboardInterrupt):
            publish(NAME, place, settings, print)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's upload
def test_a_hub_gets_one_commit_with_the_card(made: Made, hub: hub_server.StandInHub, tmp_path: Path) -> None:
    hub.token = hub.writer = SECRET
    place = f"hf://{hub_server.REPOSITORY}"
    cancel(HfApi, "create_commit", place, replace(made.settings, hub_endpoint=hub.endpoint, hub_token=SECRET))
    assert hub.files == {".gitattributes": GIT}
    check_place(place, made, tmp_path, HF_ENDPOINT=hub.endpoint, HF_TOKEN=SECRET)
    assert len(hub.commits) == 1
    text = hub.files["README.md"].decode()
    assert f"slipway pull {place} FOLDER" in text
    assert metadata_of(text)["tags"] == ["slipway", "vllm", "quantized", "gptq"]


def test_what_a_hub_refuses_is_one_line_without_the_token(made: Made, hub: hub_server.StandInHub) -> None:
    hub.writer = SECRET
    settings = replace(made.settings, hub_endpoint=hub.endpoint, hub_token=OTHER)
    with pytest.raises(PublishError, match="refused hf://org/tiny@main with status 403") as error:
        publish(NAME, f"hf://{hub_server.REPOSITORY}", settings, print)
    assert OTHER not in str(error.value)
    assert set(hub.files) == {".gitattributes"}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's upload
def test_what_the_hub_warns_of_is_shown_once(made: Made, hub: hub_server.StandInHub) -> None:
    hub.warnings = ["no language\nis stated"]
    settings, lines = replace(made.settings, hub_endpoint=hub.endpoint), list[str]()
    publish(NAME, f"hf://{hub_server.REPOSITORY}", settings, lines.append)
    assert lines.count("the hub warns of the model card: no language is stated") == 1
    assert len(hub.commits) == 1


def test_a_card_that_the_hub_refuses_is_one_line_and_nothing_is_uploaded(
    made: Made, hub: hub_server.StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.publishing.publish.card", lambda *_: "---\nlicense: none-such\n---\n\n# Mine\n")
    settings = replace(made.settings, hub_endpoint=hub.endpoint)
    with pytest.raises(PublishError, match=r"the hub refuses the model card for hf://org/tiny: .*none-such") as error:
        publish(NAME, f"hf://{hub_server.REPOSITORY}", settings, print)
    assert "\n" not in str(error.value)
    assert (hub.uploads, set(hub.files)) == ({}, {".gitattributes"})


def test_a_bucket_gets_the_manifest_last(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server(tmp_path) as address:
        variables = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "key",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        place = f"s3://{BUCKET}/releases/demo"

        def cut_off(self: Any, files: Any, progress: Any) -> None:  # noqa: ANN401
            upload(self, {name: path for name, path in files.items() if name != MANIFEST}, progress)
            raise KeyboardInterrupt

        upload = _BucketPlace._upload
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_BucketPlace, "_upload", cut_off)
            with pytest.raises(KeyboardInterrupt):
                publish(NAME, place, made.settings, print)
        pulled = Command(made)("pull", place, str(tmp_path / "nothing"))
        assert (pulled.exit_code, "holds no release" in pulled.output) == (1, True)
        check_place(place, made, tmp_path)


def test_a_container_registry_gets_an_artifact(made: Made, tmp_path: Path) -> None:
    with serving_registry(tmp_path / "registry") as address:
        place = f"oci://{address}/releases/demo"
        cancel(Registry, "put_manifest", place, made.settings)
        pulled = Command(made)("pull", place, str(tmp_path / "nothing"))
        assert (pulled.exit_code, "holds no release" in pulled.output) == (1, True)
        check_place(place, made, tmp_path)
        verified = Command(made)("verify", place, "--json")  # what was attached when it was published
        assert verified.exit_code == 0, verified.output
        digest = json.loads(verified.stdout)["reference"].partition("@")[2]
        pinned = Command(made)("pull", f"{place}@{digest}", str(tmp_path / "pinned"))
        assert pinned.exit_code == 0, pinned.output


def test_a_folder_appears_when_it_is_whole(made: Made, tmp_path: Path) -> None:
    place = f"file:{tmp_path}/releases/demo"
    cancel(seal, "place", place, made.settings)
    assert list((tmp_path / "releases").iterdir()) == []
    check_place(place, made, tmp_path)


def test_something_else_is_never_overwritten(made: Made, hub: hub_server.StandInHub) -> None:
    settings = replace(made.settings, hub_endpoint=hub.endpoint)
    place = f"hf://{hub_server.REPOSITORY}"
    hub.files["config.json"] = hub.files["README.md"] = hub.files["mine.txt"] = b"{}"
    with pytest.raises(PublishError, match=r"holds something else, such as mine\.txt: nothing was written"):
        publish(NAME, place, settings, print)
    other = Manifest.parse((Path(__file__).parents[1] / "compat/5-mlbom/release" / MANIFEST).read_bytes())
    hub.files[MANIFEST] = other.canonical()
    with pytest.raises(PublishError, match=rf"holds another release, {other.name} {other.digest}"):
        publish(NAME, place, settings, print)
    assert not hub.commits


def test_a_place_of_another_kind_is_refused(made: Made) -> None:
    for place in ("https://example.org/x", "hf://only", "s3://bucket", "oci://host", "file:/"):
        with pytest.raises(PublishError, match="expected hf://ORG/NAME"):
            publish(NAME, place, made.settings, print)


def files_of(license_name: str | None = None, family: str = "llama") -> dict[str, bytes]:
    """What a card is made from: a bill of materials, which may state a license, and the configuration of a model."""
    licenses = [] if license_name is None else [{"license": {"name": license_name}}]
    bill = {"metadata": {"component": {"licenses": licenses}}}
    return {BILL: json.dumps(bill).encode(), CONFIGURATION: json.dumps(FAMILIES[family]["config"]).encode()}


def manifest_of(made: Made, uri: str, adapter: str | None = None) -> Manifest:
    """The release's manifest, as if the model had come from there, perhaps with an adapter merged."""
    manifest = Manifest.parse((run(RELEASE, made.context, made.artifacts()).folder / MANIFEST).read_bytes())
    source = manifest.source.model_copy(update={"uri": uri})
    if adapter is not None:
        merged = MergedAdapter(
            uri=adapter, revision=source.revision, rank=8, modules=("q_proj",), files=source.files,
            pins_digest=manifest.digest,
        )  # fmt: skip
        source = source.model_copy(update={"adapter": merged})
    return manifest.model_copy(update={"source": source})


def metadata_of(text: str) -> dict[str, Any]:
    """A card's metadata, which have the form that the hub documents."""
    assert hub_cards.problems(text) == []
    found: dict[str, Any] = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    return found


@pytest.mark.parametrize(
    ("named", "stated"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC-BY-NC-SA-4.0", {"license": "cc-by-nc-sa-4.0"}),
        ("Our own license, 1.0", {"license": "other", "license_name": "our-own-license-1.0"}),
    ],
)
def test_a_license_is_one_of_the_hubs_or_has_a_name(made: Made, named: str, stated: dict[str, str]) -> None:
    found = metadata_of(card(manifest_of(made, "file:mine"), files_of(named), "hf://me/mine"))
    assert {key: value for key, value in found.items() if key.startswith("license")} == stated


@pytest.mark.parametrize(
    ("origins", "base"),
    [
        (["file:mine"], None),
        (["s3://bucket/mine", "hf://org/adapter"], "org/adapter"),
        (["hf://org/base", "hf://org/adapter"], ["org/base", "org/adapter"]),
    ],
    ids=["a folder", "an adapter on a hub", "a base and an adapter on a hub"],
)
def test_bases_are_those_on_a_hub(made: Made, origins: list[str], base: object) -> None:
    found = metadata_of(card(manifest_of(made, *origins), files_of(), "hf://me/mine"))
    assert (found.get("base_model"), "base_model_relation" in found) == (base, base is not None)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", "text-generation"),
        ("gemma3_text", "text-generation"),
        ("gemma3", "image-text-to-text"),
        ("qwen3_vl", "image-text-to-text"),
        ("voxtral", "audio-text-to-text"),
    ],
)
def test_the_task_is_what_the_model_accepts(made: Made, family: str, task: str) -> None:
    text = card(manifest_of(made, "hf://org/base"), files_of(family=family), "hf://me/mine")
    assert metadata_of(text)["pipeline_tag"] == task


def test_the_card_names_base_relation_license_and_loss(made: Made) -> None:
    manifest = manifest_of(made, "hf://org/base")
    text = card(manifest, files_of("Apache-2.0"), "hf://me/mine")
    data = metadata_of(text)
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    metrics = next(gate.verdict.metrics for gate in manifest.gates if gate.verdict.gate == "drift")
    low, high = -metrics["cloze.drop_upper"], -metrics["cloze.drop_lower"]
    assert f"| cloze | 800 | accuracy {-metrics['cloze.drop']:+.2%} | {low:+.2%} to {high:+.2%} |" in text
    assert "| scan | inconclusive |" in text
    assert "calibration.jsonl`, 32 samples of up to 200 tokens: 75% cut, 0% empty |" in text
