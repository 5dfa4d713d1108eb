"""What a run will take, before anything starts: time and memory by stage, disk, and whether it fits."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ByteSize, ConfigDict
from transformers import PreTrainedModel

from trimfit.calibration import CalibrationConfig, held_out_count, window_length
from trimfit.checkpoints import load_tokenizer, read_config
from trimfit.errors import InputError
from trimfit.models import Block
from trimfit.models.outline import Outline, outline
from trimfit.models.states import pinned_bytes
from trimfit.pipelines.environment import peak_memory
from trimfit.pipelines.opened import check_text
from trimfit.pipelines.planning.prune_cost import Job, Memory, seconds
from trimfit.pipelines.planning.quantize_cost import QuantizeJob
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.losing import select_losing
from trimfit.pipelines.quantizing.config import QuantizeConfig
from trimfit.pipelines.quantizing.save import Format, check_offload, check_result
from trimfit.pipelines.runs.start import check_target
from trimfit.throughput import Throughput, measure_throughput

_CGROUP = Path("/sys/fs/cgroup/memory.max")
_DISK = "disk space"
_LEAST_LIMIT = 2**28  # of hidden states, that a remedy names

AnyJob = Job | QuantizeJob


class Peak(BaseModel):
    """Bytes at the peak of a stage. On a machine whose device is its CPU all are `host`."""

    model_config = ConfigDict(frozen=True)

    stage: str
    host: int
    device: int


class Plan(BaseModel):
    """What a run is expected to take.

    - `layers`, `weights`: to work on; `parameters`: of the whole model, in numbers.
    - `windows`, `window_length`: of calibration; 0 where no data is asked for.
    - `disk`, `disk_free`: bytes of the output and of what is beside it while the run lasts, and what is free there.
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


@dataclass(frozen=True)
class Target:
    """Where a run would work and write: arguments of `prune_checkpoint` and `quantize_checkpoint`, by their names.

    Without an `out` the disk is that of the working directory.
    """

    out: Path | None
    device: torch.device
    overwrite: bool = False
    offload: bool = False
    memory_limit: int | None = None

    @property
    def folder(self) -> Path:
        """On whose disk the run writes."""
        return Path.cwd() if self.out is None else self.out.absolute().parent


def plan_prune(source: str, config: PruneConfig, calibration: CalibrationConfig, target: Target) -> Plan:
    """Plans `prune_checkpoint` with the same arguments, from config and headers of the weights alone.

    Raises `InputError` for a model that cannot be pruned, an `out` that may not be written, and a text that is not one.
    """
    _check(source, target)
    if target.offload:
        check_text(calibration)
    model_config, dtype = read_config(source)
    length = window_length(calibration.sequence_length, model_config)

    def check(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
        select_losing(model, blocks, config)

    model = outline(model_config, dtype, length, config.ignore, check)
    calibration.check_files(length)
    held_out = held_out_count(calibration.count, config.held_out)
    fit = calibration.count - held_out
    gpu, may_offload = target.device.type == "cuda", not calibration.written
    job = Job(config, fit, held_out, target.offload, may_offload=may_offload, gpu=gpu)
    return _plan(source, model, job, target)


def plan_quantize(
    source: str, config: QuantizeConfig, calibration: CalibrationConfig | None, format: Format, target: Target
) -> Plan:
    """Plans `quantize_checkpoint`, as `plan_prune` does. Weights are taken to be in files that can be read by block."""
    _check(source, target)
    if target.offload:
        check_offload(format, calibration)
    model_config, dtype = read_config(source)
    length = 1 if calibration is None else window_length(calibration.sequence_length, model_config)

    tokenizer = load_tokenizer(source) if format == "gguf" else None  # other files need none to be planned

    def check(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
        check_result(model, tokenizer, blocks, format, config)

    model = outline(model_config, dtype, length, config.ignore, check)
    if calibration is not None:
        calibration.check_files(length)
    by_block = target.offload or (format == "packed" and calibration is None)
    may_offload = format != "gguf" and (calibration is None or not calibration.written)
    windows = 0 if calibration is None else calibration.count
    return _plan(source, model, QuantizeJob(config, format, windows, by_block, may_offload), target)


def _check(source: str, target: Target) -> None:
    if target.out is not None:
        check_target(source, target.out, target.overwrite)


def _plan(source: str, model: Outline, job: AnyJob, target: Target) -> Plan:
    room, limit = capacity(target.device, target.folder), target.memory_limit
    throughput = measure_throughput(target.device, model.dtype)
    return Plan(
        source=source,
        device=str(target.device),
        offload=job.offload,
        blocks=len(model.blocks),
        layers=sum(len(group.rows) for block in model.blocks for group in block.groups),
        weights=model.weights,
        parameters=model.bytes // model.dtype.itemsize,
        model_bytes=model.bytes,
        windows=job.windows,
        window_length=model.length if job.windows else 0,
        disk=disk_bytes(model, job, limit),
        disk_free=room.disk,
        peaks=memory_peaks(model, job, limit, room),
        host_total=room.host,
        device_total=room.device or 0,
        seconds={stage: time for stage, time in seconds(job.costs(model), throughput.model_dump()).items() if time},
        throughput=throughput,
        problem=find_problem(model, job, limit, room),
    )


def memory_peaks(model: Outline, job: AnyJob, limit: int | None, room: Capacity) -> list[Peak]:
    """By stage; the largest is what is needed."""
    held = job.memory(model)
    states = held.states
    if room.device is not None and job.offload and states:
        batch = min(job.config.batch_size, job.windows) * model.length * model.hidden * model.dtype.itemsize
        states *= pinned_bytes(batch) / batch
    states = states if limit is None else min(states, limit)
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


def _blocks(held: Memory, states: float, job: AnyJob) -> tuple[float, float]:
    """Bytes on the host and on a device apart from it: hidden states wait on the device unless the model is offloaded.

    What is above a limit is in files, which the host maps while it uses them. The next block is read ahead on the host
    while copies of this one may wait, tensor by tensor, each in up to twice its size.
    """
    on_device = held.weights + held.copy + held.work
    return (states + 4 * held.block, on_device) if job.offload else (0.0, on_device + states)


def disk_bytes(model: Outline, job: AnyJob, limit: int | None) -> int:
    """The output, what is finished of it beside it, and hidden states in files."""
    held = job.memory(model)
    above = 0.0 if limit is None else max(0.0, held.states - limit)
    return int(job.disk(model) + held.spilled + above)


def capacity(device: torch.device, folder: Path) -> Capacity:
    """What this machine has, with the disk of `folder`, if nothing else runs on it."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP.is_file() and (text := _CGROUP.read_text().strip()).isdigit():
        host = min(host, int(text))  # a container's share
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Capacity(host, total, shutil.disk_usage(folder).free, peak_memory(torch.device("cpu")))


def find_problem(model: Outline, job: AnyJob, limit: int | None, room: Capacity) -> str | None:
    """One sentence on what cannot fit and what would."""
    lack = _lack(model, job, limit, room)
    if lack is None:
        return None
    for option, (other, other_limit) in _remedies(model, job, limit, room).items():
        if _lack(model, other, other_limit, room) is None:
            return f"{lack}: {option}"
    where = "free space there or choose another output" if _DISK in lack else "take a larger machine"
    return f"{lack}, and no option would change that: {where}"


def _lack(model: Outline, job: AnyJob, limit: int | None, room: Capacity) -> str | None:
    peaks = memory_peaks(model, job, limit, room)
    needs: Mapping[str, tuple[int, int | None]] = {
        "memory": (max(peak.host for peak in peaks), room.host),
        "device memory": (max(peak.device for peak in peaks), room.device),
        _DISK: (disk_bytes(model, job, limit), room.disk),
    }
    for kind, (needed, there) in needs.items():
        if there is not None and needed > there:
            wanted, found = (ByteSize(size).human_readable(separator=" ") for size in (needed, there))
            return f"the run needs {wanted} of {kind} but there are {found}"
    return None


def _remedies(model: Outline, job: AnyJob, limit: int | None, room: Capacity) -> dict[str, tuple[AnyJob, int | None]]:
    """By what to say: jobs that do the same with less, the least loss first."""
    offloaded, small = replace(job, offload=True), job.one_by_one()
    alone: dict[str, tuple[AnyJob, int | None]] = {} if job.offload else {"give --offload": (offloaded, limit)}
    found = alone | {"give --batch-size 1": (small, limit)}
    limits = [least for least in _limits(room.host) if job.windows > 0 and (limit is None or limit > least)]
    for least in limits:
        size = f"--memory-limit {least / 2**30:.3g}GiB"
        found |= {f"give {size}": (job, least), f"give --offload {size}": (offloaded, least)}
        found |= {f"give --offload --batch-size 1 {size}": (replace(small, offload=True), least)}
    if isinstance(job, Job) and job.config.split == "error":
        found["give --allocation uniform"] = (job.evenly(), limit)
    for count in _halves(job.windows):
        for fewer, options in ((job, ""), (offloaded, "" if job.offload else " --offload")):
            found[f"give --samples {count}{options}"] = (fewer.with_windows(count), limit)
    return {option: other for option, other in found.items() if job.may_offload or not other[0].offload}


def _limits(host: int) -> Iterator[int]:
    """Of hidden states in memory: a part of what the machine has, and ever less of it."""
    size = max(_LEAST_LIMIT, host // 8)
    while size >= _LEAST_LIMIT:
        yield size
        size //= 2


def _halves(count: int) -> Iterator[int]:
    while count > 8:
        count //= 2
        yield count


def check_fits(plan: Plan) -> None:
    """Raises `InputError` for a plan that cannot be carried out."""
    if plan.problem is not None:
        raise InputError(plan.problem)
