"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Model directory, hub name, or 'demo' for the embedded model.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Directory to write; must not exist without --overwrite.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Plan = Annotated[
    bool, typer.Option("--plan", help="Only say what it would take: layers, time, memory and disk. Writes nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

Calibration = Annotated[
    str,
    typer.Option(
        help="Text file, .jsonl, .npy/.safetensors of token ids, hub data set, 'demo', or 'self': "
        "text that MODEL writes itself, so that no data is needed."
    ),
]
Field = Annotated[str, typer.Option(help="Field with the text in .jsonl or a data set.")]
Split = Annotated[str, typer.Option(help="Split of a hub data set.")]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
OwnSamples = Annotated[int, typer.Option(help="Windows that MODEL writes itself, beside those of a text.")]
SequenceLength = Annotated[
    int | None,
    typer.Option(help="Tokens in a calibration window. \\[default: the model's context, at most 2048]"),
]
Seed = Annotated[int, typer.Option(help="Of the choice of windows.")]
BatchSize = Annotated[int, typer.Option(help="Windows in one forward pass.")]

Offload = Annotated[
    bool, typer.Option("--offload", help="Hold one block of the model at a time; the others stay in their files.")
]
MemoryLimit = Annotated[
    str | None, typer.Option(help="Of hidden states in memory, as in 8GiB; those above it go to files.")
]

Scope = Annotated[
    str | None, typer.Option(help="Count sparsity per row or over the layer. \\[default: the selector's]")
]
Damping = Annotated[str, typer.Option(help="λ in H + λ·mean(diag H)·I, or auto: chosen on held-out windows.")]
Capture = Annotated[str, typer.Option(help="Recapture inputs per group (ours) or block (the paper's).")]
Ignore = Annotated[list[str] | None, typer.Option(help="Layers to leave as they are: glob, or re:REGEX. Repeatable.")]
KeepDense = Annotated[
    list[str] | None,
    typer.Option(
        help="Layers that lose no weight, but are refitted with the others to make up for what those lost, such as "
        "layers that an N:M pattern does not divide: glob, or re:REGEX. Repeatable."
    ),
]
HeldOut = Annotated[float, typer.Option(help="Share of windows kept aside to measure layer errors.")]

Window = Annotated[
    int | None, typer.Option(help="Tokens in a scored window. \\[default: the model's context, at most 2048]")
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many windows, and examples of each task.")]


def model_source(model: str) -> str:
    """Directory or hub name of a MODEL: 'demo' is the embedded model, unless there is something of that name."""
    if model != "demo" or Path(model).exists():
        return model
    from trimfit.demo.run import model_path

    return str(model_path())
