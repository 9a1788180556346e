"""What a ranker learns of the lists of queries: margins, scores, distributions and orders. No torch.

A list is a positive and negatives for one query. Every loss is a mean over the whole step, of what its batch alone can
count; formulas: distill/objectives/ranking_sum.py.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distill.objectives.protocol import Needs
from distill.schedules import Schedule, Temperature, Value

Scale = Annotated[float, Field(gt=0)] | Literal["auto"]
SCALE = (
    "times the student's margins; auto: what brings them to the spread of the teacher's, found on the first batches "
    "before the first step"
)
TARGET = "a teacher that scores pairs, by its name in targets"
WEIGHT = "factor on this loss"


class _Taught(Value):
    """By the scores of a target, of the pairs of a batch."""

    target: str = Field(description=TARGET)
    weight: Schedule = Field(Schedule.constant(1.0), description=WEIGHT)

    def needs(self) -> Needs:
        return Needs(head="rank", target_head=True)

    def check(self, student, target) -> list[str]:
        return []


class MarginMSE(_Taught):
    """The student's differences of scores are to be the teacher's (Hofstaetter et al. 2020, arXiv 2010.02666).

    Mean over the pairs of a positive and a negative, or over all pairs of a list.
    """

    pairs: Literal["positive", "all"] = Field(
        "positive", description="of which differences: the positive and each negative, or any two of a list"
    )
    scale: Scale = Field(1.0, description=SCALE)

    def count(self, batch) -> dict:
        from distill.objectives.score_lists import pairs_of_lists

        listed, group = batch["pairs"], batch["group"]
        count = pairs_of_lists(group) if self.pairs == "all" else group.new_tensor(len(listed) - _lists(batch)).double()
        return {"margin": count}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.ranking_sum import all_pairs_margin_mse, margin_mse

        (s, mask), (t, _) = _sides(student, target, batch)
        how = {"scale": self.scale, "reduction": "sum"}
        if self.pairs == "all":
            return {"margin": all_pairs_margin_mse(s, t, mask, **how)}
        return {"margin": margin_mse(s[:, 0], s[:, 1:], t[:, 0], t[:, 1:], mask[:, 1:], **how)}

    def margins(self, scores, batch):
        """What `scale` is about, of one side [n]."""
        from distill.objectives.score_lists import differences

        return differences(scores.listed, batch["group"], every=self.pairs == "all")


class PointwiseMSE(_Taught):
    """The student's scores are to be the teacher's; mean over pairs of a query and a passage."""

    def count(self, batch) -> dict:
        return {"score": batch["group"].new_tensor(len(batch["pairs"])).double()}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.ranking_sum import pointwise_mse

        return {"score": pointwise_mse(student.scores.listed, target.scores.listed, reduction="sum")}

    def margins(self, scores, batch):
        from distill.objectives.score_lists import differences

        return differences(scores.listed, batch["group"])


class ListwiseKL(_Taught):
    """KL of the teacher's distribution over the passages of a list and the student's; mean over lists."""

    temperature: Temperature = Field(Schedule.constant(1.0), description="divides the scores of both sides")
    temperature_squared: bool = Field(False, description="whether its square multiplies the loss")

    def count(self, batch) -> dict:
        return {"kl": batch["group"].new_tensor(_lists(batch)).double()}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.ranking_sum import listwise_kl

        (s, mask), (t, _) = _sides(student, target, batch)
        squared = self.temperature_squared
        how = {"temperature": self.temperature.value, "temperature_squared": squared, "reduction": "sum"}
        return {"kl": listwise_kl(s, t, mask, **how)}


class RankNet(_Taught):
    """The order of any two passages of a list is to be the teacher's (RankNet: Burges et al. 2005, ICML).

    The mean is over all pairs of a list: two that the teacher finds equal count, with a loss of zero. So the batch
    alone says what is divided by, wherever the teacher's scores come from.
    """

    weighted: bool = Field(False, description="whether a pair counts by how far apart the teacher sees it")

    def count(self, batch) -> dict:
        from distill.objectives.score_lists import pairs_of_lists

        return {"order": pairs_of_lists(batch["group"])}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.ranking_sum import ranknet

        (s, mask), (t, _) = _sides(student, target, batch)
        return {"order": ranknet(s, t, mask, weighted=self.weighted, reduction="sum")}


class _InBatch(Value):
    """Over the passages of other queries as well: `group` of them, never cut, see each other's."""

    grouped: ClassVar[str] = "queries that see each other's passages; micro-batches hold whole groups"

    def check(self, student, target) -> list[str]:
        return []

    def _crossing(self, batch):
        from distill.objectives.crossing import crossing

        return crossing(batch["pairs"], batch["group"], self.group)


class InBatchMargin(_InBatch):
    """The margins of a positive over the passages of other queries are to be the teacher's (TAS-B: arXiv 2104.06967).

    The teacher runs beside the student, since what meets in a batch was never scored before. Mean over these pairs.
    """

    target: str = Field(description=f"{TARGET}; one that runs beside the student")
    group: Annotated[int, Field(ge=2)] = Field(8, description=_InBatch.grouped)
    scale: Scale = Field(1.0, description=SCALE)
    weight: Schedule = Field(Schedule.constant(1.0), description=WEIGHT)

    def needs(self) -> Needs:
        return Needs(head="rank", target_head=True, group=self.group)

    def count(self, batch) -> dict:
        from distill.objectives.ranking_sum import in_batch_count

        crossed = self._crossing(batch)
        return {"others": in_batch_count(crossed.positive, crossed.own | ~crossed.there)}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.ranking_sum import in_batch_margin

        crossed, (s, t) = self._crossing(batch), (side.scores.crossed[self.group] for side in (student, target))
        others = in_batch_margin(
            s, t, crossed.positive, crossed.own | ~crossed.there, scale=self.scale, reduction="sum"
        )
        return {"others": others}

    def margins(self, scores, batch):
        crossed, scores = self._crossing(batch), scores.crossed[self.group]
        return (scores.gather(1, crossed.positive[:, None]) - scores)[crossed.there & ~crossed.own]


class Contrastive(_InBatch):
    """A positive is to be found among all passages of its group of queries; no teacher. Mean over lists.

    What the collection judges to answer a query is no negative of it.
    """

    group: Annotated[int, Field(ge=1)] = Field(8, description=f"{_InBatch.grouped}; 1: its own list alone")
    temperature: Temperature = Field(
        Schedule.constant(1.0), description="divides the scores; cosines want a small one, such as 0.05"
    )
    weight: Schedule = Field(Schedule.constant(1.0), description=WEIGHT)
    target: ClassVar[None] = None

    def needs(self) -> Needs:
        return Needs(head="rank", group=self.group)

    def count(self, batch) -> dict:
        return {"positive": batch["group"].new_tensor(_lists(batch)).double()}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.ranking_sum import contrastive

        crossed, scores = self._crossing(batch), student.scores.crossed[self.group]
        seen = crossed.there & ~crossed.answered(batch)
        how = {"temperature": self.temperature.value, "reduction": "sum"}
        return {"positive": contrastive(scores, crossed.positive, seen, **how)}


def _lists(batch) -> int:
    return len(batch["sample_ids"])


def _sides(student, target, batch):
    """(scores as lists [B, N], their mask) of both."""
    from distill.objectives.score_lists import lists

    return (lists(side.scores.listed, batch["group"]) for side in (student, target))
