from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from draft_models import Tensors, head_weights, write_head
from safetensors.numpy import load_file, save_file

from containers.hardware.gpu_models import find_gpu
from containers.image import profile
from evals.load.expected_memory import RUNTIME_BYTES
from homes import DEMO
from pipeline.errors import PlanError, SourceError, SpecError
from pipeline.planner.asking import plan_source
from pipeline.planner.draft_model import check, resolve
from pipeline.planner.sources import describe_folder
from pipeline.settings import Settings
from pipeline.spec import ModelSpec, load
from pipeline.stages import draft_model
from pipeline.stages.context import StageContext
from pipeline.stages.preflight import foresee
from pipeline.stages.run import run_until
from pipeline.store.artifacts import Artifact, ArtifactDraft, Recipe, Store
from unit.pipeline import hub_server

CONFIG: dict[str, Any] = json.loads((DEMO / "model" / "config.json").read_text())
ITSELF = {"method": "draft", "source": {"uri": "file:draft"}, "tokens": 4}
HEAD = {"method": "eagle3", "source": {"uri": "file:draft"}, "tokens": 2}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})


def write_spec(folder: Path, serve: dict[str, Any], **changes: Any) -> ModelSpec:  # noqa: ANN401 - of a model file
    """The demo's file in one scheme, with such a section `serve`."""
    document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
    document |= {"schemes": {"gptq": document["schemes"]["gptq"]}, "serve": serve}
    (folder / "demo.yaml").write_text(yaml.safe_dump({**document, **changes}))
    return load(folder / "demo.yaml")


def write_draft(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The demo's own weights as a draft model, which needs no tokenizer; with ``changes`` of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(load_file(DEMO / "model" / "model.safetensors"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(changes or {})}))
    return folder


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (
            {"speculative": {"method": "eagle3", "tokens": 2}},
            "`serve.speculative.source`: `method: eagle3` needs the model that drafts: add `source: {uri: …}`",
        ),
        (
            {"variants": {"fast": {"speculative": {**ITSELF, "method": "ngram"}}}},
            "`serve.variants.fast.speculative.source`: `method: ngram` asks no model: remove it, or set `method:",
        ),
        (
            {"speculative": ITSELF, "variants": {"fast": {"speculative": HEAD}}},
            "`serve.variants.fast.speculative.source`: an image has one draft model: name the same one, and `method`,",
        ),
    ],
)
def test_speculation_without_its_model_or_with_another_is_refused_by_its_key(
    tmp_path: Path, serve: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SpecError) as refused:
        write_spec(tmp_path, serve)
    assert reason in str(refused.value)


def test_the_engine_is_given_the_draft_model_where_the_image_has_it_and_fp16_never_is(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, {"variants": {"four": {"speculative": ITSELF}, "two": {"speculative": HEAD | ITSELF}}})
    serving, runtime = spec.serving("gptq", "four"), profile.load("vllm-cpu")
    flag, given = serving.engine_arguments(runtime)[-2:]
    assert flag == "--speculative-config"
    assert json.loads(given) == {"method": "draft_model", "model": "/draft_model", "num_speculative_tokens": 4}
    assert "--speculative-config" not in spec.serving("gptq").engine_arguments(runtime)
    assert "--speculative-config" not in serving.reference().engine_arguments(runtime)
    assert "uri" not in serving.document()  # a label of the image, where no path of this machine may be


def _another_width(tensors: Tensors) -> Tensors:
    return tensors | {"fc.weight": np.zeros((256, 3 * 320), np.float16)}


@pytest.mark.parametrize(
    ("tensors", "changes", "reason"),
    [
        (None, {"vocab_size": 4096}, r"config\.json has a vocabulary of 4096 tokens, and the model 2048"),
        (None, {"draft_vocab_size": 512}, r"its own vocabulary has 512 tokens, and it has no `d2t`"),
        (None, {"architectures": ["Gemma3ForCausalLM"]}, r"`architectures: \['Gemma3ForCausalLM'\]`: expected a head"),
        (None, {"architectures": None}, r"`architectures: None`: expected a head of EAGLE-3"),
        (None, {"speculators_model_type": "peagle"}, r"expected a head of EAGLE-3"),
        (_another_width, {}, r"`fc\.weight` has 960 inputs, and the model's hidden states 256 numbers: it was trained"),
        (lambda _: {"lm_head.weight": np.zeros((8, 8), np.float16)}, {}, r"has no matrix `fc\.weight`"),
        (None, {"num_attention_heads": "four"}, r"can't draft tokens: config\.json has `num_attention_heads`"),
    ],
)
def test_a_head_for_another_model_is_refused_before_weights_are_pulled(
    tmp_path: Path,
    settings: Settings,
    tensors: Callable[[Tensors], Tensors] | None,
    changes: dict[str, Any],
    reason: str,
) -> None:
    write_head(tmp_path / "draft", CONFIG, None if tensors is None else tensors(head_weights(CONFIG)), changes)
    with pytest.raises(SourceError, match=r"^`serve\.speculative\.source`: .*" + reason):
        foresee(write_spec(tmp_path, {"speculative": HEAD}), ["gptq"], settings, print)
    assert not (settings.home / "artifacts").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architectures": ["LlamaForCausalLMEagle3"]},
        {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"], "transformer_layer_config": CONFIG},
    ],
)
def test_heads_are_taken_as_their_authors_name_them(
    tmp_path: Path, settings: Settings, changes: dict[str, Any]
) -> None:
    write_head(tmp_path / "draft", CONFIG, changes=changes)
    assert foresee(write_spec(tmp_path, {"speculative": HEAD}), ["gptq"], settings, print) is not None


def test_what_is_no_draft_model_of_this_vocabulary_is_refused(tmp_path: Path, settings: Settings) -> None:
    spec = write_spec(tmp_path, {"speculative": ITSELF})
    write_draft(tmp_path / "draft", {"vocab_size": 32_000})
    with pytest.raises(SourceError, match=r"a vocabulary of 32000 tokens, and the model 2048: choose one with its tok"):
        foresee(spec, ["gptq"], settings, print)
    write_head(tmp_path / "draft", CONFIG)
    with pytest.raises(SourceError, match=r"not a language model of its own; a head .* takes `method: eagle3`"):
        foresee(spec, ["gptq"], settings, print)
    (tmp_path / "draft" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=r"^`serve\.speculative\.source`: .* a pickle can run code"):
        foresee(spec, ["gptq"], settings, print)


def test_a_hubs_draft_model_is_described_by_range_requests(tmp_path: Path) -> None:
    folder = write_head(tmp_path / "head", CONFIG)
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"# a head"}
    source = {"uri": f"hf://{hub_server.REPOSITORY}"}
    with hub_server.serving(files) as hub:
        settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint})
        spec = write_spec(tmp_path, {"speculative": {**HEAD, "source": source}})
        resolved = resolve(spec, settings)
        assert resolved is not None
        assert (resolved.revision, resolved.left_out) == (hub_server.COMMIT, ("README.md",))
        found = check(spec, resolved, describe_folder(DEMO / "model").model)
    weights = head_weights(CONFIG).values()
    # Two heads of keys and of values, of 64 numbers each, at 16 bits.
    assert (found.weights_bytes, found.cache_bytes_per_token) == (sum(each.nbytes for each in weights), 2 * 2 * 64 * 2)


def put(context: StageContext) -> Artifact:
    """An image's artifact in which only the draft model was put."""
    checkpoint = run_until("source", context)["source"]
    prepared = draft_model.prepare(context, {})
    recipe = Recipe("image", inputs={}, parameters=draft_model.parameters(prepared), code="by hand")

    def make(draft: ArtifactDraft) -> None:
        assert draft_model.put(prepared, checkpoint, draft) is not None

    made = Store(context.settings.home / "artifacts").obtain(recipe, make)
    draft_model.accept(prepared, made)
    return made


def test_it_is_pulled_once_locked_and_part_of_every_image(tmp_path: Path, settings: Settings) -> None:
    write_draft(tmp_path / "draft")
    (tmp_path / "draft" / "tokenizer.json").write_text("{}")
    spec = write_spec(tmp_path, {"speculative": ITSELF})
    context = StageContext(spec, "gptq", settings, lambda _: None)
    image = put(context)
    released = draft_model.released(image)
    assert released is not None
    assert sorted(released.files) == ["config.json", "model.safetensors"]
    assert (image.folder / "draft_model/model.safetensors").read_bytes() == (
        tmp_path / "draft/model.safetensors"
    ).read_bytes()
    assert released.uri == "file:draft"
    lock = json.loads((tmp_path / "demo.draft_model.lock.json").read_text())
    assert lock["files"].keys() == released.files.keys()
    store = Store(settings.home / "artifacts")
    ((key, _),) = store.records("draft_model")
    pulled = store.find("draft_model", key)
    assert pulled is not None
    assert (pulled.folder / "model.safetensors").samefile(image.folder / "draft_model/model.safetensors")

    write_draft(tmp_path / "draft", {"rms_norm_eps": 1e-5})
    with pytest.raises(SourceError, match=r"^`serve\.speculative\.source`: .*config\.json has sha256 .*, expected"):
        put(context)
    (tmp_path / "demo.draft_model.lock.json").unlink()
    again = draft_model.released(put(context))
    assert again is not None
    assert again.revision != released.revision


def test_without_one_an_image_and_its_recipe_have_none(tmp_path: Path, settings: Settings) -> None:
    spec = write_spec(tmp_path, {"speculative": {"method": "ngram", "tokens": 4}})
    prepared = draft_model.prepare(StageContext(spec, "gptq", settings, lambda _: None), {})
    assert draft_model.parameters(prepared) == {}


def test_the_plan_counts_its_weights_and_its_cache(tmp_path: Path, settings: Settings) -> None:
    write_draft(tmp_path / "draft")
    spec = write_spec(tmp_path, {"speculative": ITSELF}, runtime="vllm-cuda13")
    alone = write_spec(tmp_path, {}, runtime="vllm-cuda13")
    gpus = [find_gpu("L4")]
    with_it, without = (plan_source(each, settings, gpus) for each in (spec, alone))
    drafting, plain = (
        next(each for each in found.schemes if each.weights.scheme == "gptq") for found in (with_it, without)
    )
    drafted, needed = drafting.placements[0].demand, plain.placements[0].demand
    weights = sum(each.nbytes for each in load_file(DEMO / "model" / "model.safetensors").values())
    assert drafted.weights - needed.weights == weights
    assert drafted.kv_cache == 2 * needed.kv_cache  # it has the layers of the model itself
    assert any("the draft model's 8.4 MB of weights and 2,048 bytes of cache a token" in note for note in with_it.notes)


def test_the_plan_counts_its_files_once_and_again_in_each_image_and_in_the_registry(
    tmp_path: Path, settings: Settings
) -> None:
    size = sum(path.stat().st_size for path in write_draft(tmp_path / "draft").iterdir())
    schemes = yaml.safe_load(DEMO.with_suffix(".yaml").read_text())["schemes"]
    # A variant alone drafts: its image has the model too.
    spec = write_spec(tmp_path, {"variants": {"fast": {"speculative": ITSELF}}}, schemes=schemes)
    with_it = plan_source(spec, settings, [])
    without = plan_source(write_spec(tmp_path, {}, schemes=schemes), settings, [])
    assert with_it.download_bytes - without.download_bytes == size
    assert with_it.disk_bytes - without.disk_bytes == size * (1 + 2 * 2)


def test_the_preflight_counts_it_against_the_memory_limit(tmp_path: Path, settings: Settings) -> None:
    write_draft(tmp_path / "draft")
    limits = yaml.safe_load(DEMO.with_suffix(".yaml").read_text())["load"] | {"prompts": f"file:{DEMO}/heldout.jsonl"}
    plan = foresee(write_spec(tmp_path, {}), ["gptq"], settings, print)
    assert plan is not None
    (weights,) = (each.weights for each in plan.schemes if each.weights.scheme == "gptq")
    needed = weights.on_cpu(settings.cpu.instruction_set) + RUNTIME_BYTES["vllm-cpu"] + 2**30  # the last is the cache
    limits["memory"] = {"limit_bytes": needed}
    assert foresee(write_spec(tmp_path, {}, load=limits), ["gptq"], settings, print) is not None
    with pytest.raises(PlanError, match=r"^gptq needs .* and `load\.memory\.limit_bytes` gives"):
        foresee(write_spec(tmp_path, {"speculative": ITSELF}, load=limits), ["gptq"], settings, print)
