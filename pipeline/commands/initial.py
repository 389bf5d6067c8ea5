"""``slipway init``: write a first model file for a source, and say what its release will take."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.markup import escape

from pipeline.commands.show import as_json, print_json, print_table, results, say
from pipeline.settings import Settings

if TYPE_CHECKING:
    from pipeline.planner.plan import Plan
    from pipeline.planner.sources import Described
    from pipeline.proposal.cost import ProposedFile
    from pipeline.proposal.propose import AsIs, Kind, Proposal, Target
    from pipeline.spec import ModelSpec

_CPU = "cpu"


@click.command()
@click.argument("uri")
@click.option("--gpu", metavar="NAME", help="What will serve it: H100, L4, …, or cpu. Default: this machine's own.")
@click.option("--kind", type=click.Choice(["base", "chat", "code"]), help="What it is for. Default: by its name.")
@click.option("--name", metavar="NAME", help="The model's name. Default: by the URI.")
@click.option("--revision", metavar="R", help="A commit, tag or branch of the source. Default: main.")
@click.option("--baseline", metavar="URI", help="The 16-bit original of a model that is quantized already.")
@click.option("--no-baseline", metavar="REASON", help="Why a model that is quantized already has no such original.")
@click.option("--dry-run", is_flag=True, help="Print the file, and write nothing.")
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@as_json
def init(
    uri: str,
    gpu: str | None,
    kind: Kind | None,
    name: str | None,
    revision: str | None,
    baseline: str | None,
    no_baseline: str | None,
    *,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write models/NAME.yaml for the model at URI, which can be released as it is.

    URI is that of a source: file:FOLDER, hf://ORG/NAME, …. Only config.json and the headers of the safetensors files
    are read. The file has schemes that suit the GPU and the model, limits with their reasons, and data that comes with
    Slipway. In a terminal, what no option answers is asked.
    """
    from pipeline.errors import SpecError
    from pipeline.planner.evaluation import evaluation
    from pipeline.planner.sources import describe, has_chat_template
    from pipeline.proposal.cost import ProposedFile, estimate
    from pipeline.proposal.propose import kind_of, name_of, propose
    from pipeline.sources.origin import Access
    from pipeline.sources.source import resolve

    settings = Settings.read()
    uri = _absolute(uri)
    source = resolve(uri, revision, access=Access.of(settings))
    described, as_is = _as_is(describe(source), uri, baseline, no_baseline, settings)
    is_asked = sys.stdin.isatty() and sys.stderr.isatty()
    model = name or _ask("Name", name_of(uri), is_asked)
    path = settings.models / f"{model}.yaml"
    if path.exists() and not force and not dry_run:
        raise SpecError(f"{path} exists: choose another --name, or overwrite it with --force")
    target = _target(gpu or _ask("What will serve it (H100, L4, …, cpu)", _own_device(), is_asked), settings)
    chats = has_chat_template(source)
    kind = kind or _ask_kind(kind_of(uri, has_chat_template=chats), is_asked)
    proposal = propose(model, uri, revision, described.model, kind, target, has_chat_template=chats, as_is=as_is)
    text, spec, plan = _checked(proposal, described, settings)
    if not dry_run:
        from registry.atomic_write import write_atomically

        settings.models.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    found = ProposedFile(
        model=model,
        path=None if dry_run else str(path),
        text=text,
        schemes=tuple(proposal.choice.schemes),
        left_out=proposal.choice.left_out,
        expected=tuple(estimate(proposal, plan, evaluation(spec))),
    )
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        _show(found)


def _as_is(
    described: Described, uri: str, baseline: str | None, reason: str | None, settings: Settings
) -> tuple[Described, AsIs | None]:
    """The model at 16 bits, and how a source that is quantized already is taken.

    Raises:
        SpecError: it is, and nothing says what it is to be compared with; or it is not, and something does.
    """
    from pipeline.errors import SpecError
    from pipeline.planner.sources import describe, with_published
    from pipeline.proposal.propose import AsIs
    from pipeline.sources.origin import Access
    from pipeline.sources.source import resolve

    given = [name for name, value in (("--baseline", baseline), ("--no-baseline", reason)) if value is not None]
    if "quantization_config" not in described.model.config:
        if given:
            raise SpecError(f"{given[0]} is for a source that is quantized already, and {uri} is not: leave it out")
        return described, None
    if len(given) != 1:
        raise SpecError(
            f"{uri} is quantized already: name its 16-bit original with --baseline URI, or say with --no-baseline "
            "REASON why there is none"
        )
    original = None
    if baseline is not None:
        baseline = _absolute(baseline)
        original = describe(resolve(baseline, None, access=Access.of(settings)))
    whole = with_published(described, original)
    assert whole.published is not None  # noqa: S101 - what it was described with
    return whole, AsIs(whole.published, baseline, reason)


def _absolute(uri: str) -> str:
    """A folder's URI counts from here; in the model file it counts from that."""
    return f"file:{Path(uri.removeprefix('file:')).absolute()}" if uri.startswith("file:") else uri


def _ask(question: str, default: str, is_asked: bool) -> str:
    return str(click.prompt(question, default=default, err=True)) if is_asked else default


def _ask_kind(guessed: Kind, is_asked: bool) -> Kind:
    from pipeline.proposal.propose import KINDS

    if not is_asked:
        return guessed
    answer: Kind = click.prompt("What is it for", type=click.Choice(KINDS), default=guessed, err=True)
    return answer


def _own_device() -> str:
    from containers.hardware.gpu import gpus

    return next((gpu.name for gpu in gpus()), _CPU)


def _target(name: str, settings: Settings) -> Target:
    """The device of a name, and the runtime for it; of this machine's own GPU the one that its driver runs.

    Raises:
        GpuDataError: there is no such GPU in the data file.
    """
    from containers.hardware.gpu import gpus
    from containers.hardware.gpu_models import find_gpu
    from containers.image import profile
    from containers.image.gpu_compatibility import labels_of, needs_of, problems
    from pipeline.proposal.propose import Target

    isa = settings.cpu.instruction_set
    if name.lower() == _CPU:
        return Target("vllm-cpu", None, isa)
    found, own = find_gpu(name), [gpu for gpu in gpus() if gpu.name == name]
    if not own:
        return Target("vllm-cuda13", found, isa)
    can_run = not problems(needs_of(labels_of(profile.load("vllm-cuda13"))), own[0])
    found = found.model_copy(update={"memory_bytes": own[0].memory_bytes})
    return Target("vllm-cuda13" if can_run else "vllm-cuda12", found, isa, len(own))


def _checked(proposal: Proposal, described: Described, settings: Settings) -> tuple[str, ModelSpec, Plan]:
    """The file's text, read back, with its plan: what is written passes the checks that a release begins with."""
    from pipeline.planner.asking import plan_described, refusals
    from pipeline.planner.data import check_data
    from pipeline.proposal.model_file import write
    from pipeline.spec import load

    has_schema = (settings.models.parent / "docs" / "model.schema.json").is_file()
    text = write(proposal, "../docs/model.schema.json" if has_schema else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        path.write_text(text, encoding="utf-8")
        spec = load(path)
    check_data(spec)
    gpus = [] if proposal.target.gpu is None else [proposal.target.gpu]
    refused = refusals(described.model, spec.schemes)
    return text, spec, plan_described(spec, described, spec.schemes, gpus, lambda usual: usual, refused)


def _show(found: ProposedFile) -> None:
    """Print the file, or where it is, and what the release will take."""
    if found.path is None:
        click.echo(found.text, nl=False)
        for each in found.expected:
            say(f"{each.what}: {each.amount} ({each.basis})")
        return
    for scheme, reason in found.left_out.items():
        results.print(f"left out: {escape(scheme)}: {escape(reason)}")
    rows = [(each.what, each.amount, each.basis) for each in found.expected]
    print_table(("first release", "about", "estimated from"), rows)
    results.print(f"\nwrote {escape(found.path)}\n\nTry next:")
    for command in (f"slipway plan {found.model}", f"slipway release {found.model}"):
        results.print(f"  {escape(command)}")
