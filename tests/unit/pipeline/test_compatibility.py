from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from safetensors.numpy import save_file

from containers.hardware.cpu import InstructionSet
from homes import DEMO, SLIPWAY
from pipeline.cli import main
from pipeline.commands.show import USAGE
from pipeline.compatibility import backends, preflight
from pipeline.compatibility.description import ModelDescription, Role
from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.compatibility.scheme import Scheme
from pipeline.errors import SpecError, UnsupportedModelError
from pipeline.planner.sources import describe_folder
from pipeline.planner.weights import unquantized
from pipeline.settings import Settings
from pipeline.spec import load
from pipeline.stages.preflight import foresee

DATA = Path(__file__).parents[2] / "data"
FAMILIES: dict[str, Any] = json.loads((DATA / "model_families.json").read_text())["families"]
_DTYPES = {"F16": np.float16, "F32": np.float32}


def write_family(folder: Path, family: str, **changes: object) -> Path:
    """Write a model of a family, with zeros for weights, as transformers names and shapes them."""
    described = FAMILIES[family]
    folder.mkdir(parents=True)
    weights = {name: np.zeros(shape, _DTYPES[dtype]) for name, (dtype, *shape) in described["tensors"].items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**described["config"], **changes}))
    (folder / "tokenizer.json").write_text((DEMO / "model" / "tokenizer.json").read_text())
    return folder


def scheme_of(method: str, backend: str, **more: object) -> Scheme:
    sized = {"group_size": 32} if 32 in backends.GROUP_SIZES[method] else {}
    return Scheme.model_validate({"method": method, "backend": backend, **sized, **more})


def model_of(family: str, tmp_path: Path, **changes: object) -> ModelDescription:
    return describe_folder(write_family(tmp_path / "model", family, **changes)).model


PAIRS = [(method, backend) for method, named in backends.METHODS.items() for backend in named]
# What each backend can do, by family; what it can't has a word of the reason, and what to do.
DENSE = {"llama", "qwen2", "mistral"}
FUSED = {"llama4_text", "gpt_oss", "granitemoe"}
LOADED = DENSE | {"qwen3", "qwen3_5_text", "ministral3", "smollm3", "glm4", "phi3", "phi4"}
LOADED |= {"gemma2", "gemma3_text", "gemma3n_text"}
ABLE = {
    ("awq", "autoawq"): DENSE | {"qwen3", "phi3", "phi4", "mixtral", "gemma2", "deepseek_v3"},
    ("awq", "gptqmodel"): DENSE | {"qwen3", "ministral3", "smollm3", "gemma2", "qwen3_moe"},
    ("gptq", "gptqmodel"): DENSE
    | {"qwen3", "ministral3", "smollm3", "gemma2", "gemma3_text", "qwen3_moe", "deepseek_v3"},
    ("gptq", "autogptq"): DENSE | {"mixtral"},
    # From the weights alone: all but fused experts; blocks of 128 fit few of these tiny models.
    **{(method, "llmcompressor"): FAMILIES.keys() - FUSED for method in ("fp8", "mxfp4")},
    ("fp8-block", "llmcompressor"): {"phi3", "phi4"},
    **{(method, "llmcompressor"): LOADED for method in ("w4a16", "nvfp4")},
    ("w8a8", "llmcompressor"): LOADED - {"glm4", "gemma3n_text"},
}


@pytest.mark.parametrize(("method", "backend"), PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_accepted_or_refused_from_its_headers(
    family: str, method: str, backend: str, tmp_path: Path
) -> None:
    found = preflight.find_problems(model_of(family, tmp_path), scheme_of(method, backend))
    assert (found == []) == (family in ABLE[method, backend]), found
    if found:
        able = [other for other in backends.METHODS[method] if family in ABLE[method, other]]
        assert (
            f"use `backend: {able[0]}`" in found[0] if able else "use `method" in found[0] or "no backend" in found[0]
        )


@pytest.mark.parametrize(
    ("family", "scheme", "reason"),
    [
        ("qwen3_5_text", ("gptq", "gptqmodel"), "`model.layers.0.linear_attn.in_proj_a`"),
        ("llama4_text", ("gptq", "gptqmodel"), "`model.layers.0.feed_forward.experts.down_proj`"),
        ("gpt_oss", ("gptq", "gptqmodel"), "`model.layers.0.mlp.experts.down_proj`"),
        ("phi3", ("gptq", "gptqmodel"), "`model.layers.0.mlp.gate_up_proj`.*use `method: awq` with `backend: autoawq`"),
        ("mixtral", ("gptq", "gptqmodel"), "experts.0.w1`.*use `backend: autogptq`"),
        ("qwen3_moe", ("awq", "autoawq"), "the routers too.*no `num_experts`.*use `backend: gptqmodel`"),
        ("gemma3_text", ("awq", "gptqmodel"), "its own rotary positions: use `method: gptq` with `backend: gptqmodel`"),
        ("deepseek_v3", ("awq", "gptqmodel"), "latent attention the wrong inputs: use `backend: autoawq`"),
        ("glm4_moe", ("gptq", "gptqmodel"), "its own code for the router does not fit its transformers"),
        ("ministral3", ("awq", "autoawq"), "does not support this architecture.*use `backend: gptqmodel`"),
    ],
)
def test_a_refusal_names_the_layers_and_who_can(
    family: str, scheme: tuple[str, str], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        preflight.check(model_of(family, tmp_path), scheme_of(*scheme))


# What stands in the headers


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ({"method": "awq", "backend": "gptqmodel", "group_size": 128}, "192 inputs of `.*down_proj`.*: use 32 or 64$"),
        ({"method": "gptq", "backend": "gptqmodel", "group_size": 128}, "use -1, 16, 32 or 64$"),
        ({"method": "gptq", "backend": "gptqmodel", "group_size": 64}, None),
        ({"method": "gptq", "backend": "gptqmodel", "group_size": -1}, None),
    ],
)
def test_groups_must_divide_every_linears_inputs(scheme: dict[str, Any], reason: str | None) -> None:
    config = FAMILIES["llama"]["config"]
    narrow = ModelDescription(config, {
        "model.layers.0.mlp.up_proj.weight": Tensor("BF16", (192, 128), 0, 0, Path("x")),
        "model.layers.0.mlp.down_proj.weight": Tensor("BF16", (128, 192), 0, 0, Path("x")),
    })  # fmt: skip
    found = preflight.find_problems(narrow, Scheme.model_validate(scheme))
    assert len(found) == (reason is not None)
    assert reason is None or re.search(reason, found[0])


@pytest.mark.parametrize(("backend", "outputs", "able"), [
    ("autoawq", 96, True), ("autoawq", 80, False), ("gptqmodel", 80, True), ("gptqmodel", 84, False),
])  # fmt: skip
def test_outputs_must_fill_the_words_that_a_backend_packs(backend: str, outputs: int, able: bool) -> None:
    weight = Tensor("BF16", (outputs, 64), 0, 0, Path("x"))
    model = ModelDescription(FAMILIES["llama"]["config"], {"model.layers.0.self_attn.k_proj.weight": weight})
    found = preflight.find_problems(model, scheme_of("awq", backend))
    assert (found == []) == able
    assert able or f"does not divide the {outputs} of `model.layers.0.self_attn.k_proj`" in found[0]


@pytest.mark.parametrize("left", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, None, {}])
def test_a_quantization_config_beside_16_bit_weights_says_nothing(left: object, tmp_path: Path) -> None:
    model = model_of("llama", tmp_path, quantization_config=left)
    assert preflight.find_problems(model, scheme_of("awq", "autoawq")) == []


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I32", "F4"])
def test_weights_of_fewer_bits_are_quantized_whatever_the_configuration_says(dtype: str, tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {**model.tensors, name: Tensor(dtype, (256, 128), 0, 0, Path("x"))}
    (problem,) = preflight.find_problems(ModelDescription(model.config, tensors), scheme_of("awq", "autoawq"))
    assert f"already quantized (`{name}` is {dtype})" in problem


# What every family is made of: its roles but `other`, with how many tensors have each.
PARTS: dict[str, dict[str, int]] = {
    "llama": {"linear": 14, "embedding": 1, "head": 1},
    "qwen2": {"linear": 14, "embedding": 1, "head": 1},
    "qwen3": {"linear": 14, "embedding": 1, "head": 1},
    "mistral": {"linear": 14, "embedding": 1, "head": 1},
    "ministral3": {"linear": 14, "embedding": 1, "head": 1},
    "smollm3": {"linear": 14, "embedding": 1},
    "phi3": {"linear": 8, "embedding": 1, "head": 1},
    "phi4": {"linear": 8, "embedding": 1},
    "glm4": {"linear": 12, "embedding": 1, "head": 1},
    "gemma2": {"linear": 14, "embedding": 1},
    "gemma3_text": {"linear": 14, "embedding": 1},
    "gemma3n_text": {"linear": 22, "router": 2, "embedding": 2},
    "mixtral": {"linear": 8, "expert": 24, "router": 2, "embedding": 1, "head": 1},
    "qwen3_moe": {"linear": 8, "expert": 24, "router": 2, "embedding": 1, "head": 1},
    "qwen3_5_text": {"linear": 10, "state": 5, "embedding": 1, "head": 1},
    "qwen3_next": {
        "linear": 4, "state": 3, "expert": 24, "shared expert": 6, "router": 4, "embedding": 1, "head": 1,
    },
    "llama4_text": {"linear": 8, "shared expert": 6, "fused experts": 4, "router": 2, "embedding": 1, "head": 1},
    "gpt_oss": {"linear": 8, "fused experts": 4, "router": 2, "embedding": 1, "head": 1},
    "granitemoe": {"linear": 8, "fused experts": 4, "router": 2, "embedding": 1, "head": 1},
    "glm4_moe": {"linear": 11, "expert": 12, "shared expert": 3, "router": 1, "embedding": 1, "head": 1},
    "qwen3_vl": {"linear": 14, "vision": 39, "embedding": 1, "head": 1},
    "gemma3": {"linear": 14, "vision": 37, "projector": 2, "embedding": 1},
    "voxtral": {"linear": 14, "audio": 37, "projector": 2, "embedding": 1, "head": 1},
    "deepseek_v3": {"linear": 13, "expert": 24, "shared expert": 3, "router": 1, "embedding": 1, "head": 1},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_family_has_its_role(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    found = Counter(str(role) for role in model.roles.values() if role is not Role.OTHER)
    assert found == PARTS[family]
    assert model.roles.keys() == model.tensors.keys()
    # All that is not quantized in a layer is small beside what is, but for experts in one tensor.
    rest = [name for name in model.of(Role.OTHER) if len(model.tensors[name].shape) == 2 and name.endswith(".weight")]
    assert not [name for name in rest if "norm" not in name and "altup" not in name and "per_layer" not in name]


def test_layers_that_draft_tokens_are_told_from_the_decoders(tmp_path: Path) -> None:
    model = model_of("deepseek_v3", tmp_path)
    added = {
        "model.layers.2.eh_proj.weight": (128, 256), "model.layers.2.enorm.weight": (128,),
        "model.layers.2.embed_tokens.weight": (512, 128), "mtp.fc.weight": (128, 256), "mtp.norm.weight": (128,),
    }  # fmt: skip
    tensors = {**model.tensors, **{name: Tensor("F16", shape, 0, 0, Path("x")) for name, shape in added.items()}}
    drafting = ModelDescription(model.config, tensors)
    assert drafting.drafting == tuple(sorted(added))
    assert drafting.linears == model.linears
    assert unquantized(drafting) == unquantized(model)
    (problem,) = preflight.find_problems(drafting, scheme_of("gptq", "gptqmodel"))
    assert "`model.layers.2.eh_proj.weight`" in problem


def test_towers_routers_and_norms_are_no_linears(tmp_path: Path) -> None:
    model = model_of("qwen3_moe", tmp_path)
    tower = {"vision_tower.layers.0.mlp.up_proj.weight": Tensor("F16", (64, 64), 0, 0, Path("x"))}
    found = ModelDescription(model.config, {**model.tensors, **tower})
    assert found.routers == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    # Mistral 3, by GPTQModel 7.5.0: `language_model.model.layers` came out as `model.language_model.layers`.
    (problem,) = preflight.find_problems(found, scheme_of("gptq", "gptqmodel"))
    assert "vision or audio tower (`vision_tower.layers.0.mlp.up_proj.weight`)" in problem
    assert not any("vision" in name or "norm" in name or name.endswith("mlp.gate") for name in found.linears)


# The commands


def write_model_file(folder: Path, source: Path, schemes: dict[str, Any]) -> Path:
    document = yaml.safe_load((DEMO.parent / "demo.yaml").read_text().replace("file:demo", f"file:{DEMO}"))
    document |= {"model": "tiny", "source": {"uri": f"file:{source}"}, "schemes": schemes}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


MINISTRAL = {
    "awq": {"method": "awq", "backend": "autoawq", "group_size": 32},
    "gptq": {"method": "gptq", "backend": "gptqmodel", "group_size": 32},
}


@pytest.mark.parametrize("schemes", [["awq"], ["awq", "gptq"]])
def test_a_release_is_refused_before_anything_is_made(schemes: list[str], tmp_path: Path) -> None:
    path = write_model_file(tmp_path, write_family(tmp_path / "source", "ministral3"), MINISTRAL)
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    with pytest.raises(UnsupportedModelError, match=r"`schemes.awq`: AutoAWQ .*use `backend: gptqmodel`"):
        foresee(load(path), schemes, settings, print)
    assert not (tmp_path / "home" / "artifacts").exists()


@pytest.mark.parametrize(
    ("family", "scheme", "reason"),
    [
        ("llama", ("gptq", "autogptq"), "AutoGPTQ .*NVIDIA GPUs alone, .* none here: use `backend: gptqmodel`"),
        ("mixtral", ("gptq", "gptqmodel"), "GPTQModel .*: use `method: awq` with `backend: autoawq`"),
    ],
)
def test_without_a_gpu_autogptq_is_refused_and_not_recommended(
    family: str, scheme: tuple[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemes = {"gptq": scheme_of(*scheme).model_dump(include={"method", "backend", "group_size"})}
    path = write_model_file(tmp_path, write_family(tmp_path / "source", family), schemes)
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    monkeypatch.setattr("pipeline.stages.preflight.have_gpus", lambda _: False)
    with pytest.raises(UnsupportedModelError, match=f"^`schemes.gptq`: {reason}$"):
        foresee(load(path), ["gptq"], settings, print)
    monkeypatch.setattr("pipeline.stages.preflight.have_gpus", lambda _: True)
    if family == "llama":
        assert foresee(load(path), ["gptq"], settings, print) is not None


def test_samples_longer_than_the_context_are_refused_before_a_release_begins(tmp_path: Path) -> None:
    schemes = {**MINISTRAL, "fp8": {"method": "fp8", "backend": "llmcompressor"}}
    path = write_model_file(tmp_path, write_family(tmp_path / "source", "llama"), schemes)
    document = yaml.safe_load(path.read_text())
    document["calibration"]["max_tokens"] = 513
    path.write_text(yaml.safe_dump(document))
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    with pytest.raises(UnsupportedModelError, match=r"`calibration.max_tokens` is 513, but .* is 512 tokens"):
        foresee(load(path), ["gptq", "fp8"], settings, print)
    assert foresee(load(path), ["fp8"], settings, print) is not None


def test_a_release_begins_in_the_schemes_that_can_be_made(tmp_path: Path) -> None:
    path = write_model_file(tmp_path, write_family(tmp_path / "source", "ministral3"), MINISTRAL)
    lines: list[str] = []
    foresee(load(path), ["gptq"], Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")}), lines.append)
    assert [line for line in lines if line.startswith("plan: gptq takes")]


def test_a_model_that_cannot_be_planned_may_still_be_released(tmp_path: Path) -> None:
    source = write_family(tmp_path / "source", "llama", max_window_layers="all", sliding_window="none")
    path = write_model_file(tmp_path, source, MINISTRAL)
    lines: list[str] = []
    assert foresee(load(path), ["awq"], Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")}), lines.append) is None
    assert lines == [
        'no plan: config.json has `sliding_window` "none": expected a number, or a list of 2 with one for each layer'
    ]


def test_release_ends_with_the_status_of_a_wrong_model_file(tmp_path: Path) -> None:
    path = write_model_file(tmp_path, write_family(tmp_path / "source", "gpt_oss"), MINISTRAL)
    environment = {
        "PATH": os.environ["PATH"],
        "SLIPWAY_HOME": str(tmp_path / "home"),
        "DOCKER_HOST": f"unix://{tmp_path}/none.sock",
    }
    done = subprocess.run([SLIPWAY, "release", path], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == USAGE, done.stderr
    assert "error: `schemes.awq`" in done.stderr
    assert "`schemes.gptq`" in done.stderr
    assert "model.layers.0.mlp.experts.down_proj" in done.stderr


def test_plan_tells_what_is_refused_beside_what_it_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    source = write_family(tmp_path / "source", "ministral3")
    path = write_model_file(tmp_path, source, MINISTRAL)
    planned = CliRunner().invoke(main, ["plan", str(path), "--gpu", "L4", "--json"])
    assert planned.exit_code == USAGE
    document = json.loads(planned.stdout)
    assert [scheme["scheme"] for scheme in document["schemes"]] == ["fp16", "gptq"]
    assert list(document["refused"]) == ["awq"]
    # A source without a model's file gets the schemes that can be made of it.
    proposed = CliRunner().invoke(main, ["plan", f"file:{source}", "--gpu", "L4"])
    assert proposed.exit_code == 0, proposed.output
    assert "awq" in proposed.stdout
    assert "refused" not in proposed.stdout


def test_plan_refuses_what_it_can_neither_plan_nor_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    path = write_model_file(tmp_path, write_family(tmp_path / "source", "qwen3_5_text"), MINISTRAL)
    refused = CliRunner().invoke(main, ["plan", str(path), "--gpu", "L4"])
    assert refused.exit_code == USAGE
    assert "`schemes.gptq`: GPTQModel can't quantize `qwen3_5_text`" in refused.stderr


def with_images(path: Path) -> Path:
    """The model file with a task that shows images."""
    document = yaml.safe_load(path.read_text())
    document["evals"].setdefault("tasks", {})["shapes"] = {
        "task": "images", "data": "builtin:images", "max_drop": 0.05
    }  # fmt: skip
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_accepts_images_if_its_configuration_says_so(name: str) -> None:
    assert ModelDescription(FAMILIES[name]["config"], {}).accepts_images == (name in {"qwen3_vl", "gemma3"})


def test_images_are_refused_for_a_model_of_text_in_the_first_second(tmp_path: Path) -> None:
    path = with_images(write_model_file(tmp_path, write_family(tmp_path / "source", "llama"), MINISTRAL))
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    reason = (
        r"^`evals\.tasks\.shapes` asks about images, and the model accepts none: its config\.json \(llama\) has neither"
    )
    with pytest.raises(UnsupportedModelError, match=reason):
        foresee(load(path), ["awq"], settings, print)
    planned = CliRunner().invoke(main, ["plan", str(path), "--gpu", "L4"], env={"SLIPWAY_HOME": str(tmp_path / "home")})
    assert planned.exit_code == USAGE
    assert "`evals.tasks.shapes` asks about images" in planned.stderr


@pytest.mark.parametrize("template", ["chat_template.jinja", "chat_template.json"])
def test_images_need_a_chat_template(template: str, tmp_path: Path) -> None:
    source, fp8 = write_family(tmp_path / "source", "gemma3"), {"method": "fp8", "backend": "llmcompressor"}
    path = with_images(write_model_file(tmp_path, source, {"fp8": fp8}))
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    with pytest.raises(
        SpecError, match=r"^`evals\.tasks\.shapes`: the model is shown images by chat, and .* no chat template"
    ):
        foresee(load(path), ["fp8"], settings, print)
    (source / template).write_text("{{ messages }}")
    foresee(load(path), ["fp8"], settings, print)


@pytest.mark.parametrize("key", ["calibration", "serve.tool_calls"])
def test_chats_without_a_chat_template_are_refused_before_a_release_begins(tmp_path: Path, key: str) -> None:
    source = write_family(tmp_path / "source", "llama")
    path = write_model_file(tmp_path, source, MINISTRAL)
    document = yaml.safe_load(path.read_text())
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "Why?"}]}\n')
    if key == "calibration":
        document["calibration"] = {"uri": f"file:{chats}", "samples": 1}
    else:
        document["serve"] = {"tool_calls": "hermes"}
    path.write_text(yaml.safe_dump(document))
    settings = Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")})
    with pytest.raises(SpecError, match=rf"^`{key}`: .* has no chat template: name one by `serve: {{chat_template: "):
        foresee(load(path), ["awq"], settings, print)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    foresee(load(path), ["awq"], settings, print)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("calibration.jsonl", {"txt": "a"}, r"`calibration\.uri`: .*calibration\.jsonl, line 3: `text` is missing"),
        ("heldout.jsonl", {"body": "a"}, r"`load\.prompts`: .*heldout\.jsonl, line 3: `text` is missing"),
        ("cloze.jsonl", {"id": "a", "question": "b"}, r"`evals\.tasks\.cloze`: .*line 3: `context` is missing"),
    ],
)
def test_data_is_read_before_a_release_begins(
    name: str, row: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model_file(tmp_path, write_family(tmp_path / "source", "llama"), MINISTRAL)
    changed = tmp_path / name
    lines = (DEMO / name).read_bytes().split(b"\n")
    changed.write_bytes(b"\n".join([*lines[:2], json.dumps(row).encode(), *lines[2:]]))
    document = yaml.safe_load(path.read_text().replace(f"file:{DEMO / name}", f"file:{changed}"))
    if name == "cloze.jsonl":
        text = {"data": f"file:{DEMO}/heldout.jsonl", "task": "perplexity", "max_increase": 0.02}
        document["evals"] = {"tasks": {"cloze": {"data": f"file:{changed}", "max_drop": 0.02}, "text": text}}
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(SpecError, match=reason):
        foresee(load(path), ["awq"], Settings.read({"SLIPWAY_HOME": str(tmp_path / "home")}), print)
    monkeypatch.setenv("SLIPWAY_HOME", str(tmp_path / "home"))
    planned = CliRunner().invoke(main, ["plan", str(path), "--gpu", "L4"])
    assert planned.exit_code == USAGE
    assert re.search(reason, planned.stderr.replace("\n", " "))


@pytest.mark.parametrize(("scheme", "isa", "lacks"), [
    ({"method": "fp8"}, "avx2", None), ({"method": "w8a8"}, "avx2", None), ({"method": "fp8-block"}, "amx", None),
    ({"method": "fp8-block"}, "avx512_bf16", "needs AMX"), ({"method": "nvfp4"}, "amx", "no kernel"),
    ({"method": "mxfp4"}, "amx", "no kernel"), ({"method": "w4a16"}, "avx2", None),
])  # fmt: skip
def test_what_a_cpu_serves_is_known_before_a_server_starts(
    scheme: dict[str, str], isa: InstructionSet, lacks: str | None
) -> None:
    asked = Scheme.model_validate({"backend": "llmcompressor", **scheme})
    found = asked.unsupported(isa)
    assert found is None if lacks is None else lacks in str(found)


@pytest.mark.parametrize(("method", "isa", "served"), [
    ("w8a8", "amx", True), ("fp8-block", "amx", True), ("fp8", "amx", False), ("w8a8", "avx512_bf16", False),
])  # fmt: skip
def test_quantized_experts_are_served_with_amx_alone(method: str, isa: InstructionSet, served: bool) -> None:
    scheme = Scheme.model_validate({"backend": "llmcompressor", "method": method})
    assert (scheme.unsupported(isa, experts=True) is None) == served


@pytest.mark.parametrize(("scheme", "left_out"), [
    ({"method": "w4a16"}, ()), ({"method": "w8a8"}, ("inputs in INT8, a scale for each token",)),
    ({"method": "fp8", "kv_cache": "fp8"}, ("inputs in FP8, a scale for each token", "keys and values in FP8")),
])  # fmt: skip
def test_what_unpacked_weights_leave_out_is_known(scheme: dict[str, str], left_out: tuple[str, ...]) -> None:
    assert Scheme.model_validate({"backend": "llmcompressor", **scheme}).quantized_at_run_time == left_out
