"""`push-to-hub`: uploads a written model to the Hugging Face hub, with the record of its verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lqexport.converters.gguf.split import is_gguf, read_split
from lqexport.errors import UserError, files_at_hand, well_formed
from lqexport.storage.files import file_digest, read_json, write_json
from lqexport.storage.published import record_of
from lqexport.verification import report
from lqexport.verification.card import save_card
from lqexport.verification.result import Verification

RESULT = "verification.json"
"""The file of a record that holds the verification's numbers and the digests of the verified files."""
CARD = "README.md"
"""The model card of a record, and of a ladder's folder."""
LADDER, PLOT = "ladder.json", "ladder.svg"
"""The files of a ladder's folder that list its files and show their losses."""
REMEDY = "`lqexport verify ... --record FOLDER` makes one; --unverified uploads all the same."


@files_at_hand()
def save_record(result: Verification, folder: str | Path) -> None:
    """Writes the record of a verification into `folder`.

    README.md is the model card. verification.json holds every number, and the digest of every verified file.
    report.html is the report page; it is left out if its packages are not installed. No file names a path of this
    machine. Raises UserError if a file cannot be written.
    """
    folder = Path(folder)
    digests = {name: file_digest(path) for name, path in model_files(result.file, result.adapter).items()}
    write_json(folder / RESULT, result.published().as_json() | {"files": digests})
    save_card(result, folder / CARD)
    if report.is_installed():
        report.save_html(result, folder / "report.html")


def model_files(file: str | Path, adapter: str | None = None) -> dict[str, Path]:
    """Returns path in a repository -> file, for all files of a written model and of its adapter. An adapter's folder
    becomes a folder of the repository."""
    files = _files(Path(file), "")
    if adapter and Path(adapter).absolute() != Path(file).absolute():
        files |= _files(Path(adapter), f"{Path(adapter).name}/")
    return files


def _files(path: Path, prefix: str) -> dict[str, Path]:
    """Returns name -> file, for all parts of a file or all files of a folder that are not hidden. A folder's names
    begin with `prefix`."""
    if path.is_file():
        return {part.name: part for part in (read_split(path)[2] if is_gguf(path) else [path])}
    inside = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
    visible = {name: file for name, file in inside.items() if not any(part.startswith(".") for part in name.parts)}
    return {f"{prefix}{name.as_posix()}": file for name, file in visible.items()}


def check_repository(repository: str) -> None:
    """Raises UserError if no repository of the hub can have an id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"No repository can be called {repository!r}: name it like me/model-gguf.") from error


@files_at_hand()
def upload_list(file: str | Path, *, record: str | Path | None = None, unverified: bool = False) -> dict[str, Path]:
    """Returns path in the repository -> file, for all files that `push_to_hub` would upload. Raises UserError if the
    record does not say that exactly these files passed.

    The folder of a ladder has the record of each of its files.
    """
    if record is None and (Path(file) / LADDER).is_file():
        return _ladder_files(Path(file))
    if not Path(file).exists() or (Path(file) / "run.json").is_file():
        raise UserError(f"{file} is no written model: the to-... commands of lqexport write such files and folders.")
    if record is None:
        if not unverified:
            raise UserError(f"No record says that {file} passed its verification. {REMEDY}")
        return model_files(file)
    return _recorded_files(file, record, unverified=unverified) | _files(Path(record), "")


def _ladder_files(folder: Path) -> dict[str, Path]:
    """Returns path in the repository -> file, for a ladder's card, plot and list, and for its files and their records.

    Nothing else in the folder is uploaded. Raises UserError if a record does not say that its file passed.
    """
    listed = read_json(folder / LADDER, f"{folder} is no ladder: it has no {LADDER}.")
    with well_formed(folder / LADDER, "`lqexport ladder` writes it."):
        models = [folder / Path(entry["file"]).name for entry in listed["files"]]
    files = {name: folder / name for name in (CARD, LADDER, PLOT) if (folder / name).is_file()}
    for model in models:
        record = record_of(model)
        files |= _recorded_files(model, record) | _files(record, f"{record.name}/")
    return files


def _recorded_files(file: str | Path, record: str | Path, *, unverified: bool = False) -> dict[str, Path]:
    """Returns path in the repository -> file, for a model and its adapter.

    Raises UserError if the record does not say that exactly these files passed, unless `unverified` is given.
    """
    result = read_json(Path(record) / RESULT, f"{record} is no record of a verification: it has no {RESULT}. {REMEDY}")
    with well_formed(Path(record) / RESULT, REMEDY):
        # The record names the adapter. It is read only if its digest will be checked.
        files = model_files(file, None if unverified else _adapter_beside(file, result["adapter"]))
        if not unverified:
            _check_passed(result, record, files)
    return files


def _adapter_beside(file: str | Path, name: str | None) -> str | None:
    """Returns the path of the adapter that a record names: beside the file, or the file itself.

    Raises UserError if it is not there.
    """
    if name is None:
        return None
    adapter = Path(file).absolute().with_name(Path(name).name)
    if not adapter.exists():
        raise UserError(f"The adapter {adapter.name} that the record names is not beside {file}: put it there.")
    return str(adapter)


def _check_passed(result: dict[str, Any], record: str | Path, files: dict[str, Path]) -> None:
    """Raises UserError if a record says that its file failed, or if it is not the record of exactly these files."""
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
    """Uploads a written model to a repository of the Hugging Face hub, in one commit; creates the repository if needed.

    file        a .gguf file, a folder that a to-... command wrote, or the folder of a ladder
    repository  the repository's id, such as me/model-gguf
    record      the folder that `save_record` or `verify --record` wrote for this file; it is uploaded too
    public      whether all may see the repository; without it, an existing public repository is refused
    unverified  upload without a record, or though the record says that the file failed

    The token is huggingface_hub's: `hf auth login`, or HF_TOKEN. Returns the commit's URL. Raises UserError if the
    record does not say that exactly these files passed, or if the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repository(repository)
    files, api = upload_list(file, record=record, unverified=unverified), HfApi()
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        seen_by_all = not api.model_info(repository).private
        if public or not seen_by_all:
            return str(api.create_commit(repository, operations, commit_message="Upload by lqexport").commit_url)
    except Exception as error:
        raise UserError(_refusal(error, file, repository)) from error
    raise UserError(f"{repository} is public, and --public was not given. Give it, or choose another repository.")


def _refusal(error: Exception, file: str | Path, repository: str) -> str:
    """Returns what an exception of huggingface_hub means for the user: no network, no token, or what the hub says.

    Its versions raise the exceptions of requests or of httpx, so they are told apart by the names of their classes.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"ConnectionError", "TransportError", "Timeout", "TimeoutError"}:
        return (
            f"The hub cannot be reached, so {file} was not uploaded as {repository}: {reason}. Check the network and "
            "HF_HUB_OFFLINE, and run the same command again."
        )
    status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
    login = isinstance(error, LocalTokenNotFoundError) or status in (401, 403)
    advice = " `hf auth login` stores a token that may write." if login else ""
    return f"The hub did not take {file} as {repository}: {reason}.{advice}"
