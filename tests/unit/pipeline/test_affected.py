"""Which releases a run would change: the stages' own recipes on a home that has released; no look makes any."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from containers.scan import scan_gate
from containers.scan.evidence import DatabaseUsed
from pipeline.errors import SourceError
from pipeline.spec import ModelSpec
from pipeline.stages import affected as looking
from pipeline.stages import quantized, scan
from pipeline.stages.affected import affected, touched
from pipeline.store.artifacts import Artifact
from registry.backend import Version
from unit.pipeline.filled import _FILES, Models, instruction_set_of
from unit.pipeline.hub_server import COMMIT
from unit.pipeline.release_evidence import SCAN

SCHEMES = {"gptq": {"method": "gptq", "backend": "gptqmodel", "bits": 4, "group_size": 64}}


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


@pytest.fixture
def released(models: Models, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """The demo, released in both of its schemes and registered."""
    spec = models.write()
    register(models.release(spec), monkeypatch)
    return spec


def register(
    signed: Mapping[str, Artifact | None],
    monkeypatch: pytest.MonkeyPatch,
    aliases: tuple[str, ...] = ("candidate", "champion"),
) -> None:
    """Let the registry have what was signed, under such aliases."""

    def current(_uri: str, name: str) -> list[Version]:
        release = signed[name.removeprefix("demo-")]
        assert release is not None
        tags = {"slipway.manifest_digest": f"sha256:{release.files['release/manifest.json'].sha256}"}
        return [Version(name, "1", aliases, tags, "", datetime.now(UTC))]

    monkeypatch.setattr(looking.catalog, "current", current)


def told(models: Models, spec: ModelSpec) -> dict[str, str | None]:
    found = {scheme: affected(spec, scheme, models.settings) for scheme in spec.schemes}
    return {scheme: each.why if each else None for scheme, each in found.items()}


def test_a_release_that_was_never_made_is_affected_at_its_first_stage(models: Models) -> None:
    assert told(models, models.write()) == {"awq": "source: never made", "gptq": "source: never made"}


def test_what_is_released_and_registered_is_not_affected_and_a_look_writes_nothing(
    models: Models, released: ModelSpec
) -> None:
    def files() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_mtime_ns) for path in models.settings.home.rglob("*") if path.is_file()}

    before = files()
    assert told(models, released) == {"awq": None, "gptq": None}
    assert files() == before


def test_a_look_writes_no_lock_file_and_makes_no_key(models: Models, released: ModelSpec) -> None:
    released.lock.unlink()
    models.settings.signing_key.unlink()
    assert told(models, released) == dict.fromkeys(("awq", "gptq"), "release: key changed")
    assert not released.lock.exists()
    assert not models.settings.signing_key.exists()


def test_a_file_that_is_written_again_with_the_same_content_affects_nothing(
    models: Models, released: ModelSpec
) -> None:
    before = touched([released], models.settings)
    weights = models.settings.models / "demo" / "model" / "model.safetensors"
    for path in (released.path, released.calibration.path, weights):
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
    assert touched([released], models.settings) != before
    assert told(models, models.write()) == {"awq": None, "gptq": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"calibration": {"uri": "file:demo/calibration.jsonl", "samples": 16, "max_tokens": 200}},
         {"awq": "quantized: samples changed", "gptq": "quantized: samples changed"}),
        ({"schemes": {"awq": {"method": "awq", "backend": "autoawq", "bits": 4, "group_size": 32}, **SCHEMES}},
         {"awq": "quantized: group_size changed", "gptq": None}),
        ({"schemes": SCHEMES}, {"gptq": None}),
        ({"license": "mit"},
         dict.fromkeys(("awq", "gptq"), "image: labels.org.opencontainers.image.licenses changed")),
        ({"automation": {"release": "on-change"}}, {"awq": None, "gptq": None}),
    ],
    ids=["calibration", "one scheme", "a scheme less", "licence", "automation itself"],
)  # fmt: skip
def test_exactly_the_releases_whose_inputs_changed_are_affected(
    models: Models, released: ModelSpec, changes: dict[str, Any], expected: dict[str, str | None]
) -> None:
    assert told(models, models.write(**changes)) == expected


def test_new_calibration_text_under_the_same_name_affects_every_scheme(models: Models, released: ModelSpec) -> None:
    with released.calibration.path.open("a") as stream:
        stream.write('{"text": "one more"}\n')
    assert told(models, released) == {"awq": "quantized: calibration changed", "gptq": "quantized: calibration changed"}


def test_new_weights_are_told_at_the_source(models: Models, released: ModelSpec) -> None:
    weights = models.settings.models / "demo" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert told(models, released) == {"awq": "source: content changed", "gptq": "source: content changed"}


def test_new_pins_of_one_quantizer_affect_its_schemes_alone(
    models: Models, released: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = quantized.pins_digest
    monkeypatch.setattr(quantized, "pins_digest", lambda name: "new" if name == "autoawq" else real(name))
    assert told(models, released) == {"awq": "quantized: pins changed", "gptq": None}


def test_another_suite_is_a_reason_to_ask_again(models: Models, released: ModelSpec) -> None:
    changed = released.model_copy(update={"evals": released.evals.model_copy(update={"seed": 7})})
    assert told(models, changed) == {"awq": "answers: suite changed", "gptq": "answers: suite changed"}


def test_a_refused_release_is_not_tried_again_until_its_limits_are_others(models: Models) -> None:
    spec = models.write()
    models.release(spec, lost=80)
    assert told(models, spec) == {"awq": None, "gptq": None}


def test_a_newer_vulnerability_database_is_the_rescans_business(
    models: Models, released: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scan.trivy.database(models.settings.home)
    monkeypatch.setattr(scan.trivy, "database", lambda _: replace(real, digest="sha256:new"))
    assert told(models, released) == {"awq": None, "gptq": None}


def test_a_database_that_has_got_old_since_hides_no_other_change(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    fresh = DatabaseUsed(state="ok", updated_at=now.isoformat())
    scan = SCAN.model_copy(update={"scanned_at": now, "database": fresh})
    files = {**_FILES["scan"], "scan.json": scan.model_dump(mode="json", by_alias=True)}
    monkeypatch.setitem(_FILES, "scan", files)
    spec = models.write()
    register(models.release(spec), monkeypatch)

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            return super().now(tz) + timedelta(days=30)

    monkeypatch.setattr(scan_gate, "datetime", Later)
    assert told(models, spec) == {"awq": None, "gptq": None}
    shorter = spec.model_copy(update={"load": spec.load.model_copy(update={"cpus": 1.5})})
    assert told(models, shorter) == dict.fromkeys(("awq", "gptq"), "load: cpus changed")


def test_what_is_signed_and_not_registered_is_affected(models: Models) -> None:
    spec = models.write()
    models.release(spec)
    assert told(models, spec) == dict.fromkeys(("awq", "gptq"), "release: signed, and not registered")


@pytest.mark.parametrize(
    ("aliases", "why"),
    [(("candidate", "previous"), None), (("previous",), "another is candidate"), ((), "another is candidate")],
    ids=["taken back by hand", "replaced by a release", "replaced by two"],
)
def test_what_a_newer_release_has_replaced_is_followed_back_and_what_a_person_took_back_is_not(
    models: Models, released: ModelSpec, monkeypatch: pytest.MonkeyPatch, aliases: tuple[str, ...], why: str | None
) -> None:
    register(models.release(released), monkeypatch, aliases)
    expected = why and f"release: signed, and {why}"
    assert told(models, released) == {"awq": expected, "gptq": expected}


def test_the_same_change_has_the_same_key_and_another_change_another(models: Models, released: ModelSpec) -> None:
    def key(samples: int) -> str:
        calibration = {"uri": "file:demo/calibration.jsonl", "samples": samples, "max_tokens": 200}
        found = affected(models.write(calibration=calibration), "gptq", models.settings)
        assert found is not None
        return found.key

    assert key(16) == key(16) != key(8)


def test_a_source_that_its_lock_does_not_allow_is_said_and_not_guessed(models: Models, released: ModelSpec) -> None:
    elsewhere = models.write(source={"uri": "hf://org/tiny", "revision": COMMIT})
    with pytest.raises(SourceError, match="delete the lock file"):
        affected(elsewhere, "gptq", models.settings)


def test_touching_anything_a_release_is_made_from_is_noticed(models: Models, released: ModelSpec) -> None:
    def writes() -> list[Callable[[], object]]:
        folder = models.settings.models
        return [
            lambda: os.utime(released.path),
            lambda: os.utime(folder / "demo" / "calibration.jsonl"),
            lambda: (folder / "other.yaml").write_text("model: other"),
            (folder / "demo" / "model" / "config.json").unlink,
        ]

    seen = [touched([released], models.settings)]
    assert touched([released], models.settings) == seen[0]
    for write in writes():
        write()
        seen.append(touched([released], models.settings))
    assert len(set(seen)) == len(seen)


AVX512 = "model name\t: Fast\nflags\t\t: fma f16c avx2 avx512f avx512bw avx512dq avx512vl avx512_bf16\n"


@pytest.fixture
def fast_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX-512, of an x86-64 machine."""
    (tmp_path / "cpuinfo").write_text(AVX512)
    monkeypatch.setattr("containers.hardware.cpu._CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def keys(signed: Mapping[str, Artifact | None]) -> dict[str, str | None]:
    return {scheme: release.key if release else None for scheme, release in signed.items()}


def test_a_finished_release_is_up_to_date_on_another_cpu_and_a_new_pair_gets_a_new_baseline(
    fast_cpu: None, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> list[tuple[str, str]]:
        made = models.context(spec, "awq").store.records("answers")
        return sorted(
            (str(instruction_set_of(record.recipe)), "candidate" if "image" in record.recipe.inputs else "FP16")
            for _, record in made
        )

    spec = models.write(schemes=SCHEMES)
    signed = models.release(spec)
    register(signed, monkeypatch)
    assert answers() == [("avx512_bf16", "FP16"), ("avx512_bf16", "candidate")]
    models.settings = replace(models.settings, cpu_limit="avx2")
    assert told(models, spec) == {"gptq": None}
    assert keys(models.release(spec)) == keys(signed)
    assert len(answers()) == 2

    models.release(spec.model_copy(update={"evals": spec.evals.model_copy(update={"seed": 7})}))
    assert answers() == [
        ("avx2", "FP16"), ("avx2", "candidate"), ("avx512_bf16", "FP16"), ("avx512_bf16", "candidate"),
    ]  # fmt: skip
    models.settings = replace(models.settings, cpu_limit=None)
    assert told(models, models.write(schemes=SCHEMES)) == {"gptq": None}
