"""The processes that share a run: one on each device, on one machine or several, through torch.distributed."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trimfit.errors import InputError, RunError, ToldElsewhere, TrimfitError, first_line
from trimfit.watch import ANOTHER_ENDED, Watch

_T = TypeVar("_T")
_SILENCE = timedelta(days=30)  # no limit: a process that ends is noticed by its connections


class Ranks:
    """One of `count` processes that all do the same, and share what can be shared.

    Everything that exchanges data must be called by all of them, in the same order. Raises `RunError` when another
    process has ended.
    """

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def first(self, work: Callable[[], _T]) -> _T:
        """What `work` gives in the first process, in all of them; errors that users can act on end all of them."""
        if self.count == 1:
            return work()
        told: list[Any] = [None, None]
        if not self.is_first:
            self._tell(told)
            if told[1] is not None:
                raise ToldElsewhere(told[1])
            return cast(_T, told[0])
        try:
            told[0] = work()
        except TrimfitError as error:
            self._tell([None, error])
            raise
        self._tell(told)
        return told[0]

    def first_only(self, work: Callable[[], _T]) -> _T | None:
        """What `work` gives in the first process, there alone; its errors end all of them."""
        kept: list[_T] = []
        self.first(lambda: kept.append(work()))
        return kept[0] if kept else None

    def everywhere(self, work: Callable[[], _T]) -> _T:
        """What `work` gives in each process; an error that users can act on ends all, and is told by one of them."""
        if self.count == 1:
            return work()
        done: list[_T] = []
        own: TrimfitError | None = None
        try:
            done.append(work())
        except TrimfitError as error:
            own = error
        errors: list[TrimfitError | None] = [None] * self.count
        with _noticing():
            dist.all_gather_object(errors, own)
        told = next((rank for rank, error in enumerate(errors) if error is not None), None)
        if told is None:
            return done[0]
        if own is not None and told == self.rank:
            raise own
        error = errors[told]
        assert error is not None
        raise ToldElsewhere(error)

    def _tell(self, told: list[Any]) -> None:
        with _noticing():
            dist.broadcast_object_list(told, src=0)

    def sum(self, tensor: Tensor) -> None:
        """Adds up, in place, what each process has."""
        if self.count > 1:
            with _noticing():
                dist.all_reduce(tensor)

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, of the same shape and dtype in all of them."""
        if self.count == 1:
            return tensor
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        with _noticing():
            dist.broadcast(sent, src=0)
        return sent.to(tensor.dtype)

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Those of the items that are this process's: every `count`-th."""
        return list(items[self.rank :: self.count])

    def gather(self, own: Sequence[Tensor], counts: Sequence[int], like: Tensor) -> Tensor:
        """The rows of all parts, put together in their order.

        `own` are the parts that `share` gave to this process, `counts` the rows of all of them; `like` tells dtype,
        device and the shape of a row to a process that has none.
        """
        if self.count == 1:
            return torch.cat(list(own))
        most, shares = max(counts), -(-len(counts) // self.count)
        padded = like.new_zeros(shares, most, *like.shape[1:])
        for place, part in zip(padded, own, strict=False):
            place[: len(part)] = part
        gathered = [torch.empty_like(padded) for _ in range(self.count)]
        with _noticing():
            dist.all_gather(gathered, padded)
        return torch.cat([gathered[i % self.count][i // self.count, :count] for i, count in enumerate(counts)])

    def largest(self, number: float) -> float:
        """The largest of the numbers that the processes have."""
        if self.count == 1:
            return number
        numbers: list[Any] = [None] * self.count
        with _noticing():
            dist.all_gather_object(numbers, number)
        return max(numbers)


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Generator[Ranks]:
    """The processes that torchrun started with this one; one alone where it did not.

    `device` is that of this process.
    """
    if not launched():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        with _noticing():
            dist.init_process_group(backend, timeout=_SILENCE)
    except ValueError as error:
        raise InputError(
            f"RANK and WORLD_SIZE say that this is one of several processes, but {first_line(error)}; start them with "
            "torchrun, or unset both"
        ) from error
    ranks, well = Ranks(dist.get_rank(), dist.get_world_size()), False
    with _noticing():
        watch = Watch(ranks.rank, ranks.count, _SILENCE)
    try:
        yield ranks
        well = True
    finally:
        watch.end(well=well)
        dist.destroy_process_group()


def launched() -> bool:
    """Whether this is one of several processes, as torchrun tells them; schedulers set WORLD_SIZE for others too."""
    count = os.environ.get("WORLD_SIZE", "")
    return "RANK" in os.environ and count.isdigit() and int(count) > 1


def local_device(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs the one with its number on the machine."""
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def _noticing() -> Generator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo and NCCL say it in many ways
        raise RunError(ANOTHER_ENDED) from error
