from pathlib import Path

import pytest
import torch

from neuroplast.errors import InputError, StorageError
from neuroplast.storage import (
    atomic_file,
    atomic_folder,
    hash_state,
    is_begun,
    load_json,
    load_jsonl,
    load_tensors,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)


def test_a_write_that_fails_leaves_the_former_file_and_no_rest(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "former")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_fails_leaves_the_former_folder_and_no_rest(tmp_path: Path):
    path = tmp_path / "a"
    with atomic_folder(path) as temporary:
        (temporary / "x").write_text("former")
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "y").write_text("half")
        raise RuntimeError
    assert [entry.name for entry in path.iterdir()] == ["x"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_clear_line_and_nothing_half_written(tmp_path: Path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    said = r"could not write .*a\.txt: No space left on device; nothing half-written"
    with pytest.raises(StorageError, match=said), atomic_file(tmp_path / "a.txt") as temporary:
        temporary.symlink_to(full)
        temporary.write_text("text" * 10_000)
    assert not (tmp_path / "a.txt").exists()


def test_nothing_is_written_through_a_link_that_lies_where_a_file_is_begun(tmp_path: Path):
    (tmp_path / "other").write_text("theirs")
    (tmp_path / "a.txt.partial").symlink_to(tmp_path / "other")
    (tmp_path / "a.txt").symlink_to(tmp_path / "other")
    write_text(tmp_path / "a.txt", "ours")
    assert (tmp_path / "other").read_text() == "theirs"
    assert (tmp_path / "a.txt").read_text() == "ours" and not (tmp_path / "a.txt").is_symlink()


def test_an_output_folder_may_be_a_link_but_hold_none_that_leads_out(tmp_path: Path):
    (out := tmp_path / "elsewhere" / "run").mkdir(parents=True)
    (link := tmp_path / "out").symlink_to(out)
    (out / "audit.json").write_text("{}")
    (out / "last").symlink_to(out / "audit.json")
    assert is_begun(link, "audit.json", "audit"), "a link that stays inside is none of our business"
    (out / "parts").mkdir()
    (out / "parts" / "tables").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"--out .*out holds the link parts/tables, which leads out of it") as caught:
        is_begun(link, "audit.json", "audit")
    assert "\n" not in str(caught.value)


def test_json_refuses_what_is_not_a_number(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_documents_come_back_as_they_were(tmp_path: Path):
    rows = [{"text": "naïve “quotes”\u2028"}, {"text": ""}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_json(tmp_path / "a.json", {"rows": rows})
    assert load_jsonl(tmp_path / "a.jsonl") == rows
    assert load_json(tmp_path / "a.json") == {"rows": rows}


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '"\\ud800'], ids=["cut", "deep", "surrogate"])
def test_broken_json_is_a_clear_error(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(StorageError, match=r"could not read .*a\.json"):
        load_json(tmp_path / "a.json")


def test_a_broken_line_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(StorageError, match="line 3: expected a JSON object, got list"):
        load_jsonl(tmp_path / "a.jsonl")


def test_tensors_come_back_and_a_broken_file_is_told(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.arange(6).view(2, 3).T}, {"why": "test"})
    assert torch.equal(load_tensors(path)["x"], torch.arange(6).view(2, 3).T)
    path.write_bytes(b"\x00" * 4)
    with pytest.raises(StorageError, match="could not read"):
        load_tensors(path)


def test_the_hash_of_weights_sees_values_names_and_shapes():
    weights = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    assert hash_state(weights) == hash_state(dict(reversed(weights.items())))
    for other in (
        {**weights, "a": torch.full((2, 2), 1.0001)},
        {**weights, "a": torch.ones(4)},
        {"a": weights["a"], "c": weights["b"]},
    ):
        assert hash_state(other) != hash_state(weights)
