import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trimfit.calibration import read_documents, read_token_ids
from trimfit.errors import InputError


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_documents(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_file_is_one_document_unchanged(tmp_path: Path) -> None:
    text = " first line\r\n\n\x0c second — é 日本\u2028 \n"
    assert read_documents(write(tmp_path / "a.txt", text)) == [text]


def test_separator_lines_end_documents(tmp_path: Path) -> None:
    text = (
        "one\nmore\n<|endoftext|>\ntwo <|endoftext|>\n <|endoftext|>\n<|endoftext|>\r\n"
        "<|endoftext|>\n \n<|endoftext|>\nthree\n"
    )
    assert read_documents(write(tmp_path / "a", text)) == ["one\nmore", "two <|endoftext|>\n <|endoftext|>", "three\n"]


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert read_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfword")) == ["word"]
    assert read_documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "word"}')) == ["word"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json-lines", ".JSONL"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    lines = [{"text": "é\n<|endoftext|>\nb", "body": "1"}, {"text": " ", "body": "2"}, {"text": "c", "body": "3"}]
    source = write(tmp_path / f"a{suffix}", "\n\n".join(json.dumps(line) for line in lines) + "\n")
    assert read_documents(source) == ["é\n<|endoftext|>\nb", "c"]
    assert read_documents(source, field="body") == ["1", "2", "3"]


def test_json_lines_are_split_at_newlines_only(tmp_path: Path) -> None:
    assert read_documents(write(tmp_path / "a.jsonl", '{"text": "a\u2028b"}')) == ["a\u2028b"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": }', ["line 3", "not valid JSON", "column 10"]),
        ('["text"]', ["line 3", "not a JSON object"]),
        ('{"body": "a", "id": 1}', ["line 3", "no field 'text'", "['body', 'id']"]),
        ('{"text": 5}', ["line 3", "'text' holds int"]),
        ('{"text": null}', ["line 3", "'text' holds NoneType"]),
        ('{"text": "a\\ud800"}', ["line 3", "character 1", "surrogate"]),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    source = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    message = refusal(source)
    assert all(part in message for part in [source, *parts]), message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"", ["is empty", "give a file with text"]),
        (b" \n\t\r\n", ["only white space"]),
        (b"\xef\xbb\xbf\n", ["only white space"]),
        (b"abc\0def", ["NUL byte at byte 3", "give UTF-8 text"]),
        (b"abcd\xff", ["not UTF-8", "byte 4", "give UTF-8 text"]),
        (b"\xef\xbb\xbfa\xe9b", ["not UTF-8", "byte 4"]),
        ("word".encode("utf-16"), ["UTF-16", "byte 0", "convert"]),
    ],
)
def test_files_that_are_not_text(tmp_path: Path, name: str, data: bytes, parts: list[str]) -> None:
    source = write(tmp_path / name, data)
    message = refusal(source)
    assert all(part in message for part in [source, *parts]), message


def test_a_file_of_blank_documents(tmp_path: Path) -> None:
    assert "only blank documents" in refusal(write(tmp_path / "a.txt", "\n<|endoftext|>\n \n<|endoftext|>\n"))


def test_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in refusal(str(tmp_path))


@pytest.mark.parametrize("source", ["no.txt", "a/b.jsonl", "./no", "/no/such", "~/no-such", "a/b/c", "two words"])
def test_missing_files(source: str) -> None:
    assert f"no such file: {source}; give" in refusal(source)


def test_text_given_in_place_of_a_file_is_not_repeated_whole() -> None:
    assert len(refusal("once upon a time " * 1000)) < 300


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    source = write(tmp_path / "a.txt", "a")
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert f"{source} cannot be read: Permission denied" in refusal(source)


def test_hub_datasets_need_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusal("org/name")
    assert 'pip install "trimfit[datasets]"' in message and "org/name is not a file" in message


class FakeHub:
    """Stands for the `datasets` package: gives endless rows and records how it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=self.load))

    def load(self, name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        self.calls.append((name, config, split, streaming))
        if split == "none":
            raise ValueError("Unknown split 'none'.\nmore lines")
        return self.rows(split)

    def rows(self, split: str) -> Iterator[dict[str, str]]:
        for i in range(10**9):
            if split == "breaks" and i == 3:
                raise ConnectionError("")
            yield {"text": f"row {i}" if i % 2 else "", "title": "t"}


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch)
    assert read_documents("wikitext:wikitext-2-raw-v1", split="test", limit=5) == ["row 1", "row 3"]
    assert read_documents("org/name-1.1", limit=2, field="title") == ["t", "t"]
    assert len(read_documents("org/data.v2")) == 5000
    assert hub.calls == [
        ("wikitext", "wikitext-2-raw-v1", "test", True),
        ("org/name-1.1", None, "train", True),
        ("org/data.v2", None, "train", True),
    ]


def test_hub_failures_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch)
    assert refusal("a:b", split="none") == "the dataset a:b (split 'none') cannot be loaded: Unknown split 'none'."
    assert refusal("a", split="breaks").endswith("cannot be loaded: ConnectionError")
    assert "dataset a, row 0: no field 'body' among ['text', 'title']" in refusal("a", field="body")


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.dtype(">i4"), np.uint64])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_npy_ids(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=dtype).reshape(shape))
    ids = read_token_ids(tmp_path / "a.npy")
    assert ids.dtype == torch.int64 and torch.equal(ids, torch.arange(6).reshape(shape))


@pytest.mark.parametrize("names", [["x"], ["input_ids", "attention_mask"], ["tokens", "b"], ["input_ids", "tokens"]])
def test_safetensors_ids(tmp_path: Path, names: list[str]) -> None:
    tensors = {name: torch.full((2, 3), i, dtype=torch.int32) for i, name in enumerate(names)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert torch.equal(read_token_ids(str(tmp_path / "a.safetensors")), torch.zeros(2, 3, dtype=torch.int64))


def test_safetensors_the_only_integers(tmp_path: Path) -> None:
    save_file({"b": torch.ones(3), "a": torch.tensor([1, 2]), "c": torch.tensor([True])}, tmp_path / "a.safetensors")
    assert read_token_ids(tmp_path / "a.safetensors").tolist() == [1, 2]


def ids_refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_token_ids(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.zeros(3), "holds float64 values; token ids must be integers"),
        (np.zeros(3, dtype=bool), "holds bool values"),
        (np.array([1, -100]), "negative id (-100)"),
        (np.zeros((1, 2, 3), dtype=int), "has shape (1, 2, 3)"),
        (np.array(3), "has shape ()"),
        (np.zeros((0, 4), dtype=int), "holds no token ids"),
        (np.array([2**63], dtype=np.uint64), "does not fit 64-bit"),
    ],
)
def test_npy_that_holds_no_ids(tmp_path: Path, array: Any, part: str) -> None:
    np.save(tmp_path / "a.npy", array)
    assert part in ids_refusal(tmp_path / "a.npy")


def test_npy_never_unpickles(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([object()]), allow_pickle=True)
    assert "cannot be read as a .npy file" in ids_refusal(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_damaged_missing_and_odd_id_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    assert "no such file" in ids_refusal(path)
    for data in (b"", b"not what it says"):
        path.write_bytes(data)
        assert f"cannot be read as a {suffix} file" in ids_refusal(path)
    path.unlink()
    path.mkdir()
    assert "is a directory" in ids_refusal(path)
    assert "but" in ids_refusal(tmp_path / "a.bin") and ".npy or .safetensors" in ids_refusal(tmp_path / "a.bin")


def test_safetensors_without_a_clear_choice(tmp_path: Path) -> None:
    save_file({"b": torch.tensor([1]), "a": torch.tensor([1])}, tmp_path / "a.safetensors")
    assert "it has ['a', 'b']" in ids_refusal(tmp_path / "a.safetensors")
    save_file({"b": torch.tensor([1.0]), "a": torch.tensor([1.0])}, tmp_path / "b.safetensors")
    assert "it has ['a', 'b']" in ids_refusal(tmp_path / "b.safetensors")
    save_file({"b": torch.tensor([1.0])}, tmp_path / "c.safetensors")
    assert "holds float32 values" in ids_refusal(tmp_path / "c.safetensors")
