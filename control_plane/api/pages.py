"""Listings: a page of items and the cursor of the next page."""

from collections.abc import Callable, Sequence
from typing import Annotated, Final, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict

MAX_LIMIT: Final = 1000

T = TypeVar("T")

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Items on one page.")]
RowCursor = Annotated[
    int | None, Query(ge=0, description="`next_cursor` of the page before, to get the next one.")
]


class View(BaseModel):
    """What the API shows of a record."""

    model_config = ConfigDict(from_attributes=True)


class Wanted(BaseModel):
    """What a request asks for; an unknown field is refused."""

    model_config = ConfigDict(extra="forbid")


class Page(BaseModel, Generic[T]):
    """Some items. `next_cursor` is null on the last page."""

    items: list[T]
    next_cursor: str | None


def page(items: Sequence[T], limit: int, cursor: Callable[[T], object]) -> Page[T]:
    """Return a page; a full one names the place where the next begins."""
    more = bool(items) and len(items) >= limit
    return Page(items=list(items), next_cursor=str(cursor(items[-1])) if more else None)
