import hashlib

import pytest

from contract.errors import PitheadError
from provisioning import join_tokens


def test_a_token_names_the_server():
    token = join_tokens.create(b"certificate")
    text = str(token)
    assert text.startswith("pj1.")
    assert text.endswith(hashlib.sha256(b"certificate").hexdigest())
    assert join_tokens.parse(f" {text}\n") == token


def test_the_secret_is_not_in_what_is_stored():
    token = join_tokens.create(b"certificate")
    assert token.secret not in token.secret_hash
    assert join_tokens.create(b"certificate").secret_hash != token.secret_hash


@pytest.mark.parametrize(
    "text",
    ["", "pj1", "pj1.abc.def", "pj2." + "a" * 43 + "." + "0" * 64, "pj1." + "a" * 43 + "." + "0" * 63 + "G"],
)
def test_anything_else_is_no_token(text: str):
    with pytest.raises(PitheadError) as caught:
        join_tokens.parse(text)
    assert caught.value.code == "enrol.token_invalid"
