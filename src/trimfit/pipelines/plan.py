"""What a prune will take, before anything starts: time and memory by stage, disk, and whether it fits."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from trimfit.calibration import CalibrationConfig, held_out_count, window_length
from trimfit.checkpoints import read_config
from trimfit.errors import InputError
from trimfit.models.outline import Outline, outline
from trimfit.pipelines.config import PruneConfig
from trimfit.pipelines.cost import Job, Memory, costs, memory, seconds
from trimfit.pipelines.opened import check_text
from trimfit.pipelines.records import peak_memory
from trimfit.throughput import Throughput, measure_throughput

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_LEAST_LIMIT = 2**28  # of hidden states, that a remedy names


class Peak(BaseModel):
    """Bytes at the peak of a stage. On a machine whose device is its CPU all are `host`."""

    model_config = ConfigDict(frozen=True)

    stage: str
    host: int
    device: int


class Plan(BaseModel):
    """What a run is expected to take.

    - `layers`, `weights`: to prune; `parameters`: of the whole model, in numbers.
    - `disk`, `disk_free`: bytes beside the output, while the run lasts, and what is free there.
    - `peaks`: memory by stage; `host_total`, `device_total`: what there is.
    - `seconds`: by stage, from `throughput`, which was measured on this device.
    - `problem`: why it cannot fit, with the option that would help; None if it fits.
    """

    model_config = ConfigDict(frozen=True)

    source: str
    device: str
    offload: bool
    blocks: int
    layers: int
    weights: int
    parameters: int
    model_bytes: int
    windows: int
    window_length: int
    disk: int
    disk_free: int
    peaks: list[Peak]
    host_total: int
    device_total: int
    seconds: dict[str, float]
    throughput: Throughput
    problem: str | None


@dataclass(frozen=True)
class Capacity:
    """Bytes of a machine. `device` is None when the work is done on the CPU; `base`: what our libraries take."""

    host: int
    device: int | None
    disk: int
    base: int


def plan_checkpoint(
    source: str,
    out: Path,
    config: PruneConfig,
    calibration: CalibrationConfig,
    *,
    device: torch.device,
    offload: bool = False,
    memory_limit: int | None = None,
) -> Plan:
    """Plans `prune_checkpoint` with the same arguments, from config and headers of the weights alone.

    Raises `InputError` for a model that cannot be pruned.
    """
    if offload:
        check_text(calibration)
    model_config, dtype = read_config(source)
    length = window_length(calibration.sequence_length, model_config)
    model = outline(model_config, dtype, length, config.ignore)
    held_out = held_out_count(calibration.samples, config.held_out)
    job = Job(config, calibration.samples - held_out, held_out, offload)
    room = capacity(device, out)
    throughput = measure_throughput(device, dtype)
    rates = throughput.model_dump()
    peaks = memory_peaks(model, job, memory_limit, room)
    disk = disk_bytes(model, job, memory_limit)
    return Plan(
        source=source,
        device=str(device),
        offload=offload,
        blocks=len(model.blocks),
        layers=sum(len(group.rows) for block in model.blocks for group in block.groups),
        weights=model.weights,
        parameters=model.bytes // dtype.itemsize,
        model_bytes=model.bytes,
        windows=calibration.samples,
        window_length=length,
        disk=disk,
        disk_free=room.disk,
        peaks=peaks,
        host_total=room.host,
        device_total=room.device or 0,
        seconds={stage: time for stage, time in seconds(costs(model, job), rates).items() if time},
        throughput=throughput,
        problem=find_problem(model, job, memory_limit, room),
    )


def memory_peaks(model: Outline, job: Job, limit: int | None, room: Capacity) -> list[Peak]:
    """By stage; the largest is what is needed."""
    held = memory(model, job)
    states = held.states if limit is None else min(held.states, limit)
    tensor = model.vocabulary * model.hidden * model.dtype.itemsize  # the largest, read again to be verified
    opened = tensor + held.weights if job.offload else model.bytes
    saved = opened if job.offload else model.bytes + tensor
    if room.device is None:
        blocks = held.weights + states + held.copy + held.work
        stages = {"open": (opened, 0.0), "blocks": (blocks, 0.0), "save": (saved, 0.0)}
    else:
        stages = {
            "open": (opened, held.weights),
            "blocks": _blocks(held, states, job),
            "save": (saved, held.weights),
        }
    return [Peak(stage=name, host=int(room.base + h), device=int(d)) for name, (h, d) in stages.items()]


def _blocks(held: Memory, states: float, job: Job) -> tuple[float, float]:
    """Bytes on the host and on a device apart from it: hidden states wait on the device unless the model is offloaded.

    What is above a limit is in files, which the host maps while it uses them.
    """
    on_device = held.weights + held.copy + held.work
    return (states + held.copy, on_device) if job.offload else (0.0, on_device + states)


def disk_bytes(model: Outline, job: Job, limit: int | None) -> int:
    """The output, the finished layers beside it (of one block, if offloaded), and hidden states above the limit."""
    spilled = 0.0 if limit is None else max(0.0, memory(model, job).states - limit)
    weights = [sum(rows * group.inputs for group in block.groups for rows in group.rows) for block in model.blocks]
    beside = max(weights, default=0) if job.offload else sum(weights)
    return int(model.bytes + beside * model.dtype.itemsize + spilled)


def capacity(device: torch.device, out: Path) -> Capacity:
    """What this machine has, if nothing else runs on it."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP.is_file() and (text := _CGROUP.read_text().strip()).isdigit():
        host = min(host, int(text))  # a container's share
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    return Capacity(host, total, shutil.disk_usage(parent).free, peak_memory(torch.device("cpu")))


def find_problem(model: Outline, job: Job, limit: int | None, room: Capacity) -> str | None:
    """One sentence on what cannot fit and what would."""
    lack = _lack(model, job, limit, room)
    if lack is None:
        return None
    for option, (other, other_limit) in _remedies(model, job, limit, room).items():
        if _lack(model, other, other_limit, room) is None:
            return f"{lack}: {option}"
    return f"{lack}, and no option would change that: take a larger machine"


def _lack(model: Outline, job: Job, limit: int | None, room: Capacity) -> str | None:
    peaks = memory_peaks(model, job, limit, room)
    needs: Mapping[str, tuple[int, int | None]] = {
        "memory": (max(peak.host for peak in peaks), room.host),
        "device memory": (max(peak.device for peak in peaks), room.device),
        "disk space": (disk_bytes(model, job, limit), room.disk),
    }
    for kind, (needed, there) in needs.items():
        if there is not None and needed > there:
            return f"the run needs {needed / 2**30:.1f} GiB of {kind} but there are {there / 2**30:.1f} GiB"
    return None


def _remedies(model: Outline, job: Job, limit: int | None, room: Capacity) -> dict[str, tuple[Job, int | None]]:
    """By what to say: jobs that do the same with less, the least loss first."""
    offloaded, least = replace(job, offload=True), max(_LEAST_LIMIT, room.host // 8)
    size = f"--memory-limit {least / 2**30:.3g}GiB"
    found = {} if job.offload else {"give --offload": (offloaded, limit)}
    if limit is None or limit > least:
        found |= {f"give {size}": (job, least), f"give --offload {size}": (offloaded, least)}
    small = replace(job, config=job.config.model_copy(update={"batch_size": 1}))
    found |= {"give --batch-size 1": (small, limit)}
    for count in _halves(job.windows):
        share = job.held_out * count // job.windows
        for fewer, options in ((job, ""), (offloaded, "" if job.offload else " --offload")):
            smaller = replace(fewer, fit=count - share, held_out=share)
            found[f"give --samples {count}{options}"] = (smaller, limit)
    tiny = replace(small, offload=True)
    return found | {f"give --offload --batch-size 1 {size}": (tiny, least)}


def _halves(count: int) -> Iterator[int]:
    while count > 8:
        count //= 2
        yield count


def check_fits(plan: Plan) -> None:
    """Raises `InputError` for a plan that cannot be carried out."""
    if plan.problem is not None:
        raise InputError(plan.problem)
