"""The student's next (or hidden) tokens are to be as likely as the teacher says. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distill.objectives.protocol import Head, Needs, classifies
from distill.schedules import Schedule, Temperature, Value

Kind = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric",
    "jsd",
    "scaled_jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]
BETA, ALPHA = ("symmetric", "jsd", "scaled_jsd"), ("skew_forward_kl", "skew_reverse_kl")


class Divergence(Value):
    """A divergence between the distributions of teacher and student at every scored token.

    Formulas and papers: distill/objectives/divergences.py. Neither side's logits ever exist as a whole.
    """

    target: str = Field(description="a teacher of the same vocabulary, by its name in targets")
    kind: Kind = Field("forward_kl", description="forward is KL(teacher || student), reverse KL(student || teacher)")
    beta: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="symmetric, jsd, scaled_jsd: from 0, forward KL, to 1, reverse KL; 0.5 unless given"
    )
    alpha: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="skew KLs: share of the first side that is mixed into the second; 0.1 unless given"
    )
    temperature: Temperature = Field(Schedule.constant(1.0), description="divides the logits of both sides")
    temperature_squared: bool = Field(False, description="whether its square multiplies the loss")
    ce: float = Field(0.0, ge=0, description="times the cross-entropy of the labels is added, in the same pass")
    objective: Head = Field(
        "causal",
        description="mlm: masked tokens; causal: the next token; classify: the classes of rows, labelled or not",
    )
    mask: Schedule = Field(Schedule.constant(0.15), description="share of tokens hidden from an mlm student")
    reduction: Literal["token", "sequence"] = Field("token", description="mean over tokens, or of the sequences' means")
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss")
    kinds_with: ClassVar[dict] = {"beta": BETA, "alpha": ALPHA}

    @model_validator(mode="after")
    def _check(self) -> Divergence:
        for key, kinds in self.kinds_with.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(f"{key}: {self.kind} has none; {', '.join(kinds)} do")
        if self.objective == "classify" and self.ce:
            raise ValueError("ce: with objective classify a row may have no label; add a loss `ce` beside this one")
        return self

    def needs(self) -> Needs:
        return Needs(head=self.objective, target_head=True)

    def check(self, student, target) -> list[str]:
        """Both must look the way that the objective asks for."""
        if self.objective == "classify":
            untaught = target.kind != "classify"
            without = f"objective classify: the teacher ({target.family}) has no classification head; train one first"
            return [*classifies(student), *([without] if untaught else [])]
        causal = self.objective == "causal"
        sees = {True: "sees only the tokens before", False: "sees the tokens after as well"}
        return [
            f"objective {self.objective}: the {side} ({facts.family}) {sees[facts.causal]}"
            for side, facts in (("student", student), ("teacher", target))
            if facts.causal != causal
        ]

    def count(self, batch) -> dict:
        rows, _ = self._scored(batch)
        number = len(rows) if self._by_row else self._each(batch, rows)[1]
        return {self._sum: rows.new_tensor(number).double()}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.token_sum import divergence

        rows, labels = self._scored(batch)
        value = divergence(
            student.head,
            target.head,
            self.kind,
            beta=0.5 if self.beta is None else self.beta,
            alpha=0.1 if self.alpha is None else self.alpha,
            temperature=self.temperature.value,
            temperature_squared=self.temperature_squared,
            weights=None if self._by_row else self._each(batch, rows)[0],
            targets=labels,
            ce=self.ce,
            reduction="sum",
        )
        return {self._sum: value}

    @property
    def _sum(self) -> str:
        """What the number in the log is of."""
        return f"{self.kind} and ce" if self.ce else self.kind

    def _scored(self, batch):
        from distill.objectives.token_sum import scored

        if self.objective == "classify":
            return batch["sample_ids"], None  # every row; what class it is of is not asked
        return scored(batch["labels"], batch["segment_ids"], causal=self.objective == "causal")

    @property
    def _by_row(self) -> bool:
        return self.reduction == "token" or self.objective == "classify"

    @staticmethod
    def _each(batch, rows):
        from distill.objectives.token_sum import sequence_means

        return sequence_means(batch["segment_ids"], rows)
