"""Model cards: what an exported directory is, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from distill.ranking.kinds import ABOUT, ENCODER
from growth import console
from growth.files import read_json, write_text

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LOADS = "modules.json"  # where sentence-transformers loads the directory
PIPELINES = {"ForMaskedLM": "fill-mask", "ForCausalLM": "text-generation", "LMHeadModel": "text-generation",
             "ForSequenceClassification": "text-classification"}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a card tells; `table` and `worth` are those of the report."""

    name: str
    about: str
    recipe: str
    stage: dict  # as the recipe has it
    teachers: dict[str, list[str]]  # name -> where it comes from
    corpus: dict = field(default_factory=dict)  # name, source, digest
    training: dict = field(default_factory=dict)  # steps, tokens, seconds, frozen: as far as they are known
    table: str = ""
    worth: list[str] = field(default_factory=list)


def write_all(run: Path, report: dict) -> None:
    """A card for the model of every training stage and seed of a run."""
    for stage in report["stages"]:
        for directory in sorted([run / stage["id"], *run.glob(f"{stage['id']}@*")]):
            if any((directory / "model" / name).is_file() for name in ("config.json", ABOUT)):
                card(directory / "model", facts(run, directory, stage, report))


def facts(run: Path, directory: Path, stage: dict, report: dict) -> Facts:
    from distill.report.words import markdown_table, sentences, table

    train = stage["train"]
    corpus = train["data"] if isinstance(train["data"], str) else train["data"]["from"]
    state = directory / "stage.json"
    _, _, seed = directory.name.partition("@")
    manifest = _corpus(run, corpus, seed) / "manifest.json"
    return Facts(
        name=f"{report['recipe']}-{directory.name}",
        about=report["about"],
        recipe=report["recipe"],
        stage=stage,
        teachers={name: _taught(target, report["models"]) for name, target in train["targets"].items()},
        corpus={
            "name": corpus,
            "source": _text(corpus, report),
            "digest": read_json(manifest).get("digest", "") if manifest.is_file() else "",
        },
        training=(read_json(state).get("metrics") or {}) if state.is_file() else {},
        table=markdown_table(*table(report, mark="**")),
        worth=sentences(report),
    )


def _corpus(run: Path, name: str, seed: str) -> Path:
    """The directory of a corpus or collection, or of what a data stage made (for this seed) of one."""
    made = [run / stage / what for stage in (f"{name}@{seed}", name) for what in ("corpus", "groups")]
    return next((path for path in [*made, run / "collections" / name] if path.is_dir()), run / "corpora" / name)


def _text(corpus: str, report: dict) -> str:
    """Where a corpus comes from, through data stages if there are any."""
    if corpus in report["corpora"]:
        source = report["corpora"][corpus]["source"]
        return source if isinstance(source, str) else ", ".join(part["source"] for part in source.values())
    if corpus in report["collections"]:
        spec = report["collections"][corpus]
        return " with ".join(spec[key] for key in ("source", "triples") if spec.get(key))
    stage = report["refined"][corpus]
    ops = ", then ".join(_named(op) for op in stage["ops"])
    return f"{_text(stage['from'], report)} through {ops}"


def _taught(target: dict, models: dict) -> list[str]:
    """Where a target's values come from."""
    if "ema" in target:
        return ["the moving average of the student itself"]
    if "cache" in target:
        return [f"what stage {target['cache']} of the same recipe has kept of a teacher"]
    references = [target["from"]] if "from" in target else target["ensemble"]
    return [source for reference in references for source in _sources(reference, models)]


def _sources(reference: str, models: dict) -> list[str]:
    """Where a teacher comes from: the sources of a model, or the stage that made it."""
    found = models[reference]["from"] if reference in models else f"stage {reference} of the same recipe"
    return [found] if isinstance(found, str) else found


def card(directory: Path, facts: Facts) -> Path:
    """Write README.md into a model directory."""
    ranker = read_json(directory / ABOUT) if (directory / ABOUT).is_file() else None
    config = read_json((directory / ENCODER if ranker else directory) / "config.json")
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    loads = (directory / LOADS).is_file()
    parts = [
        _front_matter(_matter_of_ranker(ranker, loads) if ranker else _matter(architecture), facts),
        f"# {facts.name}",
        facts.about,
        _origin(facts),
        _scoring(ranker, architecture) if ranker else "",
        _table(facts),
        "## Training",
        *_training(facts),
        "## Use",
        *(_use_of_ranker(ranker, loads) if ranker else _use(architecture)),
        "## Licence",
        _licence(facts),
    ]
    write_text(directory / "README.md", "\n\n".join(part for part in parts if part) + "\n")
    return directory / "README.md"


def _use(architecture: str) -> Iterator[str]:
    yield (
        f"```python\nfrom transformers import AutoTokenizer, {architecture}\n\n"
        f'model = {architecture}.from_pretrained("path/to/this/directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")\n```'
    )


def _scoring(ranker: dict, architecture: str) -> str:
    """What scores, in a sentence."""
    how = {
        "cross_encoder": "a linear layer over query and passage read as one text",
        "classifier": "its classification head over query and passage read as one text",
        "dual_encoder": f"{ranker.get('similarity')} of one vector a text ({ranker.get('pooling')} pooling)",
        "colbert": f"each token of a query finds its best one of the passage ({ranker.get('similarity')})",
        "prett": "layers that read query and passage apart, then together",
        "tk": "kernels over the cosines of contextualised words",
    }[ranker["kind"]]
    return (
        f"It scores how well a passage answers a query: {how}. `{ENCODER}/` is a plain `{architecture}` with its "
        f"tokenizer. Queries are cut at {ranker['query_length']} tokens, passages at {ranker['passage_length']}; "
        "a score orders the passages of one query and is no probability."
    )


LIBRARY = {  # of sentence-transformers: a class, and how it scores
    "cross_encoder": ("CrossEncoder", "model.predict([(query, passage)])"),
    "classifier": ("CrossEncoder", "model.predict([(query, passage)])"),
    "dual_encoder": ("SentenceTransformer", "{both}"),
    "colbert": ("MultiVectorEncoder", "{both}"),
}
BOTH = "model.similarity(model.encode_query([query]), model.encode_document([passage]))"


def _use_of_ranker(ranker: dict, loads: bool) -> Iterator[str]:
    texts = 'query, passage = "what is a token?", "A token is a piece of text that a model reads at once."\n'
    yield (
        f"```python\nfrom distill.ranking.opening import form, open_at\n\n{texts}"
        'ranker = open_at(form("path/to/this/directory"))\nprint(ranker.scores([(query, passage)]))\n```'
    )
    if loads:
        kind, scored = LIBRARY[ranker["kind"]]
        yield "sentence-transformers (6.2) loads the same directory:"
        yield (
            f"```python\nfrom sentence_transformers import {kind}\n\n{texts}"
            f'model = {kind}("path/to/this/directory")\nprint({scored.format(both=BOTH)})\n```'
        )


def _matter(architecture: str) -> dict:
    pipeline = next((name for ending, name in PIPELINES.items() if architecture.endswith(ending)), "feature-extraction")
    return {"library_name": "transformers", "pipeline_tag": pipeline, "tags": []}


def _matter_of_ranker(ranker: dict, loads: bool) -> dict:
    library = {"library_name": "sentence-transformers"} if loads else {}
    pipeline = "sentence-similarity" if ranker["kind"] == "dual_encoder" else "text-ranking"
    return library | {"pipeline_tag": pipeline, "tags": [ranker["kind"].replace("_", "-")]}


def _front_matter(matter: dict, facts: Facts) -> str:
    hub = [source for sources in facts.teachers.values() for source in sources if HUB_ID.fullmatch(source)]
    matter = {**matter, "tags": ["distillation", *matter["tags"], facts.recipe]}
    text = yaml.safe_dump(matter | ({"base_model": hub} if hub else {}), sort_keys=False)
    return f"---\n{text}---"


def _origin(facts: Facts) -> str:
    train = facts.stage["train"]
    said = {"cut": _cut, "new": _new, "grow": _grown, "from": lambda reference: f"`{reference}`"}
    start = next(said[key](given) for key, given in train["student"].items() if key in said and given is not None)
    taught = ", ".join(name for target in train["targets"].values() for name in _names(target))
    sources = "; ".join(f"`{name}`: " + " or ".join(found) for name, found in facts.teachers.items())
    teacher = f"distilled from {taught} ({sources})" if taught else "trained without a teacher"
    return f"Stage `{facts.stage['id']}` of the recipe `{facts.recipe}`: {teacher}. It started as {start}."


def _names(target: dict) -> list[str]:
    """What a recipe calls that which teaches."""
    found = next(target[key] for key in ("from", "ensemble", "cache", "ema") if key in target)
    if "ema" in target:
        return [f"its own average ({found})"]
    return [f"`{name}`" for name in ([found] if isinstance(found, str) else found)]


def _cut(cut: dict) -> str:
    layers = cut["layers"]
    which = f"{layers} evenly spaced layers" if isinstance(layers, int) else f"layers {', '.join(map(str, layers))}"
    return f"{which} of `{cut['from']}`"


def _grown(grow: dict) -> str:
    return f"`{grow['from']}` grown by {', then '.join(_named(op) for op in grow['ops'])}"


def _new(new: dict) -> str:
    like = new.get("like")
    return f"random weights in the architecture of `{like}`" if like else "random weights"


def _table(facts: Facts) -> str:
    return "\n\n".join(["## What it is worth", facts.table, *facts.worth]) if facts.table else ""


def _training(facts: Facts) -> Iterator[str]:
    train, done = facts.stage["train"], facts.training
    yield "\n".join([
        f"- loss: {'; '.join(_named(entry) for entry in train['loss'])}",
        f"- corpus: `{facts.corpus['name']}`, source {facts.corpus['source']}, digest `{facts.corpus['digest']}`",
        *(f"- {key}: {done[key]:,}" for key in ("steps", "tokens") if key in done),
        *([f"- time: {console.seconds(done['seconds'])}"] if "seconds" in done else []),
    ])  # fmt: skip
    if frozen := done.get("frozen"):
        yield "The loss does not reach these parameters; they are those the student started with:"
        yield "\n".join(f"- `{name}`" for name in frozen)


def _named(entry: dict) -> str:
    """`stack (factor: 4)`: an objective or operator with its fields."""
    (name, fields) = next((name, given) for name, given in entry.items() if given is not None)
    return f"{name} ({', '.join(f'{key}: {value}' for key, value in fields.items() if value is not None)})"


def _licence(facts: Facts) -> str:
    if not facts.teachers:
        return "The licence of the code says nothing about the weights; that of the training text may."
    return (
        "This model was made with the teacher above and may hold parts of its weights: the teacher's licence, and "
        "that of its training data, apply to it as well. Read the teacher's own card before passing this on."
    )
