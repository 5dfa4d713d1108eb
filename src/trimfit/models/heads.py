"""The layers whose outputs meet in the attention logits."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from trimfit.models.structure import Block, Layer


@dataclass(frozen=True)
class QueryKey:
    """Q and K, made by a layer each; query heads come in runs of equal length that share a key head.

    Both are children of the module that attends. Rows of a head lie side by side in both layers.
    """

    query: Layer
    key: Layer
    query_heads: int
    key_heads: int


def find_query_key(model: PreTrainedModel, block: Block) -> QueryKey | None:
    """Q and K of a block, by the names that they have in most families.

    None where they come from one layer, are not both to be compressed, or belong to several modules side by side.
    """
    layers = {layer.name: layer for layer in block.layers}
    parents = [name.rpartition(".")[0] for name in layers if name.endswith(".q_proj")]
    # A module within attention that chooses keys may have a Q and a K as well.
    outermost = [name for name in parents if not any(name.startswith(f"{other}.") for other in parents)]
    if len(outermost) != 1 or f"{outermost[0]}.k_proj" not in layers:
        return None
    query, key = (layers[f"{outermost[0]}.{last}"] for last in ("q_proj", "k_proj"))
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    rows, key_rows = query.weight.shape[0], key.weight.shape[0]
    if key_rows % key_heads or rows * key_heads != key_rows * heads:
        return None
    return QueryKey(query, key, heads, key_heads)
