"""`push-to-hub`: a written model on the Hugging Face hub, beside the record of its verification."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lqexport.converters.gguf.split import read_split
from lqexport.errors import UserError, well_formed
from lqexport.storage.files import file_digest, read_json, write_json
from lqexport.verification.card import save_card
from lqexport.verification.report import save_html
from lqexport.verification.result import Verification

RESULT = "verification.json"
REMEDY = "`lqexport verify ... --record FOLDER` makes one; --unverified uploads all the same."


def save_record(result: Verification, folder: str | Path) -> None:
    """Write what should stand beside a verified file: README.md, the model card; report.html, the page, where its
    packages are installed; verification.json, every number, and the digest of every file that was verified.

    Raises UserError where a file cannot be written.
    """
    folder = Path(folder)
    digests = {name: file_digest(path) for name, path in model_files(result.file, result.adapter).items()}
    write_json(folder / RESULT, result.as_json() | {"files": digests})
    save_card(result, folder / "README.md")
    if all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib")):
        save_html(result, folder / "report.html")


def model_files(file: str | Path, adapter: str | None = None) -> dict[str, Path]:
    """Path in a repository -> file: those of a written model, and of its adapter, a folder of which stays one."""
    files = _files(Path(file), "")
    if adapter and Path(adapter) != Path(file):
        files |= _files(Path(adapter), f"{Path(adapter).name}/")
    return files


def _files(path: Path, prefix: str) -> dict[str, Path]:
    if path.is_file():
        return {part.name: part for part in (read_split(path)[2] if path.suffix == ".gguf" else [path])}
    inside = {found.relative_to(path): found for found in sorted(path.rglob("*")) if found.is_file()}
    shown = {name: found for name, found in inside.items() if not any(part.startswith(".") for part in name.parts)}
    return {f"{prefix}{name.as_posix()}": found for name, found in shown.items()}


def upload_list(file: str | Path, *, record: str | Path | None = None, unverified: bool = False) -> dict[str, Path]:
    """Path in the repository -> file: what `push_to_hub` would upload. Raises UserError as it does."""
    if not Path(file).exists() or (Path(file) / "run.json").is_file():
        raise UserError(f"{file} is no written model: the to-... commands of lqexport write such files and folders.")
    if record is None:
        if not unverified:
            raise UserError(f"No record says that {file} passed its verification. {REMEDY}")
        return model_files(file)
    result = read_json(Path(record) / RESULT, f"{record} is no record of a verification: it has no {RESULT}. {REMEDY}")
    with well_formed(Path(record) / RESULT, REMEDY):
        # An adapter is a path that the record names: it is read where its digest is known, and not otherwise.
        files = model_files(file, None if unverified else result["adapter"])
        if not unverified:
            _check_passed(result, record, files)
    return files | _files(Path(record), "")


def _check_passed(result: dict[str, Any], record: str | Path, files: dict[str, Path]) -> None:
    """Raises UserError where a record says that its file failed, or is not of exactly these files."""
    if result["passed"] is not True:
        raise UserError(f"{record} says that the file failed its verification: {' '.join(result['failed'])}")
    recorded = result["files"]
    changed = [name for name in recorded | files if name not in files or recorded.get(name) != file_digest(files[name])]
    if changed:
        raise UserError(f"{record} is not of these files: {', '.join(changed[:3])} is another. {REMEDY}")


def push_to_hub(
    file: str | Path,
    repository: str,
    *,
    record: str | Path | None = None,
    public: bool = False,
    unverified: bool = False,
) -> str:
    """Upload a written model in one commit to a repository of the hub, which is made where there is none.

    file        a .gguf file, or a folder that a to-... command wrote
    repository  its id, such as me/model-gguf
    record      the folder that `save_record` or `verify --record` wrote for this file, uploaded too
    public      whether the repository may be seen by all; an existing public one is refused without it
    unverified  upload without a record, or against what it says

    The token is huggingface_hub's: `hf auth login`, or HF_TOKEN. Returns the commit's address. Raises UserError where
    the record does not say that exactly these files passed, and where the hub refuses or is out of reach.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files, api = upload_list(file, record=record, unverified=unverified), HfApi()
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        seen_by_all = not api.model_info(repository).private
        if public or not seen_by_all:
            return str(api.create_commit(repository, operations, commit_message="Upload by lqexport").commit_url)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"The hub did not take {file} as {repository}: {reason} `hf auth login` stores a token that may write."
        ) from error
    raise UserError(f"{repository} is public, and --public was not given. Give it, or choose another repository.")
