"""``slipway bundle`` and ``slipway metrics``: manifests for Kubernetes, and metrics for Prometheus."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from pipeline.commands.show import as_json, print_json, print_table, progress, results
from pipeline.settings import Settings

if TYPE_CHECKING:
    from containers.kubernetes.bundle import Form


@click.command()
@click.argument("name")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write: empty or new.")
@click.option(
    "--format", "form", default="kustomize", show_default=True,
    type=click.Choice(["kustomize", "helm", "kserve", "llm-d"]),
    help="Kustomize files, a Helm chart of the same objects, or the engine alone: as KServe's InferenceService, or as "
    "its LLMInferenceService with llm-d's scheduler.",
)  # fmt: skip
@click.option("--namespace", default="slipway", show_default=True, help="The namespace that the release runs in.")
@click.option("--monitoring", default="monitoring", show_default=True, help="The namespace that Prometheus runs in.")
@click.option(
    "--image",
    metavar="REPOSITORY",
    help="The repository that the cluster pulls the release's image from, if it was copied.",
)
@click.option("--gateway-image", metavar="REPOSITORY@DIGEST", help="The gateway's image, if another home pushed it.")
@click.option(
    "--cluster", "described", metavar="FILE", type=click.Path(path_type=Path),
    help="What is the cluster's own, in YAML; docs/reference/cluster-file.md has every key.",
)  # fmt: skip
@click.option(
    "--scan-age", "scan_age_days", metavar="DAYS", type=click.IntRange(1, 3650), default=30, show_default=True,
    help="The oldest scan that the admission policies in policies/ accept.",
)  # fmt: skip
@click.option("--variant", metavar="VARIANT", help="A serving variant that the release lists. Default: the main one.")
@as_json
def bundle(
    name: str,
    out: Path,
    form: Form,
    namespace: str,
    monitoring: str,
    image: str | None,
    gateway_image: str | None,
    described: Path | None,
    scan_age_days: int,
    variant: str | None,
    *,
    as_json: bool,
) -> None:
    """Write Kubernetes manifests for release NAME[@ALIAS].

    The folder is a Kustomize base with overlays, a Helm chart, or a service of KServe. Requests, limits,
    probes, autoscaling and alerts are derived from the release's own measurements; a comment beside each number names
    its evidence. The alerts come with tests for promtool.
    """
    from containers.kubernetes.bundle import Images, write_bundle
    from pipeline.serving.deployment import admission, cluster, gather, simulated
    from pipeline.serving.gateway_process import pushed_image

    settings = Settings.read()
    placed = cluster(described) if described is not None else None
    evidence, record = gather(name, settings, variant)
    written = write_bundle(
        evidence,
        record,
        out,
        images=Images(gateway=gateway_image or pushed_image(settings.home), engine=image),
        cluster=placed,
        namespace=namespace,
        monitoring_namespace=monitoring,
        admission=admission(settings, scan_age_days),
        form=form,
        more=lambda found: simulated(evidence, found),
    )
    for warning in written.warnings:
        progress.print(f"[yellow]before you apply it:[/] {escape(warning)}")
    if as_json:
        found = {key: {"value": number.value, "why": number.why} for key, number in written.numbers.items()}
        print_json({
            "name": name, "folder": str(out), "files": list(written.files), "numbers": found,
            "warnings": list(written.warnings),
        })  # fmt: skip
        return
    rows = [(key.replace("_", " "), str(number), escape(number.why)) for key, number in written.numbers.items()]
    print_table(("number", "value", "where it comes from"), rows)
    apply = {
        "kustomize": f"kubectl apply -k {out}/overlays/small",
        "helm": f"helm install {written.name} {out}",
        "kserve": f"kubectl apply -f {out}/inferenceservice.yaml",
        "llm-d": f"kubectl apply -f {out}/llminferenceservice.yaml",
    }
    results.print(f"\n{len(written.files)} files in {escape(str(out))}: {escape(apply[form])}")


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the file atomically, for node_exporter's textfile collector."
)
@as_json
def metrics(out: Path | None, *, as_json: bool) -> None:
    """Print metrics for Prometheus.

    They cover champions, rescans, runs, the queue, verdicts, stage durations and the size of the store.
    """
    from pipeline.orchestration.instance import open_instance
    from pipeline.orchestration.metrics import exposition, look
    from registry.atomic_write import write_atomically

    settings = Settings.read()
    with open_instance(settings) as instance:
        found = look(settings, instance)
    if out is not None:
        write_atomically(out, exposition(found))
    if as_json:
        print_json(asdict(found))
    elif out is None:
        click.echo(exposition(found), nl=False)
