"""What no table knows: tensors without a place, architectures without a table; and the rows that would help."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from growth import families
from growth.errors import UserError
from growth.families.table import Family

SHOWN = 3  # rows to add


def unknown_tensors(family: Family, prefix: str, unknown: list[str], checkpoint: Any) -> UserError:
    """Of a family that has a table."""
    return UserError(
        f"{checkpoint.path} has {tensors(len(unknown))} that {family.name}'s table does not know, first: "
        f"{unknown[0]} {list(checkpoint[unknown[0]].shape)}; a row to add in growth/families/{family.model_type}.py"
        f" would be like {_rows(family, prefix, unknown, checkpoint)}"
    )


def unknown_family(error: UserError, checkpoint: Any) -> UserError:
    """The error with the family whose tensors are named most alike, as the one to start from."""
    kind = checkpoint.config.get("model_type")
    ways = [way for family in families.FAMILIES.values() for way in _known(family, checkpoint)]
    known, family, prefix = max(ways, key=lambda way: len(way[0]), default=(set(), None, ""))
    if 2 * len(known) < len(checkpoint):
        return error
    unknown = [name for name in checkpoint if name not in known]
    alike = f"{error}; {len(known)} of its {tensors(len(checkpoint))} are named as those of {family.name}"
    start = f"replace({family.model_type.upper()}, model_type={kind!r})"
    if not unknown:
        return UserError(f"{alike}: try {start}, and `growth verify` on what comes of it")
    rows = _rows(family, prefix, unknown, checkpoint)
    return UserError(f"{alike}: start from {start}; not {unknown[0]} {list(checkpoint[unknown[0]].shape)}: {rows}")


def _known(family: Family, checkpoint: Any) -> Iterable[tuple[set[str], Family, str]]:
    """The names that a family has a place for, with each of its prefixes; nothing if its config keys are not there."""
    for prefix in (*family.prefixes, ""):
        try:
            yield family.slots(checkpoint.config, prefix).keys() & set(checkpoint), family, prefix
        except UserError:
            return


def tensors(n: int) -> str:
    return "1 tensor" if n == 1 else f"{n} tensors"


def _rows(family: Family, prefix: str, unknown: Iterable[str], checkpoint: Any) -> str:
    """A line of a table for each kind of tensor."""
    sizes = family.sizes_of(checkpoint.config)
    rows = dict.fromkeys(_row(sizes, name.removeprefix(prefix), checkpoint[name].shape) for name in unknown)
    return ", ".join([*rows][:SHOWN]) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def _row(sizes: Mapping[str, int | None], name: str, shape: tuple[int, ...]) -> str:
    axis = {size: axis for axis, size in reversed(sizes.items())}
    module = re.sub(r"\.\d+\.", ".{layers}.", name.removesuffix(".weight"))
    return f'"{module}": "{" <- ".join(axis.get(n, "?") for n in shape)}"'
