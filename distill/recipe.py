"""A recipe: what a run is made of, as frozen values whose fields are the keys of the YAML file. No torch.

`load` reads one strictly and reports every mistake at once; `dump` writes one with every default in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from distill import mistakes, references, strict_yaml
from distill.kinds import Stage
from distill.overrides import apply
from distill.schedules import Several, Value
from distill.specs import CollectionSpec, CorpusSpec, EngineSpec, ModelSpec, Name, Positive
from growth.errors import UsageError, did_you_mean


class Recipe(Value):
    recipe: Name = Field(description="its name, and that of the run directory")
    about: str = Field("", description="one line for `distill list` and the model card")
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: Positive = Field(1, description="make every model with this many seeds, counted from `seed`")
    equal: Literal["steps", "tokens", "flops", "seconds"] = Field(
        "steps", description="what a twin without the method gets"
    )
    engine: EngineSpec = EngineSpec()
    models: dict[Name, ModelSpec] = Field({}, description="what exists before the run")
    corpora: dict[Name, CorpusSpec] = Field({}, description="text to train and evaluate on")
    collections: dict[Name, CollectionSpec] = Field({}, description="what rankers are trained and evaluated on")
    stages: Annotated[Several[Stage], Field(min_length=1)]

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.id == name)

    def text(self, name: str) -> CorpusSpec:
        """A corpus, or what a data stage will make of one."""
        if name in self.corpora:
            return self.corpora[name]
        spec = self.stage(name).data
        text = self.text(spec.from_)
        for _, op in spec.operations():
            text = op.plan(text, self)
        return text

    def collection(self, name: str) -> str | None:
        """The collection that a name stands for: its own, or that of the pairs a data stage reads; None for text."""
        while name not in self.collections and name not in self.corpora:
            data = self.stage(name).data
            if data is None:
                return None
            name = data.from_
        return name if name in self.collections else None

    def made_from(self, reference: str | None) -> Iterator[Stage]:
        """The train stages whose work is in these weights, the last one first; `stage.start` is without its own."""
        while reference and reference not in self.models:
            name, _, start = reference.partition(".")
            stage = self.stage(name)
            if stage.train and not start:
                yield stage
            reference = stage.origin


# Reading and writing


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe at a path, or the packaged one of that name; raises UsageError with all mistakes, one a line."""
    path, data = find(path)
    try:
        document = strict_yaml.parse(data)
    except strict_yaml.Unreadable as error:
        raise UsageError(mistakes.report([error.args[0]], {}, str(path))) from None
    apply(document, overrides, set(Recipe.model_fields))
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        document.mistakes += mistakes.of_shape(error, document, Recipe)
    document.mistakes += references.wrong(document.value)
    if document.mistakes:
        raise UsageError(mistakes.report(document.mistakes, document, str(path)))
    return _with_data(recipe)


def _with_data(recipe: Recipe) -> Recipe:
    """An evaluation without a corpus takes that of the first training stage on text."""
    first = next((stage.train.corpus for stage in recipe.stages if stage.train and not stage.train.ranks), None)
    return recipe.model_copy(update={"stages": tuple(_filled(stage, first) for stage in recipe.stages)})


def _filled(stage: Stage, data: str | None) -> Stage:
    if stage.evaluate is None or stage.evaluate.data is not None:
        return stage
    return stage.model_copy(update={"evaluate": stage.evaluate.model_copy(update={"data": data})})


def dump(recipe: Recipe) -> str:
    """YAML with every default written out; `load` reads it back to an equal recipe."""
    return strict_yaml.dump(recipe.model_dump(mode="json", by_alias=True))


def find(name: str | Path) -> tuple[Path, bytes]:
    """The file and its bytes."""
    path = Path(name)
    if not path.is_file() and path.name == str(name) and str(name) in packaged():
        return Path(f"{name}.yaml"), packaged()[str(name)].read_bytes()
    if not path.is_file():
        known = f"; packaged recipes are {', '.join(packaged())}{did_you_mean(path.stem, packaged())}"
        what = "is not a file" if path.exists() else "no such file"
        raise UsageError(f"{name}: {what}{known}")
    with open(path, "rb") as file:
        return path, file.read(strict_yaml.LARGEST + 1)


def packaged() -> dict[str, Any]:
    """The recipes that come with the package, by name."""
    files = resources.files("recipes").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=str) if file.name.endswith(".yaml")}


def schema() -> dict:
    """JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}
