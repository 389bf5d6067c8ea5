"""The demo's image and weights in a real registry: verifiers that know nothing of Slipway accept and refuse them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from signed_registry import REQUIRED, TAMPERED, SignedManifest
from sigstore_verifiers import NpmVerifier, RefusedError, openssl_verifies

from containers.image.distribution import Registry, parse
from homes import Slipway
from pipeline.publishing.attest import ARTIFACT, IMAGE, VOLUME, StatedRelease
from pipeline.settings import Settings
from pipeline.trust import signing_key, trust_of
from registry.pull import read_metadata
from stages.loopback_registry import serving

NAME = "demo-gptq"


@pytest.mark.long  # two gigabytes are pushed, and read twice; `stages/test_attestations.py` has a small image
def test_the_demo_is_accepted_from_a_registry_and_refused_however_it_is_tampered_with(
    slipway: Slipway, tmp_path: Path
) -> None:
    check_signed_release(slipway, tmp_path)


def check_signed_release(slipway: Slipway, folder: Path) -> None:
    """Push the demo's champion, and hold `slipway verify` and independent verifiers to what is there."""
    (folder / "npm").mkdir()
    npm, settings = NpmVerifier.installed(folder / "npm"), Settings.read(dict(slipway.variables))
    public = settings.signing_key.with_suffix(".pub")
    with serving(folder / "registry") as address, Registry(address) as registry:
        pushed = slipway("push", NAME, f"{address}/slipway", "--json")
        assert pushed.returncode == 0, pushed.stderr
        references: dict[str, str] = json.loads(pushed.stdout)
        assert set(references) == {IMAGE, ARTIFACT, VOLUME}
        read = read_metadata(NAME, None, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings))
        release, key = StatedRelease(read.manifest, read.files), signing_key(settings)
        for about, reference in references.items():
            _, repository, digest = parse(reference)
            signed = SignedManifest(registry, folder / "registry", repository, digest, about, release, key)
            npm.verify(reference, [public.read_bytes()], REQUIRED)
            assert all(openssl_verifies(bundle, public, folder) for _, bundle in signed.attached())
            assert slipway("verify", f"oci://{reference}").returncode == 0
            print(f"accepted by all: {about} {digest}")
        assert slipway("pull", f"oci://{references[VOLUME]}", folder / "pulled").returncode == 0
        assert slipway("verify", folder / "pulled").returncode == 0
    for number, (name, tamper) in enumerate(TAMPERED.items()):
        changed = folder / f"changed-{number}"
        shutil.copytree(folder / "registry", changed, copy_function=linked_if_large)
        (folder / f"trusted-{number}").mkdir()
        with serving(changed) as address, Registry(address) as registry:
            _, repository, digest = parse(references[VOLUME])
            signed = SignedManifest(registry, changed, repository, digest, VOLUME, release, key)
            expected = tamper(signed, folder / f"trusted-{number}")
            variables = {} if expected.policy is None else {"SLIPWAY_POLICY": str(expected.policy)}
            done = slipway("verify", f"oci://{signed.reference}", "--json", **variables)
            problems = [f"{each['name']}: {each['why']}" for each in json.loads(done.stdout)["problems"]]
            assert (done.returncode, [each for each in problems if expected.ours in each] != []) == (1, True), problems
            with pytest.raises(RefusedError) as refused:
                npm.verify(
                    signed.reference, expected.keys or [public.read_bytes()], REQUIRED,
                    authorities=expected.authorities, maximum_scan_age_days=expected.maximum_scan_age_days,
                )  # fmt: skip
            assert expected.theirs in str(refused.value)
            theirs = next(line for line in str(refused.value).splitlines() if expected.theirs in line)
            print(f"refused: {name}\n  slipway: {problems[0]}\n  npm: {theirs}")


def linked_if_large(source: str, target: str) -> None:
    """Copy a file that a tampering may change; link one of the runtime's layers."""
    if Path(source).stat().st_size > 50_000_000:
        Path(target).hardlink_to(source)
    else:
        shutil.copyfile(source, target)
