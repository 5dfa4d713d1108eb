"""Models, checkpoints and tokens with something wrong in them, and what it takes to be refused."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from families import FAMILIES, windows
from torch import Tensor
from transformers import PreTrainedModel

from trimfit import InputError


def damage(name: str, value: float) -> Callable[[PreTrainedModel], None]:
    """Puts a value into one entry of a parameter."""

    @torch.no_grad()
    def change(model: PreTrainedModel) -> None:
        model.get_parameter(name).view(-1)[3] = value

    return change


def damage_file(directory: Path, name: str, value: float | None) -> None:
    """Puts a value into one entry of a tensor on disk, in whichever shard it is; None removes the tensor."""
    for shard in directory.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(shard)
        if name not in tensors:
            continue
        if value is None:
            del tensors[name]
        else:
            tensors[name].view(-1)[3] = value
        safetensors.torch.save_file(tensors, shard, {"format": "pt"})
        return
    raise KeyError(name)


def edit_config(directory: Path, **values: Any) -> None:
    """Changes config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@dataclass(frozen=True)
class Refused:
    """What prune and quantize must not begin with: `message` is what they say, as a regular expression."""

    message: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    tokens: Tensor | None = None
    change: Callable[[PreTrainedModel], None] | None = None

    def check(self, call: Callable[[PreTrainedModel, Tensor | None, dict[str, Any]], object]) -> None:
        """The call, on model, tokens and options of a config, is refused and changes nothing."""
        model = FAMILIES["llama"].build()
        if self.change:
            self.change(model)
        before = state(model)
        with pytest.raises(InputError, match=self.message):
            call(model, self.tokens, self.options)
        assert is_equal(model.state_dict(), before)


TOKENS = windows(8)
_NAN = "model.layers.1.mlp.up_proj.weight"
_DAMAGED = damage(_NAN, float("nan"))
_NAN_FOUND = rf"{_NAN} has NaN or infinite entries: the checkpoint is damaged"

# Whatever the tokens are, and without any.
BAD_MODELS = {
    "nan": Refused(_NAN_FOUND, change=_DAMAGED),
    "infinity": Refused(r"model\.norm\.weight has NaN or infinite", change=damage("model.norm.weight", float("inf"))),
    "nan in an ignored layer": Refused(_NAN_FOUND, {"ignore": ("up_proj",)}, change=_DAMAGED),
    "ignore": Refused("the ignore pattern 'nothing' matches no linear layer", {"ignore": ("nothing",)}),
    "ignore all": Refused("leave no layer to compress", {"ignore": ("*",)}),
}
BAD_TOKENS = {
    "overflow": Refused(
        "hidden states of LlamaForCausalLM have NaN or infinite entries", tokens=TOKENS, change=damage(_NAN, 3e38)
    ),
    "ids": Refused("token id [0-9]+ is outside the model's vocabulary of 64", tokens=TOKENS + 60),
    "negative ids": Refused("negative token id", tokens=TOKENS - 60),
    "stream": Refused(r"tokens must be \(windows, length\) .* their shape is \(192,\)", tokens=TOKENS.flatten()),
    "empty": Refused(r"not empty, but their shape is \(0, 24\)", tokens=TOKENS[:0]),
    "floats": Refused(r"token ids must be integers, but they are torch\.float32", tokens=TOKENS.float()),
    "too long": Refused("the windows have 65 tokens, but the model's context is 64", tokens=windows(2, 65)),
}
