"""How well a model predicts text."""

from trimfit.evaluate.perplexity import Score, perplexity, score_text

__all__ = ["Score", "perplexity", "score_text"]
