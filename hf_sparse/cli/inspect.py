"""Look inside a model: its matrices, and what its config and report claim. A repository on the Hub is not downloaded."""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_sparse.claim import Claim
from hf_sparse.remote import Folder, Repository, Tensor, open_place, read_claim, read_report, tensors, weight_files
from hf_sparse.report import Report
from hf_sparse.report_text import percent
from hf_sparse.sites import count_zeros
from hf_sparse.storage import StoredTensor, open_tensors
from hf_sparse.text import one_line
from hf_sparse.verify.sizes import loaded_weights


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path of a model folder, a repository on the Hub, or 'embedded'")
    parser.add_argument(
        "--all", action="store_true", help="list matrices without zeros as well; of a repository, all tensors"
    )
    group = parser.add_argument_group("Hub")
    group.add_argument("--revision", default=None, help="branch, tag or commit")
    group.add_argument("--token", default=None, help="access token")
    group.add_argument("--cache-dir", default=None, help="where config and report are kept")


def count_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Zeros of every tensor of two dimensions and more in the folder's safetensors files, one tensor in memory at a time."""
    found: dict[str, dict[str, Any]] = {}
    with open_tensors([folder / name for name in loaded_weights(Folder(str(folder), folder))]) as stored:
        for key, slice in stored.items():
            if len(slice.get_shape()) >= 2:
                tensor = slice[...]
                zeros = count_zeros(tensor)
                found[key] = {
                    "shape": list(tensor.shape), "zeros": zeros, "sparsity": zeros / max(1, tensor.numel()),
                    "compressed": isinstance(slice, StoredTensor),
                }  # fmt: skip
    return found


def run(arguments: argparse.Namespace) -> None:
    place = open_place(
        arguments.model, revision=arguments.revision, token=arguments.token, cache_dir=arguments.cache_dir
    )
    claim, report = read_claim(place), read_report(place)
    if isinstance(place, Folder):
        _folder(place, claim, report, arguments)
    else:
        _repository(place, claim, report, arguments)


# ---------------------------------------------------------------------------------------------------- a folder: counted


def _folder(place: Folder, claim: Claim | None, report: Report | None, arguments: argparse.Namespace) -> None:
    counted = count_folder(place.path)
    if arguments.json:
        print(
            json.dumps({"folder": str(place.path), "claim": _told(claim), "report": _told(report), "tensors": counted})
        )
        return
    shown = {name: tensor for name, tensor in counted.items() if arguments.all or tensor["zeros"]}
    names = {name: one_line(name, 200) for name in shown}
    width = max(map(len, names.values()), default=6)
    for name, tensor in shown.items():
        print(f"{names[name]:<{width}}  {'x'.join(map(str, tensor['shape'])):>14}  {percent(tensor['sparsity'])} zeros")
    if not shown:
        print("no matrix holds zeros.")
    _compare(claim, sum(tensor["zeros"] for tensor in counted.values()))
    if claim is not None and report is not None:
        print(report)


def _compare(claim: Claim | None, zeros: int) -> None:
    if claim is None:
        print("config.json does not say that hf_sparse pruned this model.")
    elif claim.zeros is None:
        print("config.json says that hf_sparse pruned this model, but not how many zeros it has.")
    elif zeros >= claim.zeros:
        # Matrices that were not pruned may hold zeros too: the row of a padding token, say.
        print(
            f"config.json claims {claim.zeros} zeros in the pruned sites; counted {zeros} in all matrices: they agree."
        )
    else:
        print(f"config.json claims {claim.zeros} zeros, but all matrices together hold {zeros}: the claim is not true.")


# ---------------------------------------------------------------------------------------------------- a repository: claims


def _repository(place: Repository, claim: Claim | None, report: Report | None, arguments: argparse.Namespace) -> None:
    found = tensors(place)
    size = sum(place.files[name].size for name in weight_files(place))
    if arguments.json:
        told = {
            "repository": place.name, "commit": place.commit, "claim": _told(claim), "report": _told(report), "verified": False,
            "bytes": size, "tensors": {name: _tensor(tensor) for name, tensor in found.items()},
        }  # fmt: skip
        print(json.dumps(told))
        return
    print(f"{one_line(place.name)} at commit {place.commit}")
    values, number = sum(tensor.size for tensor in found.values()), len(weight_files(place))
    formats = ", ".join(sorted({tensor.dtype for tensor in found.values()}))
    compressed = [tensor for tensor in found.values() if tensor.kept is not None]
    print(
        f"{len(found)} tensors, {values:,} values ({formats}) in {number} files of {size:,} bytes; nothing of them was downloaded"
    )
    if compressed:
        kept, whole = sum(tensor.kept or 0 for tensor in compressed), sum(tensor.size for tensor in compressed)
        print(
            f"{len(compressed)} of them are compressed: {kept:,} of {whole:,} values are stored; hf_sparse is needed to load them"
        )
    if arguments.all:
        names = {name: one_line(name, 200) for name in found}
        width = max(map(len, names.values()), default=6)
        for name, tensor in found.items():
            stored = "" if tensor.kept is None else f"  {tensor.kept:,} values stored"
            print(f"{names[name]:<{width}}  {'x'.join(map(str, tensor.shape)):>14}  {tensor.dtype}{stored}")
    print(_claimed(place, claim))
    if report is not None:
        print(f"The report, which is a claim too until it is verified, says:\n{report}")
    elif claim is not None:
        print("There is no report.")


def _claimed(place: Repository, claim: Claim | None) -> str:
    if claim is None:
        return "config.json does not say that hf_sparse pruned this model."
    way = f"`hf-sparse verify {one_line(place.name)}` downloads and counts"
    if claim.totals is None:
        return f"claimed by config.json: hf_sparse pruned this model; not how many zeros it has ({way})"
    totals = claim.totals
    return (
        f"claimed by config.json: {totals['zeros']:,} zeros in {totals['sites']:,} sites, {percent(totals['sparsity'])} of them, "
        f"{percent(totals['block_sparsity'])} of all block weights; not verified: {way}"
    )


def _tensor(tensor: Tensor) -> dict[str, Any]:
    told: dict[str, Any] = {"shape": list(tensor.shape), "dtype": tensor.dtype, "file": tensor.file}
    return told if tensor.kept is None else {**told, "kept": tensor.kept}


def _told(part: Claim | Report | None) -> dict[str, Any] | None:
    return None if part is None else part.to_dict()
