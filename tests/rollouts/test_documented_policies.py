"""The policies that the documentation offers are accepted as they stand."""

import tomllib
from pathlib import Path

import pytest

from control_plane.core.policy import parse, require_live

POLICIES = Path(__file__).parents[2] / "docs" / "policies"


@pytest.mark.parametrize("file", sorted(POLICIES.glob("*.toml")), ids=lambda file: file.stem)
def test_a_documented_policy_is_accepted(file: Path):
    require_live(parse(tomllib.loads(file.read_text())))
