"""To and from the Hugging Face Hub: what leaves the machine is named, and what goes wrong is one line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varkit.eight_bit import open_packed, packed_folder
from varkit.metrics.report import Report
from varkit.model_card import model_card

SUFFIXES = (".safetensors", ".json", ".md", ".png", ".webp")
"""The files of a folder that are uploaded without being named."""

TOKEN_HELP = "run `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"


@dataclass(frozen=True)
class Upload:
    """What a push sends.

    files: path in the repository -> file, or text made for it.   left_out: paths of the folder that stay.
    """

    files: dict[str, Path | str]
    left_out: list[str]


def plan_upload(
    folder: str | Path,
    repo_id: str,
    *,
    report: str | Path | None = None,
    run: str | Path | None = None,
    licence: str | None = None,
    datasets: Sequence[str] = (),
    include: Sequence[str] = (),
) -> Upload:
    """Choose the files of a saved model and make its card. Nothing is written, nothing is sent.

    Taken: files that end in SUFFIXES. Never taken unless named: anything else, hidden files, links.

    Args:
        report: JSON of `varkit eval --out`, for the card; uploaded as card/report.json.
        run: folder of the run that trained the model, for the card; found by itself where the folder is its model/.
        include: further files, by their path in the folder.
    Raises: FileNotFoundError, ValueError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    read = None if report is None else Report.read(report)
    if run is None and (folder.parent / "recipe.yaml").is_file() and (folder.parent / "metrics.jsonl").is_file():
        run = folder.parent
    card = model_card(
        folder, repo_id, report=read, run=None if run is None else Path(run), licence=licence, datasets=datasets
    )
    files: dict[str, Path | str] = {}
    left_out = []
    for path in sorted(p for p in folder.rglob("*") if p.is_symlink() or p.is_file()):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        linked = any((folder / parent).is_symlink() for parent in (name, *name.parents[:-1]))
        if path.suffix in SUFFIXES and not hidden and not linked:
            files[name.as_posix()] = path
        elif name.as_posix() not in include:
            left_out.append(name.as_posix())
    for wanted in include:
        path = folder / wanted
        if ".." in Path(wanted).parts or Path(wanted).is_absolute() or not path.is_file():
            raise FileNotFoundError(f"include: {wanted!r} is no file in {folder}; give its path inside the folder")
        files[Path(wanted).as_posix()] = path
    files["README.md"] = card
    if report is not None:
        files["card/report.json"] = Path(report)
    return Upload(files, left_out)


def push(
    upload: Upload,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload with varkit",
    create_pr: bool = False,
) -> str:
    """Send the files in one commit, making the repository if there is none.

    Args: private: of a new repository; None is the account's default.   token: None takes the one that is logged in.
    Returns: the address of the repository, or of the pull request.
    Raises: ValueError in one line: no token, a token that may not write, no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = token or get_token()
    if not token:
        raise ValueError(f"no Hugging Face token: {TOKEN_HELP}")
    api = HfApi(token=token)
    sources = {k: v.encode() if isinstance(v, str) else str(v) for k, v in upload.files.items()}
    with hub_errors(repo_id, writing=True):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=k, path_or_fileobj=v) for k, v in sources.items()]
        info = api.create_commit(url.repo_id, operations, commit_message=commit_message, create_pr=create_pr)
    return str(info.pr_url or url)


def download(repo_id: str, folder: str = "", **options: Any) -> Path:
    """The weights and configurations of a hub repository, from the hub or its cache. No other file is fetched.

    Args:
        folder: of the repository, where only what lies in it is wanted.
        options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir, local_files_only, ...
    Raises: ValueError in one line: no such repository, no network.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id):
        where = f"{folder}/" if folder else ""
        patterns = [f"{where}*.json", f"{where}*.safetensors"]
        return Path(snapshot_download(repo_id, allow_patterns=patterns, **options))


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `user/name` and is no path here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not os.path.exists(name)


@contextmanager
def hub_errors(repo_id: str, *, writing: bool = False) -> Iterator[None]:
    """What may go wrong with the hub, as a ValueError of one line that says what to do."""
    from huggingface_hub import constants, errors

    what = f"{repo_id} on {constants.ENDPOINT}"
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(f"{what} is gated: ask for access on its page, and {TOKEN_HELP}") from None
    except errors.RepositoryNotFoundError:
        aim = "write there" if writing else "read it, if it is private"
        raise ValueError(f"there is no {what} for you: check the name, and that your token may {aim}") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{what} has no such revision: check the branch, tag or commit") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ValueError(f"the hub refuses this token for {what}: {TOKEN_HELP}") from None
        raise ValueError(f"the hub answered {status} for {what}: {_line(error)}; try again later") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{repo_id!r} names no hub repository, which looks like user/name: {_line(error)}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        where = "is not in the cache and " if isinstance(error, errors.LocalEntryNotFoundError) else ""
        raise ValueError(
            f"{what} {where}cannot be reached: check the network (HF_HUB_OFFLINE and HF_ENDPOINT too), or give a "
            f"folder on this machine ({type(error).__name__})"
        ) from None


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class HubMixin:
    """`push_to_hub` with varkit's card, in place of the one of diffusers, and weights that are stored in eight bits.

    Put it before diffusers' classes.
    """

    @classmethod
    def from_pretrained(cls, name: Any, **options: Any) -> Any:
        """As in diffusers; folders of `varkit.eight_bit` are opened too."""
        folder = packed_folder(name, options.get("subfolder"))
        return open_packed(cls, folder, **options) if folder else super().from_pretrained(name, **options)  # type: ignore[misc]

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload with varkit",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        *,
        report: str | Path | None = None,
        run: str | Path | None = None,
        licence: str | None = None,
        datasets: Sequence[str] = (),
    ) -> str:
        """Save, write a card, upload: safetensors, JSON, and README.md.

        Args: as those of `plan_upload` and `push`.
        Returns: the address of the repository, or of the pull request.
        Raises: ValueError in one line: no token, a token that may not write, no network.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)  # type: ignore[attr-defined]
            upload = plan_upload(folder, repo_id, report=report, run=run, licence=licence, datasets=datasets)
            return push(
                upload, repo_id, private=private, token=token, commit_message=commit_message, create_pr=create_pr
            )
