"""Documents that are made from code are as the code would make them."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jsonschema
import pytest

from contract import asyncapi, codec
from contract.errors import ERRORS, PitheadError
from contract.messages import Ack, AckRange, PriorityClass

DOCS = Path(__file__).parents[2] / "docs"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = load_generator()


@pytest.mark.parametrize("name", list(GENERATE.GENERATED))
def test_generated_documents_are_up_to_date(name: str):
    assert (DOCS / name).read_text() == GENERATE.GENERATED[name](), (
        f"run `make docs` to write docs/{name} again"
    )


def test_the_asyncapi_schemas_accept_our_messages():
    document = asyncapi.document()
    ack = Ack(1, "dev-00000001", (AckRange("e", PriorityClass.HEALTH, 7, ((9, 12),)),))
    schema = {**document["components"]["messages"]["Ack"]["payload"], "components": document["components"]}
    jsonschema.validate(json.loads(codec.encode(ack)), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"v": 1, "device": "dev-00000001", "acks": "all"}, schema)


def test_an_error_needs_a_known_code():
    with pytest.raises(KeyError):
        PitheadError("no.such_code")
    for code, spec in ERRORS.items():
        assert spec.summary.endswith("."), code
        assert spec.remedy.endswith("."), code
