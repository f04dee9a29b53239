"""Model cards that tell what was pruned, how, what it cost and how to do it again."""

from model_cards.adapter import SparseAdapterCard
from model_cards.card import SparseModelCard
from model_cards.evaluation import Evaluation
from model_cards.files import file_hashes
from model_cards.merge import merge_trainer
from model_cards.source import CardSource, is_repository
from model_cards.writing import card_class, set_card_class, write_card

__all__ = [
    "CardSource",
    "Evaluation",
    "SparseAdapterCard",
    "SparseModelCard",
    "card_class",
    "file_hashes",
    "is_repository",
    "merge_trainer",
    "set_card_class",
    "write_card",
]
