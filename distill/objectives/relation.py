"""MiniLM's objective: the student's tokens are to relate to each other as the teacher's do. No torch."""

from __future__ import annotations

import math
from itertools import product
from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.objectives import layers
from distill.objectives.given import divisors
from distill.objectives.layers import Layer
from distill.objectives.protocol import Needs
from distill.schedules import Schedule, Several, Value

ROLES = {"q": "query", "k": "key", "v": "value"}
PAIRS = tuple(a + b for a, b in product(ROLES, ROLES))
Relation = Literal[("attention", *PAIRS)]
Count = Annotated[int, Field(gt=0)]

BIASED, CAPPED = "adds a learned relative position bias to query . key", "caps its scores by a tanh"
SINKS, PICKED = "gives a share of rows to a sink", "sees only tokens that an indexer picks"
# families whose attention is not the softmax of query . key alone
INEXACT = {
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "udop", "mpnet", "layoutlmv2", "layoutlmv3"), BIASED),
    **dict.fromkeys(("inkling_text", "inkling2_text"), BIASED),
    **dict.fromkeys(("deberta", "deberta-v2"), "adds its position terms to query . key"),
    **dict.fromkeys(("bloom", "mpt"), "adds a distance to query . key (ALiBi)"),
    **dict.fromkeys(("gemma2", "gemma3n_text", "vaultgemma"), CAPPED),
    **dict.fromkeys(("gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "deepseek_v4", "flint"), SINKS),
    **dict.fromkeys(("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"), PICKED),
    **dict.fromkeys(("phimoe", "doge"), "does not say how wide the window of its layers is"),
    "llama4_text": "sees chunks of a row in most layers",
}


class RelationKL(Value):
    """KL between the relations of a teacher's layer and a student's layer.

    v2 (Wang et al. 2020, arXiv 2012.15828): softmax(x y^T / sqrt(d)) for x, y among queries, keys and values, regrouped
    into `heads` relation heads of width d. v1 (Wang et al. 2020, arXiv 2002.10957): `attention`, the distribution of
    the models' own heads, and vv with as many relation heads. A token sees the tokens of its segment, in causal models
    up to itself; `attention` is that within the window of both layers, the narrower one, where they have any.
    """

    target: str = Field(description="a teacher, by its name in targets")
    relations: Annotated[Several[Relation], Field(min_length=1)] = Field(
        ("qq", "kk", "vv"), description="any pair of q, k, v; or attention"
    )
    heads: Count | dict[Relation, Count] | None = Field(
        None, description="relation heads, one number or one for each relation; attention has the models' own"
    )
    teacher_layer: Layer = Field("last", description="0 is the first; negative ones count from the end")
    student_layer: Layer = Field("last", description="0 is the first; negative ones count from the end")
    reduction: Literal["sample", "token"] = Field("sample", description="mean over sequences, or over tokens")
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss")

    @model_validator(mode="after")
    def _check(self) -> RelationKL:
        if wrong := _mistake(self.relations, self.heads):
            raise ValueError(wrong)
        return self

    def heads_of(self, relation: str) -> int | None:
        """None: the models' own."""
        if relation == "attention":
            return None
        return self.heads[relation] if isinstance(self.heads, dict) else self.heads

    def needs(self) -> Needs:
        from distill.taps import Tap

        read = {role for relation in self.relations for role in roles(relation)}
        sides = layers.number(self.student_layer), layers.number(self.teacher_layer)
        return Needs(*(frozenset(Tap(role, layer) for role in read) for layer in sides))

    def check(self, student, target) -> list[str]:
        wrong = layers.beyond([(self.student_layer, self.teacher_layer)], student, target)
        models = {"student": student, "teacher": target}
        if outside := untapped(models):
            return wrong + outside
        wrong += unlike(models)
        if "attention" in self.relations:
            wrong += unequal_attention(models)
        return wrong + self._head_mistakes(models)

    def _head_mistakes(self, models: dict) -> list[str]:
        """Relation heads must divide the width of both sides of the pair, in both models."""
        widths = {relation: {name: _widths(facts, relation) for name, facts in models.items()}
                  for relation in self.relations if relation != "attention"}  # fmt: skip
        unequal = [
            f"{relation}: the {name}'s {' and '.join(roles(relation))} are {left} and {right} wide; they need one width"
            for relation, sides in widths.items()
            for name, (left, right) in sides.items()
            if left != right
        ]
        every = {relation: {name: left for name, (left, _) in sides.items()} for relation, sides in widths.items()}
        return unequal or [
            f"{relation}: heads={self.heads_of(relation)} does not divide the {name}'s width {width}; "
            + self._fitting(relation, every)
            for relation, sides in every.items()
            for name, width in sides.items()
            if width % self.heads_of(relation)
        ]

    def _fitting(self, relation: str, every: dict[str, dict[str, int]]) -> str:
        """What would do for this relation, and if its number is that of others, for all of them."""
        own, heads = math.gcd(*every[relation].values()), self.heads_of(relation)
        if isinstance(self.heads, dict) or len(every) == 1:
            return divisors(own, heads)
        each = ", ".join(f"{r}: {_nearest(math.gcd(*sides.values()), heads)}" for r, sides in every.items())
        together = math.gcd(*(width for sides in every.values() for width in sides.values()))
        apart = any(math.gcd(*sides.values()) % heads == 0 for sides in every.values())
        return divisors(together, heads) + (f", or one number a relation, heads: {{{each}}}" if apart else "")

    def count(self, batch) -> dict:
        from distill.objectives.relation_sum import relation_count

        return dict.fromkeys(self.relations, relation_count(batch["segment_ids"], self.reduction))

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.segments import groups

        problems = groups(batch["segment_ids"])
        sides = (target, layers.number(self.teacher_layer)), (student, layers.number(self.student_layer))
        return {
            relation: related(relation, sides, problems, self.heads_of(relation), self.reduction)
            for relation in self.relations
        }


def related(relation: str, sides: tuple, problems, heads: int | None, reduction="sample", measure="kl"):
    """The sum of a relation of two sides, each a trace and a layer of it; `heads` None: the models' own."""
    from distill.objectives.relation_sum import beside, relation_sum
    from distill.objectives.segments import Sight

    tapped = [beside(*(trace.taps[role, layer] for role in roles(relation))) for trace, layer in sides]
    own = relation == "attention"
    windows = [trace.window[layer] for trace, layer in sides if own]
    return relation_sum(
        *tapped,
        problems,
        heads=heads or tapped[1][0].shape[1],
        sight=Sight(sides[1][0].causal, min(filter(None, windows), default=None)),
        reduction=reduction,
        scaling=tuple(trace.scaling[layer] for trace, layer in sides) if own else None,
        measure=measure,
    )


def roles(relation: str) -> tuple[str, str]:
    left, right = "qk" if relation == "attention" else relation
    return ROLES[left], ROLES[right]


def _mistake(relations: tuple[str, ...], heads) -> str | None:
    if len(set(relations)) < len(relations):
        return "relations: each at most once"
    headed = [relation for relation in relations if relation != "attention"]
    if isinstance(heads, dict) and set(heads) != set(headed):
        return f"heads: a number for each of {', '.join(headed) or 'no relation'}, found {', '.join(heads) or 'none'}"
    if headed and heads is None:
        return f"heads: how many relation heads {', '.join(headed)} are split into"
    return None


def untapped(models: dict) -> list[str]:
    """Models of which queries, keys and values cannot be had."""
    return [
        f"the {name}'s attention ({facts.family}) does not pass through the attention interface of "
        "transformers, so its queries, keys and values cannot be had; hidden states and logits can"
        for name, facts in models.items()
        if facts.heads is None
    ]


def unlike(models: dict) -> list[str]:
    """One sees the tokens behind, the other does not."""
    student, teacher = models.values()
    sees = {True: "only the tokens before", False: "all tokens"}
    told = f"the student sees {sees[student.causal]}, the teacher {sees[teacher.causal]}"
    return [told] if student.causal != teacher.causal else []


def unequal_attention(models: dict) -> list[str]:
    """Distributions of the models' own heads cannot be had, or there are not as many of them."""
    wrong = [
        f"attention: {facts.family} {INEXACT[facts.family]}, so its attention cannot be rebuilt; "
        "the relations qq, kk and vv can"
        for facts in models.values()
        if facts.family in INEXACT
    ]
    wrong = list(dict.fromkeys(wrong))  # two of one family: said once
    heads = {name: facts.heads for name, facts in models.items()}
    if heads["student"] != heads["teacher"]:
        wrong.append(
            f"attention: the student has {heads['student']} heads, the teacher {heads['teacher']}; "
            "it needs equal numbers, the relations qq, kk and vv do not"
        )
    return wrong


def _widths(facts, relation: str) -> tuple[int, int]:
    """Widths of both sides; in a mixed pair grouped keys and values are repeated for their queries."""
    pair = roles(relation)
    heads = {"query": facts.heads, "key": facts.kv_heads, "value": facts.kv_heads}
    most = max(heads[role] for role in pair)
    return tuple(facts.widths[role] * most // heads[role] for role in pair)


def _nearest(width: int, heads: int) -> int:
    return next(n for n in range(heads, 0, -1) if width % n == 0)
