"""Publish the folder of a sparse model on the Hub: weights, config, tokenizer, report, picture and card in one commit."""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from hf_sparse import hub, publish
from hf_sparse.errors import CheckpointError, ConfigError
from hf_sparse.remote import is_repository
from hf_sparse.remote.hub import told
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import Report
from hf_sparse.saved import files_to_publish, read_config, read_report
from hf_sparse.side_files import draw
from hf_sparse.text import one_line

_log = logging.getLogger(__name__)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of a sparse model")
    parser.add_argument("repository", help="USER/NAME on the Hub, or NAME for one of your own; it is made if absent")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", default=None, help="branch to push to, made if absent (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", default="Upload sparse model", help="message of the commit")
    parser.add_argument("--token", default=None, help="access token for the Hub (default: that of `hf auth login`)")
    parser.add_argument(
        "--readme", choices=("folder", "repository"), default=None,
        help="whose text to keep around the card, where README.md has other text in the folder than in the repository",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    if not is_repository(arguments.repository):
        raise ConfigError(f"{one_line(arguments.repository)!r} cannot be the name of a repository; write USER/NAME.")
    config, report = read_config(folder), read_report(folder)
    names, left_out, outside = files_to_publish(folder)
    local = _read(folder / hub.README) if hub.README in names else ""
    with tempfile.TemporaryDirectory() as place, told(arguments.repository, arguments.revision, doing="pushed to"):
        beside = Path(place)
        report.save(beside)  # with the hashes of the files as they are
        picture = draw(report, beside)
        files = {name: folder / name for name in names}
        files |= {name: beside / name for name in (REPORT_FILE, picture) if name}
        card = _card(report, config, picture, arguments.token)
        repository, note = _made(arguments)
        readme = _readme(card, local, arguments)
        done = hub.commit(
            files, repository, readme, message=arguments.message, token=arguments.token, revision=arguments.revision,
            create_pr=arguments.create_pr,
        )  # fmt: skip
    unchanged = isinstance(done, hub.Unchanged)
    size = sum((folder / name).stat().st_size for name in names)
    found: dict[str, Any] = {
        "repository": repository, "url": done.pr_url or done.commit_url, "commit": done.oid, "changed": not unchanged,
        "files": sorted({*files, hub.README}), "left_out": sorted([*left_out, *outside]), "bytes": size, "note": note,
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(found))
        return
    if note:
        print(f"note: {note}")
    _name("left out, as no part of the model", left_out)
    _name("left out, as links to what is outside of the folder", outside)
    if unchanged:
        opened = "; no pull request was opened" if arguments.create_pr else ""
        print(f"nothing changed: {repository} has all of it already{opened}: {found['url']}")
    else:
        print(f"pushed {len(found['files'])} files ({size / 2**20:.1f} MiB) to {repository}: {found['url']}")


def _name(why: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"{why}: {', '.join(one_line(name, 120) for name in names[:5])}{more}")


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{one_line(str(file))!r} is not UTF-8 text ({error.reason}); save it as UTF-8, or move it away."
        ) from error


def _card(report: Report, config: dict[str, Any], picture: str | None, token: str | None) -> ModelCard:
    from model_cards import card_class

    base = publish.base_card(report.model, token)
    return card_class().from_report(report, plot_name=picture, model_config=config, base_card=base)


def _made(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """The repository's full name, made if it was absent, and what is to be said of it."""
    api = HfApi(token=arguments.token)
    repository = api.create_repo(arguments.repository, private=arguments.private or None, exist_ok=True).repo_id
    if arguments.private and not api.repo_info(repository).private:
        return repository, f"{repository} was there already and is public; --private does not change that."
    return repository, None


def _readme(card: Any, local: str, arguments: argparse.Namespace) -> Callable[[str | None], str]:
    """What makes the README to push of the one in the repository: the one of the two that has all of the other's own text."""
    from model_cards.own import OwnText, own_text

    own = own_text(local)
    if own.lines == own_text(card.content).lines:  # a template of one's own
        own = OwnText((), own.header)

    def readme(there: str | None) -> str:
        if arguments.readme == "folder" or there is None:
            return publish.merged(card, local, arguments.folder)
        if arguments.readme == "repository" or own.is_in(own_text(there)):
            return publish.merged(card, there, arguments.folder)
        if own_text(there).is_in(own):
            return publish.merged(card, local, arguments.folder)
        raise ConfigError(
            f"README.md in {one_line(str(arguments.folder))!r} and in the repository have different texts around the card, or different "
            "values in their headers; say whose to keep: --readme folder or --readme repository."
        )

    return readme
