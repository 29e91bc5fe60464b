"""JSON files of a run, and texts: written whole or not at all, and named where they cannot be read."""

import json
import os
from pathlib import Path
from typing import Any


def write(path: str | Path, value: Any) -> None:
    """Writes a JSON file, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file, to a temporary name first; makes its folder."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "w") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def read(path: str | Path, mend: str, kind: type | None = None) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: it is no JSON, or not of the kind, dict or list; `mend` says what to do then.
    """
    try:
        with open(path) as file:
            value = json.load(file)
    except (ValueError, IsADirectoryError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} is damaged ({error}); {mend}") from error
    if kind and not isinstance(value, kind):
        raise ValueError(f"{path} is damaged (it holds a {type(value).__name__}, not a {kind.__name__}); {mend}")
    return value
