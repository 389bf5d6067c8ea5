"""What is champion, looked at again when the database has learned something: real Trivy, real registry of models."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml
from image_record import image_record
from release_folder import FILES, make_release

from containers.scan.evidence import Secret
from containers.scan.scan import in_engine, scan
from homes import DEMO, SLIPWAY, make_home
from pipeline.operations.rescan import TAG, RescanError, Rescanned, rescan
from pipeline.settings import Settings
from pipeline.trust import signing_key, trust_of
from registry import catalog
from registry.promote import promote
from registry.pull import read_metadata
from registry.signing import load_or_create_key, load_trusted_keys, public_path
from stages.synthetic_image import make_image
from stages.trivy_db.make_trivy_db import write_database
from unit.pipeline.release_evidence import SCAN

ADVISORIES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "trivy_db" / "advisories.json").read_text())
# What was known on the day of the release: an unfixed LOW, and things that are not in the image.
THEN = [item for item in ADVISORIES if item["id"] in {"CVE-2099-0002", "CVE-2099-0004", "CVE-2099-0005"}]
# The same image with what the advisories are about newer, or not there.
CLEAN = {
    "var/lib/dpkg/status": "Package: tar\nStatus: install ok installed\nVersion: 1.34\nArchitecture: amd64\n\n",
    "usr/lib/python3/dist-packages/idna-3.6.dist-info/METADATA": "Metadata-Version: 2.1\nName: idna\nVersion: 4.0\n\n",
}
Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient) -> Iterator[str]:
    """A Debian 12 with openssl, tar and idna."""
    image_id = make_image(engine, "slipway-test-rescan")
    yield image_id
    engine.images.remove(image_id, force=True)


@pytest.fixture
def variables(machine: Settings, tmp_path: Path) -> dict[str, str]:
    """A home with a database of its own, and a folder of models that rescans may roll back."""
    variables = make_home(tmp_path / "home", machine)
    (tmp_path / "home" / "trivy").unlink()
    (tmp_path / "models").mkdir()
    return {**variables, "SLIPWAY_MODELS": str(tmp_path / "models")}


@pytest.fixture
def slipway(variables: dict[str, str]) -> Command:
    """The command; gives its exit status and its JSON."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        command = [SLIPWAY, *words, "--json"]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    return run


def model_file(folder: Path, **scan_section: object) -> None:
    content = yaml.safe_load((DEMO.parent / "demo.yaml").read_text())
    content["scan"] |= scan_section
    text = yaml.safe_dump(content).replace("file:demo/", f"file:{DEMO}/")
    (folder / "demo.yaml").write_text(text)


def released(
    engine: docker.DockerClient, image: str, variables: dict[str, str], folder: Path, *, number: int = 1
) -> None:
    """Scan the image with the database as it is, and promote a release with that very evidence."""
    settings = Settings.read(variables)
    evidence = folder / f"evidence-{number}"
    evidence.mkdir()
    scan(in_engine(engine, image), home=settings.home, folder=evidence, progress=print)
    files = {**FILES, "config.json": json.dumps({"number": number}).encode()}
    for name in ("scan.json", "sbom.cdx.json"):
        files[f"release/evidence/{name}"] = (evidence / name).read_bytes()
    files["release/evidence/image.json"] = image_record(image_id=image, reference=image).model_dump_json().encode()
    key = load_or_create_key(settings.signing_key)
    make_release(folder / f"release-{number}", key, files=files, created=f"2026-11-2{number}T00:00:00Z")
    trusted = load_trusted_keys([public_path(settings.signing_key)])
    promote(folder / f"release-{number}", settings.tracking_uri, trusted, champion="automatic", key=key)


def champion(variables: dict[str, str]) -> catalog.Version:
    versions = catalog.current(Settings.read(variables).tracking_uri, "demo-awq")
    return next(version for version in versions if "champion" in version.aliases)


def test_a_champion_is_marked_once_the_database_knows_a_new_critical(
    engine: docker.DockerClient, image: str, variables: dict[str, str], slipway: Command, tmp_path: Path
) -> None:
    home = Settings.read(variables).home
    write_database(home / "trivy", THEN)
    released(engine, image, variables, tmp_path)
    status, told = slipway("rescan", "demo-awq")
    (entry,) = told["rescanned"]
    assert (status, entry["by"], entry["verdict"]["status"], entry["action"]) == (0, "sbom", "pass", "none")
    write_database(home / "trivy", ADVISORIES)
    status, told = slipway("rescan")
    (entry,) = told["rescanned"]
    assert (status, entry["by"], entry["verdict"]["status"], entry["action"]) == (3, "sbom", "fail", "marked")
    assert "CVE-2099-0001 CRITICAL in openssl" in entry["verdict"]["reason"]
    mark = json.loads(champion(variables).tags["slipway.rescan"])
    assert (mark["status"], mark["blocks"], champion(variables).version) == ("fail", True, "1")
    assert "CVE-2099-0001" in mark["reason"]


def test_where_the_file_says_so_it_is_rolled_back_unless_what_was_before_is_no_better(
    engine: docker.DockerClient, image: str, variables: dict[str, str], slipway: Command, tmp_path: Path
) -> None:
    home = Settings.read(variables).home
    model_file(tmp_path / "models", rescan="rollback")
    write_database(home / "trivy", THEN)
    clean = make_image(engine, "slipway-test-clean", CLEAN)
    try:
        released(engine, clean, variables, tmp_path, number=1)
        released(engine, image, variables, tmp_path, number=2)
        assert champion(variables).version == "2"
        write_database(home / "trivy", ADVISORIES)
        status, told = slipway("rescan", "demo-awq")
    finally:
        engine.images.remove(clean, force=True)
    (entry,) = told["rescanned"]
    assert (status, entry["version"], entry["action"]) == (3, "2", "rolled back"), entry["why"]
    assert champion(variables).version == "1"
    status, told = slipway("rescan", "demo-awq")
    assert (status, told["rescanned"][0]["action"]) == (0, "none")
    slipway("rollback", "demo-awq")  # by hand, back to what is refused; and now what is before it is made no better
    released(engine, image, variables, tmp_path, number=3)
    status, told = slipway("rescan", "demo-awq")
    (entry,) = told["rescanned"]
    assert (status, entry["version"], entry["action"]) == (3, "3", "kept")
    assert "the previous version, 2, is refused too" in entry["why"]


def test_a_waiver_in_the_models_file_holds_for_the_rescan_too(
    engine: docker.DockerClient, image: str, variables: dict[str, str], slipway: Command, tmp_path: Path
) -> None:
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415

    home = Settings.read(variables).home
    expires = (datetime.now(UTC) + timedelta(days=1)).date()
    common = {"owner": "jane@example.org", "reason": "not reachable", "expires": expires}
    waivers = [{"id": name, **common} for name in ("CVE-2099-0001", "CVE-2099-0003")]
    model_file(tmp_path / "models", waivers=waivers)
    write_database(home / "trivy", ADVISORIES)
    released(engine, image, variables, tmp_path)
    status, told = slipway("rescan", "demo-awq")
    assert (status, told["rescanned"][0]["verdict"]["status"]) == (0, "pass")


@pytest.mark.parametrize(
    ("damage", "cause"), [("stale", "database-stale"), ("absent", "database-absent"), ("damaged", "database-damaged")]
)
def test_a_database_that_can_not_know_proves_nothing(
    engine: docker.DockerClient, image: str, variables: dict[str, str], slipway: Command, tmp_path: Path,
    damage: str, cause: str,
) -> None:  # fmt: skip
    home = Settings.read(variables).home
    path = write_database(home / "trivy", THEN, age_hours=72 if damage == "stale" else 0)
    released(engine, image, variables, tmp_path)
    if damage == "absent":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(path.read_bytes()[:-4096])
    status, told = slipway("rescan")
    verdict = told["rescanned"][0]["verdict"]
    assert (status, verdict["status"], verdict["cause"]) == (3, "inconclusive", cause)


def test_a_line_that_is_not_there_is_named(variables: dict[str, str]) -> None:
    done = subprocess.run([SLIPWAY, "rescan", "demo-qwa"], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "`demo-qwa`: there is no such release" in done.stderr


SECRET = Secret(id="private-key", severity="HIGH", title="key", target="/srv/key.pem", line=1)


@dataclass
class Home:
    """A home without database and engine, whose champions' evidence stands for what is found in them."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    number: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        home = {"SLIPWAY_HOME": str(self.folder / "home"), "SLIPWAY_MODELS": str(self.folder / "models")}
        return Settings.read({**home, **self.variables})

    def release(self, model: str, *secrets: Secret) -> None:
        self.number += 1
        scanned = SCAN.model_copy(update={"secrets": secrets}).model_dump(mode="json", by_alias=True)
        evidence = {"scan.json": scanned, "sbom.cdx.json": {}, "image.json": image_record().model_dump(mode="json")}
        files = {**FILES, "config.json": json.dumps({"number": self.number}).encode()}
        files |= {f"release/evidence/{name}": json.dumps(content).encode() for name, content in evidence.items()}
        folder, key = self.folder / f"release-{self.number}", signing_key(self.settings)
        make_release(folder, key, model=model, files=files, created=f"2026-11-2{self.number}T00:00:00Z")
        promote(folder, self.settings.tracking_uri, trust_of(self.settings), champion="automatic", key=key)

    def rescan(self) -> list[Rescanned]:
        return rescan(self.settings, [], self.told.append)


@pytest.fixture
def quiet(tmp_path: Path) -> Home:
    (tmp_path / "models").mkdir()
    return Home(tmp_path)


def test_a_champion_that_can_not_be_looked_at_stops_none_of_the_others(quiet: Home) -> None:
    for model in ("a", "demo", "z"):
        quiet.release(model)
    (quiet.folder / "models" / "demo.yaml").write_text("scan: {fail_onn: [LOW]}")
    with pytest.raises(RescanError, match=r"^demo-awq could not be scanned: .*unknown key `scan.fail_onn`") as caught:
        quiet.rescan()
    assert [found.name for found in caught.value.found] == ["a-awq", "z-awq"]
    marked = {version.name for version in catalog.lines(quiet.settings.tracking_uri) if TAG in version.tags}
    assert marked == {"a-awq", "z-awq"}
    assert any("no model `a`" in line and "judged by the default policy" in line for line in quiet.told)


def test_a_vex_document_that_got_too_old_does_not_end_a_rollback_in_silence(quiet: Home) -> None:
    (quiet.folder / "models" / "old.json").write_text(
        json.dumps(
            {
                "@context": "https://openvex.dev/ns/v0.2.0", "@id": "https://example.org/1", "author": "Example",
                "timestamp": "2020-01-01T00:00:00Z", "version": 1,
                "statements": [{"vulnerability": {"name": "CVE-2099-0001"}, "products": [{"@id": "pkg:deb/debian/tar"}],
                                "status": "fixed"}],
            }
        )
    )  # fmt: skip
    model_file(quiet.folder / "models", rescan="rollback", vex=["file:old.json"])
    quiet.release("demo")
    quiet.release("demo", SECRET)
    with pytest.raises(RescanError, match=r"old\.json is dated 2020-01-01"):
        quiet.rescan()


def test_a_rollback_is_signed_and_its_champion_is_believed_as_the_policy_says(quiet: Home) -> None:
    signing_key(quiet.settings)
    public = public_path(quiet.settings.signing_key)
    (quiet.folder / "policy.toml").write_text(f'[signers]\nkeys = ["{public}"]\nsigned_moves = true\n')
    quiet.variables = {"SLIPWAY_POLICY": str(quiet.folder / "policy.toml")}
    model_file(quiet.folder / "models", rescan="rollback")
    quiet.release("demo")
    quiet.release("demo", SECRET)
    (found,) = quiet.rescan()
    assert (found.version, found.verdict.status, found.action) == ("2", "fail", "rolled back"), found.why
    settings = quiet.settings
    champion = read_metadata(
        "demo-awq@champion", (), tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings)
    )
    assert champion.version == "1"
