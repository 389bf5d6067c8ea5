"""Load-tests a champion again, and compares it with the load test of its release.

Its image does not change, but drivers, kernels and other load on the machine do. The image that deployments pull is
served under its model's traffic, and the measurements are compared with the signed evidence of the release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from containers.image.build import parse_image
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

# The compared metrics, and whether a higher value is worse.
_COMPARED = {"p95_latency_ms": True, "p95_ttft_ms": True, "output_tokens_per_second": False}


@dataclass(frozen=True)
class Speed:
    """A champion's new load test beside its release's. ``slower`` has a fraction for each metric: 0.5 is 50% slower.

    It is empty if the traffic in the model's file, the CPU or the cores differ from the release's. Then only the
    verdict counts.
    """

    version: str
    loaded: LoadTestResult
    slower: Mapping[str, float]
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the limits hold and no metric is slower than allowed."""
        return not self.loaded.verdict.blocks and all(share <= self.allowed for share in self.slower.values())

    @property
    def words(self) -> str:
        """The result in one line."""
        shares = ", ".join(f"{name} {share:+.0%}" for name, share in self.slower.items())
        beside = f"slower than at its release by {shares} ({self.allowed:.0%} allowed)" if shares else "not comparable"
        return f"version {self.version}: {self.loaded.verdict.status}, {self.loaded.verdict.reason}; {beside}"


def look_again(context: StageContext) -> Speed:
    """Measure the champion of the context's release line now.

    Raises:
        RegistryError: there is no champion, or it is not what was signed.
        StoreError: its checkpoint is not in this home.
        ContainerError: the engine does not have its image, or does not answer.
    """
    settings, name = context.settings, context.release_name
    names = (f"{EVIDENCE}/image.json", f"{EVIDENCE}/load.json")
    champion = read_metadata(
        f"{name}@{CHAMPION}", names, tracking_uri=settings.tracking_uri, trusted_keys=trust_of(settings)
    )
    record = parse_image(champion.files[names[0]], f"{names[0]} of {name}@{CHAMPION}")
    then = parse_load_evidence(champion.files[names[1]], f"{names[1]} of {name}@{CHAMPION}")
    checkpoint = _checkpoint(context, name, record.model_digest)
    loaded = measure_now(context, context.spec.load, record, checkpoint, lambda _: None)
    return Speed(champion.version, loaded, slower(then, loaded.evidence), context.spec.automation.slower)


def slower(then: LoadEvidence, now: LoadEvidence) -> dict[str, float]:
    """How much worse each metric is than before, as a fraction; empty if traffic or hardware differ."""
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
    """The checkpoint in the champion's image; the load test needs its tokenizer and size."""
    found = context.store.with_digest("quantized", digest)
    if found is None:
        raise StoreError(f"the champion of `{name}` was not made in {context.settings.home}: load-test it where it was")
    return found
