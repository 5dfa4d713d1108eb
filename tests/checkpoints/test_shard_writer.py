"""Weights are written as they come, in files of a bounded size."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from trimfit.checkpoints.shard_writer import ShardWriter
from trimfit.errors import RunError


def tensors(*lengths: int) -> dict[str, Tensor]:
    """One of so many bytes each."""
    return {f"t{i}": torch.full((length,), i, dtype=torch.uint8) for i, length in enumerate(lengths)}


def write(directory: Path, given: dict[str, Tensor], shard_bytes: int) -> list[str]:
    writer = ShardWriter(directory, shard_bytes)
    for name, tensor in given.items():
        writer.add({name: tensor})
    writer.finish()
    return sorted(path.name for path in directory.iterdir())


def test_one_file(tmp_path: Path):
    assert write(tmp_path, tensors(3, 0, 4), 7) == ["model.safetensors"]
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors(3, 0, 4).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(3, 0, 4).items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_single_number_may_come_with_any_stride(tmp_path: Path):
    """As the zero points of a layer of 16 rows do, packed in 2 bits and transposed."""
    given = torch.tensor([[5, 6]], dtype=torch.int32)[:, :1].as_strided((1, 1), (2, 2))
    assert write(tmp_path, {"t": given}, 7) == ["model.safetensors"]
    assert torch.equal(safetensors.torch.load_file(tmp_path / "model.safetensors")["t"], torch.tensor([[5]]).int())


def test_several_files(tmp_path: Path):
    """In the order in which the tensors come; one that is too large has a file of its own."""
    given = tensors(3, 4, 1, 9, 2, 5)
    names = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert write(tmp_path, given, 7) == [*names, "model.safetensors.index.json"]
    files = [safetensors.torch.load_file(tmp_path / name) for name in names]
    assert [set(file) for file in files] == [{"t0", "t1"}, {"t2"}, {"t3"}, {"t4", "t5"}]
    assert all(torch.equal(file[name], given[name]) for file in files for name in file)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    expected = {name: file for file, held in zip(names, files, strict=True) for name in held}
    assert index == {"metadata": {"total_size": 24}, "weight_map": expected}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_no_file_is_larger_than_it_may_be(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], bound: int):
    directory = tmp_path_factory.mktemp("shards")
    given = tensors(*lengths)
    names = [name for name in write(directory, given, bound) if name.endswith(".safetensors")]
    held = [safetensors.torch.load_file(directory / name) for name in names]
    sizes = [[tensor.nbytes for tensor in file.values()] for file in held]
    assert all(sum(size) <= bound or len([n for n in size if n]) == 1 for size in sizes)
    assert [sorted(file) for file in held if not file] == []
    assert sorted(name for file in held for name in file) == sorted(given)


def test_what_is_added_leaves_memory(tmp_path: Path):
    writer = ShardWriter(tmp_path, 10)
    alive: list[weakref.ref[Any]] = []
    for i in range(20):
        memory = np.zeros(4, dtype=np.uint8)  # that of the tensor, which keeps it alive
        alive.append(weakref.ref(memory))
        writer.add({f"t{i}": torch.from_numpy(memory)})
        del memory
        assert not any(memory() is not None for memory in alive)
    writer.finish()


def test_until_the_end_nothing_looks_like_a_checkpoint(tmp_path: Path):
    writer = ShardWriter(tmp_path, 4)
    writer.add(tensors(3, 3, 3))
    assert list(tmp_path.iterdir()) and not list(tmp_path.glob("*.safetensors*"))
    writer.finish()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 and not list(tmp_path.glob("*.part"))


def test_any_layout_and_dtype(tmp_path: Path):
    """Transposed, a part of another tensor, in need of gradients, without dimensions."""
    base = torch.arange(12.0).view(3, 4)
    given = {
        "transposed": base.T,
        "rows": base[1:],
        "bfloat16": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        "scalar": torch.tensor(5),
    }
    write(tmp_path, given, 10**6)
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in given.items())


def test_a_name_is_written_once(tmp_path: Path):
    writer = ShardWriter(tmp_path, 4)
    writer.add(tensors(3, 3))
    for name in ("t0", "t1"):  # in a file, and still waiting
        with pytest.raises(ValueError, match=f"{name} was added already"):
            writer.add({name: torch.zeros(1)})


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool):
    """Between tensors, in the order in which they come; a file system without links has it twice."""
    if not linked:
        monkeypatch.setattr("trimfit.checkpoints.shard_writer.os.link", refuse)
    source, out = tmp_path / "taken", tmp_path / "out"
    out.mkdir()
    given = tensors(3, 4, 1, 9)
    safetensors.torch.save_file({name: given[name] for name in ("t1", "t2")}, source, {"format": "pt"})
    writer = ShardWriter(out)
    writer.add({"t0": given["t0"]})
    writer.add_file(source)
    with pytest.raises(ValueError, match="t1 was added already"):
        writer.add_file(source)
    writer.add({"t3": given["t3"]})
    writer.finish()
    files = [out / f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)]
    held = [safetensors.torch.load_file(file) for file in files]
    assert [set(file) for file in held] == [{"t0"}, {"t1", "t2"}, {"t3"}]
    assert all(torch.equal(file[name], given[name]) for file in held for name in file)
    assert source.samefile(files[1]) == linked
    assert files[1].read_bytes() == source.read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 17} and index["weight_map"]["t2"] == files[1].name
    assert len(list(out.iterdir())) == 4


def refuse(*arguments: object) -> None:
    raise OSError(95, "Operation not supported")


def test_items_begin_where_readers_want_them(tmp_path: Path):
    """At a multiple of their size, whatever came before."""
    dtypes = (torch.uint8, torch.int64, torch.bfloat16, torch.bool, torch.float32, torch.float8_e4m3fn, torch.float64)
    given = {f"t{i}": torch.arange(3).to(dtype) for i, dtype in enumerate(dtypes)}
    write(tmp_path, given, 10**6)
    header = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    begins = {
        name: entry["data_offsets"][0] for name, entry in json.loads(header[8 : 8 + size]).items() if name in given
    }
    assert size % 8 == 0 and all(begins[name] % tensor.itemsize == 0 for name, tensor in given.items())
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(found[name].dtype == t.dtype and torch.equal(found[name].int(), t.int()) for name, t in given.items())


@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_what_is_not_as_it_was_added_is_noticed(tmp_path: Path, damage: str):
    writer = ShardWriter(tmp_path, 4)
    writer.add(tensors(3, 3))  # the first of them is in a file now
    (part,) = tmp_path.glob("0*.part")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + b"x" if damage == "changed" else content.replace(b'"t0"', b'"t9"'))
    with pytest.raises(RunError, match=r"t[09] is not the same after writing; nothing was kept"):
        writer.finish()
