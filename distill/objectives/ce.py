"""The cross-entropy of masked or next tokens. No torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from distill.objectives.protocol import Head, Needs
from distill.schedules import Schedule, Value


class CrossEntropy(Value):
    """The student predicts hidden tokens (mlm) or the next ones (causal); mean over all scored tokens."""

    objective: Head = Field("mlm", description="mlm: masked tokens; causal: the next token")
    mask: Schedule = Field(Schedule.constant(0.15), description="share of tokens hidden from an mlm student")
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss")
    target: ClassVar[None] = None

    def needs(self) -> Needs:
        return Needs(head=self.objective)

    def check(self, student, target=None) -> list[str]:
        """A model that sees later tokens cannot be asked for the next one."""
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

        return {self.objective: cross_entropy_sum(student.head, self._scored(batch)[1])}

    def _scored(self, batch):
        from distill.objectives.token_sum import scored

        return scored(batch["labels"], batch["segment_ids"], causal=self.objective == "causal")
