"""How well a model predicts text, and what it reaches on tasks."""

from trimfit.evaluate.perplexity import Score, perplexity, score_text
from trimfit.evaluate.tasks import Tasks, TaskScore, check_limit, evaluate_tasks

__all__ = ["Score", "TaskScore", "Tasks", "check_limit", "evaluate_tasks", "perplexity", "score_text"]
