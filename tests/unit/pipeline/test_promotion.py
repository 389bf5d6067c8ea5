"""The last stage: it believes the evidence before it and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from certificates import Signers
from load_evidence import changed

from containers.image.distribution import DistributionError
from pipeline.errors import StoreError
from pipeline.expected_errors import is_transient
from pipeline.stages import promotion
from pipeline.stages.run import run
from pipeline.stages.table import RELEASE
from pipeline.store import artifacts as store
from pipeline.store.artifacts import Artifact
from pipeline.store.notes import MergedNotes
from pipeline.trust import trust_of
from registry import seal as seals
from registry.digests import canonical_json
from registry.errors import ManifestError, PromotionError, SigningError, VerificationError
from registry.manifest import MANIFEST, REPORT, FileRecord, Manifest, MergedAdapter
from registry.provenance import statement
from registry.signing import load_trusted_keys
from registry.verify import verify
from unit.pipeline.release_evidence import ADAPTER_FILES, DIGEST, DRAFT_MODEL_FILES, LOAD, Made, settings_of


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(settings_of(tmp_path / "home"))


def seal(made: Made, artifacts: dict[str, Artifact]) -> Artifact:
    return run(RELEASE, made.context, artifacts)


def test_what_is_sealed_verifies_and_holds_every_gate_and_its_evidence(made: Made) -> None:
    release = seal(made, made.artifacts())
    verify(release.folder, load_trusted_keys(made.settings.trusted_keys))
    manifest = release.document("release/manifest.json")
    verdicts = {gate["verdict"]["gate"]: gate["verdict"] for gate in manifest["gates"]}
    assert {name: verdict["status"] for name, verdict in verdicts.items()} == {
        "drift": "pass", "scan": "inconclusive", "load": "pass",
    }  # fmt: skip
    assert verdicts["scan"]["accepted_because"].startswith("The demo must run")
    assert {name for name in release.files if name.startswith("release/evidence/")} == {
        f"release/evidence/{name}"
        for name in (
            "drift.json", "scan.json", "trivy.json", "sbom.cdx.json", "load.json", "requests.jsonl", "memory.json",
            "image.json", "waived.json", "mlbom.cdx.json",
        )
    }  # fmt: skip
    assert "<svg" in (release.folder / "release" / "report.html").read_text()


def test_files_that_were_hashed_when_they_were_made_are_not_read_again(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts, hashed = made.artifacts(), list[str]()
    hash_files, digest_file = seals.hash_files, store.digest_file

    def noted_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
        hashed.extend(names)
        return hash_files(folder, names)

    def noted_file(path: Path) -> str:
        hashed.append(path.name)
        return digest_file(path)

    monkeypatch.setattr(seals, "hash_files", noted_files)
    monkeypatch.setattr(store, "digest_file", noted_file)
    release = seal(made, artifacts)
    assert set(hashed) >= {"release/report.html", "release/evidence/waived.json", "release/evidence/mlbom.cdx.json"}
    known = {name for artifact in artifacts.values() for name in artifact.files}
    assert not {Path(name).name for name in hashed} & known
    verify(release.folder, load_trusted_keys(made.settings.trusted_keys))


def test_how_much_of_the_calibration_was_cut_is_in_the_manifest_and_the_report(made: Made) -> None:
    release = seal(made, made.artifacts())
    calibration = release.document("release/manifest.json")["quantizer"]["calibration"]
    assert (calibration["cut"], calibration["empty"]) == (24, 0)
    said = "calibration.jsonl, 32 samples of up to 200 tokens: 75% cut, 0% empty"
    assert said in (release.folder / REPORT).read_text()


def test_the_cpu_and_the_kernels_of_the_load_test_are_in_the_manifest_and_the_report(made: Made) -> None:
    release = seal(made, made.artifacts())
    hardware = release.document("release/manifest.json")["hardware"]
    tested = LOAD.server.computed_on
    assert tested is not None
    assert tested.kernels is not None
    assert hardware["instruction_set"] == tested.instruction_set
    assert hardware["kernels"]["linear_quantized"] == tested.kernels.linear_quantized
    assert hardware["kernels"]["threads"] == tested.kernels.threads
    report = (release.folder / "release" / "report.html").read_text()
    assert str(tested) in report


def test_load_evidence_from_before_kernels_were_told_is_sealed_without_them(
    made: Made,
) -> None:
    made.load = changed(LOAD, {"server": {"computed_on": None}})
    hardware = seal(made, made.artifacts()).document("release/manifest.json")["hardware"]
    assert not {"instruction_set", "kernels"} & hardware.keys()


def test_a_draft_model_is_in_the_manifest_the_provenance_and_the_bill_and_verified_like_weights(made: Made) -> None:
    made.draft_model = True
    release = seal(made, made.artifacts())
    inside = [f"draft_model/{name}" for name in DRAFT_MODEL_FILES]
    manifest = Manifest.parse((release.folder / MANIFEST).read_bytes())
    assert manifest.draft_model is not None
    assert manifest.draft_model.files == {name: manifest.files[f"draft_model/{name}"] for name in DRAFT_MODEL_FILES}
    dependencies = json.loads(statement(manifest))["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {*inside, "draft model"} <= {each["name"] for each in dependencies}
    bill = release.document("release/evidence/mlbom.cdx.json")
    (listed,) = (each for each in bill["components"] if each["bom-ref"] == "draft-model")
    assert [file["name"] for file in listed["components"]] == list(DRAFT_MODEL_FILES)
    assert "draft model" in (release.folder / "release" / "report.html").read_text()
    verify(release.folder, load_trusted_keys(made.settings.trusted_keys))
    document = manifest.model_dump(mode="json", by_alias=True)
    document["draft_model"]["files"]["config.json"]["size"] += 1
    with pytest.raises(ManifestError, match=r"`config\.json` of the draft model is not the same among `files`"):
        Manifest.parse(canonical_json(document))


def test_adapters_are_in_the_manifest_the_provenance_and_the_bill_and_verified_like_weights(made: Made) -> None:
    made.adapters = ("support",)
    release = seal(made, made.artifacts())
    inside = [f"adapters/support/{name}" for name in ADAPTER_FILES]
    manifest = release.document("release/manifest.json")
    assert set(inside) <= manifest["files"].keys()
    assert manifest["adapters"]["support"]["files"] == {
        name: manifest["files"][f"adapters/support/{name}"] for name in ADAPTER_FILES
    }
    assert manifest["serving"][0]["adapters"] == ["support"]
    assert "support=/adapters/support" in manifest["serving"][0]["command"]
    predicate = json.loads(statement(Manifest.parse((release.folder / MANIFEST).read_bytes())))["predicate"]
    assert set(inside) <= {each["name"] for each in predicate["buildDefinition"]["resolvedDependencies"]}
    bill = release.document("release/evidence/mlbom.cdx.json")
    (adapter,) = (each for each in bill["components"] if each["bom-ref"] == "adapter-support")
    assert [file["name"] for file in adapter["components"]] == list(ADAPTER_FILES)
    verify(release.folder, load_trusted_keys(made.settings.trusted_keys))
    weights = release.folder / inside[1]
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(VerificationError, match=r"adapters/support/adapter_model\.safetensors"):
        verify(release.folder, load_trusted_keys(made.settings.trusted_keys))


def test_both_parents_of_a_merged_model_are_in_the_manifest_the_provenance_the_bill_and_the_report(made: Made) -> None:
    record = FileRecord(sha256="ab" * 32, size=10)
    adapter = MergedAdapter(
        uri="hf://org/lora",
        revision="1" * 40,
        rank=8,
        modules=("q_proj",),
        files=dict.fromkeys(ADAPTER_FILES, record),
        pins_digest=DIGEST,
    )
    made.merged = MergedNotes(base={"model.safetensors": record}, adapter=adapter)
    release = seal(made, made.artifacts())
    manifest = Manifest.parse((release.folder / MANIFEST).read_bytes())
    assert manifest.source.adapter == adapter
    assert manifest.source.files == {"model.safetensors": record}
    definition = json.loads(statement(manifest))["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["adapter"] == {"uri": "hf://org/lora", "revision": "1" * 40}
    dependencies = {each["name"]: each for each in definition["resolvedDependencies"]}
    assert dependencies["merged adapter"]["annotations"] == {"revision": "1" * 40}
    assert dependencies["merged adapter/adapter_model.safetensors"]["digest"] == {"sha256": "ab" * 32}
    assert {"merge's pins", "source/model.safetensors"} <= dependencies.keys()
    bill = release.document("release/evidence/mlbom.cdx.json")
    ancestors = bill["metadata"]["component"]["pedigree"]["ancestors"]
    assert [(each["name"], each["version"]) for each in ancestors] == [
        ("file:model", "0" * 40),
        ("hf://org/lora", "1" * 40),
    ]
    assert {"base", "merged-adapter"} <= set(bill["dependencies"][0]["dependsOn"])
    assert "hf://org/lora at 1111" in (release.folder / REPORT).read_text()
    verify(release.folder, load_trusted_keys(made.settings.trusted_keys))


def test_a_local_folder_is_named_without_its_place(made: Made) -> None:
    release = seal(made, made.artifacts())
    assert release.document("release/manifest.json")["source"]["uri"] == "file:model"
    for name in ("manifest.json", "report.html"):
        assert str(made.context.spec.path.parent) not in (release.folder / "release" / name).read_text()


def test_the_same_evidence_is_sealed_once(made: Made) -> None:
    assert not seal(made, made.artifacts()).cached
    assert seal(made, made.artifacts()).cached


@pytest.mark.parametrize("stage", ["quantized", "drift", "image", "scan", "load"])
def test_evidence_of_another_checkpoint_or_image_is_refused_by_name(made: Made, stage: str) -> None:
    ours, theirs = made.artifacts(), made.artifacts(weights=b"other")
    if stage == "quantized":
        theirs["quantized"] = replace(theirs["quantized"], inputs={"source": "sha256:another"})
    with pytest.raises(StoreError, match=f"`{stage}`.*run every stage again"):
        seal(made, {**ours, stage: theirs[stage]})


def test_evidence_that_says_not_what_it_was_made_from_is_refused(made: Made) -> None:
    ours = made.artifacts()
    with pytest.raises(StoreError, match="`scan` was not made from the `image`"):
        seal(made, {**ours, "scan": replace(ours["scan"], inputs={})})


def test_a_blocked_verdict_is_not_even_signed_where_the_gate_was_skipped(made: Made) -> None:
    made.lost = 80
    with pytest.raises(SigningError, match=r"drift \(fail\)"):
        seal(made, made.artifacts())
    assert not (made.settings.home / "mlflow" / "mlflow.db").exists()


def test_a_release_that_was_changed_after_it_was_sealed_is_not_promoted(made: Made) -> None:
    release = seal(made, made.artifacts())
    weights = release.folder / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"packeD")
    with pytest.raises(PromotionError, match=r"model\.safetensors"):
        promotion.promote(made.context, release)


def test_no_alias_moves_while_the_image_can_not_be_signed(made: Made) -> None:
    made.image = {"pushed": True, "reference": f"127.0.0.1:9/slipway/demo-gptq@{DIGEST}"}
    release = seal(made, made.artifacts())
    for _ in range(2):  # the second time as the first: they are not forgotten
        with pytest.raises(DistributionError, match=r"127\.0\.0\.1:9 can't be reached") as caught:
            promotion.promote(made.context, release)
        assert is_transient(caught.value)
    assert not (made.settings.home / "mlflow" / "mlflow.db").exists()


def test_the_figures_of_a_release_are_its_verdicts_own(made: Made) -> None:
    told = promotion.measured(Manifest.parse((seal(made, made.artifacts()).folder / MANIFEST).read_bytes()))
    assert told["accuracy_change"] == pytest.approx(-1 / 800)
    assert told["bits_per_byte_change"] > 0
    assert told["size_bytes"] == len("packed") + len("{}")
    assert told["size_ratio"] == told["size_bytes"] / (len("weights" * 10) + len("{}"))
    assert told["p95_latency_ms"] == LOAD.metrics["p95_latency_ms"]


def test_a_release_is_signed_as_somebody_and_believed_as_a_policy_says(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    signers = Signers(tmp_path / "keys")
    signers.signer()
    signers.policy("release@example.com")
    settings = replace(
        settings_of(tmp_path / "home"),
        signing_key=signers.folder / "own.pem",
        signing_certificate=signers.folder / "chain.pem",
        policy=signers.folder / "policy.toml",
    )
    made = Made(settings)
    release = seal(made, made.artifacts())
    assert verify(release.folder, trust_of(settings)).keyid == "release@example.com"
