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
from hf_sparse.errors import ConfigError
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
    names, left_out = files_to_publish(folder)
    with tempfile.TemporaryDirectory() as place, told(arguments.repository, arguments.revision, doing="pushed to"):
        beside = Path(place)
        report.save(beside)  # with the hashes of the files as they are
        picture = draw(report, beside)
        files = {name: folder / name for name in names}
        files |= {name: beside / name for name in (REPORT_FILE, picture) if name}
        card = _card(report, config, picture, arguments.token)
        repository, note = _made(arguments)
        readme = _readme(card, folder / hub.README, arguments.readme)
        done = hub.commit(
            files, repository, readme, message=arguments.message, token=arguments.token, revision=arguments.revision,
            create_pr=arguments.create_pr,
        )  # fmt: skip
    size = sum((folder / name).stat().st_size for name in names)
    found: dict[str, Any] = {
        "repository": repository, "url": done.pr_url or done.commit_url, "commit": done.oid, "files": sorted({*files, hub.README}),
        "left_out": left_out, "bytes": size, "note": note,
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(found))
        return
    if note:
        print(f"note: {note}")
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        print(f"left out, as no part of the model: {', '.join(left_out[:5])}{more}")
    print(f"pushed {len(found['files'])} files ({size / 2**20:.1f} MiB) to {repository}: {found['url']}")


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


def _readme(card: Any, file: Path, whose: str | None) -> Callable[[str | None], str]:
    """What makes the README to push of the one in the repository."""
    local = file.read_bytes().decode("utf-8-sig", errors="replace") if file.is_file() else ""
    own = _own_text(local)

    def readme(there: str | None) -> str:
        if whose == "folder" or there is None:
            return publish.merged(card, local)
        if whose is None and own not in ("", _own_text(card.content), _own_text(there)):
            raise ConfigError(
                f"{one_line(str(file))!r} and the README in the repository have different texts around the card; say whose to keep: "
                "--readme folder or --readme repository."
            )
        return publish.merged(card, there)

    return readme


def _own_text(text: str) -> str:
    """What stands in a README beside the header and our section, white space aside."""
    from model_cards.parts import part_of

    body = ModelCard(text, ignore_metadata_errors=True).text if text else ""
    return " ".join(body.replace(part_of(body) or "", "").split())
