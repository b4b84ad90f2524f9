"""Experiments: questions with a prediction, candidates as data, and rows that settle them."""

from fastfar.experiments.base import Candidate, Part, Rows, Setting
from fastfar.experiments.fewstep import PARTS as FEWSTEP

EXPERIMENTS = {"fewstep": FEWSTEP}

__all__ = ["EXPERIMENTS", "Candidate", "Part", "Rows", "Setting"]
