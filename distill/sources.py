"""Where a model's files are: a directory, an installed package, the hub's cache, the hub. No torch."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

from distill.ranking.kinds import ABOUT, ENCODER
from growth import bits, files
from growth.errors import UserError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ABOUT_IT = ["*.json", "vocab.txt", "merges.txt", "*.model"]  # config, tokenizer, and what else is not weights
WEIGHTS = "*.safetensors"


def resolve(spec, name: str) -> Path:
    """The directory of a model: the first of its sources that is here, else the first that can be downloaded."""
    path = _found(spec, name, [WEIGHTS, *ABOUT_IT])
    if not has_weights(path):
        raise UserError(f"model {name}: {path} has no {WEIGHTS}; convert it to safetensors, other weights are not read")
    if spec.sha256 and (actual := weights_sha256(path)) != spec.sha256:
        raise UserError(f"model {name}: the weights in {path} have sha256 {actual}, the recipe asks for {spec.sha256}")
    return path


def described(spec, name: str) -> Path:
    """The same for a forecast, for which a config.json does: no weights are fetched, and none compared."""
    return _found(spec, name, ABOUT_IT)


def has_weights(path: Path) -> bool:
    """Whether there is more than a config; what cannot be read is refused by who reads it, with the reason."""
    return any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in encoder(path).iterdir())


def _found(spec, name: str, wanted: list[str]) -> Path:
    found = (path for look in (_here, _download) for source in spec.from_ if (path := look(source, spec, wanted)))
    path = next(found, None)
    if path is None:
        offline = " (HF_HUB_OFFLINE is set)" if _offline() else ""
        raise UserError(
            f"model {name}: none of {', '.join(spec.from_)} is at hand{offline}; give a path or install one"
        )
    return path


def weights_sha256(path: Path) -> str:
    """Of the one weights file; of several, the sha256 over the lines `<sha256>  <name>` in the order of names."""
    path = Path(path)
    single = path / "model.safetensors"
    if single.exists():
        return files.sha256(single)
    weights = sorted(w for w in {*path.glob(WEIGHTS), *encoder(path).glob(WEIGHTS)} if w.name != bits.FILE)
    if not weights:
        raise UserError(f"{path} has no *.safetensors file")
    lines = "".join(f"{files.sha256(w)}  {w.relative_to(path).as_posix()}\n" for w in weights)
    return hashlib.sha256(lines.encode()).hexdigest()


def scores_pairs(path: Path) -> bool:
    """Whether it is the directory of a ranker."""
    return (Path(path) / ABOUT).is_file()


def encoder(path: Path) -> Path:
    """The directory that transformers reads: that of a ranker's encoder, any other itself."""
    return Path(path) / ENCODER if scores_pairs(path) else Path(path)


def identity(path: Path, weights: str | None = None) -> str:
    """Of the weights, their masks, and what says how they compute; `weights`: their sha256, where it is known."""
    beside = [files.sha256(Path(path) / ABOUT)] if scores_pairs(path) else []
    beside += list(masks(path).values())
    return files.digest([weights or weights_sha256(path), files.sha256(encoder(path) / "config.json"), *beside])


def masks(path: Path) -> dict[str, str]:
    """Their sha256 where there are any: zeros do not tell which weights are dead."""
    file = encoder(path) / bits.FILE
    return {"masks": files.sha256(file)} if file.is_file() else {}


def weights_of(reference: str, context) -> str:
    """sha256 of the weights of a model or stage; those that the recipe pins were compared when they were found."""
    known = context.recipe.models.get(reference)
    path = context.model(reference)
    return (known and known.sha256) or weights_sha256(path)


def _here(source: str, spec, wanted: list[str]) -> Path | None:
    if source.startswith("package:"):
        return _in_package(source)
    path = Path(source).expanduser()
    return path if path.is_dir() else _hub(source, spec, wanted, local_files_only=True)


def _download(source: str, spec, wanted: list[str]) -> Path | None:
    away = _offline() or source.startswith("package:")
    return None if away else _hub(source, spec, wanted, local_files_only=False)


def _in_package(source: str) -> Path | None:
    """`package:NAME/SUBPATH`, found without importing the package."""
    name, _, inside = source.removeprefix("package:").partition("/")
    if not name.isidentifier() or ".." in Path(inside).parts or Path(inside).is_absolute():
        raise UserError(f"{source}: expected package:NAME/SUBPATH with a top-level NAME and a path inside the package")
    spec = importlib.util.find_spec(name)
    places = (Path(p) / inside for p in (spec.submodule_search_locations or ())) if spec else ()
    return next((p for p in places if p.is_dir()), None)


def _hub(source: str, spec, wanted: list[str], local_files_only: bool) -> Path | None:
    """A snapshot of a hub repository that has what is wanted, or nothing: safetensors are the only weights we read."""
    if not HUB_ID.fullmatch(source):
        return None
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = huggingface_hub.snapshot_download(
            source, revision=spec.revision, allow_patterns=wanted, local_files_only=local_files_only
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return Path(path) if any(Path(path).glob(wanted[0])) else None


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE
