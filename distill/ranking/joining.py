"""A query and a passage as one text, as their tokenizer would join them."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.ranking.encoding import Texts, flush
from distill.ranking.kinds import ClassifierKind, ColBERTKind, CrossKind, Join, RankerKind
from growth.errors import UserError


def join_of(tokenizer) -> Join:
    """How a tokenizer joins two texts, found by trying."""
    query, passage = (tokenizer(text)["input_ids"] for text in ("a b", "c d e"))
    pair = tokenizer("a b", "c d e")
    ids, types = pair["input_ids"], pair.get("token_type_ids")
    rest = ids[len(query) :]
    skip = next((n for n in range(len(passage)) if rest[len(rest) - len(passage) + n :] == passage[n:]), None)
    if ids[: len(query)] != query or skip is None:
        raise UserError("this tokenizer joins two texts in a way of its own; a Join must be given")
    end = len(rest) - len(passage) + skip
    return Join(between=tuple(rest[:end]), skip=skip, typed=types is not None and types[-1] == 1)


def fitted(kind: RankerKind, tokenizer) -> RankerKind:
    """With what only the tokenizer knows: how two texts become one, the id of [MASK]."""
    if isinstance(kind, CrossKind | ClassifierKind):
        return kind.model_copy(update={"join": join_of(tokenizer)})
    if isinstance(kind, ColBERTKind) and kind.masks:
        if tokenizer.mask_token_id is None:
            raise UserError(f"masks: {kind.masks} in queries, and this tokenizer has no mask token; leave them out")
        return kind.model_copy(update={"mask_token": tokenizer.mask_token_id})
    return kind


def joined(queries: Texts, passages: Texts, pairs: Tensor, join: Join) -> Texts:
    """One text for each pair of rows [P, 2]; what ids stand for does not matter."""
    q, p = pairs.unbind(1)
    after = passages.ids[p, join.skip :]  # [P, Tp - skip]
    between = after.new_tensor(join.between).expand(len(pairs), -1)
    real = torch.cat([queries.real[q], torch.ones_like(between, dtype=torch.bool), passages.real[p, join.skip :]], 1)
    ids = torch.cat([queries.ids[q], between, after], 1)
    types = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - after.shape[1]).long().expand_as(ids)
    return flush(ids, real, types if join.typed else None)
