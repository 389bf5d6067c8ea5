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


def policies(admission: Admission, folder: Path, repository: str | None = None) -> dict[str, dict[str, Any]]:
    """The policies by kind: that of pods, that of containers that are added to a running pod, and the ClusterPolicy."""
    images = Images(gateway=GATEWAY, engine=repository)
    write_bundle(evidence(), image_record(), folder, images=images, admission=admission)
    assert {path.name for path in (folder / "policies").iterdir()} == {
        "image-validating-policy.yaml",
        "cluster-policy.yaml",
    }
    of_pods, of_added = yaml.safe_load_all((folder / "policies" / "image-validating-policy.yaml").read_text())
    cluster = yaml.safe_load((folder / "policies" / "cluster-policy.yaml").read_text())
    return {"pods": of_pods, "added": of_added, "cluster": cluster}


def is_of_demo(image: str) -> bool:
    return image.partition("@")[0].partition(":")[0].endswith("/demo")


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
        assert is_of_demo(image)
        assert (kind, attestors) == (VERDICTS, ["key1", "key2"])
        return int(predicate is not None)

    def signatures(image: str, attestors: list[str]) -> int:
        assert attestors == ["key1", "key2"]
        return int(signed and is_of_demo(image))

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
    found = refused(policies(admission, tmp_path / "b")["pods"], pod, predicate, signed=signed)
    assert len(found) == len(told)
    assert all(words in message for words, message in zip(told, found, strict=True))


@pytest.mark.parametrize("name", ["registry.example/demo:latest", "registry.example/demo"])
def test_an_image_by_tag_is_refused(admission: Admission, tmp_path: Path, name: str) -> None:
    policy = policies(admission, tmp_path / "b")["pods"]
    (message,) = refused(policy, [name, "registry.example/demo-2"], verdicts(*GATES))
    assert "by its digest" in message
    assert policy["spec"]["validationConfigurations"]["verifyDigest"]


@pytest.mark.parametrize("host", ["docker.io/", "index.docker.io/", "registry-1.docker.io/", ""])
@pytest.mark.parametrize("pushed_to", ["docker.io/org/demo", "org/demo"])
def test_every_name_of_an_image_on_docker_hub_is_held_to_the_policy(
    admission: Admission, tmp_path: Path, pushed_to: str, host: str
) -> None:
    found = policies(admission, tmp_path / "b", pushed_to)
    for kind in ("pods", "added"):
        assert not refused(found[kind], [f"{host}org/demo@{DIGEST}"], verdicts(*GATES))
        (message,) = refused(found[kind], [f"{host}org/demo@{DIGEST}", SIDECAR], verdicts(*GATES), signed=False)
        assert "no signature" in message
    (rule,) = found["cluster"]["spec"]["rules"][0]["verifyImages"]
    assert any(fnmatchcase(f"{host}org/demo@{DIGEST}", glob) for glob in rule["imageReferences"])
    assert not any(fnmatchcase(SIDECAR, glob) for glob in rule["imageReferences"])


def test_containers_that_are_added_to_a_running_pod_are_held_to_the_same(admission: Admission, tmp_path: Path) -> None:
    """By a policy of its own: Kyverno extends one to Deployments and Jobs only if it matches nothing but pods."""
    found = policies(admission, tmp_path / "b")
    of_pods, of_added = found["pods"], found["added"]
    assert of_pods["metadata"].pop("name") != of_added["metadata"].pop("name")
    (rule,), (added,) = (each["spec"]["matchConstraints"]["resourceRules"] for each in (of_pods, of_added))
    assert (rule.pop("resources"), added.pop("resources")) == (["pods"], ["pods/ephemeralcontainers"])
    assert of_pods == of_added


def test_both_policies_ask_for_the_same(admission: Admission, tmp_path: Path) -> None:
    found = policies(admission, tmp_path / "b")
    (rule,) = found["cluster"]["spec"]["rules"][0]["verifyImages"]
    entries = rule["attestors"][0]["entries"]
    assert [each["keys"]["publicKeys"] for each in entries] == list(admission.keys)
    newer = found["pods"]["spec"]
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
