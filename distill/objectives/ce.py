"""The cross-entropy of masked or next tokens, or of the classes of rows. No torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from distill.objectives.protocol import Head, Needs, classifies
from distill.schedules import Schedule, Value


class CrossEntropy(Value):
    """The student predicts hidden tokens (mlm), the next ones (causal) or the classes of rows (classify).

    Mean over all scored tokens, or over the rows of a known class.
    """

    objective: Head = Field("mlm", description="mlm: masked tokens; causal: the next token; classify: rows' classes")
    mask: Schedule = Field(Schedule.constant(0.15), description="share of tokens hidden from an mlm student")
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss")
    target: ClassVar[None] = None

    def needs(self) -> Needs:
        return Needs(head=self.objective)

    def check(self, student, target=None) -> list[str]:
        """A model that sees later tokens cannot be asked for the next one."""
        if self.objective == "classify":
            return classifies(student)
        if self.objective == "causal" and not student.causal:
            return [f"objective causal: {student.family} sees the tokens it would predict; objective mlm does"]
        if self.objective == "mlm" and student.causal:
            return [f"objective mlm: {student.family} sees only what is before a masked token; objective causal does"]
        return []

    def count(self, batch) -> dict:
        rows, _ = self._scored(batch)
        return {self.objective: rows.new_tensor(len(rows)).double()}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.token_sum import cross_entropy_sum

        rows, labels = self._scored(batch)
        logits = student.head.at(rows) if self.objective == "classify" else student.head
        return {self.objective: cross_entropy_sum(logits, labels)}

    def _scored(self, batch):
        from distill.objectives.token_sum import classed, scored

        if self.objective == "classify":
            return classed(batch["classes"])
        return scored(batch["labels"], batch["segment_ids"], causal=self.objective == "causal")
