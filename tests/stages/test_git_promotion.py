"""The file in Git follows the champion: promotions into a real MLflow, pushed to a real repository."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from bundle_evidence import GATEWAY, evidence
from click.testing import CliRunner
from dagster import SkipReason, build_sensor_context
from image_record import DIGEST, image_record

from containers.kubernetes.bundle import Images, write_bundle
from homes import DEMO
from pipeline.cli import main
from pipeline.orchestration import automation
from pipeline.settings import Settings
from pipeline.stages.promotion import PromotedRelease, already_promoted, promote
from pipeline.stages.run import run
from pipeline.stages.table import RELEASE
from pipeline.trust import signing_key, trust_of
from registry import rollback
from registry.catalog import line
from registry.journal import PREFIX, JournalRecord, chain_break, records
from unit.containers.test_kubernetes import kustomized
from unit.pipeline.release_evidence import Made

FILE = "clusters/demo-gptq/kustomization.yaml"
NEWER = "sha256:" + "cd" * 32


@dataclass(frozen=True)
class Place:
    """A home whose model names a file in a repository."""

    settings: Settings
    repository: Path

    def made(self, digest: str = DIGEST) -> Made:
        image = {"reference": f"registry.example/demo@{digest}", "digest": digest}
        return Made(self.settings, model=self.settings.models / "demo.yaml", image=image)

    def promoted(self, digest: str = DIGEST) -> PromotedRelease:
        made = self.made(digest)
        release = run(RELEASE, made.context, made.artifacts(weights=digest.encode()))
        return promote(made.context, release)

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.repository, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def file(self) -> dict[str, object]:
        return dict(yaml.safe_load(self.git("show", f"main:{FILE}")))

    def trail(self) -> list[JournalRecord]:
        found = line(self.settings.tracking_uri, "demo-gptq")
        return [] if found is None else records(found)

    def protect(self) -> Path:
        hook = self.repository / "hooks" / "pre-receive"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text("#!/bin/sh\necho 'main is protected' >&2\nexit 1\n")
        hook.chmod(0o755)
        return hook


@pytest.fixture
def place(tmp_path: Path) -> Place:
    repository, models = tmp_path / "models.git", tmp_path / "models"
    models.mkdir()
    (models / "demo").symlink_to(DEMO)
    spec = yaml.safe_load(DEMO.with_suffix(".yaml").read_text())
    git = {"repository": str(repository), "path": "clusters/{release}/kustomization.yaml"}
    spec["registry"] = {**spec.get("registry", {}), "git": git}
    (models / "demo.yaml").write_text(yaml.safe_dump(spec))
    found = Place(Settings.read({**variables(tmp_path)}), repository)
    repository.mkdir()
    found.git("init", "--quiet", "--bare", "--initial-branch=main")
    tree = found.git("mktree", "--missing")
    who = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org")
    found.git("update-ref", "refs/heads/main", found.git(*who, "commit-tree", tree, "-m", "Begin"))
    return found


def variables(folder: Path) -> dict[str, str]:
    home = str(folder / "home")
    return {"SLIPWAY_HOME": home, "SLIPWAY_MODELS": str(folder / "models"), "HOME": home, "PATH": os.environ["PATH"]}


def tick(settings: Settings) -> str:
    """What the sensor says that pushes files which are behind."""
    found = automation.git_sensor(build_sensor_context(resources={"settings": settings}))
    assert isinstance(found, SkipReason)
    return str(found.skip_message)


def component(digest: str) -> dict[str, object]:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component",
        "images": [{"name": "registry.example/demo", "digest": digest}],
    }  # fmt: skip


def test_the_file_follows_promotions_and_rollbacks_and_the_audit_trail_has_each_commit(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.promoted()
    assert place.file() == component(DIGEST)
    made = place.made()
    release = run(RELEASE, made.context, made.artifacts(weights=DIGEST.encode()))
    assert already_promoted(made.context, release) is not None
    assert place.git("rev-list", "--count", "main") == "2"
    place.promoted(NEWER)
    assert place.file() == component(NEWER)
    assert "Deploy demo-gptq version 2" in place.git("log", "-1", "--format=%B", "main")

    for name, value in variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["rollback", "demo-gptq", "--json"], catch_exceptions=False)
    pushed = json.loads(done.stdout)["git"]
    assert (pushed["commit"], pushed["error"]) == (place.git("rev-parse", "main"), None)
    assert place.file() == component(DIGEST)

    trail = place.trail()
    acts = [(record.entry.action, record.entry.version, record.state) for record in trail]
    assert acts == [
        ("promote", "1", "done"), ("git", "1", "done"), ("promote", "2", "done"), ("git", "2", "done"),
        ("rollback", "1", "done"), ("git", "1", "done"),
    ]  # fmt: skip
    commits = [record.entry.pushed.commit for record in trail if record.entry.pushed]
    assert commits == place.git("rev-list", "--reverse", "main").split()[1:]
    found = line(place.settings.tracking_uri, "demo-gptq")
    written = [json.loads(found.tags[f"{PREFIX}{number:06}"])["entry"] for number in (1, 2)] if found else []
    assert ["pushed" in entry for entry in written] == [False, True], "an older Slipway refuses a key that it lacks"
    key = signing_key(place.settings).public
    assert chain_break(trail, [key]) is None
    assert all(record.signed_by([key]) for record in trail)
    shown = CliRunner().invoke(main, ["history", "demo-gptq"], catch_exceptions=False, env={"COLUMNS": "200"}).stdout
    assert commits[-1][:12] in shown


def test_a_refused_push_leaves_the_promotion_and_is_tried_again(place: Place, tmp_path: Path) -> None:
    hook = place.protect()
    made = place.made()
    release = run(RELEASE, made.context, made.artifacts(weights=DIGEST.encode()))
    promoted = promote(made.context, release)
    assert promoted.version.aliases == ("candidate", "champion")
    (warning,) = [told for told in made.told if told.startswith("warning:")]
    assert "main is protected" in warning
    assert "the aliases have moved" in warning
    assert [record.entry.action for record in place.trail()] == ["promote"]

    settings = replace(place.settings, webhook="https://hooks.example.org/secret")
    with build_sensor_context(resources={"settings": settings}) as context:
        for _ in range(2):
            found = automation.git_sensor(context)
            assert isinstance(found, SkipReason)
            assert "main is protected" in str(found.skip_message)
    (notice,) = (settings.home / "notices").iterdir()
    assert "main is protected" in notice.read_text()
    hook.unlink()

    # An entry that no trusted key signs would end every pull whose policy asks for signed moves.
    (public,) = place.settings.trusted_keys
    (tmp_path / "policy.toml").write_text(f'[signers]\nkeys = ["{public}"]\nsigned_moves = true\n')
    other = replace(place.settings, policy=tmp_path / "policy.toml", signing_key=tmp_path / "other.pem")
    signing_key(other)
    for stranger in (replace(place.settings, signing_key=tmp_path / "none.pem"), other):
        assert "has no trusted key to sign the entry with" in tick(stranger)
    assert place.git("rev-list", "--count", "main") == "1"

    assert "names the champion of demo-gptq" in tick(replace(other, signing_key=place.settings.signing_key))
    assert place.file() == component(DIGEST)
    assert tick(place.settings) == "every file in Git names its champion"
    assert [record.entry.action for record in place.trail()] == ["promote", "git"]


def test_an_image_that_no_cluster_can_pull_is_not_written(place: Place) -> None:
    made = Made(place.settings, model=place.settings.models / "demo.yaml", image={"reference": DIGEST})
    promote(made.context, run(RELEASE, made.context, made.artifacts()))
    assert any("the image of demo-gptq version 1 was not pushed" in told for told in made.told)
    assert place.git("rev-list", "--count", "main") == "1"


def test_a_rollback_elsewhere_is_followed_by_the_next_tick(place: Place) -> None:
    """By a program that knows the registry alone, as `registry.rollback` in a deployment system."""
    place.promoted()
    place.promoted(NEWER)
    rollback("demo-gptq", place.settings.tracking_uri, trust_of(place.settings), key=signing_key(place.settings))
    assert place.file() == component(NEWER)
    tick(place.settings)
    assert place.file() == component(DIGEST)


def test_kustomize_puts_the_files_digest_into_the_bundle(place: Place, tmp_path: Path) -> None:
    place.promoted(NEWER)
    write_bundle(evidence(), image_record(), tmp_path / "bundle", images=Images(gateway=GATEWAY))
    for name, text in {
        "champion": place.git("show", f"main:{FILE}"),
        "overlay": "resources: [../bundle/base]\ncomponents: [../champion]\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "kustomization.yaml").write_text(f"{text}\n")
    pods = [
        each["spec"]["template"]["spec"] for each in kustomized(tmp_path / "overlay") if each["kind"] == "Deployment"
    ]
    images = {each["image"] for pod in pods for each in [*pod["containers"], *pod.get("initContainers", ())]}
    assert f"registry.example/demo@{NEWER}" in images
    assert not any(DIGEST in image for image in images)
