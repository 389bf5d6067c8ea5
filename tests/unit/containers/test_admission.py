"""Admission policies of a bundle: their expressions are evaluated, with stand-ins for what Kyverno adds to CEL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import cel
import pytest
import yaml
from bundle_evidence import DIGEST, GATEWAY, evidence, image, manifest
from image_record import image_record
from release_folder import passing

from containers.kubernetes.admission import Admission
from containers.kubernetes.bundle import Images, write_bundle
from registry.attestation import VERDICTS, Scanned, Verdicts
from registry.signing import load_or_create_key
from registry.verdict import Verdict

IMAGE, SIDECAR = f"registry.example/demo@{DIGEST}", "docker.io/library/envoy:1"
NOW = datetime.now(UTC)
GATES = tuple(map(passing, ("drift", "scan", "load")))


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    names = ("release.pem", "release-2.pem")
    return Admission(tuple(load_or_create_key(tmp_path / name).public.pem().decode() for name in names), 30)


def policies(admission: Admission, folder: Path) -> dict[str, dict[str, Any]]:
    write_bundle(evidence(), image_record(), folder, images=Images(gateway=GATEWAY), admission=admission)
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (folder / "policies").glob("*.yaml")}
    assert set(found) == {"image-validating-policy", "cluster-policy"}
    return found


def verdicts(*gates: Verdict, age: timedelta = timedelta(days=1), passed: bool = True) -> dict[str, Any]:
    """The predicate as `pipeline.publishing.attest` signs it."""
    return Verdicts(
        release="demo-awq", manifest_digest=DIGEST, image_digest=DIGEST, sealed=f"{NOW:%Y-%m-%dT%H:%M:%SZ}",
        passed=passed, gates={gate.gate: gate for gate in gates},
        scan=Scanned(at=f"{NOW - age:%Y-%m-%dT%H:%M:%SZ}", database_updated_at=None), statements={},
    ).predicate()  # fmt: skip


def refused(
    policy: dict[str, Any], pod: Sequence[str], predicate: dict[str, Any] | None, *, signed: bool = True
) -> list[str]:
    """The messages of the validations that refuse a pod with these images, as Kyverno evaluates them.

    ``predicate`` is that of the verdicts which a release key signed for each image; None if there are none.
    """
    spec = policy["spec"]
    globs = [each["glob"] for each in spec["matchImageReferences"]]
    matched = [name for name in pod if any(fnmatchcase(name, glob) for glob in globs)]
    context = cel.Context(
        variables={
            "images": {"containers": matched, "initContainers": [], "ephemeralContainers": []},
            "attestors": {each["name"]: each["name"] for each in spec["attestors"]},
            "attestations": {each["name"]: each["intoto"]["type"] for each in spec["attestations"]},
            "time": {},
        }
    )

    def attested(image: str, kind: str, attestors: list[str]) -> int:
        assert image.partition("@")[0].partition(":")[0] == "registry.example/demo"
        assert (kind, attestors) == (VERDICTS, ["key1", "key2"])
        return int(predicate is not None)

    def signatures(image: str, attestors: list[str]) -> int:
        assert attestors == ["key1", "key2"]
        return int(signed and image.startswith("registry.example/demo"))

    context.add_function("verifyImageSignatures", signatures)
    context.add_function("verifyAttestationSignatures", attested)
    context.add_function("extractPayload", lambda _image, _kind: {"predicate": predicate})
    context.add_function("now", lambda _time: NOW)
    variables: dict[str, Any] = {}
    for each in spec["variables"]:
        context.add_variable("variables", variables)
        variables[each["name"]] = cel.evaluate(each["expression"], context)
    context.add_variable("variables", variables)
    return [each["message"] for each in spec["validations"] if cel.evaluate(each["expression"], context) is not True]


@pytest.mark.parametrize(
    ("pod", "predicate", "signed", "told"),
    [
        ([IMAGE, SIDECAR], verdicts(*GATES), True, []),
        ([SIDECAR], None, True, []),
        ([IMAGE], verdicts(*GATES), False, ["no signature of a release key"]),
        ([IMAGE], None, True, ["no signed verdicts", "a gate is missing", "the scan is older"]),
        ([IMAGE], verdicts(*GATES[:2], Verdict(gate="load", status="fail", reason="slow"), passed=False), True,
         ["a gate did not pass"]),
        ([IMAGE], verdicts(*GATES[:2]), True, ["a gate is missing"]),
        ([IMAGE], verdicts(*GATES, age=timedelta(days=31)), True, ["older than 30 days"]),
    ],
)  # fmt: skip
def test_a_pod_is_admitted_only_with_a_signed_image_whose_gates_passed(
    admission: Admission,
    tmp_path: Path,
    pod: list[str],
    predicate: dict[str, Any] | None,
    signed: bool,
    told: list[str],
) -> None:
    found = refused(policies(admission, tmp_path / "b")["image-validating-policy"], pod, predicate, signed=signed)
    assert len(found) == len(told)
    assert all(words in message for words, message in zip(told, found, strict=True))


@pytest.mark.parametrize("name", ["registry.example/demo:latest", "registry.example/demo"])
def test_an_image_by_tag_is_refused(admission: Admission, tmp_path: Path, name: str) -> None:
    policy = policies(admission, tmp_path / "b")["image-validating-policy"]
    (message,) = refused(policy, [name, "registry.example/demo-2"], verdicts(*GATES))
    assert "by its digest" in message
    assert policy["spec"]["validationConfigurations"]["verifyDigest"]


def test_containers_that_are_added_to_a_running_pod_are_held_to_the_policy(
    admission: Admission, tmp_path: Path
) -> None:
    policy = policies(admission, tmp_path / "b")["image-validating-policy"]
    (rule,) = policy["spec"]["matchConstraints"]["resourceRules"]
    assert rule["resources"] == ["pods", "pods/ephemeralcontainers"]


def test_both_policies_ask_for_the_same(admission: Admission, tmp_path: Path) -> None:
    found = policies(admission, tmp_path / "b")
    (rule,) = found["cluster-policy"]["spec"]["rules"][0]["verifyImages"]
    entries = rule["attestors"][0]["entries"]
    assert [each["keys"]["publicKeys"] for each in entries] == list(admission.keys)
    newer = found["image-validating-policy"]["spec"]
    assert [each["cosign"]["key"]["data"] for each in newer["attestors"]] == list(admission.keys)
    (attestation,) = rule["attestations"]
    assert attestation["type"] == newer["attestations"][0]["intoto"]["type"] == VERDICTS
    assert attestation["attestors"][0]["entries"] == [{"keys": each["keys"]} for each in entries]
    (conditions,) = attestation["conditions"]
    assert [each["value"] for each in conditions["all"]] == [True, "absent", "absent", "absent", "720h"]


@pytest.mark.parametrize("pushed", [True, False])
def test_a_bundle_has_no_policies_without_keys_or_without_a_pushed_image(pushed: bool, tmp_path: Path) -> None:
    reference = IMAGE if pushed else DIGEST
    given = evidence(manifest=manifest(image=image(reference=reference)))
    keys = () if pushed else ("a key",)
    write_bundle(given, image_record(), tmp_path / "b", images=Images(gateway=GATEWAY), admission=Admission(keys, 30))
    assert not (tmp_path / "b" / "policies").exists()
