"""Many small prunes in one process: memory and open files are at the end what they were when it was warm."""

import gc
import os
from pathlib import Path

import numpy
import pytest
import torch
from families import FAMILIES, LENGTH, windows
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trimfit import CalibrationConfig, PruneConfig, prune, prune_checkpoint
from trimfit.heap import trim_heap

CPU = torch.device("cpu")
CONFIG = PruneConfig(selector="wanda", target="layer")
WARM, MANY = 40, 160  # 200 together
STATM = Path("/proc/self/statm")

pytestmark = pytest.mark.skipif(not STATM.exists(), reason="only Linux tells what a process holds")


def resident() -> int:
    """Bytes of this process in memory now, without those that the allocator keeps for later."""
    gc.collect()
    trim_heap()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped() -> int:
    """Files mapped into memory, each as often as it is."""
    return sum("safetensors" in line or "states-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


def test_in_memory():
    model, tokens = FAMILIES["llama"].build(num_hidden_layers=1), windows(4)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run(times: int) -> None:
        for _ in range(times):
            model.load_state_dict(weights)
            prune(model, tokens, CONFIG)

    run(WARM)
    before = resident(), tensors(), open_files()
    run(MANY)
    assert (tensors(), open_files()) == before[1:]
    assert resident() - before[0] < 4 * 2**20  # 26 KiB for each run; its Gram matrices alone are more


@pytest.mark.parametrize("offload", [False, True])
def test_from_disk_to_disk(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, offload: bool):
    FAMILIES["llama"].build(num_hidden_layers=1).save_pretrained(tmp_path / "model", max_shard_size=20_000)
    word_tokenizer.save_pretrained(tmp_path / "model")
    numpy.save(tmp_path / "tokens.npy", windows(4).numpy())
    calibration = CalibrationConfig(source=str(tmp_path / "tokens.npy"), samples=4, sequence_length=LENGTH)

    def run(times: int) -> None:
        for _ in range(times):
            prune_checkpoint(
                str(tmp_path / "model"),
                tmp_path / "out",
                CONFIG,
                calibration,
                device=CPU,
                overwrite=True,
                offload=offload,
                memory_limit=1000,
            )

    run(3)
    before = resident(), tensors(), open_files(), mapped()
    run(9)
    assert (tensors(), open_files(), mapped()) == before[1:]
    assert resident() - before[0] < 4 * 2**20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "tokens.npy"]


def test_freed_memory_between_what_lives_is_given_back():
    torch.ones(2**22)  # glibc learns from a large tensor that was freed to keep smaller ones
    before = resident()
    pieces = [(torch.ones(2**18), torch.ones(64)) for _ in range(100)]  # 1 MiB each, with little between
    small = [piece[1] for piece in pieces]
    del pieces
    assert len(small) == 100
    assert resident() - before < 20 * 2**20
