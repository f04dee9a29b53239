"""Model cards that tell what was pruned, how, what it cost and how to do it again."""

from model_cards.card import SparseModelCard, write_card
from model_cards.evaluation import Evaluation

__all__ = ["Evaluation", "SparseModelCard", "write_card"]
