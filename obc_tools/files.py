"""Files that are complete or not there."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file, and the folders to it, so that it is the old one or the new one whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
