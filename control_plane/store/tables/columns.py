"""Column types that all tables share."""

from sqlalchemy import BigInteger, Integer, Text
from sqlalchemy.types import TypeEngine

MICROS = BigInteger()
"""Microseconds since 1970-01-01 UTC, or a duration in microseconds."""

JSON_TEXT = Text()
"""A JSON document as text: what it holds is checked by msgspec, not by the database."""

ROW_ID: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")
"""An auto-incremented key. SQLite counts in columns of the type INTEGER only."""
