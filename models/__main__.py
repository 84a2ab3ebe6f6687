"""``python -m models``: the same commands as ``pithead models``; admission runs ``validate DIR --json``."""

from models.cli import app

if __name__ == "__main__":
    app()
