from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import yaml

from homes import DEMO
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.lora import adapted_layers, modules
from pipeline.errors import SourceError, SpecError
from pipeline.planner.sources import describe_folder as describe_model
from pipeline.settings import Settings
from pipeline.sources.adapter import ADAPTER, MERGED, describe, lock_of, merged_lock_of, refuse_misfit
from pipeline.sources.lock import read_lock
from pipeline.sources.origin import Access
from pipeline.sources.source import ResolvedSource, hold_to_lock, pull, resolve
from pipeline.spec import load
from pipeline.stages import merged_source
from pipeline.stages.context import StageContext
from pipeline.stages.preflight import foresee
from pipeline.stages.pulled_adapters import read_adapters, with_adapters
from pipeline.stages.run import run_until
from pipeline.store.artifacts import ArtifactDraft
from unit.pipeline import checkpoints, hub_server, peft_adapters
from unit.pipeline.checkpoints import Tensors

FILES = ["adapter_config.json", "adapter_model.safetensors"]
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(tmp_path: Path) -> ModelDescription:
    return describe_model(checkpoints.write_source(tmp_path / "model")).model


def found(folder: Path, **more: Any) -> ResolvedSource:  # noqa: ANN401
    return resolve(f"file:{folder}", contents=ADAPTER, **more)


def pulled(resolved: ResolvedSource, folder: Path) -> dict[str, str]:
    folder.mkdir()
    return pull(resolved, folder, folder.parent / "downloads", lambda _: None)


def test_only_the_two_files_of_an_adapter_are_pulled_and_locked(tmp_path: Path, model: ModelDescription) -> None:
    folder = peft_adapters.write(tmp_path / "support")
    (folder / "README.md").write_text("# an adapter")
    (folder / "tokenizer.json").write_text("{}")
    resolved = found(folder)
    assert [file.path for file in resolved.files] == FILES
    assert resolved.left_out == ("README.md", "tokenizer.json")
    described = describe(resolved)
    refuse_misfit(described, model, resolved.uri)
    assert (described.configuration.rank, modules(described.tensors)) == (
        4,
        ["down_proj", "k_proj", "q_proj", "up_proj"],
    )

    lock = lock_of(tmp_path / "demo.lock.json", "support")
    assert lock.name == "demo.adapter_support.lock.json"
    hold_to_lock(lock, resolved, pulled(resolved, tmp_path / "pulled"))
    changed = peft_adapters.matrices()
    changed[f"{QUERY}.lora_B.weight"] *= 2
    peft_adapters.write(folder, changed)
    with pytest.raises(SourceError, match=r"adapter_model\.safetensors has sha256 .*, expected"):
        pulled(found(folder, lock=read_lock(lock)), tmp_path / "again")


def test_an_adapter_on_a_hub_is_described_by_range_requests_and_pulled_at_its_commit(
    tmp_path: Path, model: ModelDescription
) -> None:
    folder = peft_adapters.write(tmp_path / "support")
    files = {name: (folder / name).read_bytes() for name in FILES} | {"adapter_model.bin": b"pickle"}
    with hub_server.serving(files) as hub:
        uri = f"hf://{hub_server.REPOSITORY}"
        resolved = resolve(uri, contents=ADAPTER, access=Access(hub.endpoint))
        assert (resolved.revision, resolved.left_out) == (hub_server.COMMIT, ("adapter_model.bin",))
        refuse_misfit(describe(resolved), model, uri)
        assert sorted(pulled(resolved, tmp_path / "pulled")) == FILES


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "optimizer.pt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    folder = peft_adapters.write(tmp_path / "support")
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=rf"holds {name}: a pickle can run code"):
        found(folder)


def test_a_hubs_adapter_that_has_only_a_pickle_is_refused() -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80\x04."}
    with (
        hub_server.serving(files) as hub,
        pytest.raises(SourceError, match=r"has no safetensors, only adapter_model\.bin: a pickle can run code"),
    ):
        resolve(f"hf://{hub_server.REPOSITORY}", contents=ADAPTER, access=Access(hub.endpoint))


def test_a_models_folder_is_not_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no adapter_model\.safetensors: it holds config\.json"):
        found(checkpoints.write_source(tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "`peft_type` is `IA3`"),
        ({"r": 0}, "`r`: Input should be greater than or equal to 1"),
        ({"r": "four"}, "`r`: Input should be a valid integer"),
        ({"r": 1024}, "`r`: Input should be less than or equal to 512"),
        ({"lora_alpha": -1}, "`lora_alpha`"),
        ({"target_modules": None}, "`target_modules`"),
        ({"bias": "all"}, "`bias` is `all`"),
        ({"use_dora": True}, "`use_dora` is set"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is set"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is `pissa`"),
        ({"rank_pattern": {"q_proj": 4096}}, "`rank_pattern`"),
    ],
)
def test_what_the_engine_does_not_serve_is_refused_by_the_key(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    folder = peft_adapters.write(tmp_path / "support", **changes)
    with pytest.raises(SourceError) as error:
        describe(found(folder))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def of_another_width(tensors: Tensors) -> None:
    tensors[f"{QUERY}.lora_A.weight"] = np.ones((4, 2 * checkpoints.HIDDEN), np.float16)


def of_another_layer(tensors: Tensors) -> None:
    for side in "AB":
        tensors[f"{QUERY.replace('.0.', '.7.')}.lora_{side}.weight"] = tensors.pop(f"{QUERY}.lora_{side}.weight")


def of_the_head(tensors: Tensors) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((4, checkpoints.HIDDEN), np.float16)
    tensors["base_model.model.lm_head.lora_B.weight"] = np.ones((checkpoints.VOCABULARY, 4), np.float16)


def without_one_side(tensors: Tensors) -> None:
    del tensors[f"{QUERY}.lora_B.weight"]


def of_another_rank(tensors: Tensors) -> None:
    tensors[f"{QUERY}.lora_A.weight"] = np.ones((8, checkpoints.HIDDEN), np.float16)


def of_integers(tensors: Tensors) -> None:
    tensors[f"{QUERY}.lora_A.weight"] = np.ones((4, checkpoints.HIDDEN), np.int8)


def with_a_whole_layer(tensors: Tensors) -> None:
    tensors["base_model.model.lm_head.weight"] = np.ones((4, 4), np.float16)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_another_width, "the adapter is for 128 inputs and 64 outputs, the layer has 64 and 64"),
        (of_another_layer, "`model.layers.7.self_attn.q_proj` is not a linear layer of the model's decoder"),
        (of_the_head, "`lm_head` is not a linear layer of the model's decoder"),
        (without_one_side, "`model.layers.0.self_attn.q_proj` has no lora_B"),
        (of_another_rank, "have the ranks 8 and 4, and the configuration 4"),
        (of_integers, "lora_A is of I8: expected one of BF16, F16, F32, F64"),
        (with_a_whole_layer, "`base_model.model.lm_head.weight` is not a matrix of a LoRA adapter"),
        (dict.clear, "has no matrix of a LoRA adapter"),
    ],
)  # fmt: skip
def test_matrices_that_do_not_fit_the_model_are_refused(
    tmp_path: Path,
    model: ModelDescription,
    change: Callable[[Tensors], None],
    told: str,
) -> None:
    tensors = peft_adapters.matrices()
    change(tensors)
    resolved = found(peft_adapters.write(tmp_path / "support", tensors))
    with pytest.raises(SourceError) as error:
        refuse_misfit(describe(resolved), model, "the adapter")
    assert told in str(error.value)


# Merging


def test_doras_adapter_is_merged_but_not_served(tmp_path: Path, model: ModelDescription) -> None:
    folder = peft_adapters.write(tmp_path / "support", peft_adapters.with_magnitudes(), use_dora=True)
    described = describe(resolve(f"file:{folder}", contents=MERGED), "merged")
    refuse_misfit(described, model, "the adapter", "merged")
    layer = adapted_layers(described.tensors, model)["model.layers.0.self_attn.q_proj.weight"]
    assert layer.name == "model.layers.0.self_attn.q_proj"
    assert layer.parts["lora_magnitude_vector"] == f"{QUERY}.lora_magnitude_vector"
    with pytest.raises(SourceError, match=r"`use_dora` is set: .* merge it instead"):
        describe(found(folder))


def short(tensors: Tensors) -> None:
    tensors[f"{QUERY}.lora_magnitude_vector"] = np.ones(7, np.float16)


def without_magnitude(tensors: Tensors) -> None:
    del tensors[f"{QUERY}.lora_magnitude_vector"]


def twice(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(QUERY)]:
        tensors[name.replace(".model.model.", ".model.")] = tensors[name]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_another_width, "the adapter is for 128 inputs and 64 outputs, the layer has 64 and 64"),
        (short, "lora_magnitude_vector has 7 numbers for 64 outputs"),
        (without_magnitude, "`model.layers.0.self_attn.q_proj` has no lora_magnitude_vector"),
        (twice, "`model.layers.0.self_attn.q_proj` is there twice, under two names"),
    ],
)
def test_matrices_that_can_not_be_merged_are_refused(
    tmp_path: Path, model: ModelDescription, change: Callable[[Tensors], None], told: str
) -> None:
    tensors = peft_adapters.with_magnitudes()
    change(tensors)
    folder = peft_adapters.write(tmp_path / "support", tensors, use_dora=True)
    with pytest.raises(SourceError) as error:
        refuse_misfit(describe(resolve(f"file:{folder}", contents=MERGED), "merged"), model, "it", "merged")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` is set: such adapters can't be merged"),
        ({"init_lora_weights": "lora_ga"}, "`init_lora_weights` is `lora_ga`"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "`target_parameters` is set"),
        ({"peft_type": "LOHA"}, "only `LORA` can be merged"),
    ],
)
def test_adapters_that_are_more_than_a_product_are_not_merged(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    folder = peft_adapters.write(tmp_path / "support", **changes)
    with pytest.raises(SourceError) as error:
        describe(found(folder), "merged")
    assert told in str(error.value)


def test_a_layer_that_the_configuration_does_not_name_is_refused(tmp_path: Path, model: ModelDescription) -> None:
    folder = peft_adapters.write(tmp_path / "support", target_modules=["k_proj", "up_proj", "down_proj"])
    with pytest.raises(SourceError, match=r"q_proj` is not among the `target_modules` of adapter_config\.json"):
        refuse_misfit(describe(found(folder)), model, "it")


def test_magnitudes_without_dora_are_refused(tmp_path: Path, model: ModelDescription) -> None:
    folder = peft_adapters.write(tmp_path / "support", peft_adapters.with_magnitudes())
    with pytest.raises(SourceError, match="has a lora_magnitude_vector, and adapter_config"):
        refuse_misfit(describe(found(folder)), model, "it")


def test_a_damaged_header_is_one_line(tmp_path: Path) -> None:
    folder = peft_adapters.write(tmp_path / "support")
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(SourceError, match="truncated, or not a safetensors file"):
        describe(found(folder))


# The command


def write_model_file(folder: Path, **changes: Any) -> Path:  # noqa: ANN401
    """The demo's file for the tiny model, with an adapter `support`."""
    document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo", f"file:{DEMO}"))
    document |= {"model": "tiny", "source": {"uri": f"file:{folder / 'model'}"}}
    document |= {"schemes": {"gptq": {**document["schemes"]["gptq"], "group_size": 32}}}
    document |= {"serve": {"adapters": {"support": {"uri": "file:support"}}}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**document, **changes}))
    return path


def test_a_release_is_refused_in_its_first_seconds_by_the_adapters_key(tmp_path: Path) -> None:
    checkpoints.write_source(tmp_path / "model")
    tensors = peft_adapters.matrices()
    of_another_width(tensors)
    peft_adapters.write(tmp_path / "support", tensors)
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    with pytest.raises(SourceError, match=r"^`serve\.adapters\.support`: .* the adapter is for 128 inputs"):
        foresee(load(write_model_file(tmp_path)), ["gptq"], settings, print)
    (tmp_path / "support" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=r"^`serve\.adapters\.support`: .* a pickle can run code"):
        foresee(load(write_model_file(tmp_path)), ["gptq"], settings, print)
    assert not (tmp_path / "home" / "artifacts").exists()


def test_the_stage_pulls_checks_and_locks_each_adapter_and_finds_it_again(tmp_path: Path) -> None:
    checkpoints.write_source(tmp_path / "model")
    peft_adapters.write(tmp_path / "support")
    spec = load(write_model_file(tmp_path))
    context = StageContext(spec, "gptq", Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")}), lambda _: None)
    made = run_until("adapters", context)["adapters"]
    assert sorted(made.files) == ["adapters.json", *(f"support/{name}" for name in FILES)]
    assert read_adapters(made)["support"].modules == ("down_proj", "k_proj", "q_proj", "up_proj")
    served = with_adapters(context, {"adapters": made}).serving.adapters["support"]
    assert (served.rank, served.digest.startswith("sha256:")) == (4, True)
    assert (tmp_path / "tiny.adapter_support.lock.json").exists()
    assert run_until("adapters", context)["adapters"].cached

    changed = peft_adapters.matrices()
    changed[f"{QUERY}.lora_B.weight"] *= 2
    peft_adapters.write(tmp_path / "support", changed)
    with pytest.raises(SourceError, match=r"^`serve\.adapters\.support`: .* has sha256 .*, expected"):
        run_until("adapters", context)
    (tmp_path / "tiny.adapter_support.lock.json").unlink()
    again = run_until("adapters", context)["adapters"]
    assert again.digest != made.digest
    assert with_adapters(context, {"adapters": again}).serving.adapters["support"].digest != served.digest


def test_a_pulled_adapter_does_not_need_its_hub_again(tmp_path: Path) -> None:
    checkpoints.write_source(tmp_path / "model")
    folder = peft_adapters.write(tmp_path / "support")
    spec = load(write_model_file(tmp_path, serve={"adapters": {"support": {"uri": f"hf://{hub_server.REPOSITORY}"}}}))
    with hub_server.serving({name: (folder / name).read_bytes() for name in FILES}) as hub:
        settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint})
        run_until("adapters", StageContext(spec, "gptq", settings, print))
    assert foresee(spec, ["gptq"], settings, print) is None
    assert run_until("adapters", StageContext(spec, "gptq", settings, print))["adapters"].cached


def test_a_merged_adapter_does_not_need_its_hub_again(tmp_path: Path) -> None:
    model = checkpoints.write_source(tmp_path / "model")
    folder = peft_adapters.write(tmp_path / "support")
    source = {"uri": f"file:{model}", "adapter": {"uri": f"hf://{hub_server.REPOSITORY}"}}
    spec = load(write_model_file(tmp_path, source=source, serve={}))

    def copy_model(draft: ArtifactDraft) -> None:
        copytree(model, draft.folder, dirs_exist_ok=True)

    with hub_server.serving({name: (folder / name).read_bytes() for name in FILES}) as hub:
        settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint})
        context = merged_source.prepare(StageContext(spec, "gptq", settings, print), {})
        assert context.merged_adapter is not None
        hold_to_lock(merged_lock_of(spec.lock), context.merged_adapter, pulled(context.merged_adapter, tmp_path / "to"))
        context.store.obtain(merged_source.recipe(context, {}), copy_model)
        hub.token = "another"  # noqa: S105 - so that this one is refused
        hub.seen = []
        foresee(spec, ["gptq"], settings, print)
    assert hub.seen == []


def test_an_adapter_for_another_base_is_refused_before_weights_are_pulled(tmp_path: Path) -> None:
    checkpoints.write_source(tmp_path / "model")
    tensors = peft_adapters.matrices()
    of_another_width(tensors)
    peft_adapters.write(tmp_path / "support", tensors)
    source = {"uri": f"file:{tmp_path / 'model'}", "adapter": {"uri": "file:support"}}
    spec = load(write_model_file(tmp_path, source=source, serve={}))
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    with pytest.raises(SourceError, match=r"^`source\.adapter`: .* can't be merged: .* the adapter is for 128 inputs"):
        foresee(spec, ["gptq"], settings, print)
    with pytest.raises(SourceError, match=r"^`source\.adapter`: .* the adapter is for 128 inputs"):
        run_until("source", StageContext(spec, "gptq", settings, print))
    (tmp_path / "support" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError, match=r"^`source\.adapter`: .* a pickle can run code"):
        foresee(spec, ["gptq"], settings, print)
    assert not list((tmp_path / "home").glob("artifacts/source/*/files"))


@pytest.mark.parametrize(("stated", "told"), [("org/other-tiny", 2), ("Org/Tiny", 0), ("/models/other", 0)])
def test_an_adapter_that_names_another_base_of_the_same_shapes_is_told(tmp_path: Path, stated: str, told: int) -> None:
    peft_adapters.write(tmp_path / "support", base_model_name_or_path=stated)
    source = {"uri": f"hf://{hub_server.REPOSITORY}@main", "adapter": {"uri": "file:support"}}
    spec, lines = load(write_model_file(tmp_path, source=source)), list[str]()
    model = checkpoints.write_source(tmp_path / "model")
    with hub_server.serving({path.name: path.read_bytes() for path in model.iterdir()}) as hub:
        settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint})
        foresee(spec, ["gptq"], settings, lines.append)
    warned = [line.partition(":")[0] for line in lines if f"was trained on `{stated}`" in line]
    assert warned == ["`source.adapter`", "`serve.adapters.support`"][:told]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "support"}, "`serve.adapters.support`: the model itself is served under this name"),
        ({"serve": {"adapters": {"Not_A Name": {"uri": "file:support"}}}}, "`serve.adapters.Not_A Name"),
        ({"serve": {"adapters": {"support": {"url": "file:support"}}}}, "`serve.adapters.support.url`"),
    ],
)
def test_a_model_file_with_a_wrong_adapter_is_refused_by_the_key(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(SpecError) as error:
        load(write_model_file(tmp_path, **changes))
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": "hf"}, "`serve.adapters`: adapters are evaluated as they are served"),
        (
            {"adapters": {"suport": {"tasks": {"a": {"task": "arc_easy", "max_drop": 0.1}}}}},
            "`evals.adapters.suport`: `serve.adapters` has no such adapter: did you mean `support`?",
        ),
    ],
)
def test_evals_that_do_not_fit_the_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    evals = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo", f"file:{DEMO}"))["evals"]
    with pytest.raises(SpecError) as error:
        load(write_model_file(tmp_path, evals={**evals, **changes}))
    assert told in str(error.value)
