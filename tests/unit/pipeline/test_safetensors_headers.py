from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pipeline.compatibility.safetensors_headers import HeaderError, parse_header, read_header, read_model
from pipeline.compatibility.safetensors_values import read_columns, read_rows
from unit.pipeline import checkpoints


def put(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(start: int, end: int, shape: list[Any], dtype: str = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = checkpoints.unquantized()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in tensors.items()}
    assert np.array_equal(read_rows(found["model.norm.weight"]), tensors["model.norm.weight"])
    head = tensors["lm_head.weight"]
    assert np.array_equal(read_rows(found["lm_head.weight"], slice(8, 24)), head[8:24])
    assert np.array_equal(read_columns(found["lm_head.weight"], slice(8, 24)), head[:, 8:24])


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"{not json", b"", "no JSON"),
        ([1], b"", "not a JSON object"),
        (b'{"a": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}, "a": {}}', b"", "twice"),
        ({"a": entry(0, 4, [2], "F17")}, b"1234", "unknown dtype"),
        ({"a": entry(0, 4, [3])}, b"1234", "takes 6 bytes"),
        ({"a": entry(0, 4, [-1, -2])}, b"1234", "unsigned integer"),
        ({"a": entry(0, 4, [2.0])}, b"1234", "unsigned integer"),
        ({"a": {"dtype": "F16", "shape": [2]}}, b"1234", "data_offsets"),
        ({"a": entry(0, 4, [2]), "b": entry(2, 6, [2])}, b"123456", "overlaps"),
        ({"a": entry(0, 4, [2]), "b": entry(6, 10, [2])}, b"1234567890", "hole"),
        ({"a": entry(2, 6, [2])}, b"123456", "hole"),
        ({"a": entry(0, 4, [2])}, b"123456", "end at byte"),
        ({"a": entry(0, 4, [2])}, b"12", "end at byte"),
        ({"a": {**entry(0, 4, [2]), "dtype": ["F16"]}}, b"1234", "unknown dtype"),
        ({"a": entry(0, 4, [2**64])}, b"1234", "64 bits"),
        ({"a": entry(0, 2**64, [2**63])}, b"1234", "64 bits"),
        ({"a": entry(0, 4, [[2]])}, b"1234", "nested more than 3 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "no JSON"),
        (b"[" * 100_000, b"", "nested more than 3 deep"),
        ({"a": entry(0, 4, [2**64 - 1] * 65)}, b"1234", "65 dimensions"),
        (b"{" + b'"a": 0, ' * 1_500_000 + b'"b": 0}', b"", "values"),
        ({"a\n\x1b[2Kb": entry(0, 4, [3])}, b"1234", r"'a\\n\\x1b\[2Kb'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_header_that_breaks_the_law_is_refused(tmp_path: Path, header: object, data: bytes, reason: str) -> None:
    with pytest.raises(HeaderError, match=reason):
        read_header(put(tmp_path / "model.safetensors", header, data))


@pytest.mark.parametrize("header", [{"a" * 10_000: entry(0, 4, [3])}, {"a": entry(0, 4, [2**64 - 1] * 64)}])
def test_a_problem_is_one_short_line(tmp_path: Path, header: object) -> None:
    with pytest.raises(HeaderError) as caught:
        read_header(put(tmp_path / "model.safetensors", header, b"1234"))
    assert len(str(caught.value)) < 3000
    assert len(str(caught.value).splitlines()) == 1


def test_a_header_that_is_too_long_is_refused_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 40 << 20))
        stream.truncate(64 << 20)
    with pytest.raises(HeaderError, match="at most 33554432 are read"):
        read_header(path)


def test_a_shape_takes_linear_time() -> None:
    # The product of a shape of 500,000 numbers of 64 bits took minutes; so did a message that held it.
    raw = b'{"a": {"dtype": "F16", "shape": [' + b"9223372036854775807," * 500_000 + b'1], "data_offsets": [0, 0]}}'
    with pytest.raises(HeaderError, match="500001 dimensions"):
        parse_header(raw, Path("model.safetensors"), 8 + len(raw))


def test_the_problems_of_a_folder_are_told_up_to_a_number(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float16)}, tmp_path / "model.safetensors")
    placed = {"a": "model.safetensors", **{f"b{n}\0": "model.safetensors" for n in range(1000)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(HeaderError) as caught:
        read_model(tmp_path)
    assert len(str(caught.value).splitlines()) == 21
    assert str(caught.value).endswith("and 980 more problems")


@pytest.mark.parametrize("length", [2**63, 100_000_001, 200])
def test_a_length_beyond_the_file_is_refused_without_reading(tmp_path: Path, length: int) -> None:
    with pytest.raises(HeaderError, match="truncated"):
        read_header(put(tmp_path / "model.safetensors", {}, length=length))


@given(st.binary(max_size=64))
def test_noise_is_refused_and_nothing_else_happens(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "model.safetensors"
    path.write_bytes(noise)
    with contextlib.suppress(HeaderError):
        assert read_header(path) == {}


def test_an_index_must_be_complete_and_right(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": np.zeros(2, np.float16)}, tmp_path / first)
    save_file({"b": np.zeros(2, np.float16)}, tmp_path / second)
    index = tmp_path / "model.safetensors.index.json"
    with pytest.raises(HeaderError, match="nor an index"):
        read_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    assert sorted(read_model(tmp_path)) == ["a", "b"]
    index.write_text(json.dumps({"weight_map": {"a": second, "c": first, "d": "model-00003-of-00003.safetensors"}}))
    with pytest.raises(HeaderError) as caught:
        read_model(tmp_path)
    message = str(caught.value)
    assert "names `model-00003-of-00003.safetensors`, which is not there" in message
    index.write_text(json.dumps({"weight_map": {"a": second, "c": first}}))
    with pytest.raises(HeaderError) as caught:
        read_model(tmp_path)
    message = str(caught.value)
    assert "`a` is in model-00001-of-00002.safetensors" in message
    assert "does not name it" in message
    assert "`c` into model-00001-of-00002.safetensors, which lacks it" in message


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({"a": np.zeros(2, np.float16)}, tmp_path / name)
    placed = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(HeaderError, match=r"`a` is in model-00001-of-00002\.safetensors too"):
        read_model(tmp_path)
