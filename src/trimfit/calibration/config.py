"""Which calibration windows a run asks for."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from trimfit.calibration.self_sampling import AT_ONCE, SelfSample, sample_from_model
from trimfit.calibration.sources import is_on_hub, read_documents, read_token_ids
from trimfit.calibration.standard_library import CALIBRATION, read_modules
from trimfit.calibration.windows import (
    added_tokens,
    check_ids,
    encode_documents,
    sample_windows,
    window_length,
    windows_from_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO = "demo"
SELF = "self"


class CalibrationConfig(BaseModel):
    """Where calibration windows come from.

    - `source`: a text file, a .jsonl file, a .npy or .safetensors file of token ids, a dataset on the hub, "demo" for
      the standard-library modules kept aside for it, or "self" for text sampled from the model itself, so that no data
      is needed. A file of either name is read as "./demo" or "./self".
    - `field`: name of the text in each line of .jsonl, or column of the data set.
    - `split`: of a data set on the hub.
    - `samples`: windows to draw.
    - `own_samples`: windows that the model writes itself beside those; all are put in a random order.
    - `sequence_length`: tokens in each, capped by the model's context; None is the context, but at most 2048.
    - `seed`: of the draw.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = DEMO
    field: str = "text"
    split: str = "train"
    samples: int = Field(default=128, ge=1, lt=2**31)
    own_samples: int = Field(default=0, ge=0, lt=2**31)
    sequence_length: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_own(self) -> Self:
        if self.source == SELF and self.own_samples:
            raise ValueError("own_samples are windows beside those of a text: with the source self raise samples")
        return self

    @property
    def count(self) -> int:
        """Of all windows."""
        return self.samples + self.own_samples

    @property
    def written(self) -> int:
        """How many of them the model writes."""
        return self.samples if self.source == SELF else self.own_samples

    def windows(self, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> Tensor:
        """(count, length) int64 token ids. Raises `InputError` for a source that cannot be used."""
        return self.draw(tokenizer, model)[0]

    def draw(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        model: "PreTrainedModel",
        *,
        batch_size: int = AT_ONCE,
        sample: SelfSample | None = None,
    ) -> tuple[Tensor, SelfSample | None]:
        """The windows, and those of them that the model writes, `batch_size` at a time, if there are such.

        `sample` are these, if it has written them already. Raises `InputError` as `windows` and `sample_from_model` do.
        """
        length = window_length(self.sequence_length, model.config)
        given = None if self.source == SELF else self._of_source(tokenizer, length)
        if not self.written:
            assert given is not None
            return given, None
        if given is not None:  # what is wrong with these comes first: to write windows takes long
            check_ids(given, model.get_input_embeddings().get_parameter("weight").shape[0])
        sample = sample or sample_from_model(
            model, tokenizer, samples=self.written, length=length, seed=self.seed, batch_size=batch_size
        )
        if given is None:
            return sample.windows, sample
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed))
        return torch.cat([given, sample.windows])[order], sample  # so that both are among those that are held out

    def _of_source(self, tokenizer: "PreTrainedTokenizerBase", length: int) -> Tensor:
        if self._is_ids:
            return self._from_ids(length)
        documents = encode_documents(tokenizer, self.documents())
        bos = added_tokens(tokenizer).bos
        return sample_windows(documents, samples=self.samples, length=length, seed=self.seed, bos=bos)

    def check_files(self, length: int) -> None:
        """Raises `InputError` for a file that `windows` cannot use for windows of `length` tokens.

        Needs neither model nor tokenizer, so whether a text is long enough is not seen; the hub is not asked.
        """
        if self._is_ids:
            self._from_ids(length)
        elif self.source not in (DEMO, SELF) and not is_on_hub(self.source):
            self.documents()

    @property
    def _is_ids(self) -> bool:
        return Path(self.source).suffix in (".npy", ".safetensors")

    def _from_ids(self, length: int) -> Tensor:
        return windows_from_ids(read_token_ids(self.source), samples=self.samples, length=length, seed=self.seed)

    def documents(self) -> list[str]:
        """The texts of the source, which must not be "self" or token ids."""
        if self.source == DEMO:
            return read_modules(CALIBRATION)
        return read_documents(self.source, field=self.field, split=self.split)
