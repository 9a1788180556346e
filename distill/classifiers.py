"""Models that say which class a row of text is of: their heads, and whose classes these are.

Any family for which transformers has a `...ForSequenceClassification`. The names of the classes stand in config.json
(`id2label`); they, and not their numbers, are what two models or a model and a corpus must have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill import layout, loading
from distill.heads import Logits
from growth.console import bar
from growth.errors import UserError

if TYPE_CHECKING:
    from distill.corpus.store import Corpus

ROWS = 32  # of one forward pass
OTHER_PROBLEMS = ("regression", "multi_label_classification")  # of the same classes of transformers


def names(config) -> list[str] | None:
    """The classes that a checkpoint tells apart, in the order of its logits; None without a classification head."""
    if loading.own_head(config) != "classify":
        return None
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def known(path: Path) -> list[str]:
    """The classes of a checkpoint in the order of its logits."""
    config = loading.configuration(path)
    found = names(config)
    if found is None:
        raise UserError(f"{path} has no classification head")
    if len(found) < 2 or config.problem_type in OTHER_PROBLEMS:
        what = (config.problem_type or "regression").replace("_", " ")
        raise UserError(f"{path}: its head is for {what}, not for one class out of several")
    return found


def named(config, classes: Sequence[str]):
    """The same config, with a place for each of these classes in the head."""
    config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
    return config


def load(path: Path, classes: Sequence[str], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A checkpoint with a classification head, its logits in the order of `classes`; refused if it has other ones."""
    has = known(path)
    if wrong := differ(has, classes):
        raise UserError(f"{path}: {wrong}")
    return _reordered(loading.load(path, "classify", dtype), has, list(classes))


def differ(has: Sequence[str], asked: Sequence[str]) -> str | None:
    """What is wrong where two lists of classes are not the same but for their order."""
    if sorted(has) == sorted(asked):
        return None
    return f"the head tells {_listed(has)} apart, but the classes here are {_listed(asked)}"


def _listed(classes: Sequence[str]) -> str:
    more = f" and {len(classes) - 8} more" if len(classes) > 8 else ""
    return f"{len(classes)} ({', '.join(classes[:8])}{more})"


def _reordered(model: nn.Module, has: list[str], classes: list[str]) -> nn.Module:
    with torch.no_grad():
        for p in last_layer(model).parameters():
            p.copy_(p[[has.index(name) for name in classes]].clone())
    named(model.config, classes)
    return model


def last_layer(model: nn.Module) -> nn.Linear:
    """What makes the logits of the classes."""
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels][-1]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Logits:
    """Of the classes of every row, [B, C]: one document a row, padded on whichever side.

    Encoders make them of the first token (or the mean), decoders of the last one. Both are found by the segments, not
    by an id that would stand for padding.
    """
    if bool((batch["segment_ids"] > 1).any()):
        raise UserError("a row of several documents has no class of its own; corpora need packed: false")
    batch = _flush(batch)
    inputs = layout.inputs(model, batch)
    if not loading.causal(model.config):
        return Logits(model(**inputs, return_dict=True).logits)
    hidden = model.base_model(**inputs).last_hidden_state  # [B, T, D]
    last = (batch["segment_ids"] > 0).sum(1).clamp_min(1) - 1
    return Logits(alone(model)(hidden[torch.arange(len(last), device=last.device), last]))


def alone(model: nn.Module) -> nn.Linear:
    """The head of a decoder, which is one layer."""
    others = [m for m in model.children() if m is not model.base_model and any(True for _ in m.parameters())]
    if others != [last_layer(model)]:
        raise UserError(f"{type(model).__name__}: the head of a decoder that classifies is more than one layer here")
    return last_layer(model)


def over(model: nn.Module, corpus: Corpus, rows: Sequence[int]) -> Tensor:
    """The same for rows of a corpus, in their order: [N, C] float32 on the CPU. Rows of like lengths run together."""
    order = sorted(range(len(rows)), key=lambda i: int((corpus.row(rows[i])[1] > 0).sum()))
    groups = [[rows[i] for i in order[first : first + ROWS]] for first in range(0, len(order), ROWS)]
    with bar(len(rows), f"classifying {corpus.path.name}") as advance:
        found = []
        for group in groups:
            found.append(_of_rows(model, corpus, group))
            advance(len(group))
    return torch.cat(found)[torch.tensor(order).argsort()]


@torch.inference_mode()
def _of_rows(model: nn.Module, corpus: Corpus, rows: Sequence[int]) -> Tensor:
    ids, segments = (torch.from_numpy(values) for values in corpus.block(rows))
    longest = int((segments > 0).sum(1).max())  # what is behind it in every row is padding
    batch = {"input_ids": ids[:, :longest], "segment_ids": segments[:, :longest]}
    return logits(model, {name: x.to(model.device) for name, x in batch.items()}).whole().float().cpu()


def _flush(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens with all padding behind them."""
    order = (batch["segment_ids"] == 0).long().argsort(dim=1, stable=True)
    return {key: batch[key].gather(1, order) for key in ("input_ids", "segment_ids")}
