"""Tells a file from what a download that went wrong leaves in its place: a pointer of Git LFS, or a web page."""

from __future__ import annotations

from pathlib import Path

POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype html", b"<html")


def stand_in(path: Path) -> str | None:
    """Returns a sentence about a file that stands in for another one, with what to do; None for any other file."""
    try:
        with path.open("rb") as file:
            begin = file.read(256).lstrip().lower()
    except OSError:
        return None
    if begin.startswith(POINTER):
        return f"{path} is a pointer of Git LFS, and not the file itself: run `git lfs pull` there, or download it."
    if begin.startswith(PAGES):
        return f"{path} is a web page, and not the file itself. Download it again."
    return None
