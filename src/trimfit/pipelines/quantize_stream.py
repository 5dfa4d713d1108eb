"""Quantize a model that stays in its files: one block after the other is read, quantized, handed on and dropped."""

from collections.abc import Callable, Mapping

from torch import Tensor

from trimfit.checkpoints.packed import plain_tensors
from trimfit.checkpoints.stream import Stream
from trimfit.models import find_blocks, select_layers
from trimfit.pipelines.observer import Observer
from trimfit.pipelines.quantize import QuantizeRun, Sink
from trimfit.pipelines.quantize_config import QuantizeConfig
from trimfit.pipelines.quantize_records import QuantizeReport
from trimfit.pipelines.weight_moments import WeightMoments


def quantize_stream(
    stream: Stream,
    config: QuantizeConfig,
    *,
    observer: Observer,
    sink: Sink,
    keep: Callable[[Mapping[str, Tensor]], None],
) -> QuantizeReport:
    """Does what `quantize` does without data, with one decoder block in memory at a time.

    - `sink`: given each quantized layer, as by `quantize`.
    - `keep`: given all other tensors, as they are at the end, by their names; they must be done with at once.
    """
    model = stream.checkpoint.model
    blocks = select_layers(model, find_blocks(model), config.ignore)
    layers = [layer.name for block in blocks for layer in block.layers]
    run = QuantizeRun(model, config, blocks, observer, sink, None, stream.device)
    moments = _moments(stream)
    for block in blocks:
        with stream.loaded(block.name):
            run.without_data(block, moments)
            keep(plain_tensors(model, layers, f"{block.name}."))
    inside = tuple(f"{block.name}." for block in blocks)
    for name in plain_tensors(model, layers):
        if not name.startswith(inside):
            keep({name: stream.read(name)})
    return run.report()


def _moments(stream: Stream) -> WeightMoments:
    model = stream.checkpoint.model
    embedding = model.get_input_embeddings().get_parameter("weight")
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    return WeightMoments(model, stream.read(name), stream.device)
