"""Promotion: from a signed release folder to a registered version that an alias names.

The order makes every point of death harmless: upload, read back, READY, version, then the aliases, which the journal
announces first (`registry.journal`). What a killed promotion left behind is either whole and verified, and then used,
or unfinished, and then thrown away; no alias ever names it. One promoter of a line is at work at a time
(`registry.promotion_lock`). Nothing is believed but the signed manifest: not the run that calls, nor a check that was
skipped.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from registry import journal
from registry.backend import EXPERIMENT, MANIFEST_TAG, MODEL_TAG, Version, only_version
from registry.catalog import current, line
from registry.embedded import Embedded
from registry.errors import Problem, PromotionError, PullError, RegistryError, TrackingError, VerificationError
from registry.locations import checked_folder
from registry.manifest import DOCUMENTS, MANIFEST, REPORT, Manifest
from registry.moves import assign_champion, recover, signers
from registry.policy import Policy, Trust, policy_of
from registry.progress import Progress, silent
from registry.promotion_lock import hold_promotion_lock
from registry.resolve import CANDIDATE, CHAMPION
from registry.seal import place
from registry.signing import PublicKey, SigningKey
from registry.stored import differences, verify_stored
from registry.tracking import connected, database_path, local_folder
from registry.verify import VerificationReport, hash_files, verify, verify_documents
from registry.version_files import open_artifacts

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

SCHEME_TAG = "slipway.scheme"
REPORT_TAG = "slipway.report"
Champion = Literal["automatic", "manual"]


@dataclass(frozen=True)
class PromotedVersion:
    """A promoted version. ``reused`` says that it was registered before; ``replaced`` is the champion before it.

    ``report`` is where MLflow's UI shows the release's report, from its address on; None where it has none.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    manifest_digest: str
    reused: bool
    replaced: str | None
    report: str | None


def promote(
    folder: Path,
    tracking_uri: str,
    trusted_keys: Trust,
    *,
    champion: Champion = "automatic",
    required_gates: Sequence[str] | None = None,
    artifact_root: str | None = None,
    why: str = "every gate passed",
    who: str | None = None,
    key: SigningKey | None = None,
    progress: Progress = silent,
) -> PromotedVersion:
    """Verify the release in ``folder``, register it as a version of ``MODEL-SCHEME``, and move the aliases to it.

    ``candidate`` always moves; ``champion`` does where ``champion`` is ``automatic``, and then ``previous`` names the
    champion before. A release that is registered already is not uploaded again. ``artifact_root`` is where a new
    experiment keeps its files; by default beside an SQLite database, or wherever the server says. ``why``, ``who`` and
    ``key`` are for the audit trail, as in `registry.moves.promote_version`.

    Raises:
        PromotionError: The folder is not what was signed, a gate blocks or is absent, or what was uploaded differs.
            No version was registered, and no alias moved.
        TrackingError: MLflow can't be reached, or refused.
    """
    policy = policy_of(trusted_keys, required_gates)
    report = _verified(folder, policy)
    name, digest, known = report.manifest.name, report.manifest_digest, _needed_signers(policy, key)
    with hold_promotion_lock(tracking_uri, name, progress) as held:
        found = _registered(tracking_uri, name, digest)
        if found is not None and _aliases_are_confirmed(tracking_uri, found, champion, known):
            return _unchanged(found, digest)
        with connected(tracking_uri) as client:
            backend = Embedded(client)
            recover(held, backend, name, tracking_uri, policy, progress)
            release = _Release(client, tracking_uri, folder, report, progress)
            if found is None:
                number = release.register(_experiment(client, tracking_uri, artifact_root))
            else:
                _verify_registered(found, tracking_uri, policy)
                number = found.version
            now = backend.line(name)
            if now is None:
                raise PromotionError(f"not promoted: `{name}` was removed during the promotion")
            entry = assign_champion(
                held, backend, now, only_version(backend, name, number), digest,
                action="promote", why=why, who=who, key=key, policy=policy,
                also=[CANDIDATE], champion=champion == "automatic",
            )  # fmt: skip
        registered = next(version for version in current(tracking_uri, name) if version.version == number)
    progress(f"{name} version {number} is {' and '.join(registered.aliases)}")
    replaced = next((move.before for move in entry.moves if move.alias == CHAMPION), None) if entry else None
    return replace(_unchanged(registered, digest), reused=found is not None, replaced=replaced)


def find_promoted(
    folder: Path,
    tracking_uri: str,
    trusted_keys: Trust,
    *,
    champion: Champion = "automatic",
    required_gates: Sequence[str] | None = None,
    key: SigningKey | None = None,
) -> PromotedVersion | None:
    """Return the registered version of the release in ``folder`` if `promote` would change nothing, else None.

    Its files are not hashed, for none of them is promoted here: what pulls get lies in the registry.
    Arguments and errors are those of `promote`, and ``VerificationError``.
    """
    policy = policy_of(trusted_keys, required_gates)
    digest = f"sha256:{hash_files(folder, [MANIFEST])[MANIFEST]}"
    name = verify_documents(folder, policy, digest).manifest.name
    found = _registered(tracking_uri, name, digest)
    if found is None or not _aliases_are_confirmed(tracking_uri, found, champion, _needed_signers(policy, key)):
        return None
    return _unchanged(found, digest)


def _needed_signers(policy: Policy, key: SigningKey | None) -> Sequence[PublicKey]:
    """Whoever moves with a key asks for signed entries; without one none is needed."""
    return signers(policy, key) if key is not None else ()


def _unchanged(version: Version, digest: str) -> PromotedVersion:
    report = version.tags.get(REPORT_TAG)
    return PromotedVersion(
        version.name, version.version, version.aliases, digest, reused=True, replaced=None, report=report
    )


def _verified(folder: Path, policy: Policy) -> VerificationReport:
    try:
        return verify(folder, policy)
    except VerificationError as error:
        raise PromotionError(f"not promoted: {'; '.join(str(problem) for problem in error.problems)}") from error


def _verify_registered(found: Version, tracking_uri: str, policy: Policy) -> None:
    """Verify what was registered before; it may be signed by another key than the folder, or at another time."""
    try:
        verify_stored(found, tracking_uri, policy)
    except (VerificationError, PullError) as error:
        problems = error.problems if isinstance(error, VerificationError) else [error]
        why = "; ".join(str(problem) for problem in problems)
        what = f"version {found.version} of `{found.name}`"
        raise PromotionError(f"not promoted: {what} is not what was signed: {why}") from error


def _registered(tracking_uri: str, name: str, digest: str) -> Version | None:
    return next((found for found in current(tracking_uri, name) if found.manifest_digest == digest), None)


def _aliases_are_confirmed(tracking_uri: str, found: Version, champion: Champion, known: Sequence[PublicKey]) -> bool:
    """Whether the aliases name the version, as the audit trail says, and no act is to be finished."""
    wanted = {CANDIDATE, CHAMPION} if champion == "automatic" else {CANDIDATE}
    now = line(tracking_uri, found.name)
    if now is None or journal.pending(journal.records(now)) is not None:
        return False
    return all(journal.is_confirmed(now, alias, found.version, known) for alias in wanted)


@dataclass(frozen=True)
class _Release:
    """A verified folder being uploaded to MLflow under the line's promotion lock."""

    client: MlflowClient
    tracking_uri: str
    folder: Path
    report: VerificationReport
    progress: Progress

    @property
    def manifest(self) -> Manifest:
        return self.report.manifest

    def register(self, experiment: str) -> str:
        """Upload unless an earlier promotion did, and register; return the version's number."""
        model = self._left_behind(experiment) or self._upload(experiment)
        name = self.manifest.name
        if not self.client.search_registered_models(f"name = '{name}'"):
            tags = {MODEL_TAG: self.manifest.model, SCHEME_TAG: self.manifest.scheme}
            Embedded(self.client).create_line(name, tags)
        report = self._report(model)
        version = self.client.create_model_version(
            name,
            source=model.artifact_location,
            run_id=model.source_run_id,
            model_id=model.model_id,
            tags={**self._tags(), **({REPORT_TAG: report} if report else {})},
            description=self._description(report),
        )
        return str(version.version)

    def check(self, location: str, what: str) -> None:
        """Compare what is stored with what was signed; ``PromotionError`` names each difference."""
        problems = self._differences(location)
        if problems:
            found = "; ".join(str(problem) for problem in problems)
            raise PromotionError(f"not promoted: {what} is not what was signed: {found}")

    def _left_behind(self, experiment: str) -> LoggedModel | None:
        """Return what an earlier promotion had uploaded whole and did not register; throw away what is not whole."""
        query = f"tags.`{MANIFEST_TAG}` = '{self.report.manifest_digest}'"
        for model in self.client.search_logged_models([experiment], filter_string=query):
            if not self._differences(model.artifact_location):
                self.progress("an earlier promotion had uploaded this release: registering it")
                return model if str(model.status) == "READY" else self._finished(model)
            discard_upload(self.client, model)
        return None

    def _upload(self, experiment: str) -> LoggedModel:
        from mlflow.entities import LoggedModelOutput  # noqa: PLC0415 - slow, and imported by `connected` already

        manifest = self.manifest
        self.progress(f"uploading {len(manifest.files)} files, {manifest.size_bytes / 1e6:.1f} MB")
        run = self.client.create_run(experiment, run_name=f"{manifest.name} {manifest.created}", tags=self._tags())
        model = self.client.create_logged_model(
            experiment,
            name=re.sub(r"[/:.%\"']", "_", manifest.name),  # MLflow allows these in no logged model's name
            source_run_id=run.info.run_id,
            tags=self._tags(),
            params=_params(manifest),
        )
        self.client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
        try:
            self._put(model)
            self.progress("reading back what was uploaded")
            self.check(model.artifact_location, "what was uploaded")
            return self._finished(model)
        except TrackingError:  # it may be whole: the next promotion reads it back
            raise
        except BaseException:  # an interrupt included: no half upload stays
            discard_upload(self.client, model)
            raise

    def _put(self, model: LoggedModel) -> None:
        """Store the release's files; where that is a folder of this machine, by hard link if one can be made."""
        folder = local_folder(model.artifact_location)
        if folder is None:
            self.client.log_model_artifacts(model.model_id, str(self.folder))
            return
        names = [*self.manifest.files, *(name for name in DOCUMENTS if (self.folder / name).exists())]
        place({name: self.folder / name for name in names}, folder)

    def _finished(self, model: LoggedModel) -> LoggedModel:
        """Say of an upload that is whole what was measured, and that it is whole."""
        if model.source_run_id:
            self._log_metrics(model.source_run_id, model.model_id)
            self.client.set_terminated(model.source_run_id)
        return self.client.finalize_logged_model(model.model_id, "READY")

    def _differences(self, location: str) -> list[Problem]:
        own = hash_files(self.folder, [name for name in DOCUMENTS if (self.folder / name).exists()])
        expected = {name: record.sha256 for name, record in self.manifest.files.items()} | own
        with open_artifacts(location, self.tracking_uri) as stored:
            found = set(stored.names())
            extra = [Problem(name, "extra") for name in sorted(found - expected.keys())]
            missing = [Problem(name, "missing") for name in sorted(expected.keys() - found)]
            return extra + missing or differences(stored, expected)  # half an upload is not read back

    def _log_metrics(self, run_id: str, model_id: str) -> None:
        """Log each gate's metrics, so that MLflow's own pages compare versions."""
        from mlflow.entities import Metric  # noqa: PLC0415 - slow, and imported by `connected` already

        now = int(time.time() * 1000)
        metrics = [
            Metric(_metric_name(f"{record.verdict.gate}.{name}"), value, now, 0, model_id=model_id)
            for record in self.manifest.gates
            for name, value in record.verdict.metrics.items()
        ]
        metrics.append(Metric("size_bytes", float(self.manifest.size_bytes), now, 0, model_id=model_id))
        self.client.log_batch(run_id, metrics=metrics)

    def _tags(self) -> dict[str, str]:
        manifest = self.manifest
        return {
            MANIFEST_TAG: self.report.manifest_digest,
            MODEL_TAG: manifest.model,
            SCHEME_TAG: manifest.scheme,
            "slipway.keyid": self.report.keyid,
            "slipway.image": manifest.image.reference,
            "slipway.image_digest": manifest.image.digest,
            "slipway.source_revision": manifest.source.revision,
            "slipway.created": manifest.created,
            **{f"slipway.gate.{gate.verdict.gate}": gate.verdict.status for gate in manifest.gates},
        }

    def _report(self, model: LoggedModel) -> str | None:
        """The page of MLflow's UI that shows the release's report: its run's, whose files are its model's."""
        if REPORT not in self.manifest.files or not model.source_run_id:
            return None
        return f"#/experiments/{model.experiment_id}/runs/{model.source_run_id}/artifacts/{REPORT}"

    def _description(self, report: str | None) -> str:
        gates = "\n".join(
            f"- {gate.verdict.gate}: {gate.verdict.status}. {gate.verdict.reason}" for gate in self.manifest.gates
        )
        title = f"{self.manifest.model}, {self.manifest.scheme}, {self.manifest.created}"
        return "\n\n".join([title, *([f"[The report]({report})"] if report else []), gates])[:4900]


def line_of(model: LoggedModel) -> str:
    """Return the release line that a logged model was uploaded for."""
    return f"{model.tags.get(MODEL_TAG)}-{model.tags.get(SCHEME_TAG)}"


def discard_upload(client: MlflowClient, model: LoggedModel) -> None:
    """Delete a logged model that no version names: its files where they are on this machine, its run, and itself.

    The logged model is deleted last, so that a killed deletion is found and repeated. Elsewhere MLflow keeps the
    files of a deleted logged model until its own ``mlflow gc`` is run.
    """
    files = checked_folder(model.artifact_location, client.get_experiment(model.experiment_id).artifact_location)
    if files is not None and files.parent.name == model.model_id:
        shutil.rmtree(files.parent, ignore_errors=True)
    if model.source_run_id and client.get_run(model.source_run_id).info.lifecycle_stage == "active":
        client.delete_run(model.source_run_id)
    client.delete_logged_model(model.model_id)


def _params(manifest: Manifest) -> dict[str, str]:
    quantizer = manifest.quantizer
    return {
        "source": manifest.source.uri,
        "revision": manifest.source.revision,
        "quantizer": f"{quantizer.backend} {quantizer.version}",
        "method": quantizer.method,
        **{f"quantizer.{name}": str(value) for name, value in quantizer.parameters.items()},
        "runtime": manifest.image.runtime,
    }


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", name)


def _experiment(client: MlflowClient, tracking_uri: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException  # noqa: PLC0415 - slow, and imported by `connected` already

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    path = database_path(tracking_uri)
    if artifact_root is None and path is not None:
        artifact_root = (path.absolute().parent / "artifacts").as_uri()
    try:
        return str(client.create_experiment(EXPERIMENT, artifact_location=artifact_root))
    except MlflowException as error:
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            raise RegistryError(f"the experiment `{EXPERIMENT}` can't be made: {error}") from error
        return str(found.experiment_id)
