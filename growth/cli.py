"""`growth`: commands on checkpoints at rest. Each is one function of the library."""

from __future__ import annotations

import functools
from dataclasses import fields

import click

from growth.console import Commands, count, say, size, table
from growth.errors import UsageError, UserError
from growth.learn import LEARNED, RATE, STEPS
from growth.learn import learn as learned
from growth.sizes import Sizes

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="distill-growth")
def main() -> None:
    """Models at rest: look into checkpoints, make them deeper, wider or smaller, and say what stays the same."""


def writing(command):
    """The options of every command that writes a checkpoint, as one value."""

    @functools.wraps(command)
    def run(shard_size: str, check: bool, overwrite: bool, **asked):
        from growth.operate import Output

        _done(command(**asked, output=Output(shard_size, check, overwrite)))

    for option in (
        click.option("--overwrite", is_flag=True, help="Replace DST if it is a checkpoint."),
        click.option("--check", is_flag=True, help="Read all values first and refuse NaN and infinity."),
        click.option("--shard-size", default="5GB", show_default=True, help="Largest file."),
    ):
        run = option(run)
    return run


def sized(*names: str):
    """An option for each of these sizes."""

    def options(command):
        for one in reversed([one for one in fields(Sizes) if one.name in names]):
            option = f"--{one.name.replace('_', '-')}"
            command = click.option(option, type=int, metavar="N", help=one.metadata["help"])(command)
        return command

    return options


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
        *([("masks", _alive(found))] if found.masks else []),
        *(("tied", f"{head} = {source}") for head, source in found.tied.items()),
        *(("dropped", name) for name in found.buffers),
        *(fact for story in found.history for fact in _story(story)),
    ]
    table(["fact", "value"], facts, title=str(found.path))


def _alive(found) -> str:
    kept, of = found.alive
    return f"{kept / of:.2%} of {count(of)} weights in {len(found.masks)} tensors are alive"


def _story(lineage: dict) -> list[tuple[str, str]]:
    sources = ", ".join(source["path"] for source in lineage["sources"])
    new = [f"{axis} {part}" for axis, part in lineage.get("new", {}).items() if part]
    facts = [("made by", f"{lineage['operator']} of {sources}"), ("  preserves", lineage["preserves"])]
    return facts + ([("  new", ", ".join(new))] if new else [])


@main.command()
@click.argument("src", default=".")
@click.argument("dst", required=False)
@click.option("--factor", default=2, show_default=True, help="How many times as deep.")
@click.option("--order", default="stack", show_default=True, help="stack, interleave, or layers such as 0-23,8-31.")
@click.option("--how", default="copy", show_default=True, help="What new layers hold: copy, zero or random.")
@writing
def stack(src, dst, output, **asked):
    """Repeat the whole depth of SRC into DST, or beside SRC as <name>-x2. Copies change the function."""
    from growth.depth import stack

    return stack(src, dst, **asked, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--layers", type=int, help="How many blocks, evenly spread.")
@click.option("--after", help="Behind these layers instead, such as 3,7,11.")
@click.option("--approximate", is_flag=True, help="Nearly the identity, where it cannot be had (BERT's norms).")
@writing
def insert(src, dst, after, output, **asked):
    """Insert blocks that start as the identity: the function stays exactly the same."""
    from growth.depth import insert

    return insert(src, dst, after=None if after is None else numbers(after), **asked, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--layers", help="Evenly spaced, with the last.")
@click.option("--hidden", help="Channels of the residual stream.")
@click.option("--heads", help="Query heads.")
@click.option("--kv-heads", help="Key-value heads.")
@click.option("--ffn", help="Neurons of the feed-forward part.")
@click.option("--vocab", help="Tokens, the first ones.")
@click.option("--undo", is_flag=True, help="Keep what SRC was grown from.")
@writing
def cut(src, dst, output, undo, **asked):
    """Keep a part of SRC: of anything a number (the largest weights stay) or a list such as 0,1,5."""
    from growth.cut import cut
    from growth.undo import undo as undone

    if undo and any(part is not None for part in asked.values()):
        raise UsageError("--undo says all: nothing else can be asked for with it")
    if undo:
        return undone(src, dst, output=output)
    return cut(src, dst, **{name: part if part is None else some(part) for name, part in asked.items()}, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@sized(*vars(Sizes()))
@click.option("--how", default="exact", show_default=True, help="exact, fpi, aki, weighted, mean, zero or random.")
@click.option("--noise", default=0.01, show_default=True, help="Between copies; the function does not see it.")
@click.option("--seed", default=0, show_default=True)
@writing
def widen(src, dst, output, **asked):
    """Make SRC wider, keeping what it computes wherever that is possible."""
    from growth.width import widen

    return widen(src, dst, **asked, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--text", required=True, help="A file of plain text, by which the maps are trained.")
@click.option("--factor", default=1, show_default=True, help="How many times as deep.")
@click.option("--order", default="stack", show_default=True, help="What maps of depth start from, as in `stack`.")
@sized(*LEARNED)
@click.option("--start", default="copies", show_default=True, help="Of maps of width; random: as LiGO was published.")
@click.option("--steps", default=STEPS, show_default=True, help="Of training the maps.")
@click.option("--lr", default=RATE, show_default=True, help="Of the maps.")
@click.option("--seed", default=0, show_default=True)
@writing
def learn(src, dst, text, output, **asked):
    """Make SRC deeper or wider through maps that are trained for some steps (LiGO). The function changes."""
    from growth.batches import batches

    read = batches(src, text, number=asked["steps"], seed=asked["seed"])
    return learned(src, dst, batches=read, **asked, output=output)


@main.command()
@click.argument("sources", nargs=-1, required=True)
@click.argument("dst")
@click.option("--how", default="linear", show_default=True, help="linear, task or slerp.")
@click.option("--weights", help="One for each source, such as 0.3,0.7; equal ones by default.")
@click.option("--base", help="What the sources were trained from, for task vectors.")
@click.option("--lines", type=float, help="Factor of task vectors in the first layer, rising to 1 in the last.")
@writing
def merge(sources, dst, weights, output, **asked):
    """Make one checkpoint DST of several SOURCES."""
    from growth.merge import merge

    shares = None if weights is None else numbers(weights, float)
    return merge(sources, dst, weights=shares, **asked, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--experts", default=8, show_default=True)
@click.option("--top", default=2, show_default=True, help="Experts for every token.")
@click.option("--noise", default=0.0, show_default=True, help="Between experts; the function sees it.")
@click.option("--seed", default=0, show_default=True)
@writing
def upcycle(src, dst, output, **asked):
    """Make SRC a mixture of experts that computes the same."""
    from growth.upcycle import upcycle

    return upcycle(src, dst, **asked, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--size", type=int, help="Tokens, new ones behind the old.")
@click.option("--vectors", help="Other tokens: a safetensors file with same, and with old and new for aligned vectors.")
@click.option("--how", help="mean (with --size the default), normal or multivariate; with --vectors wechsel or ofa.")
@click.option("--rank", default=400, show_default=True, help="Of ofa's factors.")
@click.option("--seed", default=0, show_default=True)
@writing
def vocabulary(src, dst, output, **asked):
    """Give SRC more tokens, or another vocabulary."""
    from growth.vocabulary import vocabulary

    return vocabulary(src, dst, **asked, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--sparsity", type=float, help="Share of each matrix that is zero: 0.75, or as --pattern says.")
@click.option("--how", default="random", show_default=True, help="Which weights stay: random or magnitude.")
@click.option("--scope", default="attention,ffn", show_default=True, help="Matrices of these parts.")
@click.option("--pattern", help="Such as 2:4, two of every four along what is summed over.")
@click.option(
    "--rescale", default="none", show_default=True, help="none, or sqrt_density to keep the scale of outputs."
)
@click.option("--seed", default=0, show_default=True)
@writing
def sparsify(src, dst, scope, output, **asked):
    """Zero most weights of SRC's matrices, and say which in masks.safetensors beside the weights."""
    from growth.sparsity import sparsify

    return sparsify(src, dst, scope=scope.split(","), **asked, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@writing
def densify(src, dst, output):
    """Drop the masks of SRC: the same weights, of which dead ones may grow."""
    from growth.sparsity import densify

    return densify(src, dst, output=output)


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--shard-size", default="5GB", show_default=True, help="Largest file.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a checkpoint.")
def pack(src: str, dst: str, shard_size: str, overwrite: bool) -> None:
    """Keep of the sparse checkpoint SRC its live weights and its masks alone, for the disk."""
    from growth.operate import Output
    from growth.packing import pack, stored

    made = pack(src, dst, output=Output(shard_size, overwrite=overwrite))
    say(f"{made}: {size(stored(made))} for the {size(stored(src))} of {src}")


@main.command()
@click.argument("src")
@click.argument("dst")
@click.option("--shard-size", default="5GB", show_default=True, help="Largest file.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a checkpoint.")
def unpack(src: str, dst: str, shard_size: str, overwrite: bool) -> None:
    """Make of what was packed the checkpoint that it was, to the last bit."""
    from growth.operate import Output
    from growth.packing import unpack

    say(f"{unpack(src, dst, output=Output(shard_size, overwrite=overwrite))}: as it was before it was packed")


@main.command()
@click.argument("src", default=".")
@click.option("--length", default=512, show_default=True, help="Tokens of a sequence, for the FLOPs.")
def masks(src: str, length: int) -> None:
    """What the masks of SRC keep, compared with its weights to the last bit, and the FLOPs that this models."""
    from growth.sparse_facts import facts, kept

    table(["matrices", "tensors", "weights", "alive"], [(n, k, count(w), f"{a:.2%}") for n, k, w, a in kept(src)])
    table(["fact", "value"], facts(src, length))


@main.command()
@click.argument("snapshot")
@click.argument("grown")
@click.argument("dst")
def moments(snapshot: str, grown: str, dst: str) -> None:
    """Make the optimizer state SNAPSHOT of a source one of the checkpoint GROWN from it."""
    from growth.moments import moments

    say(f"{moments(snapshot, grown, dst)}: masters, both moments and learning rates of {grown}")


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--dtype", default="float64", show_default=True, help="float32 is what users will run.")
@click.option("--seed", default=0, show_default=True, help="Of the tokens.")
@click.option("--text", help="Also on real text, a UTF-8 file: the loss of A and of B (without a head: their vectors).")
def verify(a: str, b: str, dtype: str, seed: int, text: str | None) -> None:
    """Compare what A and B compute, and B's promise with it. Exit code 1 when a promise is broken."""
    from growth.verify import quiet, verify

    quiet()
    read = [] if text is None else _read(a, b, text)
    found = verify(a, b, dtype=dtype, seed=seed)
    facts = [
        ("largest difference", f"{found.max_abs:.3g}"),
        ("mean difference", f"{found.mean_abs:.3g}"),
        ("largest output of A", f"{found.largest:.3g}"),
        ("computed in", f"{found.dtype} on {found.tokens} random tokens"),
        ("equal up to rounding", "yes" if found.exact else "no"),
        ("promised", found.promised),
        *read,
    ]
    table(["fact", "value"], facts)
    if not found.kept:
        raise UserError(f"{b} promises to compute what {a} does, and does not")


def _read(a: str, b: str, text: str) -> list[tuple[str, str]]:
    from growth.reading import Likeness, on_text

    read = on_text(a, b, text)
    if isinstance(read, Likeness):
        return [
            ("text", f"{text}, {read.passages} passages, as means of hidden states in float32"),
            ("cosine of A's and B's", f"{read.cosine:.6f} on average, {read.least:.6f} at least"),
            ("between passages", f"cosines change by {read.moved:.2g} on average, {read.most:.2g} at most"),
        ]
    said = [f"{loss.nats:.6f} nats a token, perplexity {loss.perplexity:.5g}" for loss in read]
    counts = " and ".join(dict.fromkeys(f"{loss.tokens:,} {loss.kind} tokens" for loss in read))
    return [("text", f"{text}, {counts}, in float32"), ("loss of A", said[0]), ("loss of B", said[1])]


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


def numbers(text: str, kind: type = int) -> list:
    """`0,1,5` -> [0, 1, 5]."""
    try:
        return [kind(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise UsageError(f"{text!r}: numbers with commas between them are expected") from None


def some(text: str) -> int | list[int]:
    """`6` -> 6, `0,1,5` -> [0, 1, 5]; `5,` is a list of one."""
    return numbers(text) if "," in text else numbers(text)[0]


def _done(path) -> None:
    from growth.files import read_json
    from growth.writer import LINEAGE

    words = {
        "exact": "computes the same as before",
        "approximate": "computes nearly the same as before; `growth verify` says how nearly",
        "no": "computes something else than before: train it",
    }
    say(f"{path}: {words[read_json(path / LINEAGE)['preserves']]}")
