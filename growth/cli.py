"""`growth`: commands on checkpoints at rest. Each is one function of the library."""

from __future__ import annotations

import click

from growth.console import Commands, count, say, size, table
from growth.errors import UsageError, UserError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="distill-growth")
def main() -> None:
    """Models at rest: look into checkpoints, make them deeper, wider or smaller, and say what stays the same."""


def writing(command):
    """The options of every command that writes a checkpoint."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace DST if it is a checkpoint."),
        click.option("--check", is_flag=True, help="Read all values first and refuse NaN and infinity."),
        click.option("--shard-size", default="5GB", show_default=True, help="Largest file."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("src", default=".")
def inspect(src: str) -> None:
    """Family, axes, parameters, tied tensors and lineage of the checkpoint SRC."""
    from growth.inspect import inspect

    found = inspect(src)
    kinds = ", ".join(f"{n} x {dtype}" for dtype, n in found.dtypes.items())
    facts = [
        ("family", f"{found.family} ({', '.join(found.architectures) or 'no architecture named'})"),
        ("axes", ", ".join(f"{axis} {n}" for axis, n in found.sizes.items())),
        ("parameters", count(found.parameters)),
        *((f"  {part}", count(n)) for part, n in found.parts.items()),
        ("stored", f"{size(found.nbytes)} in {found.files} file{'s' * (found.files > 1)}, {kinds}"),
        *(("tied", f"{head} = {source}") for head, source in found.tied.items()),
        *(("dropped", name) for name in found.buffers),
        *_story(found.lineage),
    ]
    table(["fact", "value"], facts, title=str(found.path))


def _story(lineage: dict) -> list[tuple[str, str]]:
    if not lineage:
        return []
    sources = ", ".join(source["path"] for source in lineage["sources"])
    return [("made by", f"{lineage['operator']} of {sources}"), ("preserves", lineage["preserves"])]


@main.command()
@click.argument("src", default=".")
@click.argument("dst", required=False)
@click.option("--factor", default=2, show_default=True, help="How many times as deep.")
@click.option("--order", default="stack", show_default=True, help="stack, interleave, or layers such as 0-23,8-31.")
@writing
def stack(src: str, dst: str | None, factor: int, order: str, shard_size: str, check: bool, overwrite: bool) -> None:
    """Repeat the whole depth of SRC into DST, or beside SRC as <name>-x2. The function changes."""
    from growth.depth import stack

    _done(stack(src, dst, factor=factor, order=order, shard_size=shard_size, check=check, overwrite=overwrite))


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--layers", type=int, help="How many blocks, evenly spread.")
@click.option("--after", help="Behind these layers instead, such as 3,7,11.")
@writing
def insert(
    src: str, dst: str, layers: int | None, after: str | None, shard_size: str, check: bool, overwrite: bool
) -> None:
    """Insert blocks that start as the identity: the function stays exactly the same."""
    from growth.depth import insert

    behind = None if after is None else numbers(after)
    _done(insert(src, dst, layers=layers, after=behind, shard_size=shard_size, check=check, overwrite=overwrite))


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--layers", required=True, help="A number (evenly spaced, with the last) or a list such as 0,1,5.")
@writing
def cut(src: str, dst: str, layers: str, shard_size: str, check: bool, overwrite: bool) -> None:
    """Keep some layers of SRC."""
    from growth.cut import cut

    chosen = numbers(layers) if "," in layers else numbers(layers)[0]
    _done(cut(src, dst, chosen, shard_size=shard_size, check=check, overwrite=overwrite))


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--hidden", type=int, help="Channels of the residual stream.")
@click.option("--heads", type=int, help="Query heads.")
@click.option("--kv-heads", type=int, help="Key-value heads.")
@click.option("--ffn", type=int, help="Neurons of the feed-forward part.")
@click.option("--how", default="exact", show_default=True, help="exact, fpi, aki, weighted, zero or mean.")
@click.option("--noise", default=0.01, show_default=True, help="Between copies; the function does not see it.")
@click.option("--seed", default=0, show_default=True)
@writing
def widen(
    src: str,
    dst: str,
    hidden: int | None,
    heads: int | None,
    kv_heads: int | None,
    ffn: int | None,
    how: str,
    noise: float,
    seed: int,
    shard_size: str,
    check: bool,
    overwrite: bool,
) -> None:
    """Make SRC wider, keeping what it computes wherever that is possible."""
    from growth.width import widen

    asked = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}
    way = {"how": how, "noise": noise, "seed": seed}
    _done(widen(src, dst, **asked, **way, shard_size=shard_size, check=check, overwrite=overwrite))


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--dtype", default="float64", show_default=True, help="float32 is what users will run.")
@click.option("--seed", default=0, show_default=True, help="Of the tokens.")
def verify(a: str, b: str, dtype: str, seed: int) -> None:
    """Compare what A and B compute, and B's promise with it. Exit code 1 when a promise is broken."""
    from growth.verify import verify

    found = verify(a, b, dtype=dtype, seed=seed)
    facts = [
        ("largest difference", f"{found.max_abs:.3g}"),
        ("mean difference", f"{found.mean_abs:.3g}"),
        ("largest output of A", f"{found.largest:.3g}"),
        ("computed in", f"{found.dtype} on {found.tokens} random tokens"),
        ("equal up to rounding", "yes" if found.exact else "no"),
        ("promised", found.promised),
    ]
    table(["fact", "value"], facts)
    if not found.kept:
        raise UserError(f"{b} promises to compute what {a} does, and does not")


@main.command()
@click.option("--params", type=float, required=True, help="Parameters of the big model, such as 7e9.")
@click.option("--tokens", type=float, required=True, help="Tokens that it would see from scratch, such as 300e9.")
@click.option("--factor", default=4, show_default=True, help="How many times as deep as the small model.")
def plan(params: float, tokens: float, factor: int) -> None:
    """When to grow, what it costs, and what was saved where it was measured."""
    from growth.plan import SPEED_UP, plan, saved

    made = plan(params, tokens, factor)
    facts = [
        ("small model", f"{count(params / factor)} parameters: the same width, 1/{factor} of the layers"),
        ("train it on", f"{count(made.small_tokens)} tokens ({made.small_share:.1%} of the cost from scratch)"),
        ("then", f"growth stack SMALL BIG --factor {factor}; fresh optimizer, new warm-up, data not seen before"),
        ("from scratch", f"{made.flops:.3g} FLOPs (6 N D)"),
        ("memory", f"{size(made.training_bytes)} for weights, gradient and AdamW in mixed precision, over all ranks"),
        ("published", f"{SPEED_UP:.1%} speed-up in FLOPs for 7B, which is {saved(SPEED_UP):.0%} of them saved"),
        ("yours", "not known before a run from scratch at equal FLOPs stands beside it"),
    ]
    table(["fact", "value"], facts)


def numbers(text: str) -> list[int]:
    """`0,1,5` -> [0, 1, 5]."""
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UsageError(f"{text!r}: numbers with commas between them are expected") from None


def _done(path) -> None:
    from growth.files import read_json
    from growth.writer import LINEAGE

    words = {
        "exact": "computes the same as before",
        "approximate": "computes nearly the same as before; `growth verify` says how nearly",
        "no": "computes something else than before: train it",
    }
    say(f"{path}: {words[read_json(path / LINEAGE)['preserves']]}")
