"""Reads a model's file, ``models/<name>.yaml``, into a frozen `ModelSpec`; errors name the path of the key."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from containers.errors import ProfileError
from containers.image import profile
from containers.image.engine_options import find_problems, options_of, parser_problem
from containers.image.serving import Adapter, Override, Serve, ServingConfiguration, Speculative
from containers.scan.policy import ScanPolicy
from evals import builtin
from evals.drift.limits import NO_BASELINE, DriftLimits
from evals.load.cost import CostPlan
from evals.load.load_test import LoadPlan
from pipeline.compatibility.scheme import AS_IS, Scheme
from pipeline.errors import SpecError
from pipeline.yaml_file import explain, keys, listed, read
from registry.digests import digest_file
from registry.suggestions import suggestion

# No user information in https, so no token is in a file that is committed; `ext::` and options are no addresses.
_REPOSITORY = re.compile(
    r"https://[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[A-Za-z0-9._~-]+)+|"
    r"ssh://([A-Za-z0-9._]+@)?[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[A-Za-z0-9._~-]+)+|(/[A-Za-z0-9._~ -]+)+"
)
_NO_PARTS = {".", "..", ".git"}
_NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
# Paths of the keys that name data files, some of which may be built-in ones; ``*`` matches any key.
_CALIBRATION = (("calibration", "uri"), ("calibration", "mixture", "*", "uri"))
_BUILTIN = (*_CALIBRATION, ("evals", "tasks", "*", "data"), ("load", "prompts"))
_DATA = (*_BUILTIN, ("evals", "adapters", "*", "tasks", "*", "data"), ("serve", "chat_template"))
# Paths of the sections that name further weights.
_PINNED: tuple[tuple[str, ...], ...] = (
    ("source",),
    ("baseline",),
    ("source", "adapter"),
    ("serve", "adapters", "*"),
    *((*section, "speculative", "source") for section in (("serve",), ("serve", "variants", "*"))),
    ("schemes", "*", "serve", "speculative", "source"),
)
BUILTIN, DATASETS = "builtin:", "hf://datasets/"
# Keys of `serve` whose values the engine defines.
_ASKED_OF_ENGINE = {"arguments", "tool_calls", "reasoning"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Section):
    """Where the weights come from."""

    uri: str
    """`file:FOLDER`, `hf://ORG/NAME`, `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`,
    `models:/NAME@ALIAS`, `runs:/RUN/PATH` or `oci://HOST/NAME:TAG` (see *Sources*); a relative folder counts from the
    model file.
    """
    revision: str | None = None
    """Of a hub: a commit, a tag or a branch; default `main`."""
    adapter: Adapter | None = None
    """A LoRA or DoRA adapter that is merged into the weights: the model is released as one of its own."""


class Baseline(_Section):
    """The 16-bit original of a source that is quantized already."""

    uri: str
    """As `source.uri`."""
    revision: str | None = None
    """Of a hub: a commit, a tag or a branch; default `main`."""


def _section(given: object) -> object:
    """A URI alone as the section that has it."""
    return {"uri": given} if isinstance(given, str) else given


class ReleasedScheme(Scheme):
    """How a model is quantized, and what is served differently for it."""

    serve: Override = Field(default=Override(), exclude=True)
    """Keys of the model's `serve` that this scheme overrides."""


class CalibrationData(_Section):
    """One source of calibration samples."""

    uri: str = f"{BUILTIN}calibration"
    """`file:PATH` or a data set `hf://datasets/ORG/NAME`, with rows of `text` or of `messages`, which the model's chat
    template renders; or `builtin:calibration`: prose, code and questions with answers.
    """
    revision: str | None = None
    """Of a data set: a commit, a tag or a branch; default `main`. What it resolves to is locked."""
    files: str | None = None
    """Of a data set: which of its files, as `data/train-*.parquet`; JSON lines (`.jsonl`) or Parquet."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if not self.is_here:
            if self.files is None:
                raise ValueError("a data set needs `files`, which say what is used of it, as `data/train-*.parquet`")
        elif given := [name for name in ("revision", "files") if getattr(self, name) is not None]:
            raise ValueError(f"`{given[0]}` applies only to {DATASETS}ORG/NAME: remove it")
        return self

    @property
    def is_here(self) -> bool:
        """Whether it is a file of this machine, and not a data set of a hub."""
        return not self.uri.startswith(DATASETS)

    @property
    def path(self) -> Path:
        """The file that holds it, if it is not a data set of a hub."""
        name = self.uri.removeprefix(BUILTIN)
        return builtin.FILES[name] if name != self.uri else Path(self.uri.removeprefix("file:"))


class WeightedData(CalibrationData):
    """One source of a mixture."""

    weight: float = Field(default=1, gt=0, allow_inf_nan=False)
    """Its share of the samples, relative to the other weights."""


class Calibration(CalibrationData):
    """What the quantizer is calibrated with: the first rows of one source, or a sample of each source of a mixture."""

    mixture: tuple[WeightedData, ...] = Field(default=(), max_length=16)
    """In place of `uri`: sources with weights. Each gives its share of the samples, drawn from its first 20,000 rows,
    always the same.
    """
    samples: int = Field(default=128, ge=1, le=20_000)
    """How many rows are used: of one source the first."""
    max_tokens: int = Field(default=512, ge=16)
    """Longer texts are cut to so many tokens. Of longer conversations the last messages are left out."""
    min_expert_tokens: int | None = Field(default=None, ge=1)
    """Calibration tokens that must reach each expert of a mixture; with fewer the release fails and says how many
    `samples` would be enough. Without it, experts that no token reached are a warning.
    """

    @model_validator(mode="after")
    def _one_form(self) -> Calibration:
        if self.mixture and "uri" in self.model_fields_set:
            raise ValueError("`uri` and `mixture` exclude each other: remove one of them")
        return self

    @property
    def data(self) -> tuple[WeightedData, ...]:
        """Its sources: those of the mixture, or the one."""
        return self.mixture or (WeightedData(uri=self.uri, revision=self.revision, files=self.files),)


class GitFile(_Section):
    """A file in a Git repository that names the champion's image."""

    repository: Annotated[str, StringConstraints(max_length=500)]
    """`https://HOST/PATH`, `ssh://USER@HOST/PATH` or the absolute path of a bare repository. Credentials come from
    git's helpers or the SSH agent.
    """
    branch: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$", max_length=200)] = "main"
    """The branch that is pushed to; it must exist."""
    path: Annotated[str, StringConstraints(max_length=300)]
    """The file, which belongs to Slipway alone; `{release}` in it is the release line, such as `demo-awq`."""
    format: Literal["kustomize", "values"] = "kustomize"
    """A Kustomize component with `images`, or values for a Helm chart with `image.repository` and `image.digest`."""

    @field_validator("repository")
    @classmethod
    def _address(cls, address: str) -> str:
        if not _REPOSITORY.fullmatch(address):
            raise ValueError(
                "expected `https://HOST/PATH`, `ssh://USER@HOST/PATH` or an absolute path, without a password; git's "
                "credential helpers know passwords"
            )
        return address

    @field_validator("path")
    @classmethod
    def _plain_path(cls, path: str) -> str:
        parts = path.replace("{release}", "release").split("/")
        if any(re.fullmatch(r"[A-Za-z0-9._-]+", part) is None or part.lower() in _NO_PARTS for part in parts):
            raise ValueError(f"`{path}` is not a path in a repository: expected `clusters/prod/{{release}}.yaml`")
        return path


class Registry(_Section):
    """What happens to a release that passed all gates."""

    champion: Literal["automatic", "manual"] = "automatic"
    """`automatic` makes it the champion, `manual` leaves it a candidate until `slipway promote`."""
    git: GitFile | None = None
    """The file in a Git repository that is written whenever the champion changes, for Argo CD or Flux."""
    cold_aliases: bool = False
    """Whether `slipway gc --tier` may also move versions with an alias; a pull then fetches them from cold storage."""


class Automation(_Section):
    """What happens to the model automatically; nothing by default."""

    release: Literal["by-hand", "nightly", "on-change"] = "by-hand"
    """When the model is released again: only by hand, in the night after an input changed, or as soon as a change is
    noticed. Inputs are the revision, calibration, suite, pins and limits.
    """
    upstream: Literal["locked", "follow"] = "locked"
    """Whether the nightly run updates the lock of a branch, tag or alias that moved (`follow`) or only reports it
    (`locked`): of the source, of adapters, of a draft model and of calibration data.
    """
    rescan: Literal["by-hand", "nightly"] = "by-hand"
    """Whether the champion is scanned again every night."""
    load: Literal["by-hand", "weekly"] = "by-hand"
    """Whether the champion is load-tested again every week."""
    slower: float = Field(default=0.25, gt=0)
    """How much slower than the release's own load test, as a fraction, that load test may be before it is reported."""


class ModelSpec(_Section):
    """One model: the source of its weights, its schemes, and the limits of each gate."""

    model: str
    """The model's name: lower-case letters, digits, `-` and `.`."""
    source: Source
    """Where the weights come from."""
    baseline: Annotated[Baseline | None, BeforeValidator(_section, json_schema_input_type=Baseline | str | None)] = None
    """For `method: as-is`: the 16-bit original of the source, which the release is compared with; a URI, or `{uri:
    hf://ORG/NAME, revision: R}`. It is locked like the source. Without one, `evals.accept_inconclusive` must give a
    reason for `no-baseline`.
    """
    license: str | None = None
    """The license of the weights, for the image's labels and the bill of materials."""
    calibration: Calibration = Calibration()
    """The text that the quantizer is calibrated with; `fp8`, `fp8-block` and `mxfp4` use none."""
    schemes: Mapping[str, ReleasedScheme] = Field(min_length=1)
    """How the model is quantized; each scheme is a release line, `MODEL-SCHEME`."""
    evals: DriftLimits
    """The evaluation of FP16 and of the quantized model, and the allowed loss."""
    runtime: str
    """The runtime that serves the model: a profile in `containers/runtimes/`."""
    serve: Serve = Serve()
    """How the model is served; this is tested, and part of the release."""
    scan: ScanPolicy = ScanPolicy()
    """What the scan forbids in the image."""
    load: LoadPlan
    """The traffic of the load test, and the limits for it."""
    cost: CostPlan | None = None
    """Prices, for the cost in the report."""
    registry: Registry = Registry()
    """What happens to a release that passed all gates."""
    automation: Automation = Automation()
    """What happens automatically."""
    path: Path = Field(exclude=True)

    @field_validator("model")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"`{name}` is not a valid name: use lower-case letters, digits, `-` and `.`")
        return name

    @field_validator("schemes")
    @classmethod
    def _plain_schemes(cls, schemes: Mapping[str, ReleasedScheme]) -> Mapping[str, ReleasedScheme]:
        for name in schemes:
            cls._plain(name)
        return schemes

    @model_validator(mode="after")
    def _one_file_each(self) -> Self:
        if self.registry.git is not None and len(self.schemes) > 1 and "{release}" not in self.registry.git.path:
            raise ValueError("`registry.git.path`: every scheme would write this file; put `{release}` into the path")
        return self

    @field_validator("runtime")
    @classmethod
    def _known_runtime(cls, name: str) -> str:
        if name not in profile.names():
            raise ValueError(f"there is no such runtime{suggestion(name, profile.names())}")
        return name

    @property
    def lock(self) -> Path:
        """The file beside this one that pins what the source resolved to."""
        return self.path.with_suffix(".lock.json")

    @property
    def is_published(self) -> bool:
        """Whether the source is quantized already, and taken as it is."""
        return any(scheme.method == AS_IS for scheme in self.schemes.values())

    @property
    def lacks_baseline(self) -> bool:
        """Whether there are no 16-bit weights to compare a release with."""
        return self.is_published and self.baseline is None

    @property
    def original(self) -> Source:
        """Where the 16-bit weights come from; of a quantized source without a baseline, it is that source itself."""
        return self.source if self.baseline is None else Source(**self.baseline.model_dump())

    @property
    def original_lock(self) -> Path:
        """The lock of `original`. No model's name has an underscore, so it is not the lock of another model."""
        return self.lock if self.baseline is None else self.path.with_suffix(".baseline_source.lock.json")

    @property
    def calibrates(self) -> bool:
        """Whether any scheme is calibrated."""
        return any(scheme.needs_calibration for scheme in self.schemes.values())

    @property
    def serve_sections(self) -> dict[str, Override]:
        """All sections that say how the model is served, by their paths."""
        sections: dict[str, Override] = {"serve": self.serve}
        sections |= {f"schemes.{name}.serve": scheme.serve for name, scheme in self.schemes.items()}
        return sections | {f"serve.variants.{name}": variant for name, variant in self.serve.variants.items()}

    @property
    def drafting(self) -> dict[str, Speculative]:
        """Where a model drafts tokens, by the keys that name it; it is the same everywhere."""
        found = {f"{path}.speculative.source": section.speculative for path, section in self.serve_sections.items()}
        return {key: each for key, each in found.items() if each is not None and each.asks_a_model}

    def scheme(self, name: str) -> ReleasedScheme:
        """Return one scheme.

        Raises:
            SpecError: the model has no such scheme.
        """
        if name not in self.schemes:
            raise SpecError(f"{self.path} has no scheme `{name}`{suggestion(name, self.schemes)}")
        return self.schemes[name]

    def serving(self, scheme: str | None = None, variant: str | None = None) -> ServingConfiguration:
        """Return how the model is served in a scheme, or as a variant; without a scheme, what holds for all of them.

        Raises:
            SpecError: the model has no such scheme or variant.
        """
        sections: list[Override] = [self.serve]
        keys: dict[str, Any] = {"variant": variant}
        if scheme is not None:
            sections.append(self.scheme(scheme).serve)
            keys |= {"kv_cache": cache} if (cache := self.scheme(scheme).kv_cache) else {}
        if variant is not None:
            if variant not in self.serve.variants:
                raise SpecError(f"{self.path} has no variant `{variant}`{suggestion(variant, self.serve.variants)}")
            sections.append(self.serve.variants[variant])
        for section in sections:
            keys |= {name: getattr(section, name) for name in section.model_fields_set - {"variants", "adapters"}}
        if self.serve.chat_template is not None:
            keys["chat_template"] = f"sha256:{digest_file(self.serve.chat_template)}"
        return ServingConfiguration(**keys)


def find(model: str, models: Path) -> Path:
    """Return the file of ``model``: a path to a YAML file, or a name in the ``models`` folder.

    Raises:
        SpecError: there is no such file; the message suggests a similar name.
    """
    given = Path(model)
    if given.suffix in {".yaml", ".yml"}:
        if not given.is_file():
            raise SpecError(f"there is no file {given}")
        return given.absolute()
    path = models / f"{model}.yaml"
    if not path.is_file():
        known = sorted(item.stem for item in models.glob("*.yaml"))
        raise SpecError(f"no model `{model}` in {models}{suggestion(model, known)}")
    return path


def load(path: Path) -> ModelSpec:
    """Read a model's file; relative ``file:`` URIs count from its folder, and the data that they name must be there.

    Raises:
        SpecError: listing every key that is unknown, missing or wrong, by its path.
    """
    document = read(path)
    # Set by this function, and not allowed in the file.
    known = _known_keys()
    problems = [f"unknown key `path`{suggestion('path', known)}"] if "path" in document else []
    wrong: Iterable[str] = ()
    try:
        resolved = _resolved(document, path.parent, problems)
        spec = ModelSpec.model_validate({**resolved, "path": path})
    except ValidationError as error:
        wrong = (explain(detail, known) for detail in error.errors())
    except OSError as error:
        problems.append(f"a name or path in it is not valid: {error.strerror}")
    except UnicodeError:
        problems.append("it holds an invalid character (a lone surrogate, `\\uD800` to `\\uDFFF`)")
    else:
        for find in (*(_published, _not_served, _not_on_a_cpu, _refused_by_engine, _odd_adapters, _odd_draft_models),):
            problems += find(spec)
        if not problems:
            return spec
    raise SpecError(listed(f"{path} is not a valid model file:", itertools.chain(problems, wrong)))


def _published(spec: ModelSpec) -> Iterator[str]:
    """What does not go with a source that is quantized already; and what that alone may have."""
    if not spec.is_published:
        if spec.baseline is not None:
            yield "`baseline`: it is for `method: as-is` alone, others are compared with `source`: remove it"
        return
    for name, scheme in spec.schemes.items():
        if scheme.method != AS_IS:
            yield (
                f"`schemes.{name}`: another scheme takes the source as it is, so that it is quantized already: to "
                "quantize its original, write a file of its own with that as `source`"
            )
    if spec.source.adapter is not None:
        yield "`source.adapter`: an adapter can't be merged into weights that are quantized already: remove it"
    if spec.baseline is not None:
        if NO_BASELINE in spec.evals.accept_inconclusive:
            yield f"`evals.accept_inconclusive.{NO_BASELINE}`: there is a `baseline`: remove one of them"
        return
    if NO_BASELINE not in spec.evals.accept_inconclusive:
        yield (
            "`baseline`: a source that is quantized already is compared with its 16-bit original: name it, as "
            f"`baseline: hf://ORG/NAME`, or say why there is none: `evals: {{accept_inconclusive: {{{NO_BASELINE}: "
            "REASON}}`"
        )
    if spec.load.canary is None:
        yield "`load.canary`: without a `baseline` no 16-bit model gives one: write `{prompt: TEXT, expect: TEXT}`"
    if spec.serve.adapters:
        yield "`serve.adapters`: adapters are compared with those of a `baseline`, and there is none"


def _not_served(spec: ModelSpec) -> Iterator[str]:
    """Schemes that vLLM can't serve although the evaluation needs a server."""
    for name, scheme in spec.schemes.items() if spec.evals.engine == "served" else ():
        if key := scheme.not_served:
            yield (
                f"`schemes.{name}.{key}`: vLLM can't serve this; for GPTQ it needs 4 or 8 bits, `symmetric: true`, "
                f"`desc_act: false`: change it, or set `evals: {{engine: hf}}` to evaluate without a server "
                f"(found {getattr(scheme, key)!r})"
            )


def _not_on_a_cpu(spec: ModelSpec) -> Iterator[str]:
    """Keys of `serve` that a runtime for CPUs has no use for, or can't serve with."""
    if profile.load(spec.runtime).minimum_driver is not None:
        return
    for path, section in spec.serve_sections.items():
        if section.gpu_memory is not None:
            yield (
                f"`{path}.gpu_memory`: `{spec.runtime}` serves on a CPU, whose memory `load.memory.limit_bytes` "
                f"limits: leave the key out (found {section.gpu_memory})"
            )
        if section.pipeline_parallel > 1:
            yield (
                f"`{path}.pipeline_parallel`: `{spec.runtime}` can't serve with it, since vLLM's engine for CPUs stops "
                f"at the first request: set `tensor_parallel` instead (found {section.pipeline_parallel})"
            )


def _refused_by_engine(spec: ModelSpec) -> Iterator[str]:
    """Keys of `serve` that the runtime's engine does not take."""
    sections = spec.serve_sections.items()
    asked = {path: section for path, section in sections if section.model_fields_set & _ASKED_OF_ENGINE}
    if not asked:
        return
    try:
        options = options_of(profile.load(spec.runtime))
    except ProfileError as error:
        yield f"`serve`: {error}"
        return
    for path, section in asked.items():
        yield from (f"`{path}.arguments`: {problem}" for problem in find_problems(section.arguments, options))
        for key, parsers in (("tool_calls", options.tool_parsers), ("reasoning", options.reasoning_parsers)):
            name = getattr(section, key)
            if name is not None and (problem := parser_problem(name, parsers, options)):
                yield f"`{path}.{key}`: {problem}"


def _odd_adapters(spec: ModelSpec) -> Iterator[str]:
    """Adapters that can't be told from the model or can't be evaluated, and questions for unknown adapters."""
    adapters = spec.serve.adapters
    if spec.model in adapters:
        yield f"`serve.adapters.{spec.model}`: the model itself is served under this name: choose another"
    if adapters and spec.evals.engine == "hf":
        yield "`serve.adapters`: adapters are evaluated as they are served: set `evals: {engine: served}`"
    for name in spec.evals.adapters:
        if name not in adapters:
            yield f"`evals.adapters.{name}`: `serve.adapters` has no such adapter{suggestion(name, adapters)}"


def _odd_draft_models(spec: ModelSpec) -> Iterator[str]:
    """Speculation without the model that it asks, or with one that it does not ask, or with more than one."""
    for path, section in spec.serve_sections.items():
        found, key = section.speculative, f"{path}.speculative.source"
        if found is None or (found.source is not None) == found.asks_a_model:
            continue
        if found.asks_a_model:
            yield f"`{key}`: `method: {found.method}` needs the model that drafts: add `source: {{uri: …}}`"
        else:
            yield f"`{key}`: `method: {found.method}` asks no model: remove it, or set `method: draft`"
    drafting = list(spec.drafting.items())
    for (first, one), (key, other) in itertools.product(drafting[:1], drafting[1:]):
        if (other.method, other.source) != (one.method, one.source):
            yield f"`{key}`: an image has one draft model: name the same one, and `method`, as in `{first}`"


def _resolved(document: Mapping[str, Any], folder: Path, problems: list[str]) -> dict[str, Any]:
    """Replace data URIs by absolute paths, and make the source's path absolute; append errors to ``problems``."""
    made: dict[str, Any] = copy.deepcopy(dict(document))
    for pattern in _DATA:
        for place, holder in _matching(made, pattern):
            uri = holder[place[-1]]
            key = ".".join(place)
            if not isinstance(uri, str):
                continue  # the schema reports it
            path = folder / uri.removeprefix("file:")
            if uri.startswith(BUILTIN) and pattern in _BUILTIN:
                name = uri.removeprefix(BUILTIN)
                path = builtin.FILES.get(name, path)
                if name not in builtin.FILES:
                    known = ", ".join(f"{BUILTIN}{each}" for each in builtin.FILES)
                    problems.append(f"`{key}`: expected one of {known} (found {uri!r})")
            elif uri.startswith(DATASETS) and pattern in _CALIBRATION:
                continue
            elif not uri.startswith("file:"):
                problems.append(f"`{key}`: expected file:PATH, counted from {folder} (found {uri!r})")
            elif not path.is_file():
                problems.append(f"`{key}`: there is no file {path}")
            kept = uri if uri.startswith(BUILTIN) else f"file:{path}"
            holder[place[-1]] = kept if pattern in _CALIBRATION else path
    scan = made.get("scan")
    if isinstance(scan, dict) and isinstance(scan.get("vex"), list):
        scan["vex"] = [folder / str(uri).removeprefix("file:") for uri in scan["vex"]]
    made["baseline"] = _section(made.get("baseline"))
    for section in _PINNED:
        for place, holder in _matching(made, section):
            pinned = holder[place[-1]]
            if isinstance(pinned, dict) and str(pinned.get("uri", "")).startswith("file:"):
                pinned["uri"] = f"file:{folder / pinned['uri'].removeprefix('file:')}"
    return made


def _matching(
    document: Any,  # noqa: ANN401 - any YAML value
    pattern: tuple[str, ...],
    above: tuple[str, ...] = (),
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the path of every key that the pattern matches, with the mapping that holds it."""
    if isinstance(document, list):
        document = dict(enumerate(document))
    if not isinstance(document, dict):
        return
    first, *rest = pattern
    for key in list(document) if first == "*" else [first] if first in document else []:
        place = (*above, str(key))
        if rest:
            yield from _matching(document[key], tuple(rest), place)
        else:
            yield place, document


def _known_keys() -> list[str]:
    return sorted(set(keys(ModelSpec)) - {"path"})
