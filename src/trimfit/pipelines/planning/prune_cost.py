"""What a prune costs, by arithmetic: operations by stage, and bytes of memory (docs/scale.md derives them).

Counts are those of docs/method.md, section 11. What depends on the weights is set to what was usual when it was
measured: the steps of the solver and of ADMM.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Self

from trimfit.calibration import CURVATURE_TOKENS
from trimfit.masks import NM
from trimfit.masks.joint import SWAP_WORK
from trimfit.models.groups import AT_ONCE
from trimfit.models.logits import queries_apart
from trimfit.models.outline import BlockOutline, GroupOutline, Outline
from trimfit.pipelines.pruning.allocate import DEPTH
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.sensitivity import TOKENS

SOLVER_STEPS = 25  # of conjugate gradients to a gap of 1e-4; 15 to 40 were usual from masked weights
ADMM_STEPS = 60
_STEPS_TOGETHER = 4  # times the solver's steps, for rows of Q and K together; 9 to 221 were seen
_LOGIT_BYTES = 5 * 4  # for each logit whose curvature is taken: itself, its weight, their sums, two slopes
_LOGIT_TRAFFIC = 16 * 4
_STEPS_PER_INVERSE = 5
_FIT_STEPS = 10
_SMALL_PRODUCTS = 6  # how much longer a flop of swaps takes
_SORT_BYTES = 400  # for each entry, as if it were traffic
_TOP_K_BYTES = 60
_CHUNK_BYTES = 10 * 2**28  # of the refit: some ten tensors of 2²⁵ float64
_CHUNK_ELEMENTS = 2**25

# By stage: flops as "model" (in its dtype), "float32" and "float64", traffic as "memory", files as "disk" (bytes).
Costs = dict[str, Counter[str]]


@dataclass(frozen=True)
class Job:
    """What is to be done: a config, over (`fit` + `held_out`) windows; `offload` as for `prune_checkpoint`.

    `solver_steps`: of an average refit. `may_offload`: whether that may be asked for. `gpu`: whether it runs on CUDA.
    """

    config: PruneConfig
    fit: int
    held_out: int
    offload: bool = False
    solver_steps: int = SOLVER_STEPS
    may_offload: bool = True
    gpu: bool = False

    @property
    def windows(self) -> int:
        """All of them."""
        return self.fit + self.held_out

    def with_windows(self, count: int) -> Self:
        """The same with fewer windows, of which the same share is held out."""
        share = self.held_out * count // self.windows
        return replace(self, fit=count - share, held_out=share)

    def one_by_one(self) -> Self:
        """The same with one window in a forward pass."""
        return replace(self, config=self.config.model_copy(update={"batch_size": 1}))

    def evenly(self) -> Self:
        """The same without an allocation, which follows a stream of hidden states for each layer."""
        return replace(self, config=self.config.model_copy(update={"allocation": "uniform"}))

    @property
    def streams(self) -> int:
        """Of hidden states: the model in work and, for the target dense, the dense model."""
        return 2 if self.config.target == "dense" else 1

    def costs(self, model: Outline) -> Costs:
        """Operations of each stage of a whole run."""
        return _costs(model, self)

    def memory(self, model: Outline) -> "Memory":
        """While blocks are pruned."""
        return _memory(model, self)

    def disk(self, model: Outline) -> int:
        """Bytes of the output, and of the finished layers beside it (of one block, if offloaded)."""
        return _disk(model, self)


def _costs(model: Outline, job: Job) -> Costs:
    total: Costs = {stage: Counter() for stage in ("allocation", "forward", "gram", "factorisation", "mask", "refit")}
    total |= {"errors": Counter(), "files": Counter(disk=_file_bytes(model, job))}
    for number, block in enumerate(model.blocks):
        total["forward"]["model"] += job.windows * job.streams * _passes(block, job.config)
        # Nothing comes behind the last block; and the dense model was seen to the end of others already.
        idle = job.streams if number == len(model.blocks) - 1 else job.streams - 1 if _adds(block) else 0
        total["forward"]["model"] -= job.windows * idle * block.flops
        for group in block.groups:
            for stage, cost in _group(group, model, job).items():
                total[stage].update(cost)
            total["forward"].update(_curvature(group, model, job))
    if job.config.split != "uniform":
        for stage, cost in _allocation(model, job).items():
            total[stage].update(cost)
    return total


def _passes(block: BlockOutline, config: PruneConfig) -> int:
    """Flops over one window: until each group's input is there, and through the whole block."""
    ends = [group.flops_before for group in block.groups]
    if config.target == "dense" and _adds(block):
        ends[-1] = block.flops  # what is added to the residual stream last is seen at the end only
    return block.flops + (max(ends, default=0) if config.capture == "block" else sum(ends))


def _adds(block: BlockOutline) -> bool:
    """Whether the last layer adds to what the block gives."""
    return bool(block.groups) and block.groups[-1].adds


def _group(group: GroupOutline, model: Outline, job: Job) -> dict[str, dict[str, int]]:
    n, weights = group.inputs, sum(group.rows) * group.inputs
    product = 2 * weights * n  # of the layers with an n × n matrix
    dense = job.config.target == "dense"
    beside = (model.hidden if group.adds else n) if dense else 0  # columns that drift
    tokens = job.windows * model.length
    refitted = job.config.refit == "optimal"
    # In products of all rows of the group with its n × n matrix.
    weighed = sum(group.query_key) / sum(group.rows) if job.config.weighs_rows else 0
    steps = job.solver_steps * (1 + (_STEPS_TOGETHER - 1) * weighed)
    return {
        "gram": {"float32": round(2 * tokens * group.share * n * (n + beside))},
        "factorisation": {"float64": n**3 // 3, "memory": 10 * 8 * n * n},
        "mask": _mask(n, weights, job.config, dense),
        "refit": {
            "float64": 2 * n**3 // 3 + (5 if refitted else 0) * product + (product if dense else 0),
            "float32": round(2 * steps * product),
            "memory": round(steps * 20 * 4 * weights),
        }
        if refitted
        else {},
        "errors": {"float32": (8 if job.held_out else 4) * product},
    }


def _curvature(group: GroupOutline, model: Outline, job: Job) -> dict[str, int]:
    """Forward to the attention logits and back to Q and K, in a few windows, where rows of these are weighed."""
    if not (group.query_heads and job.config.weighs_rows):
        return {}
    windows = min(job.fit, -(-CURVATURE_TOKENS // model.length))
    logits = _logits(group, model)
    query, key = group.query_key
    heads_width = query // group.query_heads
    sums = 2 * model.length * heads_width * (query + key)
    return {
        "model": windows * 2 * model.length * sum(group.rows) * group.inputs,
        "float32": windows * (3 * 2 * logits * heads_width + sums),
        "memory": windows * logits * _LOGIT_TRAFFIC,
    }


def _logits(group: GroupOutline, model: Outline) -> int:
    """How many a window has that are seen at once."""
    every = group.query_heads * model.length**2
    return every // max(1, queries_apart(every))


def _mask(n: int, weights: int, config: PruneConfig, dense: bool) -> dict[str, int]:
    product = 2 * weights * n
    goal = product if dense else 0  # the weights that a selector is given then
    match config.selector:
        case "joint":
            inverses = ADMM_STEPS // _STEPS_PER_INVERSE * n**3
            pattern = config.mask_pattern
            kept = pattern.n / pattern.m if isinstance(pattern, NM) else 1 - float(pattern.sparsity)
            # In small batches eliminations go far below the rate of large products. Well-conditioned layers need none.
            swaps = round(_SMALL_PRODUCTS * min(weights * n**2 * kept**3 / 3, SWAP_WORK * weights * n))
            return {
                "float32": ADMM_STEPS * product + inverses + 2 * _FIT_STEPS * product + swaps,
                "float64": 4 * product + 2 * n**3 // 3 + goal,
                "memory": ADMM_STEPS * (_TOP_K_BYTES + 15 * 4) * weights,
            }
        case "sparsegpt" | "thanos":
            own = {"float32": product // 2, "float64": 4 * n**3 // 3 + goal}
            return {**own, "memory": (_SORT_BYTES + 64 * 8) * weights}
        case _:
            return {"float64": goal, "memory": _SORT_BYTES * weights}


def _allocation(model: Outline, job: Job) -> Costs:
    """One pass over the dense model; for "error" also one of a few windows from each layer on.

    Passes and Gram matrices belong to their own stages, as the clock of a run counts them.
    """
    total: Costs = {stage: Counter() for stage in ("forward", "gram", "allocation")}
    few, windows = _few(model, job), _seen(model, job)
    behind = 0
    for block in reversed(model.blocks):
        behind += block.flops
        layers = _probed(block)
        total["forward"]["model"] += windows * block.flops
        if job.config.split == "error":
            total["forward"]["model"] += few * (block.flops + layers * behind)
            total["allocation"]["model"] += few * layers * 2 * model.length * model.hidden * model.vocabulary
            total["allocation"]["memory"] += few * layers * model.length * model.vocabulary * 4 * 6
        for group in block.groups:
            n, weights = group.inputs, sum(group.rows) * group.inputs
            total["gram"]["float32"] += round(2 * windows * model.length * group.share * n * n)
            total["allocation"]["float64"] += n**3 + 2 * weights * n
            total["allocation"]["memory"] += _SORT_BYTES * weights
    return total


def _seen(model: Outline, job: Job) -> int:
    """Windows whose Gram matrices the allocation goes by."""
    if job.config.split != "error":
        return job.fit
    widest = max((group.inputs for block in model.blocks for group in block.groups), default=0)
    return min(job.fit, -(-DEPTH * widest // model.length))


def _few(model: Outline, job: Job) -> int:
    """Windows that the sensitivities are found on."""
    return min(job.fit, max(1, TOKENS // model.length))


def _probed(block: BlockOutline) -> int:
    """How many streams the allocation follows from a block on: one for each layer; experts side by side share one."""
    return sum(len(group.rows) for group in block.groups if group.share == 1 or group.flops_before)


def _file_bytes(model: Outline, job: Job) -> int:
    """Read, hashed or written: the model when it is opened and saved, its layers in the run directory."""
    in_blocks = sum(block.bytes for block in model.blocks)
    layers = model.weights * model.dtype.itemsize
    if not job.offload:
        return 4 * model.bytes + 2 * layers  # loaded, fingerprinted, written, verified
    walks = 2 if job.config.split != "uniform" else 1
    # Checked and fingerprinted, copied, compared; causality; each walk sees two windows first; layers kept, and moved.
    return 5 * model.bytes + (1 + 4 * walks) * in_blocks + in_blocks + 4 * layers + _spilled_traffic(model, job)


def _spilled_traffic(model: Outline, job: Job) -> int:
    """Read and written of the hidden states that an allocation puts into files: all of them at each block."""
    allocating = _allocating(model, job)
    if not allocating:
        return 0
    before, seen = 0, 0  # streams, and how many were seen so far in all
    for block in model.blocks:
        seen += before
        before += _probed(block)
    moved = 2 * _window_bytes(model) * (_few(model, job) * seen + 2 * _seen(model, job) * len(model.blocks))
    return int(moved * _memory(model, job).spilled / allocating)


def _disk(model: Outline, job: Job) -> int:
    weights = [sum(rows * group.inputs for group in block.groups for rows in group.rows) for block in model.blocks]
    beside = max(weights, default=0) if job.offload else sum(weights)
    return model.bytes + beside * model.dtype.itemsize


def seconds(work: Costs, rates: dict[str, float]) -> dict[str, float]:
    """Of each stage, when every operation takes the time that its rate says and nothing overlaps."""
    return {stage: sum(amount / rates[kind] for kind, amount in parts.items()) for stage, parts in work.items()}


@dataclass(frozen=True)
class Memory:
    """Bytes that are held at one time.

    - `weights`: of the model, or of what is loaded of it.
    - `states`: hidden states between blocks; `spilled`: those that are in files whatever the limit.
    - `block`: the largest; `copy`: the dense copy of a block.
    - `work`: the largest of what one forward pass and one group of layers take.
    """

    weights: float
    states: float
    block: float
    copy: float
    work: float
    spilled: float = 0.0


def _memory(model: Outline, job: Job) -> Memory:
    block = max(model.blocks, key=lambda block: block.bytes).bytes
    inside = sum(block.bytes for block in model.blocks)
    streams = job.streams
    pruning, allocating = job.windows * _window_bytes(model) * streams, _allocating(model, job)
    states, above = max(pruning, allocating), max(0, allocating - pruning)
    states, spilled = (pruning, above) if job.offload else (states, 0)
    parts = (_work, _curvature_bytes)
    work = max((part(group, model, job) for part in parts for _, group in _groups(model)), default=0.0)
    work = max(work, *(_pass_bytes(group, block, model, job) for block, group in _groups(model)), 0.0)
    if job.config.split != "uniform":
        work = max(work, *(_allocation_bytes(block) for block in model.blocks))
    weights = model.bytes - inside + block if job.offload else model.bytes
    return Memory(weights, states, block, block if job.config.target == "dense" else 0.0, work, spilled)


def _window_bytes(model: Outline) -> int:
    """Of the hidden states of one window."""
    return model.length * model.hidden * model.dtype.itemsize


def _allocating(model: Outline, job: Job) -> int:
    """Bytes of hidden states while the sparsity is allocated: before and behind a block, and of each layer's stream."""
    if job.config.split == "uniform":
        return 0
    layers = sum(_probed(block) for block in model.blocks) if job.config.split == "error" else 0
    return (2 * _seen(model, job) + layers * _few(model, job)) * _window_bytes(model)


def _allocation_bytes(block: BlockOutline) -> float:
    """Gram matrices that are seen in one pass, as sums and as means, and one that is factorised."""
    squares = [group.inputs**2 for group in block.groups]
    largest = max(squares, default=0)
    return 12 * min(sum(squares), max(largest, AT_ONCE)) + 8 * 4 * largest


def _groups(model: Outline) -> list[tuple[BlockOutline, GroupOutline]]:
    return [(block, group) for block in model.blocks for group in block.groups]


def _moments(group: GroupOutline, model: Outline, job: Job) -> float:
    """Gram matrices of both sets of windows, and the drift, of all groups that are seen in one pass."""
    beside = (model.hidden if group.adds else group.inputs) if job.config.target == "dense" else 0
    return (2 if job.held_out else 1) * 4 * group.inputs * (group.inputs + beside) * group.together


def _sums(group: GroupOutline, model: Outline, job: Job) -> float:
    """The same while the last of them are summed: in float64, beside the product of a batch."""
    means = _moments(group, model, job)
    return means + means / (2 if job.held_out else 1) + 4 * group.inputs**2


def _pass_bytes(group: GroupOutline, block: BlockOutline, model: Outline, job: Job) -> float:
    """A batch on its way through the block, its inputs in float32, and the moments that are summed."""
    tokens = min(job.config.batch_size, job.windows) * model.length
    activations = tokens * model.dtype.itemsize * (4 * block.largest + 4 * model.hidden)
    rows = tokens * group.share * group.together
    caught = job.streams * rows * group.inputs * (model.dtype.itemsize + 4) + 4 * rows * group.inputs
    return activations + caught + _sums(group, model, job)


def _curvature_bytes(group: GroupOutline, model: Outline, job: Job) -> float:
    """The logits of a window and all that is made of them, beside the moments of the group."""
    if not job.config.weighs_rows:
        return 0.0
    return _moments(group, model, job) + _LOGIT_BYTES * _logits(group, model)


def _work(group: GroupOutline, model: Outline, job: Job) -> float:
    """Mask and refit of the largest layer of a group."""
    square, weights = float(group.inputs) ** 2, float(max(group.rows)) * group.inputs
    factored = 8 * (4 * square) + 2 * 4 * square  # H, damped, factor, inverse; two in float32
    layer = (6 * 4 + 8 + 1) * weights
    chunk = min(_CHUNK_BYTES, 10 * 8 * weights)
    if job.gpu:
        chunk += 2 * 4 * square  # the two in float32 are held in parts
    selecting = 0.0
    if job.config.selector == "joint":
        selecting = 12 * 4 * weights + 3 * 8 * weights + 4 * 4 * square
    elif job.config.selector in ("sparsegpt", "thanos"):
        selecting = 5 * 8 * square + 3 * 4 * weights
    return _moments(group, model, job) + factored + layer + max(chunk, selecting)
