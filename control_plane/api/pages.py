"""Listings: a page of items and the cursor of the next page."""

from collections.abc import Callable, Sequence
from typing import Annotated, Final, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict, field_validator

MAX_LIMIT: Final = 1000

T = TypeVar("T")

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Items on one page.")]
RowCursor = Annotated[
    int | None,
    Query(ge=0, le=2**63 - 1, description="`next_cursor` of the page before, to get the next one."),
]


class View(BaseModel):
    """What the API shows of a record."""

    model_config = ConfigDict(from_attributes=True)


class Wanted(BaseModel):
    """What a request asks for; an unknown field is refused, and a text that no database takes."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _storable(cls, value: object) -> object:
        if not storable(value):
            raise ValueError("holds a NUL, or half of a surrogate pair")
        return value


class Page(BaseModel, Generic[T]):
    """Some items. `next_cursor` is null on the last page."""

    items: list[T]
    next_cursor: str | None


def storable(value: object) -> bool:
    """Whether every text in a JSON value can be stored."""
    match value:
        case str():
            return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
        case list():
            return all(storable(item) for item in value)
        case dict():
            return all(storable(key) and storable(item) for key, item in value.items())
    return True


def page(items: Sequence[T], limit: int, cursor: Callable[[T], object]) -> Page[T]:
    """Return a page; a full one names the place where the next begins."""
    more = bool(items) and len(items) >= limit
    return Page(items=list(items), next_cursor=str(cursor(items[-1])) if more else None)
