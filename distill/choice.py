"""A choice in a recipe: exactly one key of several; one value of a table by its name. No torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import create_model, model_serializer, model_validator

from distill.schedules import Value


class OneOf(Value):
    """A choice: exactly one of its optional keys is given, those `beside` it left out."""

    beside: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _check_one(self) -> OneOf:
        if len(self._given()) != 1:
            found = " and ".join(self._given()) or "none"
            raise ValueError(f"exactly one of {', '.join(self._choices())} is needed, found {found}")
        return self

    @model_serializer(mode="wrap")
    def _write_one(self, write) -> dict:
        return {key: value for key, value in write(self).items() if value is not None}

    @classmethod
    def _choices(cls) -> dict[str, str]:
        """{key in YAML: attribute}."""
        fields = {name: f for name, f in cls.model_fields.items() if name not in cls.beside}
        return {f.alias or name: name for name, f in fields.items() if not f.is_required()}

    def _given(self) -> list[str]:
        return [key for key, name in self._choices().items() if getattr(self, name) is not None]


class Named(OneOf):
    """One value by name: an objective, a hook, an operator."""

    def named(self) -> tuple[str, Value]:
        (name,) = self._given()
        return name, getattr(self, name)


def one_of(name: str, table: dict[str, type[Value]]) -> type[Named]:
    return create_model(name, __base__=Named, **{key: (kind | None, None) for key, kind in table.items()})
