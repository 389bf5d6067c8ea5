"""A model's file: what is refused, by which path, and what is suggested instead."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkout import CHECKOUT
from evals import builtin
from homes import DEMO
from pipeline.errors import SpecError
from pipeline.spec import find, load

# What `evals: {suite: demo}` stands for, listed.
TASKS = {
    "tasks": {
        "cloze": {"data": f"file:{DEMO}/cloze.jsonl", "items": 800, "max_drop": 0.02},
        "perplexity": {"data": f"file:{DEMO}/heldout.jsonl", "max_increase": 0.01},
    }
}
Change = Callable[[dict[str, Any]], None]
Write = Callable[[Change], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the demo's file with changes; its data are the demo's."""

    def written(change: Change) -> Path:
        document = yaml.safe_load(DEMO.with_suffix(".yaml").read_text().replace("file:demo/", f"file:{DEMO}/"))
        document["evals"] = copy.deepcopy(TASKS)
        change(document)
        path = tmp_path / "m.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return written


def put(path: str, value: object) -> Change:
    """A change that sets the key at a dotted path."""

    def change(document: dict[str, Any]) -> None:
        *above, key = path.split(".")
        for part in above:
            document = document[part]
        document[key] = value

    return change


def drop(path: str) -> Change:
    """A change that removes the key at a dotted path."""

    def change(document: dict[str, Any]) -> None:
        *above, key = path.split(".")
        for part in above:
            document = document[part]
        del document[key]

    return change


def refusal(path: Path) -> str:
    with pytest.raises(SpecError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((CHECKOUT / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_in_the_checkout_loads(path: Path) -> None:
    assert load(path).model == path.stem


def test_the_demo_is_what_its_file_says() -> None:
    spec = load(DEMO.with_suffix(".yaml"))
    assert list(spec.schemes) == ["awq", "gptq"]
    assert spec.source.uri == f"file:{DEMO}/model"
    assert spec.calibration.path == DEMO / "calibration.jsonl"
    assert spec.evals.tasks["cloze"].data == DEMO / "cloze.jsonl"
    assert spec.load.prompts == DEMO / "heldout.jsonl"
    assert spec.load.memory.limit_bytes == 4 * 2**30
    assert spec.lock == DEMO.with_suffix(".lock.json")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("modle", "did you mean `model`?"),
        ("source.ury", "did you mean `uri`?"),
        ("schemes.awq.group_sise", "did you mean `group_size`?"),
        ("evals.tasks.cloze.max_dorp", "did you mean `max_drop`?"),
        ("scan.fail_onn", "did you mean `fail_on`?"),
        ("load.slo.p95_latency", "did you mean `p95_latency_ms`?"),
        ("load.memory.headrom", "did you mean `headroom`?"),
        ("registry.champoin", "did you mean `champion`?"),
        ("load.quux", ""),
        ("path", ""),  # a field of ours, and no key of theirs
    ],
)
def test_an_unknown_key_is_refused_by_its_path_at_any_depth(write: Write, key: str, hint: str) -> None:
    message = refusal(write(put(key, 1)))
    assert f"unknown key `{key}`" in message
    assert hint in message


def test_every_problem_is_listed_at_once(write: Write) -> None:
    def change(document: dict[str, Any]) -> None:
        del document["load"]["memory"]
        document["runtime"] = "vllm_cpu"
        document["schemes"]["gptq"]["bits"] = 5
        document["calibration"]["uri"] = "file:nowhere.jsonl"

    message = refusal(write(change))
    for key in ("load.memory", "runtime", "schemes.gptq", "calibration.uri"):
        assert f"`{key}`" in message


def test_of_thousands_of_problems_the_first_are_listed(write: Write) -> None:
    message = refusal(write(put("scan.fail_on", [None] * 5000)))
    told = message.splitlines()[1:]
    assert len(told) == 21
    assert told[0].strip().startswith("`scan.fail_on.0`")
    assert told[-1].strip() == "and more"


@pytest.mark.parametrize("key", ["model", "source", "schemes", "evals.tasks", "runtime", "load.slo"])
def test_a_missing_key_is_named(write: Write, key: str) -> None:
    if key == "load.slo":  # the one that has a default
        assert load(write(drop(key))).load.slo.error_rate == 0
    else:
        assert f"`{key}` is missing" in refusal(write(drop(key)))


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("model: a\nsource: {uri: x}\nmodel: b\n")
    assert refusal(path) == f"{path}, line 3: the key `model` stands twice"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a mapping"),
        (b"- a\n- b\n", "is not a mapping"),
        (b"model: [demo\n", "line 2: "),
        (b"model: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
        (b"model: \xff\xfe\n", "is not valid YAML"),
        (b"{[a]: 1}", "line 1: a key is a word here"),
        (b"1: 2\n", "`1`: Keys should be strings"),
    ],
)
def test_what_is_no_model_file_is_refused_and_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(str(path))
    assert words in message


def test_relative_uris_count_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    for name in ("calibration", "cloze", "heldout"):
        (tmp_path / "demo" / f"{name}.jsonl").touch()
    path = tmp_path / "m.yaml"
    path.write_text(DEMO.with_suffix(".yaml").read_text())
    monkeypatch.chdir("/")
    spec = load(path)
    assert spec.calibration.path == tmp_path / "demo" / "calibration.jsonl"
    assert spec.source.uri == f"file:{tmp_path}/demo/model"


@pytest.mark.parametrize("key", ["calibration.uri", "evals.tasks.cloze.data", "load.prompts"])
def test_data_that_is_not_there_is_named_before_anything_runs(write: Write, key: str, tmp_path: Path) -> None:
    message = refusal(write(put(key, "file:gone.jsonl")))
    assert f"`{key}`: there is no file {tmp_path}/gone.jsonl" in message
    assert f"`{key}`: there is no file" in refusal(write(put(key, f"file:{tmp_path}")))


def test_data_without_a_scheme_or_from_elsewhere_is_refused(write: Write) -> None:
    assert "`load.prompts`: expected file:PATH" in refusal(write(put("load.prompts", "heldout.jsonl")))
    assert "(found 's3://b/x')" in refusal(write(put("calibration.uri", "s3://b/x")))


def test_data_may_be_what_comes_with_slipway(write: Write) -> None:
    spec = load(write(put("calibration.uri", "builtin:calibration")))
    assert json.loads(spec.calibration.path.read_text().partition("\n")[0])["text"]
    message = refusal(write(put("load.prompts", "builtin:held-out")))
    assert "`load.prompts`: expected one of builtin:calibration, builtin:cloze, builtin:heldout" in message
    assert "`serve.chat_template`: expected file:PATH" in refusal(
        write(put("serve", {"chat_template": "builtin:cloze"}))
    )


def test_a_model_without_calibration_text_is_calibrated_with_what_comes_with_slipway(write: Write) -> None:
    assert load(write(drop("calibration"))).calibration.path == builtin.FILES["calibration"]


def test_a_mixture_of_calibration_data_is_read_with_its_files_and_refused_by_their_paths(write: Write) -> None:
    sources: list[dict[str, Any]] = [{"uri": f"file:{DEMO}/calibration.jsonl", "weight": 3}, {}]
    spec = load(write(put("calibration", {"mixture": sources, "samples": 20})))
    expected = [(DEMO / "calibration.jsonl", 3), (builtin.FILES["calibration"], 1)]
    assert [(each.path, each.weight) for each in spec.calibration.data] == expected
    sources[1]["uri"] = "file:gone.jsonl"
    assert "`calibration.mixture.1.uri`: there is no file" in refusal(write(put("calibration", {"mixture": sources})))
    both = {"mixture": sources[:1], "uri": "builtin:calibration"}
    assert "`uri` and `mixture` exclude each other" in refusal(write(put("calibration", both)))


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"uri": "hf://datasets/a/b"}, "a data set needs `files`"),
        ({"uri": f"file:{DEMO}/calibration.jsonl", "files": "*"}, "`files` applies only to hf://datasets/ORG/NAME"),
        ({"revision": "main"}, "`revision` applies only to hf://datasets/ORG/NAME"),
        ({"uri": "hf://a/b", "files": "*"}, "`calibration.uri`: expected file:PATH"),
    ],
)
def test_what_is_used_of_a_data_set_must_be_said(write: Write, section: dict[str, str], reason: str) -> None:
    assert reason in refusal(write(put("calibration", section)))


def test_text_that_begins_like_a_uri_is_left_alone(write: Write) -> None:
    canary = load(write(put("load.canary.prompt", "file: open("))).load.canary
    assert canary is not None
    assert canary.prompt == "file: open("


def test_a_source_on_a_hub_is_left_as_it_is(write: Write) -> None:
    spec = load(write(put("source", {"uri": "hf://org/name", "revision": "main"})))
    assert (spec.source.uri, spec.source.revision) == ("hf://org/name", "main")


@pytest.mark.parametrize("name", ["Demo", "a/b", "a b", "-a", "a@b", "", "../x"])
def test_names_are_plain(write: Write, name: str) -> None:
    assert f"`model`: `{name}` is not a valid name" in refusal(write(put("model", name)))
    schemes = {name: {"method": "awq", "backend": "autoawq"}}
    assert f"`schemes`: `{name}` is not a valid name" in refusal(write(put("schemes", schemes)))


def test_an_unknown_runtime_is_refused_with_a_near_name(write: Write) -> None:
    assert "`runtime`: there is no such runtime: did you mean `vllm-cuda1" in refusal(
        write(put("runtime", "vllm-cuda11"))
    )
    assert "there are `vllm-cpu`, `vllm-cuda12`, `vllm-cuda13`" in refusal(write(put("runtime", "tgi")))


def test_an_unknown_task_is_refused_with_a_near_name(write: Write) -> None:
    task = {"data": f"file:{DEMO}/heldout.jsonl", "max_increase": 0.01}
    message = refusal(write(put("evals.tasks.perplexitty", task)))
    assert "unknown task `perplexitty` over a file of data: did you mean `perplexity`?" in message


@pytest.mark.parametrize("gate", ["evals", "scan", "load"])
def test_only_causes_that_the_gate_knows_can_be_accepted_and_in_words(write: Write, gate: str) -> None:
    key = f"{gate}.accept_inconclusive"
    message = refusal(write(put(key, {"bad-luck": "why not"})))
    assert key in message
    assert "bad-luck" in message
    known = {"evals": "too-few-items", "scan": "database-stale", "load": "incomplete"}[gate]
    assert known in message
    assert f"{key}.{known}" in refusal(write(put(key, {known: ""})))
    assert load(write(put(key, {known: "a reason"})))


def test_causes_of_drift_that_come_together_are_accepted_together(write: Write) -> None:
    key = "evals.accept_inconclusive"
    assert load(write(put(key, {"baseline-at-chance+too-few-items": "tiny"})))
    assert "unknown cause" in refusal(write(put(key, {"too-few-items+baseline-at-chance": "not sorted"})))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"bits": 2}, "bits"),
        ({"bits": 3}, "bits"),
        ({"symmetric": False}, "symmetric"),
        ({"desc_act": True}, "desc_act"),
    ],
)
def test_a_scheme_that_vllm_refuses_on_every_device_is_refused_before_it_is_made(
    write: Write, changes: dict[str, Any], key: str
) -> None:
    def change(document: dict[str, Any]) -> None:
        document["schemes"]["gptq"] |= changes

    message = refusal(write(change))
    assert f"`schemes.gptq.{key}`: vLLM can't serve this" in message
    assert "`evals: {engine: hf}`" in message

    def by_transformers(document: dict[str, Any]) -> None:
        change(document)
        document["evals"]["engine"] = "hf"

    assert load(write(by_transformers)).schemes["gptq"].not_served == key


@pytest.mark.parametrize("changes", [{"bits": 8}, {"group_size": -1}, {"group_size": -1, "desc_act": True}])
def test_what_vllm_serves_of_gptq_is_let_through(write: Write, changes: dict[str, Any]) -> None:
    assert load(write(lambda document: document["schemes"]["gptq"].update(changes))).schemes["gptq"].not_served is None


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("serve.contxt", 4096, "unknown key `serve.contxt`: did you mean `context`?"),
        ("serve.context", 0, "`serve.context`: Input should be greater than 0 (found 0)"),
        ("serve.gpu_memory", 1.2, "`serve.gpu_memory`: Input should be less than or equal to 1 (found 1.2)"),
        ("serve.gpu_memory", 0.8, "`serve.gpu_memory`: `vllm-cpu` serves on a CPU, whose memory"),
        ("serve.variants", {"full": {"gpu_memory": 1}}, "`serve.variants.full.gpu_memory`: `vllm-cpu` serves on a CPU"),
        ("serve.pipeline_parallel", 2, "`serve.pipeline_parallel`: `vllm-cpu` can't serve with it"),
        ("serve.speculative", {"method": "eagle", "tokens": 2}, "`serve.speculative.method`: Input should be 'ngram'"),
        ("serve.kv_cache", "fp4", "`serve.kv_cache`: Input should be 'auto', 'fp8', 'fp8_e4m3' or 'fp8_e5m2'"),
        ("serve.speculative", {"method": "ngram"}, "`serve.speculative.tokens` is missing"),
        ("serve.chat_template", "file:no.jinja", "`serve.chat_template`: there is no file"),
        ("serve.tool_calls", "hermess", "`serve.tool_calls`: vLLM 0.32.0 has no parser `hermess`: did you mean"),
        ("serve.reasoning", "qwen9", "`serve.reasoning`: vLLM 0.32.0 has no parser `qwen9`: did you mean `qwen3`?"),
        ("serve.arguments", ["--trust-remote-code"],
         "`serve.arguments`: `--trust-remote-code` can't be set: it would run code that was not checked"),
        ("serve.arguments", ["--max-model-len", "512"], "`--max-model-len` has a key of its own: set `serve.context`"),
        ("serve.variants", {"long": {"reasoning": "gwen3"}}, "`serve.variants.long.reasoning`: vLLM 0.32.0 has no"),
        ("serve.variants", {"long": {"dtype": "float32"}}, "`serve.variants.long`: `dtype` is one for the whole model"),
        ("schemes.awq.serve", {"arguments": ["--seed"]}, "`schemes.awq.serve.arguments`: `--seed` takes one value"),
    ],
)  # fmt: skip
def test_how_a_model_is_served_is_checked_with_the_file(write: Write, key: str, value: object, expected: str) -> None:
    def change(document: dict[str, Any]) -> None:
        document["serve"] = {}
        put(key, value)(document)

    message = refusal(write(change))
    assert expected in message
    assert len(message.splitlines()) == 2


def test_a_scheme_overrides_keys_of_the_model_and_a_variant_both(write: Write) -> None:
    def change(document: dict[str, Any]) -> None:
        document["serve"] = {
            "context": 256, "max_sequences": 8, "dtype": "float32", "variants": {"long": {"context": 512}},
        }  # fmt: skip
        document["schemes"]["awq"]["serve"] = {"context": 128}

    spec = load(write(change))
    found = [spec.serving(), spec.serving("gptq"), spec.serving("awq"), spec.serving("awq", "long")]
    assert [each.context for each in found] == [256, 256, 128, 512]
    assert {each.max_sequences for each in found} == {8}
    assert {each.dtype for each in found} == {"float32"}
    assert "serve" not in spec.scheme("awq").model_dump()  # it does not enter the key of the quantized weights
    with pytest.raises(SpecError, match="no variant `lang`: did you mean `long`"):
        spec.serving("awq", "lang")


def test_a_model_is_a_name_in_the_models_folder_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "demo.yaml"
    path.touch()
    assert find("demo", tmp_path) == path
    monkeypatch.chdir(tmp_path)
    assert find("demo.yaml", Path("/nowhere")) == path
    assert find(str(path), Path("/nowhere")) == path


def test_a_model_that_is_not_there_is_said_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").touch()
    with pytest.raises(SpecError, match=r"no model `dmeo` in .*: did you mean `demo`"):
        find("dmeo", tmp_path)
    with pytest.raises(SpecError, match=r"there is no file gone\.yaml"):
        find("gone.yaml", tmp_path)
    with pytest.raises(SpecError, match="there is no file"):
        find(str(tmp_path / "folder.yaml"), tmp_path)


def test_a_scheme_that_is_not_there_is_said_with_a_near_name() -> None:
    with pytest.raises(SpecError, match="has no scheme `gtpq`: did you mean `gptq`"):
        load(DEMO.with_suffix(".yaml")).scheme("gtpq")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"repository": "https://ann:tok3n@git.example.com/models.git"}, "without a password"),
        ({"repository": "https://ann@git.example.com/models.git"}, "without a password"),
        ({"repository": "ext::sh -c id"}, "expected `https://HOST/PATH`"),
        ({"repository": "--upload-pack=id"}, "expected `https://HOST/PATH`"),
        ({"repository": "ssh://-oProxyCommand=id/models.git"}, "expected `https://HOST/PATH`"),
        ({"branch": "--force"}, "`registry.git.branch`"),
        ({"path": "../{release}.yaml"}, "is not a path in a repository"),
        ({"path": "/etc/{release}.yaml"}, "is not a path in a repository"),
        ({"path": ".GIT/{release}"}, "is not a path in a repository"),
        ({"path": "prod/champion.yaml"}, "every scheme would write this file"),
    ],
)
def test_a_file_in_git_is_at_a_plain_path_of_a_plain_repository(
    write: Write, changes: dict[str, str], told: str
) -> None:
    whole = {"repository": "ssh://git@git.example.com:22/models.git", "path": "prod/{release}.yaml"}
    git = load(write(put("registry", {"git": whole}))).registry.git
    assert git is not None
    assert (git.branch, git.format) == ("main", "kustomize")
    assert told in refusal(write(put("registry", {"git": {**whole, **changes}})))
