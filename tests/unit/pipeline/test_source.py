from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from safetensors.numpy import save_file

from homes import DEMO
from pipeline.errors import SourceError, UnreachableError
from pipeline.planner.sources import describe, describe_folder
from pipeline.sources import file_digests
from pipeline.sources.hub import Hub, _check
from pipeline.sources.lock import read_lock
from pipeline.sources.origin import Access
from pipeline.sources.source import ResolvedSource, _folder_name, hold_to_lock, pull, resolve, revision_of
from unit.pipeline import checkpoints, hub_server

URI = f"hf://{hub_server.REPOSITORY}"


def silent(_: str) -> None:
    pass


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.write_source(tmp_path / "model")


@pytest.fixture
def hub(model: Path) -> Iterator[hub_server.StandInHub]:
    files = {path.name: path.read_bytes() for path in sorted(model.iterdir())}
    with hub_server.serving(files) as serving:
        yield serving


@pytest.fixture
def into(tmp_path: Path) -> Callable[[ResolvedSource], dict[str, str]]:
    """Pull into a fresh folder, keeping broken downloads from one pull to the next."""
    numbers = iter(range(100))

    def fetch(resolved: ResolvedSource) -> dict[str, str]:
        folder = tmp_path / f"pulled-{next(numbers)}"
        folder.mkdir()
        found = pull(resolved, folder, tmp_path / "downloads", silent)
        assert found == digests(folder)
        return found

    return fetch


Fetch = Callable[[ResolvedSource], dict[str, str]]


# A folder


def test_a_folder_is_copied_whole_with_its_digests(model: Path, into: Fetch) -> None:
    (model / "model.safetensors").chmod(0o600)
    (model / "README.md").write_text("# a model")
    resolved = resolve(f"file:{model}")
    assert resolved.left_out == ("README.md",)
    found = into(resolved)
    assert sorted(found) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert found["model.safetensors"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert revision_of(resolved, found).startswith("sha256:")


def test_a_folders_fingerprint_is_its_content_and_not_when_or_where_it_was_written(model: Path, tmp_path: Path) -> None:
    memory = tmp_path / "home" / "digests.json"
    before = resolve(f"file:{model}", memory=memory).fingerprint
    os.utime(model / "config.json", ns=(1, 1))
    shutil.copytree(model, tmp_path / "copy")
    assert resolve(f"file:{model}", memory=memory).fingerprint == before
    assert resolve(f"file:{tmp_path / 'copy'}").fingerprint == before
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("{", "{ ", 1))
    assert resolve(f"file:{model}", memory=memory).fingerprint != before


def test_a_file_is_read_once_until_it_is_written_to_even_if_its_time_is_put_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, weights = tmp_path / "home" / "digests.json", model / "model.safetensors"
    for path in model.iterdir():
        os.utime(path, (1, 1))
    before = resolve(f"file:{model}", memory=memory).fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(file_digests, "digest_file", lambda path: pytest.fail(f"read {path}"))
        assert resolve(f"file:{model}", memory=memory).fingerprint == before
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1, 1))
    assert resolve(f"file:{model}", memory=memory).fingerprint != before


def test_a_memory_that_is_damaged_costs_a_look_at_each_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text("{")
    assert (
        resolve(f"file:{model}", memory=tmp_path / "digests.json").fingerprint == resolve(f"file:{model}").fingerprint
    )


def test_a_folder_that_changes_while_it_is_pulled_is_not_taken(model: Path, into: Fetch) -> None:
    resolved = resolve(f"file:{model}")
    assert resolved.fingerprint
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"tokenizer\.json changed while it was pulled: run again"):
        into(resolved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "original/consolidated.00.pth", "optimizer.pkl"])
def test_a_pickle_is_refused_by_name(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"\x80\x04.")
    with pytest.raises(SourceError) as caught:
        resolve(f"file:{model}")
    assert name in str(caught.value)
    assert "pickle" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_refused(model: Path) -> None:
    (model / "modeling_tiny.py").write_text("print('hello')")
    with pytest.raises(SourceError, match=r"modeling_tiny\.py"):
        resolve(f"file:{model}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_configuration_that_wants_code_is_refused(model: Path, into: Fetch, name: str) -> None:
    config = checkpoints.config() | {"model_type": "tiny"}
    (model / "config.json").write_text(json.dumps(config))
    wanting = json.loads((model / name).read_text()) if (model / name).exists() else {}
    (model / name).write_text(json.dumps(wanting | {"auto_map": {"AutoModel": "modeling.Tiny"}}))
    with pytest.raises(SourceError, match=f"{name} has `auto_map`, and transformers does not support `tiny` itself"):
        into(resolve(f"file:{model}"))


def test_code_is_not_needed_for_what_transformers_has_itself(model: Path, tmp_path: Path) -> None:
    config = checkpoints.config() | {"model_type": "phi3", "auto_map": {"AutoModel": "modeling_phi3.Phi3"}}
    (model / "config.json").write_text(json.dumps(config))
    lines: list[str] = []
    (tmp_path / "pulled").mkdir()
    pull(resolve(f"file:{model}"), tmp_path / "pulled", tmp_path / "downloads", lines.append)
    assert "config.json: `auto_map` is ignored: transformers supports `phi3` itself" in lines


# What a model must have


def sharded(folder: Path, *names: str) -> Path:
    """A source whose tensors lie in files of these names, as its index says."""
    checkpoints.write_source(folder)
    (folder / "model.safetensors").unlink()
    tensors = checkpoints.unquantized()
    placed = {tensor: names[number % len(names)] for number, tensor in enumerate(tensors)}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in tensors if placed[tensor] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"),
        ("model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002-of-00002.safetensors"),
        ("layers-0.safetensors", "rest.safetensors"),
    ],
)
def test_the_files_that_the_index_names_are_the_weights(names: tuple[str, ...], tmp_path: Path, into: Fetch) -> None:
    folder = sharded(tmp_path / "sharded", *names)
    for extra in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file(checkpoints.unquantized(), folder / extra)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    wanted = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    resolved = resolve(f"file:{folder}")
    assert sorted(into(resolved)) == sorted([*wanted, *names])
    assert resolved.left_out == ("adapter_model.safetensors", "consolidated.safetensors")
    with hub_server.serving(files) as hub:
        found = resolve(URI, access=Access(hub.endpoint))
        assert sorted(into(found)) == sorted([*wanted, *names])
        planned = describe(found)
    # The planner reads what is pulled, from the folder as from the hub.
    assert planned.model.tensors.keys() == describe_folder(folder).model.tensors.keys()


def test_an_extra_file_beside_a_single_one_is_not_read(model: Path, into: Fetch) -> None:
    save_file(checkpoints.unquantized(), model / "consolidated.safetensors")
    assert "consolidated.safetensors" not in into(resolve(f"file:{model}"))
    assert len(describe_folder(model).model.tensors) == len(checkpoints.unquantized())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "weights.bin"])
def test_an_index_that_names_no_file_beside_it_is_refused(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "sharded", "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SourceError, match="not the name of a safetensors file beside it"):
        resolve(f"file:{folder}")


def test_shards_that_are_missing_are_named_before_anything_is_fetched(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "sharded", "one.safetensors", "two.safetensors")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "two.safetensors"}
    with (
        hub_server.serving(files) as hub,
        pytest.raises(SourceError, match=r"names `two\.safetensors`, which is not there"),
    ):
        resolve(URI, access=Access(hub.endpoint))


@pytest.mark.parametrize("left", [[], ["tokenizer.model"], ["qwen.tiktoken"]])
def test_a_tokenizer_that_no_worker_reads_is_refused_at_the_source(left: list[str], model: Path) -> None:
    (model / "tokenizer.json").unlink()
    for name in left:
        (model / name).write_bytes(b"\0")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(SourceError, match=r"no tokenizer\.json.*write it with transformers") as caught:
        resolve(f"file:{model}")
    assert all(name in str(caught.value) for name in left)
    with hub_server.serving(files) as hub, pytest.raises(SourceError, match=r"no tokenizer\.json"):
        resolve(URI, access=Access(hub.endpoint))


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("vocab.txt",)])
def test_older_forms_of_a_tokenizer_are_taken(names: tuple[str, ...], model: Path, into: Fetch) -> None:
    (model / "tokenizer.json").unlink()
    for name in names:
        (model / name).write_text("{}")
    assert set(names) <= set(into(resolve(f"file:{model}")))


def test_a_link_of_a_snapshot_that_leads_nowhere_is_reported(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(model / "gone")
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        resolve(f"file:{model}")


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {}}'])
def test_a_tokenizer_that_is_none_is_refused(content: str, model: Path, into: Fetch) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match=r"tokenizer\.json is not a valid tokenizer"):
        into(resolve(f"file:{model}"))


def test_an_untied_model_without_a_head_is_refused(model: Path, into: Fetch) -> None:
    tensors = {name: value for name, value in checkpoints.unquantized().items() if name != "lm_head.weight"}
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(SourceError, match="no output head"):
        into(resolve(f"file:{model}"))
    tied = {key: value for key, value in checkpoints.config().items() if key != "tie_word_embeddings"}
    (model / "config.json").write_text(json.dumps(tied | {"model_type": "gemma2"}))  # whose class ties it
    assert into(resolve(f"file:{model}"))


def test_a_configuration_nested_without_end_is_refused(model: Path, into: Fetch) -> None:
    (model / "generation_config.json").write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    with pytest.raises(SourceError, match=r"generation_config\.json can't be read: nested more than 64 deep"):
        into(resolve(f"file:{model}"))


def test_damaged_weights_and_json_are_refused_together(model: Path, into: Fetch) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-1])
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError) as caught:
        into(resolve(f"file:{model}"))
    assert "model.safetensors: the tensors end at byte" in str(caught.value)
    assert "tokenizer.json can't be read: no JSON" in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "revision", "reason"),
    [
        ("file:/nowhere/at/all", None, "there is no folder"),
        ("ftp://host/model", None, "expected a URI that begins with one of `file:`, `hf:`"),
        ("/a/folder", None, "expected a URI that begins with one of `file:`, `hf:`"),
        ("hf://only-a-name", None, "expected hf://ORG/NAME"),
        ("hf://org/name@one", "two", "remove one of them"),
        ("file:/tmp", "main", "`revision` does not apply"),
    ],
)
def test_a_source_that_cannot_be_is_refused(uri: str, revision: str | None, reason: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(uri, revision)
    assert reason in str(caught.value)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"no model\.safetensors: it holds config\.json"):
        resolve(f"file:{tmp_path}")


# The lock


def test_a_flipped_byte_is_refused_with_both_digests_and_the_way_out(tmp_path: Path, model: Path, into: Fetch) -> None:
    path = tmp_path / "tiny.lock.json"
    resolved = resolve(f"file:{model}", lock=read_lock(path))
    good = into(resolved)
    hold_to_lock(path, resolved, good)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(SourceError) as caught:
        into(resolve(f"file:{model}", lock=read_lock(path)))
    message = str(caught.value)
    assert f"model.safetensors has sha256 {hashlib.sha256(weights).hexdigest()}" in message
    assert f"expected {good['model.safetensors']}" in message
    assert f"{path}; if the change is intended, delete that file" in message
    assert "\n" not in message
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    again = resolve(f"file:{model}", lock=read_lock(path))
    hold_to_lock(path, again, into(again))


def test_a_lock_names_what_is_missing_and_extra(tmp_path: Path, model: Path, into: Fetch) -> None:
    path = tmp_path / "tiny.lock.json"
    resolved = resolve(f"file:{model}")
    hold_to_lock(path, resolved, into(resolved))
    (model / "tokenizer.json").rename(model / "merges.txt")
    with pytest.raises(SourceError) as caught:
        resolve(f"file:{model}", lock=read_lock(path))
    assert "tokenizer.json is missing" in str(caught.value)
    assert "merges.txt is not in the lock" in str(caught.value)


def test_a_lock_is_held_against_an_artifact_that_was_kept(tmp_path: Path, model: Path, into: Fetch) -> None:
    path = tmp_path / "tiny.lock.json"
    resolved = resolve(f"file:{model}")
    good = into(resolved)
    hold_to_lock(path, resolved, good)
    with pytest.raises(SourceError, match=r"config\.json has sha256"):
        hold_to_lock(path, resolved, good | {"config.json": "0" * 64})


def test_a_lock_holds_in_another_checkout_and_not_for_another_source(tmp_path: Path, into: Fetch) -> None:
    for checkout in ("one", "two"):
        checkpoints.write_source(tmp_path / checkout / "tiny" / "model")
    resolved = resolve(f"file:{tmp_path}/one/tiny/model")
    hold_to_lock(tmp_path / "one" / "tiny.lock.json", resolved, into(resolved))
    moved = tmp_path / "two" / "tiny.lock.json"
    moved.write_bytes((tmp_path / "one" / "tiny.lock.json").read_bytes())
    into(resolve(f"file:{tmp_path}/two/tiny/model", lock=read_lock(moved)))
    with pytest.raises(SourceError, match=r"pins file:tiny/model, but the model's file names hf://org/tiny"):
        resolve(URI, lock=read_lock(moved))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": "slipway/lock/9"}', '{"schema": "slipway/lock/1", "files": {}}']
)
def test_what_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tiny.lock.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=r"tiny\.lock\.json"):
        read_lock(path)


def test_a_whole_lock_of_another_version_is_refused(model: Path, tmp_path: Path, into: Fetch) -> None:
    path = tmp_path / "tiny.lock.json"
    resolved = resolve(f"file:{model}")
    hold_to_lock(path, resolved, into(resolved))
    assert read_lock(path) is not None
    path.write_text(path.read_text().replace("slipway/lock/1", "slipway/lock/9"))
    with pytest.raises(SourceError, match="has schema 'slipway/lock/9', but this version of Slipway reads"):
        read_lock(path)


# A hub


def test_a_branch_is_pulled_at_its_commit(hub: hub_server.StandInHub, model: Path, into: Fetch) -> None:
    resolved = resolve(URI, access=Access(hub.endpoint))
    assert resolved.revision == hub_server.COMMIT
    assert into(resolved) == digests(model)
    assert revision_of(resolved, {}) == hub_server.COMMIT


def test_a_lock_holds_a_branch_to_its_commit_without_asking_the_hub(
    tmp_path: Path, hub: hub_server.StandInHub, into: Fetch
) -> None:
    path = tmp_path / "tiny.lock.json"
    resolved = resolve(URI, "main", access=Access(hub.endpoint))
    hold_to_lock(path, resolved, into(resolved))
    hub.branches["main"] = "f" * 40
    hub.seen.clear()
    locked = resolve(URI, "main", access=Access(hub.endpoint), lock=read_lock(path))
    assert locked.revision == hub_server.COMMIT
    assert hub.seen == []
    into(locked)
    with pytest.raises(SourceError, match=f"the model's file names {URI}@{'e' * 40}"):
        resolve(URI, "e" * 40, access=Access(hub.endpoint), lock=read_lock(path))


def test_a_broken_download_goes_on_where_it_stopped(hub: hub_server.StandInHub, into: Fetch, tmp_path: Path) -> None:
    kept = tmp_path / "downloads" / _folder_name(URI) / hub_server.COMMIT
    kept.mkdir(parents=True)
    (kept / "model.safetensors.part").write_bytes(hub.files["model.safetensors"][:1000])
    (kept / "config.json.part").write_bytes(hub.files["config.json"] + b"too long")
    into(resolve(URI, access=Access(hub.endpoint)))
    ranges = {path.rsplit("/", 1)[-1]: wanted for _, path, wanted, _ in hub.seen if "/resolve/" in path}
    assert ranges == {"model.safetensors": "bytes=1000-", "config.json": None, "tokenizer.json": None}
    assert not kept.exists()


def test_a_line_that_breaks_is_tried_again_and_gives_up_with_one_line(
    hub: hub_server.StandInHub, into: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    resolved = resolve(URI, access=Access(hub.endpoint))
    hub.cuts = 2
    into(resolved)
    hub.cuts = 1000
    with pytest.raises(SourceError, match="downloaded parts are kept"):
        into(resolved)
    hub.cuts = 0
    into(resolved)


def test_what_is_not_what_the_hub_promised_is_refused_and_fetched_anew(hub: hub_server.StandInHub, into: Fetch) -> None:
    weights, tokenizer = bytearray(hub.files["model.safetensors"]), hub.files["tokenizer.json"]
    weights[-1] ^= 1
    hub.served = {"model.safetensors": bytes(weights), "tokenizer.json": tokenizer.replace(b"1", b"2")}
    resolved = resolve(URI, access=Access(hub.endpoint))
    with pytest.raises(SourceError) as caught:
        into(resolved)
    assert f"model.safetensors: sha256 {hashlib.sha256(weights).hexdigest()}, expected" in str(caught.value)
    assert "tokenizer.json: git blob" in str(caught.value)
    hub.served = {}
    into(resolved)


def test_a_locked_file_that_the_hub_changed_is_refused(tmp_path: Path, hub: hub_server.StandInHub, into: Fetch) -> None:
    path = tmp_path / "tiny.lock.json"
    resolved = resolve(URI, access=Access(hub.endpoint))
    hold_to_lock(path, resolved, into(resolved))
    hub.served = {"config.json": hub.files["config.json"].replace(b"llama", b"llamb")}
    with pytest.raises(SourceError, match=r"config\.json has sha256 .* expected"):
        into(resolve(URI, access=Access(hub.endpoint), lock=read_lock(path)))


def test_pickles_and_other_files_beside_safetensors_are_left_on_the_hub(
    hub: hub_server.StandInHub, into: Fetch
) -> None:
    hub.files |= {"pytorch_model.bin": b"\x80", "original/model.safetensors": b"", "modeling.py": b"", "README.md": b""}
    hub.files |= {"consolidated.safetensors": b"", "pytorch_model.bin.index.json": b"{}", ".gitattributes": b""}
    resolved = resolve(URI, access=Access(hub.endpoint))
    assert sorted(into(resolved)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "pytorch_model.bin" in resolved.left_out
    assert not [path for _, path, _, _ in hub.seen if "pytorch_model" in path]


def test_a_model_of_gguf_files_alone_is_refused_with_the_reason(hub: hub_server.StandInHub) -> None:
    del hub.files["model.safetensors"]
    hub.files |= {"model-Q4_K_M.gguf": b"GGUF", "model-Q8_0.GGUF": b"GGUF"}
    with pytest.raises(SourceError, match=r"only model-Q4_K_M\.gguf, model-Q8_0\.GGUF: .* quantized already") as error:
        resolve(URI, access=Access(hub.endpoint))
    assert "name the model that it was made from" in str(error.value)
    assert "\n" not in str(error.value)
    assert not any("/resolve/" in path for _, path, _, _ in hub.seen)  # not a byte of them was asked for


@pytest.mark.parametrize("uri", ["file:/models/model-Q4_K_M.gguf", "hf://org/tiny/model.GGUF", "s3://models/tiny.gguf"])
def test_a_gguf_file_is_refused_with_the_reason(uri: str) -> None:
    with pytest.raises(SourceError, match=r"has no safetensors, only [\w-]+\.(gguf|GGUF): .* quantized already"):
        resolve(uri)


def test_a_folder_may_be_named_like_a_gguf_file(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO / "model", tmp_path / "demo.gguf")
    assert "model.safetensors" in [file.path for file in resolve(f"file:{folder}").files]


def test_a_model_of_pickles_alone_is_refused_by_name(hub: hub_server.StandInHub) -> None:
    del hub.files["model.safetensors"]
    hub.files["pytorch_model.bin"] = b"\x80"
    with pytest.raises(SourceError, match=r"no safetensors, only pytorch_model\.bin: a pickle"):
        resolve(URI, access=Access(hub.endpoint))


def test_names_that_lead_elsewhere_are_never_written(hub: hub_server.StandInHub, into: Fetch, tmp_path: Path) -> None:
    hub.files |= {"../escaped.json": b"{}", "..\\escaped.json": b"{}", ".hidden.json": b"{}"}
    into(resolve(URI, access=Access(hub.endpoint)))
    assert not list(tmp_path.rglob("*escaped*"))
    assert not list(tmp_path.rglob("*hidden*"))


def test_the_token_opens_and_is_shown_nowhere(hub: hub_server.StandInHub, into: Fetch) -> None:
    hub.token = "hf_secret"  # noqa: S105 - a stand-in's
    with pytest.raises(SourceError, match="HF_TOKEN is not set"):
        resolve(URI, access=Access(hub.endpoint))
    with pytest.raises(SourceError) as caught:
        resolve(URI, access=Access(hub.endpoint, "hf_wrong"))
    assert "hf_wrong" not in str(caught.value)
    resolved = resolve(URI, access=Access(hub.endpoint, hub.token))
    into(resolved)
    assert "hf_secret" not in repr(resolved)


def test_without_a_token_of_ours_the_machines_own_is_not_sent(
    hub: hub_server.StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    resolve(URI, access=Access(hub.endpoint))
    assert [authorization for *_, authorization in hub.seen] == [None]


def test_a_gated_model_says_how_to_get_in(hub: hub_server.StandInHub) -> None:
    hub.gated = True
    with pytest.raises(SourceError, match=r"gated, and was requested without a token .*accept its terms"):
        resolve(URI, access=Access(hub.endpoint))
    with pytest.raises(SourceError, match=r"gated, and was requested with HF_TOKEN: accept its terms"):
        resolve(URI, access=Access(hub.endpoint, "hf_mine"))


@pytest.mark.parametrize(
    ("uri", "revision", "reason"),
    [
        (URI, "no-such-branch", "has no revision `no-such-branch`"),
        ("hf://org/other", None, "does not exist at http"),
        ("hf://org/-bad-", None, "is not a valid model name"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    hub: hub_server.StandInHub, uri: str, revision: str | None, reason: str
) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(uri, revision, access=Access(hub.endpoint))
    assert reason in str(caught.value)


def test_an_unreachable_hub_is_one_line_within_seconds(tmp_path: Path, hub: hub_server.StandInHub, into: Fetch) -> None:
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"can't reach the hub at http://127\.0\.0\.1:9") as caught:
        resolve(URI, access=Access("http://127.0.0.1:9"))
    assert "\n" not in str(caught.value)
    path = tmp_path / "tiny.lock.json"
    resolved = resolve(URI, access=Access(hub.endpoint))
    hold_to_lock(path, resolved, into(resolved))
    with pytest.raises(SourceError, match="can't reach the hub"):
        into(resolve(URI, access=Access("http://127.0.0.1:9"), lock=read_lock(path)))
    assert time.monotonic() - started < 60


# Attacks


@pytest.mark.parametrize("sha", ["../../../victim", "/victim", "0" * 39, "main", "0" * 41])
def test_a_commit_that_is_not_one_never_becomes_a_path(hub: hub_server.StandInHub, tmp_path: Path, sha: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept.txt").write_text("kept")
    hub.commit = f"{tmp_path}/victim" if sha == "/victim" else sha
    with pytest.raises(SourceError, match="expected a commit of 40 hex digits"):
        resolve(URI, access=Access(hub.endpoint))
    assert (victim / "kept.txt").exists()


@pytest.mark.parametrize("place", ["/proc/self/environ", "outside/key.pem", "../model-2/vocab.txt"])
def test_a_link_out_of_a_source_is_refused(model: Path, tmp_path: Path, place: str) -> None:
    for path in (tmp_path / "outside" / "key.pem", tmp_path / "model-2" / "vocab.txt"):
        path.parent.mkdir()
        path.write_text("secret")
    target = place if place.startswith(("/", "..")) else tmp_path / place
    (model / "vocab.txt").symlink_to(target)
    with pytest.raises(SourceError, match=r"vocab\.txt is a link to .*only to the same folder"):
        resolve(f"file:{model}")


def test_a_link_that_appears_after_the_source_was_resolved_is_refused(model: Path, tmp_path: Path, into: Fetch) -> None:
    (tmp_path / "key.pem").write_text("secret")
    (model / "vocab.txt").write_text("a")
    resolved = resolve(f"file:{model}")
    (model / "vocab.txt").unlink()
    (model / "vocab.txt").symlink_to(tmp_path / "key.pem")
    with pytest.raises(SourceError, match="is a link to"):
        into(resolved)


@pytest.mark.parametrize("name", ["vocab.txt", "model.safetensors.index.json"])
def test_a_fifo_in_a_source_is_refused_and_does_not_block(model: Path, name: str) -> None:
    os.mkfifo(model / name)
    with pytest.raises(SourceError, match=f"{name} can't be read"):
        resolve(f"file:{model}")


def test_links_within_a_source_and_those_of_a_hugging_face_cache_are_taken(
    model: Path, tmp_path: Path, into: Fetch
) -> None:
    (model / "kept").mkdir()
    (model / "tokenizer.json").rename(model / "kept" / "tokenizer.json")
    (model / "tokenizer.json").symlink_to("kept/tokenizer.json")
    cache = tmp_path / "models--org--tiny"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / hub_server.COMMIT
    snapshot.mkdir(parents=True)
    for path in (model / "config.json", model / "model.safetensors", model / "tokenizer.json"):
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, cache / "blobs" / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    assert into(resolve(f"file:{snapshot}")) == into(resolve(f"file:{model}"))
    (cache / "blobs" / "notes.txt").write_text("not a blob")
    (snapshot / "vocab.txt").symlink_to("../../blobs/notes.txt")
    with pytest.raises(SourceError, match="is a link to"):
        resolve(f"file:{snapshot}")


def test_a_token_that_a_library_does_not_like_is_not_shown(hub: hub_server.StandInHub) -> None:
    with pytest.raises(UnreachableError) as caught:
        Hub(hub.endpoint, "hf_secret\nX-More: 1").revision("acme/tiny", "main")
    assert "hf_secret" not in str(caught.value)


def test_the_hub_is_not_followed_to_another_scheme() -> None:
    request = httpx2.Request("GET", "https://hub.example.com/x")
    for there in ("http://hub.example.com/x", "ftp://hub.example.com/x"):
        answer = httpx2.Response(302, headers={"Location": there}, request=request)
        with pytest.raises(SourceError, match="redirects from https to"):
            _check(answer)
    for there in ("https://[::1", "https://a:99999/x"):
        with pytest.raises(SourceError, match="malformed"):
            _check(httpx2.Response(302, headers={"Location": there}, request=request))
    _check(httpx2.Response(302, headers={"Location": "https://cdn.example.com/x"}, request=request))


def test_a_folder_that_is_too_deep_or_has_names_that_are_not_utf_8_is_refused(model: Path) -> None:
    deep = model.joinpath(*["d"] * 101)
    deep.mkdir(parents=True)
    with pytest.raises(SourceError, match="more than 100 folders deep"):
        resolve(f"file:{model}", None, access=Access("", None))
    shutil.rmtree(model / "d")
    (model / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"")
    with pytest.raises(SourceError, match="its name is not UTF-8"):
        resolve(f"file:{model}", None, access=Access("", None))
