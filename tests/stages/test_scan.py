"""The real Trivy on real images: what it finds, what it doesn't say, and what ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import docker
import pytest

from containers.errors import ScanError
from containers.image.blobs import BlobStore
from containers.image.layers import Member, archive
from containers.image.oci import OciImage, documents, place
from containers.scan import trivy
from containers.scan.evidence import ScanEvidence, read_scan
from containers.scan.policy import ScanPolicy
from containers.scan.scan import ScanTarget, in_engine, in_layout, scan, scan_key, scan_sbom
from containers.scan.scan_gate import judge, waived, warnings
from containers.scan.trivy import TrivyError, database, find_trivy, update_database
from stages.loopback_registry import serving
from stages.synthetic_image import FILES, make_image
from stages.trivy_db.make_trivy_db import write_database
from stages.trivy_db.push_trivy_db import push_database

ADVISORIES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "trivy_db" / "advisories.json").read_text())
# In two pieces, so that no scanner of this repository takes it for one.
PRIVATE_KEY = (
    "-----BEGIN RSA " + "PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA" * 40 + "\n-----END RSA " + "PRIVATE KEY-----\n"
)
HARMLESS = [{"id": "CVE-2099-9", "target": "pip", "package": "nobody-has-this", "fixed": "1", "severity": "LOW"}]


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient) -> Iterator[str]:
    """A Debian 12 with openssl, tar and idna."""
    image_id = make_image(engine, "slipway-test-scan")
    yield image_id
    engine.images.remove(image_id, force=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "evidence"
    path.mkdir()
    return path


def run(engine: docker.DockerClient, image: str, home: Path, folder: Path) -> ScanEvidence:
    return scan(in_engine(engine, image), home=home, folder=folder, progress=print)


def test_the_pinned_binary_is_found_and_is_the_one() -> None:
    out = subprocess.run([find_trivy(), "--version"], capture_output=True, text=True, check=True).stdout
    assert trivy.VERSION in out


def test_findings_of_every_kind_are_in_the_evidence_and_fail(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path
) -> None:
    write_database(tmp_path / "trivy", ADVISORIES)
    evidence = run(engine, image, tmp_path, folder)
    found = {(item.id, item.package, item.severity, item.fixed) for item in evidence.vulnerabilities}
    assert found == {
        ("CVE-2099-0001", "libssl3", "CRITICAL", "3.0.99-1~deb12u1"),
        ("CVE-2099-0001", "openssl", "CRITICAL", "3.0.99-1~deb12u1"),
        ("CVE-2099-0002", "tar", "LOW", None),
        ("CVE-2099-0003", "idna", "HIGH", "3.7"),
    }
    assert (evidence.image_id, evidence.database.state, evidence.packages) == (image, "ok", 4)
    assert judge(evidence, ScanPolicy()).status == "fail"
    assert read_scan(folder) == evidence
    sbom = json.loads((folder / "sbom.cdx.json").read_text())
    assert "pkg:pypi/idna@3.6" in {component.get("purl") for component in sbom["components"]}


def test_an_image_without_known_holes_passes(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path
) -> None:
    kept = [item for item in ADVISORIES if item["id"] in {"CVE-2099-0002", "CVE-2099-0004", "CVE-2099-0005"}]
    write_database(tmp_path / "trivy", kept)
    assert judge(run(engine, image, tmp_path, folder), ScanPolicy()).status == "pass"


@pytest.mark.parametrize(
    ("advisories", "hours", "cause"),
    [
        (None, 0, "database-absent"),
        ([], 0, "database-empty"),
        (HARMLESS, 0, "database-incomplete"),
        (ADVISORIES[1:2] + HARMLESS, 72, "database-stale"),
    ],
)
def test_a_database_that_trivy_takes_in_silence_is_told(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path, *,
    advisories: list[dict[str, Any]] | None, hours: float, cause: str,
) -> None:  # fmt: skip
    if advisories is not None:
        write_database(tmp_path / "trivy", advisories, age_hours=hours)
    evidence = run(engine, image, tmp_path, folder)
    verdict = judge(evidence, ScanPolicy())
    assert (verdict.status, verdict.cause) == ("inconclusive", cause)
    assert evidence.sbom_components >= 4


def test_a_damaged_database_is_told_and_not_used(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path
) -> None:
    path = write_database(tmp_path / "trivy", ADVISORIES)
    path.write_bytes(path.read_bytes()[:-4096])
    verdict = judge(run(engine, image, tmp_path, folder), ScanPolicy())
    assert (verdict.status, verdict.cause) == ("inconclusive", "database-damaged")


def test_a_key_left_in_the_image_and_a_root_user_fail(
    engine: docker.DockerClient, tmp_path: Path, folder: Path
) -> None:
    image = make_image(engine, "slipway-test-secret", {"srv/key.pem": PRIVATE_KEY}, user="root")
    try:
        evidence = run(engine, image, tmp_path, folder)
    finally:
        engine.images.remove(image, force=True)
    assert [(item.id, item.target) for item in evidence.secrets] == [("private-key", "/srv/key.pem")]
    assert {item.id for item in evidence.misconfigurations if item.severity == "HIGH"} == {"DS-0002"}
    verdict = judge(evidence, ScanPolicy())
    assert verdict.status == "fail"
    assert "private-key in /srv/key.pem" in verdict.reason
    assert "DS-0002" in verdict.reason


def test_what_is_waived_passes_with_a_warning_until_it_ends(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path
) -> None:
    write_database(tmp_path / "trivy", ADVISORIES)
    evidence = run(engine, image, tmp_path, folder)
    assert judge(evidence, ScanPolicy()).status == "fail"

    def under(days: int) -> ScanPolicy:
        expires = (datetime.now(UTC) + timedelta(days=days)).date()
        common = {"owner": "jane@example.org", "reason": "not reachable", "expires": expires}
        waivers = [{"id": name, **common} for name in ("CVE-2099-0001", "CVE-2099-0003")]
        return ScanPolicy.model_validate({"waivers": waivers})

    verdict = judge(evidence, under(1))
    assert (verdict.status, verdict.metrics["findings_waived"]) == ("pass", 3)  # openssl, libssl3 and idna
    assert {item.days_left for item in waived(evidence, under(1))} == {1}
    assert any(
        "the waiver of CVE-2099-0001 in openssl expires in 1 days" in line for line in warnings(evidence, under(1))
    )
    assert judge(evidence, under(-1)).status == "fail"


def laid_out(folder: Path, files: Mapping[str, str]) -> ScanTarget:
    """An image in a folder, that no engine has."""
    members = [Member(name, text.encode()) for name, text in files.items()]
    blob = BlobStore(folder / "images").plain(archive(members).chunks())
    image = OciImage({"User": "65534"}, (blob,), ("files",), {})
    layout = folder / "layout"
    for name, data in {place(blob.digest): b"".join(blob.chunks()), **documents(image.manifest, image.config)}.items():
        (layout / name).parent.mkdir(parents=True, exist_ok=True)
        (layout / name).write_bytes(data)
    return in_layout(layout, image.config_digest, f"pkg:oci/demo-awq@{image.digest}")


def test_a_bill_of_materials_tells_what_its_image_tells(tmp_path: Path, folder: Path) -> None:
    write_database(tmp_path / "trivy", ADVISORIES)
    target = laid_out(tmp_path, FILES)
    evidence = scan(target, home=tmp_path, folder=folder, progress=print)
    assert (evidence.purl, len(evidence.vulnerabilities)) == (target.purl, 4)
    again = scan_sbom(folder / "sbom.cdx.json", evidence, home=tmp_path, folder=folder, progress=print)
    assert again.model_copy(update={"scanned_at": evidence.scanned_at, "seconds": evidence.seconds}) == evidence


def test_an_image_in_which_nothing_is_recognized_proves_nothing(tmp_path: Path, folder: Path) -> None:
    write_database(tmp_path / "trivy", ADVISORIES)
    evidence = scan(laid_out(tmp_path, {"hello": "world"}), home=tmp_path, folder=folder, progress=print)
    verdict = judge(evidence, ScanPolicy())
    assert (verdict.status, verdict.cause) == ("inconclusive", "database-incomplete")
    assert "no advisories for an image without recognized distribution or packages" in verdict.reason


def test_an_image_that_is_gone_is_an_error(engine: docker.DockerClient, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ScanError, match="build it again"):
        run(engine, "sha256:" + "0" * 64, tmp_path, folder)


def test_a_killed_trivy_is_an_error_and_the_next_scan_works(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path
) -> None:
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set():
            for pid in _processes(str(tmp_path / "trivy")):
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(TrivyError, match="killed by signal 9"):
            run(engine, image, tmp_path, folder)
    finally:
        stop.set()
        killer.join()
    assert not (folder / "scan.json").exists()
    assert run(engine, image, tmp_path, folder).image_id == image
    assert not list((tmp_path / "trivy" / "scratch").iterdir())


def test_a_scan_that_takes_too_long_is_an_error(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path
) -> None:
    with pytest.raises(TrivyError, match=r"did not finish|failed"):
        scan(in_engine(engine, image), home=tmp_path, folder=folder, progress=print, timeout_s=0.05)


def test_trivy_sees_nothing_of_the_callers_environment(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIVY_SCANNERS", "license")
    monkeypatch.setenv("TRIVY_SKIP_DIRS", "/usr")
    monkeypatch.setenv("SLIPWAY_TEST_SECRET", "hunter2")
    seen: list[bytes] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for pid in _processes(str(tmp_path / "trivy")):
                try:
                    seen.append(Path(f"/proc/{pid}/environ").read_bytes())
                except OSError:
                    continue
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert run(engine, image, tmp_path, folder).packages == 4
    finally:
        stop.set()
        watcher.join()
    assert any(b"DOCKER_HOST" in environment for environment in seen)
    assert not [environment for environment in seen if b"hunter2" in environment or b"TRIVY_" in environment]


def test_the_database_comes_from_a_registry_and_changes_the_key(
    engine: docker.DockerClient, image: str, tmp_path: Path, folder: Path, registry: str
) -> None:
    before = scan_key(image, database(tmp_path))
    write_database(tmp_path / "made", ADVISORIES, archive=tmp_path / "db.tar.gz")
    push_database(tmp_path / "db.tar.gz", f"{registry}/trivy-db:2")
    got = update_database(tmp_path, f"{registry}/trivy-db:2", print, insecure=True)
    assert got.is_usable
    assert scan_key(image, got) != before
    assert judge(run(engine, image, tmp_path, folder), ScanPolicy()).status == "fail"


def test_a_database_that_can_not_be_had_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrivyError, match="status 1"):
        update_database(tmp_path, "127.0.0.1:9/trivy-db:2", print, insecure=True)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Debian's own registry on loopback."""
    with serving(tmp_path / "registry") as address:
        yield address


def _processes(cache: str) -> list[int]:
    """Trivy processes that work on a cache folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
        except OSError:
            continue
        if arguments and arguments[0].endswith(b"/trivy") and cache.encode() in arguments:
            found.append(int(entry.name))
    return found
