"""Write the parts of the documentation that are made from code. Run by ``make docs``."""

from pathlib import Path

import yaml

from contract import asyncapi
from contract.errors import ERRORS

DOCS = Path(__file__).parent


def asyncapi_yaml() -> str:
    """Return ``docs/asyncapi.yaml`` as it should be."""
    return yaml.safe_dump(asyncapi.document(), sort_keys=False, allow_unicode=True, width=110)


def errors_markdown() -> str:
    """Return ``docs/errors.md`` as it should be."""
    rows = [
        f"| `{code}` | {spec.summary} | {spec.remedy} | {'yes' if spec.retryable else 'no'} |"
        for code, spec in ERRORS.items()
    ]
    head = [
        "# Error codes",
        "",
        "The same code stands in an HTTP problem document, in a device's receipt and in the log.",
        "",
        "| code | what happened | what to do | tried again by itself |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows]) + "\n"


GENERATED = {"asyncapi.yaml": asyncapi_yaml, "errors.md": errors_markdown}


def main() -> None:
    """Write all of them."""
    for name, make in GENERATED.items():
        (DOCS / name).write_text(make())


if __name__ == "__main__":
    main()
