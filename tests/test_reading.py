"""Files are read within limits, and whatever is wrong with one is an error of one line."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from neuroplast import reading
from neuroplast.errors import StorageError
from neuroplast.reading import parse_json, parse_toml, read_bytes, read_json, read_text, read_toml
from neuroplast.storage import load_json, load_metadata, load_tensors, write_tensors


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[" * 101 + "]" * 101, "nested more than 100 levels deep"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 levels deep"),
        ('{"a":' * 101 + "1" + "}" * 101, "nested more than 100 levels deep"),
        ("[NaN]", "NaN, which is no finite number"),
        ("[-Infinity]", "-Infinity, which is no finite number"),
        ("[1e400]", "1e400, which is no finite number"),
        ("[" + "9" * 400 + "]", "a number of 400 digits"),
        ('["\\ud800"]', "surrogates not allowed"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_no_file_of_ours_has_is_refused_in_a_line(text: str, wrong: str, tmp_path: Path):
    with pytest.raises(ValueError, match=wrong) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(StorageError, match=r"could not read .*a\.json"):
        load_json(tmp_path / "a.json")


def test_json_within_the_limits_is_what_it_says():
    for value in ([[[0.1]], {"a": [None, True, -3]}, "\U0001f600é"], json.loads("[" * 99 + "]" * 99), 10**299):
        assert parse_json(json.dumps(value)) == value
    assert parse_json("[Infinity, 1e400]", strict=False) == [float("inf")] * 2, "what others write may have it"


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 5000 + "]" * 5000, "a." * 900 + "a = 1", "a." * 60_000 + "a = 1", "x = nan"]
)
def test_toml_is_refused_before_it_takes_long(text: str):
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"levels deep|more than 1000 dots|no finite number"):
        parse_toml(text)
    assert time.process_time() - begun < 2


def test_a_file_that_is_too_large_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "large"
    path.touch()
    os.truncate(path, reading.LARGEST + 1)  # it takes no room on the disk
    monkeypatch.setattr(Path, "open", None)
    for read in (read_bytes, read_text, read_json, read_toml):
        with pytest.raises(ValueError, match="is the most that is read"):
            read(path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**20))
    for load in (load_tensors, load_metadata):
        with pytest.raises(StorageError, match="is the most that is read"):
            load(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is no regular file"):
        read_bytes(tmp_path / "pipe")


def test_text_comes_without_mark_and_with_one_kind_of_line_end(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(tmp_path / "a") == "one\ntwo\nthree\n"


def test_provenance_that_is_nested_deeply_is_refused(tmp_path: Path):
    from safetensors.torch import save_file

    write_tensors(tmp_path / "a.safetensors", {}, {"model": "tiny"})
    assert load_metadata(tmp_path / "a.safetensors") == {"model": "tiny"}
    save_file({}, tmp_path / "a.safetensors", {"neuroplast": "[" * 10_000})
    with pytest.raises(StorageError, match="levels deep"):
        load_metadata(tmp_path / "a.safetensors")


def test_what_another_library_quotes_of_a_file_stays_in_one_short_line(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "\n" + "x" * 5000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(StorageError, match="unknown variant") as caught:
        load_tensors(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
