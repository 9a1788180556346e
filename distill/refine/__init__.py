"""What a data stage does to a corpus: operations by name. No torch.

Each is a function of directories as well:

    scoring.score(corpus.open("pool"), "teacher", "scores/teacher")         # and "reference", "scores/reference"
    scored.describe("scores", kind="nll_gap", per="token")
    refinement.refine("pool", "scores", "better", Rule(keep=0.5))
    rewriting.retokenize("better", "rows", tokens.load("student"), length=1024)
    rewriting.mix("rows", "mixed", {"other": 0.3})
    rewriting.augment("rows", "more", copies=3, share=0.4)
"""

from __future__ import annotations

from distill.refine.augment import Augment
from distill.refine.cache import Cache
from distill.refine.drop_false_negatives import DropFalseNegatives
from distill.refine.import_scores import ImportScores
from distill.refine.label import Label
from distill.refine.mine import Mine
from distill.refine.mix import Mix
from distill.refine.operation import DataOp
from distill.refine.retokenize import Retokenize
from distill.refine.score import Score
from distill.refine.score_pairs import ScorePairs
from distill.refine.select import Select

OPS: dict[str, type[DataOp]] = {
    "score": Score,
    "select": Select,
    "retokenize": Retokenize,
    "mix": Mix,
    "augment": Augment,
    "cache": Cache,
    "label": Label,
    "mine": Mine,
    "score_pairs": ScorePairs,
    "import_scores": ImportScores,
    "drop_false_negatives": DropFalseNegatives,
}

__all__ = ["OPS", "DataOp"]
