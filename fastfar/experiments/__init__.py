"""Experiments: questions with a prediction, candidates as data, and rows that settle them."""

from fastfar.experiments.base import Candidate, Part, Rows, Setting
from fastfar.experiments.fewstep import PARTS as FEWSTEP
from fastfar.experiments.fewstep import shown
from fastfar.experiments.paper import STUDIES, Study, Variant

EXPERIMENTS = {"fewstep": FEWSTEP}
SHOWN = {"fewstep": shown}  # plans of the picture

__all__ = [
    "EXPERIMENTS",
    "SHOWN",
    "STUDIES",
    "Candidate",
    "Part",
    "Rows",
    "Setting",
    "Study",
    "Variant",
]
