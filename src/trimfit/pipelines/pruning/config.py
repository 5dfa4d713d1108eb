"""What a run is asked to do: frozen, validated, serialisable."""

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trimfit.masks import SELECTORS, Pattern, Unstructured, parse_pattern
from trimfit.refit import Auto, Cholesky, ConjugateGradients, Solver

SolverName = Literal["auto", "cholesky", "cg", "cg-diagonal"]


class PruneConfig(BaseModel):
    """How to prune.

    - `sparsity`: share of the weights to remove, in [0, 1); 0.5 when no pattern is given either.
    - `pattern`: "N:M", N kept of each M consecutive inputs; instead of `sparsity`.
    - `selector`: what picks the mask: "magnitude", "wanda", "sparsegpt", "thanos" or "joint".
    - `scope`: whether an unstructured mask counts per "row" or over the "layer"; None is the selector's own habit.
    - `row_weights`: what errors in outputs count: all "equal", or those of Q and K as much as they change "attention":
      the rows of a head are then refitted together, and compete so where a mask counts over the layer. None is
      "attention" for the selector joint, "equal" for others.
    - `allocation`: how the sparsity is split over the layers: "uniform", the same in each; "owl", less in blocks with
      many outliers; "error", so that the estimated cost in nats is least; None is "error" for the selector joint,
      "uniform" for others and for an N:M pattern, which leaves nothing to split.
    - `reorder`: whether inputs whose order is free are first put in one that suits an N:M pattern: the hidden units of
      an MLP, and the dimensions of V within a KV head; None is yes for the selector joint and a pattern, no for others.
    - `refit`: "optimal" refits the dense weights to the mask; "own" keeps the selector's updated weights;
      "none" keeps the dense weights where the mask is True.
    - `target`: what the refit, and the selector, aim at: "layer" is what the dense layer gives on the inputs of the
      pruned model, as in the paper; "dense" goes `dense_share` of the way from there to what the dense model has.
    - `dense_share`: in (0, 1]; belongs to the target "dense".
    - `solver`, `tolerance`: of the optimal refit; the tolerance is on the relative gap of every row. Rows that are
      refitted together are always solved by conjugate gradients.
    - `damping`: λ in H + λ·mean(diag H)·I, for selectors and refit; "auto" chooses it for each group of layers, by
      the error of a refit on held-out windows.
    - `capture`: "group" sees inputs from the already pruned groups of the same block; "block" captures them all
      before the block changes, as the paper does.
    - `ignore`: layers that are left as they are, as globs or "re:" patterns.
    - `keep_dense`: layers that lose no weights, in the same form, such as those that an N:M pattern does not divide.
      With the target "dense" they are refitted like all others, to make up for what was pruned before them. `ignore`
      goes first.
    - `held_out`: share of the windows on which layer errors are measured and no weight is fitted; the guard and "auto"
      damping choose by them.
    - `guard`: a layer gets simpler weights than those asked for where these are nearer to the target on the held-out
      windows.
    - `batch_size`: windows in one forward pass.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    pattern: str | None = None
    selector: str = "joint"
    scope: Literal["row", "layer"] | None = None
    row_weights: Literal["equal", "attention"] | None = None
    allocation: Literal["uniform", "owl", "error"] | None = None
    reorder: bool | None = None
    refit: Literal["optimal", "own", "none"] = "optimal"
    target: Literal["layer", "dense"] = "dense"
    dense_share: float = Field(default=0.5, gt=0, le=1)
    solver: SolverName = "auto"
    tolerance: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["auto"] = 0.01
    capture: Literal["group", "block"] = "group"
    ignore: tuple[str, ...] = ()
    keep_dense: tuple[str, ...] = ()
    held_out: float = Field(default=0.125, ge=0, lt=1)
    guard: bool = True
    batch_size: int = Field(default=8, ge=1, le=2**20)

    @field_validator("selector")
    @classmethod
    def _known_selector(cls, name: str) -> str:
        if name not in SELECTORS:
            raise ValueError(f"unknown selector {name!r}: choose one of {', '.join(SELECTORS)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _default_sparsity(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("sparsity") is None and data.get("pattern") is None:
            return {**data, "sparsity": 0.5}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give sparsity or pattern, not both")
        if self.pattern is not None:
            parse_pattern(self.pattern)
            if self.allocation not in (None, "uniform"):
                raise ValueError("an N:M pattern leaves no sparsity to split: use the allocation 'uniform'")
            if self.scope is not None:
                raise ValueError("scope belongs to an unstructured sparsity, not to an N:M pattern")
        elif self.reorder:
            raise ValueError("to reorder inputs belongs to an N:M pattern, not to an unstructured sparsity")
        if self.target == "layer" and self.dense_share != type(self).model_fields["dense_share"].default:
            raise ValueError("dense_share belongs to the target 'dense', not to 'layer'")
        if self.damping == "auto" and self.held_out == 0:
            raise ValueError("damping 'auto' is chosen on held-out windows: give held_out a share above 0")
        if self.refit == "own" and not SELECTORS[self.selector].updates_weights:
            raise ValueError(
                f"the selector {self.selector} has no weight update of its own: use refit 'optimal' or 'none'"
            )
        return self

    @property
    def share(self) -> float:
        """How far the goal is from the layer's own outputs towards the dense model's, in [0, 1]."""
        return self.dense_share if self.target == "dense" else 0.0

    @property
    def mask_pattern(self) -> Pattern:
        """The pattern that masks must follow."""
        if self.pattern is not None:
            return parse_pattern(self.pattern)
        assert self.sparsity is not None  # one of the two is always there
        return Unstructured(self.sparsity, self.scope or SELECTORS[self.selector].default_scope)

    @property
    def split(self) -> Literal["uniform", "owl", "error"]:
        """The allocation asked for, or the default of the selector."""
        return self.allocation or ("error" if self.selector == "joint" and self.pattern is None else "uniform")

    @property
    def reorders(self) -> bool:
        """Whether inputs are reordered where their order is free."""
        return self.pattern is not None and (self.selector == "joint" if self.reorder is None else self.reorder)

    @property
    def rows_matter(self) -> bool:
        """Whether anything depends on what errors of a row count: the refit, the guard, or a mask over the layer."""
        pattern = self.mask_pattern
        compete = isinstance(pattern, Unstructured) and pattern.scope == "layer"
        guarded = self.refit == "own" and self.guard and self.held_out > 0
        return self.refit == "optimal" or compete or guarded

    @property
    def weighs_rows(self) -> bool:
        """Whether errors of Q and K count as much as the attention weights make of them."""
        asked = self.row_weights == "attention" or (self.row_weights is None and self.selector == "joint")
        return asked and self.rows_matter

    def make_solver(self) -> Solver | Auto:
        """The solver with the tolerance asked for."""
        dtype = torch.float32
        match self.solver:
            case "auto":
                return Auto(self.tolerance, dtype)
            case "cholesky":
                return Cholesky(self.tolerance, dtype)
            case "cg":
                return ConjugateGradients("masked_inverse", self.tolerance, dtype=dtype)
            case "cg-diagonal":
                return ConjugateGradients("diagonal", self.tolerance, dtype=dtype)
