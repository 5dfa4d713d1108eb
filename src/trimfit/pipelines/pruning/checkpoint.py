"""From a checkpoint on disk to a pruned checkpoint on disk."""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from trimfit.calibration import CalibrationConfig, SelfSample
from trimfit.checkpoints import load_checkpoint
from trimfit.models import Block, find_blocks, select_layers
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.opened import InMemory, Offloaded, check_run_space
from trimfit.pipelines.pruning.checkpoint_record import PruneRecord
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.prune import PruneRun
from trimfit.pipelines.pruning.records import PruneReport
from trimfit.pipelines.pruning.shared import SharedLedger
from trimfit.pipelines.runs.directory import RunDirectory, run_path
from trimfit.pipelines.runs.start import (
    check_same_model,
    enter_run,
    identity,
    report_in,
    take_finished,
    there,
    threads_of,
)
from trimfit.pipelines.windows import draw_windows
from trimfit.ranks import ALONE, Ranks


@torch.inference_mode(False)  # what is loaded in it no gradient could be taken through
def prune_checkpoint(
    source: str,
    out: Path,
    config: PruneConfig,
    calibration: CalibrationConfig,
    *,
    device: torch.device,
    overwrite: bool = False,
    offload: bool = False,
    memory_limit: int | None = None,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> PruneReport:
    """Prunes the checkpoint `source` and writes `out`: a plain Hugging Face checkpoint with a `trimfit.json` in it.

    - `offload`: holds one decoder block at a time on `device`, and leaves the others in their files.
    - `memory_limit`: bytes of hidden states in memory; those above it are in files.
    - `ranks`: the processes that share the work; only the first of them writes.

    What is finished is kept in a `RunDirectory` beside `out`: when a run was ended or killed, the same call goes on
    from there. With calibration on the model itself `calibration.npy` in `out` holds the windows. `out` is there when
    everything is done and checked. Raises `InputError` for an `out` that would replace `source`, for a model that
    cannot be offloaded, and for a run that was begun with something else; other errors: see `load_checkpoint`,
    `CalibrationConfig`, `prune`, `save_checkpoint`.
    """
    observer = observer or Silent()
    request = {
        "command": "prune",
        "source": source,
        "config": config.model_dump(),
        "calibration": calibration.model_dump(),
        "device": str(device) if ranks.count == 1 else device.type,
        "overwrite": overwrite,
        "offload": offload,
        "memory_limit": memory_limit,
    }
    finished = ranks.first(lambda: take_finished(out, request))
    if finished is not None:
        return report_in(finished, PruneReport)
    with ExitStack() as stack:
        run = ranks.first_only(lambda: enter_run(stack, source, out, overwrite, request))
        observer.stage(f"loading {source}")

        def open_model() -> tuple[InMemory | Offloaded, list[Block], str]:
            opened = (
                Offloaded.open(source, device, calibration) if offload else InMemory(load_checkpoint(source, device))
            )
            model = opened.checkpoint.model
            blocks = select_layers(model, find_blocks(model), config.ignore)
            return opened, blocks, opened.prepare(blocks)

        opened, blocks, model_fingerprint = ranks.everywhere(open_model)
        checkpoint, model = opened.checkpoint, opened.checkpoint.model
        check_same_model(source, model_fingerprint, ranks)

        def begin(run: RunDirectory) -> None:
            check_run_space(out, opened.disk(blocks), run)
            parts = {"config": config.model_dump(), "calibration": calibration.model_dump()}
            run.open(identity("prune", model_fingerprint, **parts))

        def draw(sample: SelfSample | None) -> tuple[Tensor, SelfSample | None]:
            return draw_windows(checkpoint, calibration, config.batch_size, observer, sample)

        ranks.first(lambda: begin(there(run)))
        stack.enter_context(threads_of(run, ranks))
        windows, sample = ranks.first(lambda: there(run).windows(draw))
        ledger = SharedLedger(opened.ledger(run) if run else None, ranks)
        folder = run_path(out)  # which processes on other machines may not see
        placement = opened.placement(memory_limit, folder if folder.is_dir() else None)
        report = PruneRun(model, blocks, windows, config, observer, placement, ranks, ledger).run()

        def save(run: RunDirectory) -> None:
            record = PruneRecord(
                checkpoint.source, opened.device, model_fingerprint, calibration, windows, sample, report, run.id
            )
            opened.save(out, overwrite, record, run)

        observer.stage(f"writing {out}")
        ranks.first(lambda: save(there(run)))
    return report
