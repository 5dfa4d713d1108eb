"""Which weights to keep. Tensors only: a new selector is one new file and one line in the table."""

from trimfit.masks import joint, magnitude, sparsegpt, thanos, wanda
from trimfit.masks.patterns import NM as NM
from trimfit.masks.patterns import Pattern as Pattern
from trimfit.masks.patterns import Scope as Scope
from trimfit.masks.patterns import Unstructured as Unstructured
from trimfit.masks.patterns import check_width as check_width
from trimfit.masks.patterns import keep_best as keep_best
from trimfit.masks.patterns import parse_pattern as parse_pattern
from trimfit.masks.permutation import obs_scores as obs_scores
from trimfit.masks.permutation import spread as spread
from trimfit.masks.selection import Selection as Selection
from trimfit.masks.selection import Selector as Selector

SELECTORS: dict[str, Selector] = {
    "magnitude": Selector(magnitude.select, magnitude.DEFAULT_SCOPE, updates_weights=False),
    "wanda": Selector(wanda.select, wanda.DEFAULT_SCOPE, updates_weights=False),
    "sparsegpt": Selector(sparsegpt.select, sparsegpt.DEFAULT_SCOPE, updates_weights=True),
    "thanos": Selector(thanos.select, thanos.DEFAULT_SCOPE, updates_weights=True),
    "joint": Selector(joint.select, joint.DEFAULT_SCOPE, updates_weights=True),
}
