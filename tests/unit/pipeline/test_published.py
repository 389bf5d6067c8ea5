"""Sources that are quantized already, taken as they are: what their format is, what is refused, and what is checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from evals.drift.drift_gate import judge
from evals.drift.pairs import Drift, not_compared, read_drift
from homes import DEMO
from pipeline.cli import main
from pipeline.commands.show import USAGE
from pipeline.compatibility import preflight
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import CheckpointError, SourceError, SpecError, UnsupportedModelError
from pipeline.orchestration.asset_metadata import answers as answers_shown
from pipeline.orchestration.asset_metadata import drift as drift_shown
from pipeline.planner.sources import Described, describe_folder, with_published
from pipeline.planner.weights import taken, unquantized
from pipeline.publishing.card import CONFIGURATION, card
from pipeline.quantization.checkpoint import check_published
from pipeline.quantization.quantize import QuantizedNotes
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.context import StageContext
from pipeline.stages.locked_sources import locked_sources
from pipeline.stages.preflight import foresee
from pipeline.stages.release import MLBOM
from pipeline.stages.run import run, run_until
from pipeline.stages.table import BASELINE, DRIFT, RELEASE
from registry.manifest import MANIFEST, REPORT, Manifest
from registry.provenance import statement
from registry.signing import load_trusted_keys
from registry.verify import verify
from unit.pipeline import checkpoints, compressed, published_models
from unit.pipeline.release_evidence import Made
from unit.pipeline.test_compatibility import FAMILIES, write_family

COMPRESSED = ("fp8", "fp8-block", "w8a8", "w4a16", "nvfp4", "mxfp4")
PACKED = {"awq": ("awq", 4, 32), "gptq": ("gptq", 4, 32)}
PUBLISHED = {"fp8-scale-inv": "deepseek_v3", "mxfp4-experts": "gpt_oss"}
FORMATS = (*COMPRESSED, *PACKED, *PUBLISHED)
LAYER = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts.down_proj"
GPT_OSS: dict[str, object] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
DEEPSEEK: dict[str, object] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
REASON = "the publisher has no 16-bit weights of it"


def family(name: str) -> dict[str, NDArray[Any]]:
    """A two-layer model of a family, with numbers by chance."""
    generator = np.random.default_rng(1)
    described = FAMILIES[name]["tensors"]
    return {key: generator.standard_normal(shape).astype(np.float16) for key, (_, *shape) in described.items()}


def original_of(name: str, folder: Path) -> Path:
    """The 16-bit model that a published checkpoint of this format was made from."""
    if name in PUBLISHED:
        model = PUBLISHED[name]
        return checkpoints.write(folder, family(model), dict(FAMILIES[model]["config"]))
    return checkpoints.write_source(folder)


def gpt_oss() -> compressed.Stored:
    """GPT-OSS's tensors as OpenAI publishes them."""
    found: compressed.Stored = {}
    for name, values in family("gpt_oss").items():
        if not name.endswith("_proj"):
            found[name] = ("float16", values)
            continue
        each = [compressed.encode("mxfp4", expert.T.astype(np.float32)) for expert in values]
        blocks, scales = (np.stack([one[part][1] for one in each]) for part in ("weight_packed", "weight_scale"))
        found[f"{name}_blocks"] = ("uint8", blocks.reshape(*scales.shape, 16))
        found[f"{name}_scales"] = ("uint8", scales)
    return found


def deepseek() -> compressed.Stored:
    """DeepSeek V3's tensors as DeepSeek publishes them."""
    linears = describe_linears("deepseek_v3")
    found: compressed.Stored = {}
    for name, values in family("deepseek_v3").items():
        module = name.removesuffix(".weight")
        if module in linears:
            parts = compressed.encode_squares(values.astype(np.float32))
            found |= {f"{module}.{part}": stored for part, stored in parts.items()}
        else:
            found[name] = ("float16", values)
    return found


def describe_linears(name: str) -> set[str]:
    from unit.pipeline.test_proposal import family as described  # noqa: PLC0415 - a model without weights

    return set(described(name).linears)


def publish(name: str, folder: Path, tensors: compressed.Stored | None = None, **stated: object) -> Path:
    """Write a quantized checkpoint as somebody else published it, with keys of its configuration changed."""
    if name in COMPRESSED:
        return compressed.write(folder, name, tensors, **stated)
    if name in PACKED:
        method, bits, size = PACKED[name]
        config = checkpoints.config() | {
            "quantization_config": checkpoints.quantization_config(method, bits, size) | stated
        }
        return checkpoints.write(folder, checkpoints.quantized(method, bits, size), config)
    model = PUBLISHED[name]
    usual, made = (GPT_OSS, gpt_oss) if model == "gpt_oss" else (DEEPSEEK, deepseek)
    config = {**FAMILIES[model]["config"], "quantization_config": {**usual, **stated}}
    return compressed.write_stored(folder, config, tensors or made())


def described(folder: Path, baseline: Path | None) -> Described:
    return with_published(describe_folder(folder), None if baseline is None else describe_folder(baseline))


@pytest.mark.parametrize("name", FORMATS)
def test_a_published_format_is_recognized_planned_and_checked(name: str, tmp_path: Path) -> None:
    original, folder = original_of(name, tmp_path / "original"), publish(name, tmp_path / "published")
    found = described(folder, original).published
    assert found is not None
    assert found.scheme.format == name
    at_16_bits = describe_folder(original).model
    assert {key: tensor.shape for key, tensor in found.original.tensors.items()} == {
        key: tensor.shape for key, tensor in at_16_bits.tensors.items()
    }
    weights, whole = taken("x", found), unquantized(at_16_bits)
    assert weights.bytes == sum(tensor.bytes for tensor in describe_folder(folder).model.tensors.values())
    assert weights.numbers == whole.numbers
    checked = check_published(folder, original)
    assert checked == check_published(folder, None)
    assert weights.bits_per_weight == pytest.approx(checked.bits_per_weight)
    assert checked.source_bytes == whole.bytes


# What is refused from headers alone


@pytest.mark.parametrize(
    ("name", "stated", "said"),
    [
        ("fp8", {"quant_method": "bitsandbytes"}, "`quant_method` 'bitsandbytes'.* `mxfp4` or `compressed-tensors`"),
        ("fp8", {"kv_cache_scheme": {"num_bits": 8}}, "`kv_cache_scheme`"),
        ("fp8", {"config_groups": {}}, "does not know: {'quant_method': 'compressed-tensors'"),
        ("fp8", {"ignore": [LAYER]}, f"`{LAYER}`: quantized, and config.json says that it is not"),
        ("fp8", {"ignore": ["re:.*up_proj$"]}, f"`{LAYER}`, .*: quantized, and config.json says that it is not"),
        ("fp8", {"ignore": ["re:(a+)+$"]}, r"names layers by what is not read here: 're:\(a\+\)\+\$'"),
        ("awq", {"version": "gemv"}, "`quantization_config.version` is 'gemv', expected 'gemm'"),
        ("awq", {"group_size": 7}, "does not know: {'quant_method': 'awq'"),
        ("gptq", {"desc_act": True}, "vLLM can't serve GPTQ with `desc_act` True"),
        ("fp8-scale-inv", {"activation_scheme": "static"}, "`.*activation_scheme` is 'static', expected 'dynamic'"),
    ],
)
def test_a_configuration_that_is_not_known_is_refused(
    name: str, stated: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = publish(name, tmp_path / "published", **stated)
    with pytest.raises(UnsupportedModelError, match=f"^`source`: .*{said}"):
        described(folder, None)


def test_a_source_that_is_not_quantized_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write_source(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=r"^`source`: it is not quantized .*choose a method that quantizes"):
        described(folder, None)


def test_a_layer_at_16_bits_must_be_named_and_a_head_must_not_be_quantized(tmp_path: Path) -> None:
    tensors = compressed.quantized("fp8")
    kept = {f"{LAYER}.weight": ("float16", checkpoints.unquantized()[f"{LAYER}.weight"])}
    tensors = {name: stored for name, stored in tensors.items() if not name.startswith(LAYER)} | kept
    with pytest.raises(UnsupportedModelError, match=f"`{LAYER}`: not quantized, and config.json does not say so"):
        described(compressed.write(tmp_path / "silent", "fp8", tensors), None)
    named = compressed.write(tmp_path / "named", "fp8", tensors, ignore=["lm_head", LAYER])
    original = checkpoints.write_source(tmp_path / "original")
    assert described(named, original).published is not None
    assert check_published(named, original).layers == len(checkpoints.linears()) - 1
    head = checkpoints.unquantized()["lm_head.weight"].astype(np.float32)
    encoded = {f"lm_head.{part}": stored for part, stored in compressed.encode("fp8", head).items()}
    odd = compressed.write(tmp_path / "head", "fp8", compressed.quantized("fp8") | encoded, ignore=[])
    with pytest.raises(UnsupportedModelError, match="`lm_head` is quantized, and no linear layer of the decoder"):
        described(odd, None)


def other_vocabulary(folder: Path) -> Path:
    changed = checkpoints.unquantized()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed[name] = changed[name][:-8]
    return checkpoints.write(folder, changed, checkpoints.config())


def without_a_norm(folder: Path) -> Path:
    changed = {name: values for name, values in checkpoints.unquantized().items() if name != "model.norm.weight"}
    return checkpoints.write(folder, changed, checkpoints.config())


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            lambda folder: publish("w4a16", folder),
            r"it is quantized itself \(`.*` is I32\): name the original at 16 bits",
        ),
        (lambda folder: write_family(folder, "qwen3"), "it is a `qwen3`, and the source a `llama`"),
        (other_vocabulary, r"`lm_head.weight` is \[88, 64\], and \[96, 64\] in the source \(1 more differ\)"),
        (without_a_norm, "it lacks `model.norm.weight`, which the source has"),
    ],
    ids=["quantized", "architecture", "vocabulary", "norm"],
)
def test_a_baseline_that_is_not_the_original_is_refused(
    write: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^`baseline`: {said}$"):
        described(publish("fp8", tmp_path / "published"), write(tmp_path / "baseline"))


# What is refused when the weights are there


def doubled(tensors: compressed.Stored, name: str, factor: float = 2) -> compressed.Stored:
    dtype, values = tensors[name]
    return tensors | {name: (dtype, (values * factor).astype(values.dtype))}


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        (
            "fp8",
            lambda: doubled(compressed.quantized("fp8"), f"{LAYER}.weight_scale"),
            f"{LAYER} decodes to 2.0. times",
        ),
        ("fp8", lambda: doubled(compressed.quantized("fp8"), "model.norm.weight"), "`model.norm.weight` differs"),
        ("fp8-scale-inv", lambda: doubled(deepseek(), f"{LAYER}.weight_scale_inv"), f"{LAYER} decodes to 2.0. times"),
        ("mxfp4-experts", lambda: one_more(gpt_oss(), f"{EXPERTS}_scales"), r"down_proj\[2\] decodes to .* times"),
    ],
    ids=["scales", "norm", "squares", "expert"],
)
def test_weights_that_are_not_the_baseline_s_are_refused(
    name: str, tensors: Callable[[], compressed.Stored], said: str, tmp_path: Path
) -> None:
    folder = publish(name, tmp_path / "published", tensors())
    with pytest.raises(CheckpointError, match=said):
        check_published(folder, original_of(name, tmp_path / "original"))
    check_published(folder, None)


def one_more(tensors: compressed.Stored, name: str) -> compressed.Stored:
    """The third expert's powers of two raised by one."""
    dtype, values = tensors[name]
    changed = values.copy()
    changed[2] += 1
    return tensors | {name: (dtype, changed)}


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        ("fp8", lambda: doubled(compressed.quantized("fp8"), f"{LAYER}.weight_scale", np.nan), "is not finite"),
        (
            "fp8-scale-inv",
            lambda: doubled(deepseek(), f"{LAYER}.weight_scale_inv", 0),
            "values that are not above zero",
        ),
        (
            "mxfp4-experts",
            lambda: {k: v for k, v in gpt_oss().items() if k != f"{EXPERTS}_scales"},
            "lacks `weight_scale`",
        ),
    ],
    ids=["not finite", "zero", "missing"],
)
def test_scales_that_can_t_be_right_are_refused_without_a_baseline(
    name: str, tensors: Callable[[], compressed.Stored], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        check_published(publish(name, tmp_path / "published", tensors()), None)


# The model file


def write_file(folder: Path, taken_from: Path, **more: object) -> Path:
    document = yaml.safe_load((DEMO.parent / "demo.yaml").read_text().replace("file:demo", f"file:{DEMO}"))
    document |= {"model": "taken", "source": {"uri": f"file:{taken_from}"}, "schemes": {"fp8": {"method": "as-is"}}}
    document |= more
    path = folder / "taken.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return path


def without_baseline(**evals: object) -> dict[str, Any]:
    document = yaml.safe_load((DEMO.parent / "demo.yaml").read_text().replace("file:demo", f"file:{DEMO}"))
    load_test = document["load"] | {"canary": {"prompt": "a", "expect": "b"}}
    return {"evals": {**document["evals"], "accept_inconclusive": {"no-baseline": REASON}, **evals}, "load": load_test}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "`baseline`: a source that is quantized already is compared .*or say why there is none"),
        ({"baseline": {"url": "hf://a/b"}}, "`baseline.uri` is missing"),
        (
            {"baseline": "hf://a/b", "schemes": {"a": {"method": "as-is", "bits": 4}}},
            "`schemes.a`: `bits` does not apply to as-is",
        ),
        (
            {
                "baseline": "hf://a/b",
                "schemes": {"a": {"method": "as-is"}, "b": {"method": "fp8", "backend": "llmcompressor"}},
            },
            "`schemes.b`: another scheme takes the source as it is",
        ),
        (
            {"baseline": "hf://a/b", "schemes": {"b": {"method": "fp8", "backend": "llmcompressor"}}},
            "`baseline`: it is for `method: as-is` alone",
        ),
        (
            {"baseline": "hf://a/b", "source": {"uri": "hf://a/c", "adapter": {"uri": "hf://a/d"}}},
            "`source.adapter`: an adapter can't be merged into weights that are quantized already",
        ),
        (
            {"baseline": "hf://a/b", **without_baseline()},
            "`evals.accept_inconclusive.no-baseline`: there is a `baseline`",
        ),
        (
            {**without_baseline(), "load": {**without_baseline()["load"], "canary": None}},
            "`load.canary`: without a `baseline` no 16-bit model gives one",
        ),
        (
            {**without_baseline(engine="served"), "serve": {"adapters": {"a": {"uri": "hf://a/d"}}}},
            "`serve.adapters`: adapters are compared with those of a `baseline`",
        ),
    ],
)
def test_a_file_that_takes_a_source_as_it_is_says_nothing_else(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=said):
        load(write_file(tmp_path, tmp_path, **more))


def test_a_quantizer_s_refusal_of_a_quantized_source_names_the_method(tmp_path: Path) -> None:
    scheme = Scheme.model_validate({"method": "fp8", "backend": "llmcompressor"})
    (problem,) = preflight.find_problems(describe_folder(publish("awq", tmp_path / "published")).model, scheme)
    assert problem.endswith("release it by `method: as-is`, or use the original model")


def test_a_plan_has_the_source_as_it_is_beside_its_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    original, folder = original_of("mxfp4-experts", tmp_path / "o"), publish("mxfp4-experts", tmp_path / "p")

    def plan(**more: object) -> dict[str, Any]:
        done = CliRunner().invoke(main, ["plan", str(write_file(tmp_path, folder, **more)), "--gpu", "H100", "--json"])
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    compared, alone = plan(baseline=f"file:{original}"), plan(**without_baseline())
    assert [scheme["scheme"] for scheme in compared["schemes"]] == ["fp16", "fp8"]
    assert [scheme["scheme"] for scheme in alone["schemes"]] == ["fp8"]
    assert compared["schemes"][1] == alone["schemes"][0]
    assert compared["download_bytes"] > 2 * alone["download_bytes"]
    assert any("vLLM has no kernel for the format `mxfp4-experts` on CPUs" in note for note in alone["notes"])


def test_a_release_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = publish("fp8", tmp_path / "published")
    path = write_file(tmp_path, folder, baseline=f"file:{folder}")
    with pytest.raises(UnsupportedModelError, match=r"^`baseline`: it is quantized itself"):
        foresee(load(path), ["fp8"], Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")}), print)
    assert not (tmp_path / "home" / "artifacts").exists()


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b", "deepseek-v3"])
def test_a_model_that_is_published_in_few_bits_is_planned_with_the_numbers_that_are_published(name: str) -> None:
    found = with_published(Described(published_models.model(name), 0), None)
    assert found.published is not None
    numbers = published_models.published(name)["parameters"]
    assert taken("x", found.published).numbers == unquantized(found.model).numbers == numbers


def test_a_first_file_takes_a_quantized_source_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SLIPWAY_MODELS", str(tmp_path))
    original, folder = original_of("mxfp4-experts", tmp_path / "o"), publish("mxfp4-experts", tmp_path / "p")

    def init(uri: Path, *words: str) -> Result:
        return CliRunner().invoke(main, ["init", f"file:{uri}", "--gpu", "H100", "--name", "taken", "--force", *words])

    silent = init(folder)
    assert silent.exit_code == USAGE
    assert "quantized already: name its 16-bit original with --baseline URI, or say with --no-baseline" in silent.stderr
    compared = init(folder, "--baseline", f"file:{original}")
    assert compared.exit_code == 0, compared.stderr
    spec = load(tmp_path / "taken.yaml")
    assert {name: scheme.method for name, scheme in spec.schemes.items()} == {"mxfp4": "as-is"}
    assert (spec.source.uri, spec.original.uri) == (f"file:{folder}", f"file:{original}")
    alone = init(folder, "--no-baseline", "There is: none.")
    assert alone.exit_code == 0, alone.stderr
    assert load(tmp_path / "taken.yaml").evals.accept_inconclusive == {"no-baseline": "There is: none."}
    odd = init(original, "--baseline", f"file:{original}")
    assert "--baseline is for a source that is quantized already" in odd.stderr


# The stages, up to the checkpoint


def context_of(path: Path) -> StageContext:
    return StageContext(load(path), "fp8", Settings.read({"SLIPWAY_HOME": str(path.parent / "home")}), lambda _: None)


def test_both_sources_are_pulled_locked_and_recorded(tmp_path: Path) -> None:
    original, folder = original_of("fp8", tmp_path / "original"), publish("fp8", tmp_path / "published")
    path = write_file(tmp_path, folder, baseline=f"file:{original}")
    made = run_until("quantized", context_of(path))
    assert made["source"].sha256.keys() == {each.name for each in original.iterdir()}
    assert (made["quantized"].folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    notes = made["quantized"].noted(QuantizedNotes)
    assert (notes.method, notes.backend, notes.pins_digest, notes.device) == ("fp8", "none", None, None)
    assert notes.revision is not None
    assert notes.revision.startswith("sha256:")
    locks = {each.name for each in tmp_path.glob("*.lock.json")}
    assert locks == {"taken.lock.json", "taken.baseline_source.lock.json"}
    assert {each.key: each.lock.name for each in locked_sources(load(path))} == {
        "source": "taken.lock.json",
        "baseline": "taken.baseline_source.lock.json",
    }
    again = run_until("quantized", context_of(path))
    assert all(artifact.cached for artifact in again.values())
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(SourceError, match=r"taken.lock.json.*tokenizer.json has sha256"):
        run_until("quantized", context_of(path))


def test_without_a_baseline_the_source_is_pulled_once(tmp_path: Path) -> None:
    folder = publish("mxfp4-experts", tmp_path / "published")
    made = run_until("quantized", context_of(write_file(tmp_path, folder, **without_baseline())))
    names = [made[stage].folder / "model.safetensors" for stage in ("source", "quantized")]
    assert len({name.stat().st_ino for name in names}) == 1
    assert made["quantized"].noted(QuantizedNotes).method == "mxfp4-experts"
    assert {each.name for each in tmp_path.glob("*.lock.json")} == {"taken.lock.json"}


def test_without_a_baseline_drift_is_inconclusive_and_let_through_with_the_file_s_reason(tmp_path: Path) -> None:
    limits = load(write_file(tmp_path, tmp_path, **without_baseline())).evals
    verdict = judge(not_compared("there is nothing"), limits)
    assert (verdict.status, verdict.cause, verdict.accepted_because) == ("inconclusive", "no-baseline", REASON)
    assert not verdict.blocks
    assert judge(not_compared("there is nothing"), limits.model_copy(update={"accept_inconclusive": {}})).blocks


# The release

TAKEN = QuantizedNotes(
    method="fp8", backend="none", parameters={"bits": 8, "group_size": -1}, device=None, calibration=None, layers=28,
    bytes=10**6, source_bytes=2 * 10**6, bits_per_weight=8.2, pins_digest=None, revision="1" * 40,
)  # fmt: skip


def made_of(folder: Path, drift: Drift | None = None, **more: object) -> Made:
    """What makes the artifacts of a source that is taken as it is."""
    config = (compressed.write(folder / "published", "fp8") / "config.json").read_text()
    file = write_file(folder, folder / "published", **more)
    settings = Settings.read({"SLIPWAY_HOME": str(folder / "home")})
    return Made(settings, model=file, scheme="fp8", quantized=TAKEN, config=config, drift=drift)


def sealed(folder: Path, drift: Drift | None = None, **more: object) -> tuple[Manifest, dict[str, Any], str]:
    """A release of a source as it is: its manifest, the bill of materials and the report."""
    made = made_of(folder, drift, **more)
    release = run(RELEASE, made.context, made.artifacts())
    verify(release.folder, load_trusted_keys(made.settings.trusted_keys))
    report = (release.folder / REPORT).read_text()
    return Manifest.parse((release.folder / MANIFEST).read_bytes()), release.document(MLBOM), report


def test_a_release_says_where_it_was_published_and_what_it_was_compared_with(tmp_path: Path) -> None:
    manifest, bill, report = sealed(tmp_path, baseline=f"file:{tmp_path}/original")
    assert (manifest.source.uri, manifest.source.revision) == ("file:published", "1" * 40)
    assert manifest.baseline is not None
    assert (manifest.baseline.uri, manifest.baseline.revision) == ("file:original", "0" * 40)
    quantizer = manifest.quantizer
    assert (quantizer.backend, quantizer.version, quantizer.method) == ("none", "as published", "fp8")
    dependencies = json.loads(statement(manifest))["predicate"]["buildDefinition"]["resolvedDependencies"]
    names = {each["name"] for each in dependencies}
    assert names >= {"source", "source/model.safetensors", "baseline", "baseline/model.safetensors"}
    assert "quantizer's pins" not in names
    ancestors = [each["name"] for each in bill["metadata"]["component"]["pedigree"]["ancestors"]]
    assert ancestors == ["file:published", "file:original"]
    assert f"file:original at {'0' * 40}" in report
    files = {CONFIGURATION: json.dumps(FAMILIES["llama"]["config"]).encode()}
    text = card(manifest, files, "hf://org/name")
    assert "quantized already, and released as it was published (fp8)" in text
    assert f"| compared with | `file:original` at `{'0' * 40}` |" in text


def test_a_release_without_a_baseline_gives_the_file_s_reason(tmp_path: Path) -> None:
    manifest, bill, report = sealed(tmp_path, not_compared("there is nothing"), **without_baseline())
    assert manifest.baseline is None
    assert [each["name"] for each in bill["metadata"]["component"]["pedigree"]["ancestors"]] == ["file:published"]
    assert REASON in report
    files = {CONFIGURATION: json.dumps(FAMILIES["llama"]["config"]).encode()}
    assert f"there is nothing Accepted: {REASON}" in card(manifest, files, "hf://org/name")


def test_without_a_baseline_nothing_is_asked(tmp_path: Path) -> None:
    made = made_of(tmp_path, **without_baseline())
    artifacts = made.artifacts()
    inputs = {name: artifacts[name] for name in BASELINE.inputs}
    artifacts["baseline"] = run(BASELINE, made.context, inputs)
    assert answers_shown(made.context, artifacts["baseline"]) == {}
    drift = run(DRIFT, made.context, {name: artifacts[name] for name in DRIFT.inputs})
    verdict = judge(read_drift(drift.folder), made.context.evals)
    assert (verdict.cause, verdict.accepted_because) == ("no-baseline", REASON)
    assert drift_shown(made.context, drift)
