"""A first model file: for every family and device it is valid and passes the checks that a release begins with."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pynvml
import pytest
import stand_in_nvml
from click.testing import CliRunner, Result
from stand_in_nvml import StandInGpu

from containers.hardware.gpu_models import find_gpu
from homes import DEMO, SLIPWAY
from pipeline.cli import main
from pipeline.commands.show import FAILED, USAGE
from pipeline.compatibility.description import ModelDescription
from pipeline.compatibility.safetensors_headers import Tensor
from pipeline.errors import PlanError, SpecError, UnsupportedModelError
from pipeline.planner.asking import plan_described, refusals
from pipeline.planner.data import check_data
from pipeline.planner.evaluation import evaluation
from pipeline.planner.sources import Described
from pipeline.proposal.cost import estimate
from pipeline.proposal.model_file import write
from pipeline.proposal.propose import Kind, Proposal, Target, kind_of, name_of, propose
from pipeline.spec import ModelSpec, load
from unit.pipeline import published_models
from unit.pipeline.hub_server import REPOSITORY, serving

FAMILIES: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "model_families.json").read_text())[
    "families"
]
MODEL = f"file:{DEMO / 'model'}"
DEVICES = ("cpu", "T4", "A100 80GB", "H100", "B200")
# What is proposed of each family for these devices, with the size of its groups; None where nothing is.
USUAL = ("awq 128, gptq 128", "awq 128, gptq 128", "w8a8 -1, w4a16 128", "fp8 -1, w4a16 128", "fp8 -1, nvfp4 16")
EIGHT_BITS = ("fp8 -1", None, "fp8 -1", "fp8 -1", "fp8 -1")
NOTHING = (None, None, None, None, None)
PROPOSED: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "ministral3", "smollm3", "gemma2"), USUAL),
    **dict.fromkeys(("phi3", "phi4"), ("awq 128", "awq 128", *USUAL[2:])),
    "gemma3_text": ("gptq 128", "gptq 128", *USUAL[2:]),
    "glm4": ("w4a16 128", None, "w4a16 128", "fp8 -1, w4a16 128", "fp8 -1, nvfp4 16"),
    "gemma3n_text": ("w4a16 32", None, "w4a16 32", "fp8 -1, w4a16 32", "fp8 -1, nvfp4 16"),
    "mixtral": (None, "awq 128, gptq 128", "gptq 128", "fp8 -1, gptq 128", "fp8 -1, gptq 128"),
    "qwen3_moe": (None, "awq 128, gptq 128", "gptq 128", "fp8 -1, gptq 128", "fp8 -1, gptq 128"),
    "deepseek_v3": (None, "awq 64, gptq 64", "gptq 64", "fp8 -1, gptq 64", "fp8 -1, gptq 64"),
    "glm4_moe": (None, *EIGHT_BITS[1:]),
    **dict.fromkeys(("qwen3_vl", "gemma3", "voxtral"), EIGHT_BITS),
    # Fused experts; a cache that the planner does not know.
    **dict.fromkeys(("llama4_text", "gpt_oss", "granitemoe", "qwen3_5_text", "qwen3_next"), NOTHING),
}


def target(device: str) -> Target:
    gpu = None if device == "cpu" else find_gpu(device)
    return Target("vllm-cpu" if gpu is None else "vllm-cuda13", gpu, "avx2")


def family(name: str) -> ModelDescription:
    described = FAMILIES[name]
    tensors = {
        tensor: Tensor(dtype, tuple(shape), 0, 1, Path("x")) for tensor, (dtype, *shape) in described["tensors"].items()
    }
    return ModelDescription(described["config"], tensors)


def proposed(model: ModelDescription, device: str, kind: Kind = "base", uri: str = "hf://org/name") -> Proposal:
    return propose("name", uri, None, model, kind, target(device), has_chat_template=True)


def read_back(proposal: Proposal, folder: Path) -> ModelSpec:
    """The spec of the file that is written; it and its model pass the checks that a release begins with."""
    path = folder / "name.yaml"
    path.write_text(write(proposal))
    spec = load(path)
    check_data(spec)
    described = Described(proposal.description, 1000)
    gpus = [] if proposal.target.gpu is None else [proposal.target.gpu]
    assert refusals(proposal.description, spec.schemes) == {}
    plan = plan_described(spec, described, spec.schemes, gpus, lambda usual: usual, {})
    assert plan.schemes
    assert all(placement.fits for scheme in plan.schemes for placement in scheme.placements)
    asked = evaluation(spec)
    assert all(task.can_decide for task in asked.tasks)
    assert all(line.amount and line.basis for line in estimate(proposal, plan, asked))
    return spec


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_proposed_suits_device_and_family(name: str) -> None:
    for device, expected in zip(DEVICES, PROPOSED[name], strict=True):
        if expected is None:
            with pytest.raises(
                (UnsupportedModelError, PlanError),
                match=r"no scheme can be made|linear_attention",
            ):
                proposed(family(name), device)
        else:
            chosen = proposed(family(name), device).choice.schemes
            assert ", ".join(f"{key} {scheme.group_size}" for key, scheme in chosen.items()) == expected


@pytest.mark.parametrize(
    ("name", "device"),
    [("llama", "cpu"), ("gemma3_text", "T4"), ("glm4", "A100 80GB"), ("qwen3_moe", "H100"), ("deepseek_v3", "B200")],
)
def test_the_file_is_valid_and_passes_what_a_release_begins_with(name: str, device: str, tmp_path: Path) -> None:
    read_back(proposed(family(name), device), tmp_path)


def test_a_group_divides_every_layer_and_what_is_left_out_has_its_reason(tmp_path: Path) -> None:
    # SmolLM2-135M's width.
    config = FAMILIES["llama"]["config"]
    narrow = {
        name: Tensor(
            tensor.dtype, tuple({128: 576, 256: 1536}.get(size, size) for size in tensor.shape), 0, 1, Path("x")
        )
        for name, tensor in family("llama").tensors.items()
    }
    model = ModelDescription({**config, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 144}, narrow)
    spec = read_back(proposed(model, "cpu"), tmp_path)
    assert {scheme.group_size for scheme in spec.schemes.values()} == {64}
    text = write(proposed(family("gemma3"), "H100"))
    assert "# `gptq` is left out: GPTQModel can't quantize `gemma3`: beside a vision or audio tower" in text
    assert "use `method" not in text


@pytest.mark.parametrize(
    ("name", "gpu", "gpus"),
    [
        ("llama-3.3-70b", "H100", {"fp16": 4, "fp8": 2, "w4a16": 2}),
        ("mistral-small-24b", "L40S", {"fp16": 2, "fp8": 2, "w4a16": 1}),
        ("gemma-3-27b", "B200", {"fp16": 1, "fp8": 1}),
    ],
)
def test_a_published_model_gets_the_gpus_that_hold_fp16_and_each_scheme(
    name: str, gpu: str, gpus: dict[str, int], tmp_path: Path
) -> None:
    proposal = proposed(published_models.model(name), gpu, "chat")
    spec = read_back(proposal, tmp_path)
    assert {scheme: spec.serving(None if scheme == "fp16" else scheme).tensor_parallel or 1 for scheme in gpus} == gpus
    assert proposal.tensor_parallel == gpus


def test_a_model_that_no_group_of_gpus_holds_is_refused() -> None:
    with pytest.raises(PlanError, match=r"fp16 needs \d+ GiB on each of 8 L4, which have \d+: choose larger GPUs"):
        proposed(published_models.model("llama-3.3-70b"), "L4")


def test_a_quantized_source_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="of this model: the source is already quantized"):
        proposed(published_models.model("gpt-oss-120b"), "H200")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"architectures": ["BertModel"]},
            "`BertModel` does not generate text: expected a model with one of ForCausalLM",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
        ({"is_encoder_decoder": True}, "`llama` has an encoder before its decoder"),
        ({"model_type": "ours", "auto_map": {"AutoModel": "ours.Ours"}}, "`ours` itself, and code that comes with"),
    ],
)
def test_a_model_that_answers_no_prompt_or_needs_its_own_code_is_refused(changes: dict[str, Any], reason: str) -> None:
    model = family("llama")
    with pytest.raises(UnsupportedModelError, match=reason):
        proposed(replace(model, config={**model.config, **changes}), "H100")


def test_a_model_without_an_output_head_is_refused_before_it_is_downloaded() -> None:
    model = family("llama")
    headless = {name: tensor for name, tensor in model.tensors.items() if name != "lm_head.weight"}
    with pytest.raises(UnsupportedModelError, match="no output head"):
        proposed(replace(model, config={**model.config, "tie_word_embeddings": False}, tensors=headless), "H100")


@pytest.mark.parametrize(
    ("uri", "name", "kind"),
    [
        ("hf://meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct", "chat"),
        ("hf://Qwen/Qwen2.5-Coder-7B@main", "qwen2.5-coder-7b", "code"),
        ("hf://google/gemma-3-27b-it", "gemma-3-27b-it", "chat"),
        ("file:/models/My Model_v2/", "my-model-v2", "base"),
        ("s3://bucket/team/fraud", "fraud", "base"),
        ("models:/Fraud@champion", "fraud", "base"),
        ("models:/Fraud/3", "fraud", "base"),
        ("oci://registry.example/team/fraud@sha256:00", "fraud", "base"),
    ],
)
def test_name_and_kind_are_those_of_the_uri(uri: str, name: str, kind: Kind) -> None:
    assert (name_of(uri), kind_of(uri, has_chat_template=False)) == (name, kind)


def test_a_template_for_chats_decides_where_the_name_does_not() -> None:
    assert kind_of("file:/models/fraud", has_chat_template=True) == "chat"
    with pytest.raises(SpecError, match=r"give it with --name"):
        name_of("file:/…/")


def test_a_uri_that_yaml_would_read_otherwise_is_quoted(tmp_path: Path) -> None:
    uri = 'file:/models/a, b: {"c"} # d'
    assert read_back(proposed(family("llama"), "cpu", uri=uri), tmp_path).source.uri == uri


@pytest.mark.parametrize(("name", "revision"), [("null", "off"), ("no", "2026"), ("7b", "v1.0")])
def test_a_name_and_a_revision_stay_text(name: str, revision: str, tmp_path: Path) -> None:
    spec = read_back(
        propose(name, "hf://org/name", revision, family("llama"), "base", target("cpu"), has_chat_template=False),
        tmp_path,
    )
    assert (spec.model, spec.source.revision) == (name, revision)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "voxtral", "llama"])
def test_a_model_that_accepts_images_is_asked_about_some(name: str, tmp_path: Path) -> None:
    sees = name in {"gemma3", "qwen3_vl"}
    asked = {task.name: task for task in evaluation(read_back(proposed(family(name), "H100"), tmp_path)).tasks}
    assert ("images" in asked) == sees
    assert ("`suite: vision` in place of" in write(proposed(family(name), "H100"))) == sees
    if sees:
        assert (asked["images"].items, asked["images"].tier) == (240, "supporting")
        silent = propose("name", MODEL, None, family(name), "base", target("H100"), has_chat_template=False)
        assert "images" not in {task.name for task in evaluation(read_back(silent, tmp_path)).tasks}


# The command


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "SLIPWAY_HOME": str(tmp_path / "home"),
        "SLIPWAY_MODELS": str(tmp_path / "models"),
        "DOCKER_HOST": f"unix://{tmp_path}/none.sock",
    }


def slipway(*words: str, variables: dict[str, str]) -> Result:
    return CliRunner().invoke(main, ["init", *words], env=variables)


def test_a_file_is_written_once_and_overwritten_only_with_force(variables: dict[str, str], tmp_path: Path) -> None:
    done = slipway(MODEL, "--name", "mine", "--json", variables=variables)
    assert done.exit_code == 0, done.stderr
    found, path = json.loads(done.stdout), tmp_path / "models" / "mine.yaml"
    assert (found["path"], found["schemes"]) == (str(path), ["awq", "gptq"])
    assert path.read_text() == found["text"]
    assert load(path).source.uri == MODEL
    assert [line["what"] for line in found["expected"]] == ["download", "disk", "quantize", "evaluate", "load test"]
    path.write_text("mine\n")
    again = slipway(MODEL, "--name", "mine", variables=variables)
    assert again.exit_code == USAGE
    assert f"{path} exists: choose another --name, or overwrite it with --force" in again.stderr
    assert path.read_text() == "mine\n"
    assert slipway(MODEL, "--name", "mine", "--force", variables=variables).exit_code == 0
    assert path.read_text() == found["text"]


def test_of_a_hub_s_model_only_configuration_and_headers_are_read(variables: dict[str, str]) -> None:
    files = {path.name: path.read_bytes() for path in (DEMO / "model").iterdir()}
    # As large as Gemma 3's, whose template stands behind its added tokens.
    tokens = {str(number): {"content": f"<unused{number}>", "special": False} for number in range(24_000)}
    files["tokenizer_config.json"] = json.dumps(
        {"added_tokens_decoder": tokens, "chat_template": "{{ messages }}"}
    ).encode()
    assert 1 << 20 < len(files["tokenizer_config.json"]) < 4 << 20
    with serving(files) as hub:
        words = (f"hf://{REPOSITORY}", "--revision", "main", "--dry-run")
        done = slipway(*words, variables={**variables, "HF_ENDPOINT": hub.endpoint})
    assert done.exit_code == 0, done.stderr
    assert f"source: {{uri: hf://{REPOSITORY}, revision: main}}" in done.stdout
    assert "a chat model (llama)" in done.stdout


@pytest.mark.parametrize(("driver", "runtime"), [("580.95.05", "vllm-cuda13"), ("550.54.15", "vllm-cuda12")])
def test_by_default_it_is_for_the_machine_s_own_gpus_and_their_driver(
    driver: str, runtime: str, variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in dir(pynvml) if name.startswith("nvml")]:
        monkeypatch.setattr(pynvml, name, getattr(pynvml, name))  # restored afterwards
    stand_in_nvml.install(tmp_path / "gpus.json")
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: driver)
    stand_in_nvml.write(tmp_path / "gpus.json", [StandInGpu("GPU-a")])
    done = slipway(MODEL, "--dry-run", variables=variables)
    assert done.exit_code == 0, done.stderr
    assert "for H100, as" in done.stdout
    assert f"runtime: {runtime}" in done.stdout


def test_a_machine_with_too_few_gpus_is_refused() -> None:
    machine = replace(target("H100"), machine_gpus=2)
    with pytest.raises(PlanError, match="fp16 needs 4 H100, and this machine has 2"):
        propose(
            "name",
            "hf://org/name",
            None,
            published_models.model("llama-3.3-70b"),
            "chat",
            machine,
            has_chat_template=True,
        )


def test_a_dry_run_prints_the_file_and_writes_nothing(variables: dict[str, str], tmp_path: Path) -> None:
    done = slipway(MODEL, "--name", "mine", "--gpu", "H100", "--dry-run", variables=variables)
    assert done.exit_code == 0, done.stderr
    assert "runtime: vllm-cuda13" in done.stdout
    assert "GPU hours: " in done.stderr
    assert not (tmp_path / "models").exists()
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load(tmp_path / "printed.yaml").model == "mine"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("file:nowhere",), FAILED, "nowhere"),
        ((MODEL, "--gpu", "H1000"), FAILED, "`H1000` is not a GPU of gpus.yaml: did you mean `H100`?"),
        ((MODEL, "--name", "Not A Name"), USAGE, "is not a valid name"),
    ],
)
def test_what_is_wrong_is_one_line(words: tuple[str, ...], status: int, said: str, variables: dict[str, str]) -> None:
    done = slipway(*words, variables=variables)
    assert (done.exit_code, done.stdout) == (status, "")
    assert said in done.stderr


@pytest.mark.parametrize(
    ("flags", "questions"),
    [((), 3), (("--gpu", "cpu", "--kind", "code", "--name", "other"), 0)],
)
def test_in_a_terminal_at_most_three_questions_are_asked(
    flags: tuple[str, ...], questions: int, variables: dict[str, str], tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, b"\n" * questions)
    command = [SLIPWAY, "init", MODEL, *flags]
    done = subprocess.run(command, env=variables, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, check=False)
    os.write(theirs, b"end")  # without it, nothing may be there to read
    printed = os.read(ours, 65536)
    for end in (ours, theirs):
        os.close(end)
    assert done.returncode == 0, printed
    assert printed.count(b"]: ") == questions
    assert list((tmp_path / "models").glob("*.yaml"))
