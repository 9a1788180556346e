"""Models of different tokenisers compared over spans of the same text. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill.objectives.protocol import Needs
from distill.schedules import Schedule, Temperature, Value

Kind = Literal["likelihood", "shared", "sorted"]


class Aligned(Value):
    """The student gives each span of text what the teacher gives it; mean over spans. For causal models.

    `likelihood`: how probable the span is, by the chain rule, against everything else (ALM: Minixhofer et al. 2025,
    arXiv 2503.20083). `shared`: at the start of each span, what comes next: the pieces that both have, the others as
    one; with equal tokenisers the divergence of whole distributions. `sorted`: the same place, probabilities by rank
    whatever they are of (ULD: Boizard et al. 2024, arXiv 2402.12030).
    """

    target: str = Field(description="a teacher, by its name in targets")
    kind: Kind = Field("likelihood", description="likelihood: of spans; shared, sorted: of what comes next")
    temperature: Temperature = Field(Schedule.constant(1.0), description="divides log-likelihoods, or logits")
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss")

    def needs(self) -> Needs:
        return Needs(head="causal", target_head=True, own_ids=True)

    def check(self, student, target) -> list[str]:
        return [
            f"aligned: the {who} ({facts.family}) does not predict the next token; models of one tokeniser can be "
            "compared at masked ones"
            for who, facts in (("student", student), ("teacher", target))
            if not facts.causal
        ]

    def count(self, batch) -> dict:
        from distill.objectives.span_sum import span_count

        spans, theirs = (batch[f"{self.target}.{side}"] for side in ("spans", "teacher_spans"))
        return {self.kind: span_count(spans, theirs)}

    def terms(self, student, target, batch) -> dict:
        """The target has read rows of its own: `{target}.ids` and `{target}.segments` of the batch."""
        from distill.objectives.span_sum import Predicted, aligned_sum

        mine = Predicted.of(student.head, batch["labels"], batch["segment_ids"], batch[f"{self.target}.spans"])
        shared = batch[f"{self.target}.shared"][0]  # [2, K]
        return {self.kind: aligned_sum(mine, self._theirs(target, batch), self.kind, self.temperature.value, shared)}

    def _theirs(self, target, batch):
        from distill.objectives.span_sum import Heard, Predicted
        from distill.objectives.sparse import Spoken

        rows = [batch[f"{self.target}.{name}"] for name in ("ids", "segments", "teacher_spans")]
        if isinstance(target.head, Spoken):
            return Heard.of(target.head.log_probs, *rows)
        return Predicted.of(target.head, *rows)
