"""A champion under load again: is it still as fast as its release's own load test found it?

Drivers, kernels and neighbours change under an image that does not. The image that deployments pull is served once more
under its model's traffic, and set beside the signed evidence of the day it was released.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from evals.load.comparison import differ_in_hardware
from evals.load.evidence import LoadEvidence, parse_load_evidence
from pipeline.errors import StoreError
from pipeline.operations.load_tests import LoadTestResult, measure_now
from pipeline.stages.context import StageContext
from pipeline.store.artifacts import Artifact
from pipeline.trust import trust_of
from registry.manifest import EVIDENCE
from registry.pull import read_metadata
from registry.resolve import CHAMPION

# What is compared, and whether more of it is worse.
_COMPARED = {"p95_latency_ms": True, "p95_ttft_ms": True, "output_tokens_per_second": False}


@dataclass(frozen=True)
class Speed:
    """A champion's load test beside its release's. ``slower`` are fractions, 0.5 for half as slow again, by metric.

    It is empty where the traffic of the model's file is another than the release's, or this machine's CPU or cores are:
    then there is only the verdict.
    """

    version: str
    loaded: LoadTestResult
    slower: Mapping[str, float]
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the limits hold, and nothing is slower than allowed."""
        return not self.loaded.verdict.blocks and all(share <= self.allowed for share in self.slower.values())

    @property
    def words(self) -> str:
        """All of it in a line."""
        shares = ", ".join(f"{name} {share:+.0%}" for name, share in self.slower.items())
        beside = f"slower than at its release by {shares} ({self.allowed:.0%} allowed)" if shares else "not comparable"
        return f"version {self.version}: {self.loaded.verdict.status}, {self.loaded.verdict.reason}; {beside}"


def look_again(context: StageContext) -> Speed:
    """Measure the champion of the context's release line now.

    Raises:
        RegistryError: there is no champion, or it is not what was signed.
        StoreError: it was not made in this home, or is gone from it.
        ContainerError: the engine has lost its image, or does not answer.
    """
    settings, name = context.settings, context.release_name
    names = (f"{EVIDENCE}/image.json", f"{EVIDENCE}/load.json")
    champion = read_metadata(
        f"{name}@{CHAMPION}", names, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings)
    )
    record = json.loads(champion.files[names[0]])
    then = parse_load_evidence(champion.files[names[1]], f"{names[1]} of {name}@{CHAMPION}")
    checkpoint = _checkpoint(context, name, str(record["model_digest"]))
    loaded = measure_now(context, context.spec.load, record, checkpoint, lambda _: None)
    return Speed(champion.version, loaded, slower(then, loaded.evidence), context.spec.automation.slower)


def slower(then: LoadEvidence, now: LoadEvidence) -> dict[str, float]:
    """By how much each metric is worse than it was, as a fraction; nothing where traffic or hardware differ."""
    if [profile.requested for profile in then.profiles] != [profile.requested for profile in now.profiles]:
        return {}
    if differ_in_hardware(then, now):
        return {}
    found = {}
    for name, more_is_worse in _COMPARED.items():
        before, after = then.metrics.get(name), now.metrics.get(name)
        if before and after:
            found[name] = (after / before if more_is_worse else before / after) - 1
    return found


def _checkpoint(context: StageContext, name: str, digest: str) -> Artifact:
    """The checkpoint in the champion's image, for its tokenizer and its size."""
    found = context.store.with_digest("quantized", digest)
    if found is None:
        raise StoreError(f"the champion of `{name}` was not made in {context.settings.home}: load-test it where it was")
    return found
