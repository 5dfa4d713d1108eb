"""What a quantization costs, by arithmetic: operations by stage, and bytes of memory (docs/scale.md derives them).

Flops are counted. What goes entry by entry is counted as traffic, in bytes for each weight, and as calls of operations
on small tensors, one input after the other; both as measured (docs/scale.md).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from trimfit.models.outline import BlockOutline, GroupOutline, HeadsOutline, Outline
from trimfit.pipelines.planning.prune_cost import Costs, Memory
from trimfit.pipelines.quantizing.block import RUN
from trimfit.pipelines.quantizing.config import QuantizeConfig
from trimfit.pipelines.quantizing.disk import QuantizeDisk
from trimfit.pipelines.quantizing.save import Format
from trimfit.quant.blocks import block_size
from trimfit.quant.learned import ROWS
from trimfit.quant.moments import SAMPLES
from trimfit.quant.nearest_plane import COLUMNS
from trimfit.quant.rounding import OTHER_SCALES, SWEEPS

# Bytes of traffic for each weight.
_PLACE_BYTES = 3000  # 16 clip ratios, twice each: some twelve passes
_ROUND_BYTES = 220  # one pass of error feedback or coordinate descent
_BALANCE_BYTES = 160
_LEARN_BYTES = 200  # a step of gradient descent
_PACK_BYTES = 400
_TOLD_BYTES = 60  # errors and zeros of a finished layer

# Calls of small operations.
_ROUND_CALLS = 16  # for each input, in each pass
_DIAGONAL_CALLS = 25
_LEARN_CALLS = 60  # a step of gradient descent

_PAIR_SWEEPS = 3
_PAPER_STEPS = 3000
_SOLVES = 16  # how much longer a flop of solving with many small matrices takes; 10 to 20 from 128 to 32 rows
_CANDIDATES = 4


@dataclass(frozen=True)
class QuantizeJob:
    """What is to be done: a config, over `windows`, 0 without data.

    - `format`: of the output. `offload`: whether one block at a time is in memory, asked for or not.
    """

    config: QuantizeConfig
    format: Format = "packed"
    windows: int = 0
    offload: bool = False
    may_offload: bool = True

    def with_windows(self, count: int) -> Self:
        """The same with fewer windows."""
        return replace(self, windows=count)

    def one_by_one(self) -> Self:
        """The same with one window in a forward pass."""
        return replace(self, config=self.config.model_copy(update={"batch_size": 1}))

    def run(self, width: int) -> int:
        """Inputs that error feedback stays within: see `BlockWork`."""
        group = self.config.grid.fitted(width).group_size
        return width if self.windows or group is None else min(width, max(1, RUN // group) * group)

    def costs(self, model: Outline) -> Costs:
        """Operations of each stage of a whole run."""
        return _costs(model, self)

    def memory(self, model: Outline) -> Memory:
        """While blocks are quantized."""
        return _memory(model, self)

    def disk(self, model: Outline) -> int:
        """Bytes of the result, and until it is finished of the blocks."""
        return _disk(model, self).peak


def _costs(model: Outline, job: QuantizeJob) -> Costs:
    stages = ("forward", "gram", "folds", "transforms", "factorisation", "rounding", "pairs", "packing")
    total: Costs = {stage: Counter() for stage in stages}
    total |= {"files": Counter(disk=_file_bytes(model, job))}
    if not job.windows:
        total["gram"]["float32"] += 2 * model.vocabulary * model.hidden**2
    for number, block in enumerate(model.blocks):
        last = number == len(model.blocks) - 1  # nothing comes behind it
        for stage, cost in _block(block, model, job, last).items():
            total[stage].update(cost)
    return total


def _block(block: BlockOutline, model: Outline, job: QuantizeJob, last: bool) -> dict[str, Counter[str]]:
    costs: dict[str, Counter[str]] = {}
    if job.windows:
        passes = sum(group.flops_before for group in block.groups) + (0 if last else block.flops)
        tokens = job.windows * model.length
        costs["forward"] = Counter(model=job.windows * passes)
        costs["gram"] = Counter(
            float32=sum(round(2 * tokens * group.share * group.inputs**2) for group in block.groups)
        )
    else:
        costs["gram"] = _moments(block, model)
    costs |= {stage: Counter() for stage in ("folds", "transforms", "factorisation", "rounding", "pairs", "packing")}
    for group in block.groups:
        weights = sum(group.rows) * group.inputs
        if job.config.transform == "free":
            costs["folds"]["memory"] += _BALANCE_BYTES * weights
        if job.config.transform == "online":
            costs["transforms"].update(_transforms(group, job.config))
        if job.format == "packed":
            costs["packing"]["memory"] += _PACK_BYTES * weights
        for stage, cost in _rounding(group, job, fed=_is_fed(block, job)).items():
            costs[stage].update(cost)
    costs["folds"].update(_fold_pair(block, model, job.config))
    costs["pairs"].update(_round_pair(block, model, job))
    return costs


def _is_fed(block: BlockOutline, job: QuantizeJob) -> bool:
    """Whether layers are rounded by error feedback: what it needs is known of their inputs."""
    known = bool(job.windows) or block.units > 0 or job.config.transform == "online"
    return known and job.config.rounding == "alternating"


def _rounding(group: GroupOutline, job: QuantizeJob, *, fed: bool) -> dict[str, dict[str, int]]:
    n, weights = group.inputs, sum(group.rows) * group.inputs
    told = {"float32": 4 * weights * n} if job.windows else {}
    placed = _PLACE_BYTES * weights + _TOLD_BYTES * weights
    if not fed:
        return {"rounding": {"memory": placed, **told}}
    run, size, passes = job.run(n), job.config.grid.fitted(n).group_size or n, 1 + len(OTHER_SCALES) + SWEEPS
    feedback = (1 + len(OTHER_SCALES)) * weights * run + SWEEPS * weights * (2 * run + 4 * size)
    return {
        "factorisation": {"float64": 5 * n * run**2 // 3, "memory": 10 * 8 * n * run},
        "rounding": {
            "float32": feedback + told.get("float32", 0),
            "memory": placed + passes * _ROUND_BYTES * weights,
            "calls": passes * _ROUND_CALLS * n * len(group.rows),
        },
    }


def _moments(block: BlockOutline, model: Outline) -> Counter[str]:
    """What the weights tell of the inputs of V, O, up and down, where the block is one that can be followed."""
    if not block.units or block.heads is None:
        return Counter()
    d, units, value, heads = model.hidden, block.units, block.heads.value, block.heads.output
    attention = 2 * value * d * (d + value) + 2 * d * heads * (d + heads)
    mlp = d**3 // 3 + 2 * SAMPLES * (d * d + 2 * d * units + units**2) + 2 * d * units * (d + units)
    return Counter(float32=attention + mlp, memory=5 * 4 * heads**2 + 100 * SAMPLES * d)


def _fold_pair(block: BlockOutline, model: Outline, config: QuantizeConfig) -> dict[str, int]:
    """A new basis for V and O, and the errors with it and without."""
    pair = block.heads
    if pair is None or config.transform not in ("free", "pairs", "paper"):
        return {}
    if config.transform == "paper":
        return _learned_pair(pair, model.hidden)
    columns = model.hidden * (pair.group + 1)  # of both factors, for each channel of a head
    found = {"float64": pair.count * (6 * columns * pair.size**2 + 30 * pair.size**3)}
    if config.transform == "pairs":
        return found
    products = pair.output * model.hidden**2  # of A and B, as they are and rounded
    placed = 2 * _PLACE_BYTES * (pair.value + pair.output) * model.hidden
    spread = 2 * 5 * 8 * pair.count * pair.group * model.hidden**2
    return {**found, "float32": 2 * 2 * 2 * products, "memory": placed + spread}


def _learned_pair(pair: HeadsOutline, hidden: int) -> dict[str, int]:
    """By gradients: A is solved for and its gradient too, at each step; the rest are products."""
    a, b = (width * hidden * pair.size for width in (pair.group * pair.count, pair.count))
    return {
        "float32": _PAPER_STEPS * 2 * pair.size * (2 * _SOLVES * a + a + 2 * b),
        "memory": _PAPER_STEPS * _LEARN_BYTES * (a + b),
        "calls": _PAPER_STEPS * _LEARN_CALLS,
    }


def _round_pair(block: BlockOutline, model: Outline, job: QuantizeJob) -> dict[str, int]:
    """V and O in turns."""
    pair, d = block.heads, model.hidden
    if pair is None or job.windows or job.config.rounding != "alternating" or job.config.transform == "online":
        return {}
    r, value, output = pair.size, pair.value * d, pair.output * d
    one_sided = output * (2 * 16 * 12 + 2 * 12 * r // 32)
    two_sided = value * (r + COLUMNS) * 16
    diagonals = -(-d // COLUMNS) * (COLUMNS + r)
    return {
        "float64": d**3 // 3 + _PAIR_SWEEPS * (4 * value * d + 12 * r * (value + output)),
        "float32": _PAIR_SWEEPS * (value * d + 4 * r * output),
        "memory": _PAIR_SWEEPS * (one_sided + two_sided + 20 * 8 * (value + output)),
        "calls": _PAIR_SWEEPS * (_DIAGONAL_CALLS * diagonals + 2 * 10 * r),
    }


def _transforms(group: GroupOutline, config: QuantizeConfig) -> Counter[str]:
    """Closed forms, the one that is learned, and the errors of all."""
    n, rows = group.inputs, sum(group.rows)
    weights, size, steps = rows * n, block_size(n, config.block_size), config.learned_steps
    tried = _CANDIDATES + (1 if steps else 0)
    learned = steps * min(rows, ROWS) * n
    return Counter(
        float64=2 * weights * size + 25 * n * size**2,
        float32=tried * 4 * weights * size + learned * 4 * size,
        memory=tried * _PLACE_BYTES * weights + learned * _LEARN_BYTES,
        calls=steps * _LEARN_CALLS,
    )


def _file_bytes(model: Outline, job: QuantizeJob) -> int:
    """Read, hashed or written: the model when it is opened, its blocks again, the parts, and the result."""
    in_blocks = sum(block.bytes for block in model.blocks)
    opened = 2 * model.bytes + ((4 if job.windows else 1) * in_blocks if job.offload else 0)
    disk = _disk(model, job)
    return opened + 3 * disk.parts + 4 * disk.result


def _disk(model: Outline, job: QuantizeJob) -> QuantizeDisk:
    layers = [(rows, group.inputs) for block in model.blocks for group in block.groups for rows in group.rows]
    in_blocks = sum(block.bytes for block in model.blocks)
    moments = 0 if job.windows else 4 * model.hidden**2 * len(model.blocks)
    return QuantizeDisk(layers, model.bytes, in_blocks, model.dtype.itemsize, moments, job.config, job.format)


def _memory(model: Outline, job: QuantizeJob) -> Memory:
    block = max((block.bytes for block in model.blocks), default=0)
    outside = model.bytes - sum(block.bytes for block in model.blocks) if job.windows else 0
    states = job.windows * model.length * model.hidden * model.dtype.itemsize
    work = max((_block_bytes(block, model, job) for block in model.blocks), default=0.0)
    return Memory(outside + block if job.offload else model.bytes, states, block, 0.0, work)


def _block_bytes(block: BlockOutline, model: Outline, job: QuantizeJob) -> float:
    """Folded weights in float32 and codes of all layers, and the largest of what is made on the way."""
    weights = sum(sum(group.rows) * group.inputs for group in block.groups)
    if not block.groups:
        return 0.0
    steps: Mapping[str, float] = {
        "forward": max(_pass_bytes(group, block, model, job) for group in block.groups) if job.windows else 0.0,
        "moments": 4 * SAMPLES * (2 * model.hidden + 3 * block.units) + 4 * block.units**2,
        "fold": max(_fold_bytes(group, job.config) for group in block.groups),
        "round": max(_round_bytes(group, job, fed=_is_fed(block, job)) for group in block.groups),
        "pair": _pair_bytes(block, model),
    }
    return 5 * weights + _gram_bytes(block, model, job) + max(steps.values())


def _gram_bytes(block: BlockOutline, model: Outline, job: QuantizeJob) -> int:
    """Gram matrices that stay: those of groups that are seen in one pass, or of all that the weights tell."""
    if job.windows:
        return 4 * max(group.inputs**2 * group.together for group in block.groups)
    if not block.units or block.heads is None:
        return 0
    return 4 * (4 * model.hidden**2 + block.heads.output**2 + block.units**2)


def _pass_bytes(group: GroupOutline, block: BlockOutline, model: Outline, job: QuantizeJob) -> float:
    """A batch on its way through the block, its inputs in float32, and what is summed of them."""
    tokens, size = min(job.config.batch_size, job.windows) * model.length, model.dtype.itemsize
    caught = tokens * group.share * group.together * group.inputs * (size + 8)
    sums = 4 * group.inputs**2 * (group.together + 1)  # in float64, so once more, and the product of a batch
    return tokens * size * (4 * block.largest + 4 * model.hidden) + caught + sums


def _fold_bytes(group: GroupOutline, config: QuantizeConfig) -> int:
    each = {"none": 0, "online": 24}.get(config.transform, 12)
    return each * sum(group.rows) * group.inputs


def _round_bytes(group: GroupOutline, job: QuantizeJob, *, fed: bool) -> int:
    """Levels, feedback and errors of the largest layer, and factors for all of its inputs."""
    n, largest = group.inputs, max(group.rows) * group.inputs
    told = 20 * largest
    if not fed:
        return max(5 * 4 * largest, told)
    run = job.run(n)
    return 5 * 8 * n * run + max(7 * 4 * largest * run // n, told)


def _pair_bytes(block: BlockOutline, model: Outline) -> int:
    """Both factors, their levels and their errors, in float64; the product of one head."""
    pair = block.heads
    if pair is None:
        return 0
    d = model.hidden
    return 12 * 8 * (pair.value + pair.output) * d + 3 * 8 * d * d + 4 * 4 * pair.group * d * d
