"""Look inside a model folder: zeros of each matrix counted from the files, and what its config and report claim."""

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_sparse import embedded
from hf_sparse.checkpoint import CONFIG_KEY
from hf_sparse.errors import CheckpointError
from hf_sparse.report import FILE_NAME as REPORT_FILE
from hf_sparse.report import Report, percent
from hf_sparse.sites import count_zeros


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path of a model folder, or 'embedded'")
    parser.add_argument("--all", action="store_true", help="list matrices without zeros as well")


def count_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Zeros of every tensor of two dimensions and more in the folder's safetensors files, one tensor in memory at a time."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{str(folder)!r} holds no .safetensors files.")
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no mapping, only the method exists)
                    tensor = tensors.get_tensor(name)
                    if tensor.ndim >= 2:
                        zeros = count_zeros(tensor)
                        found[name] = {
                            "shape": list(tensor.shape),
                            "zeros": zeros,
                            "sparsity": zeros / max(1, tensor.numel()),
                        }
        except SafetensorError as error:
            raise CheckpointError(f"{file.name} cannot be read ({error}); was the save interrupted?") from error
    return found


def read_claim(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{str(folder)!r} is no model folder: config.json cannot be read ({error.strerror})."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(folder / 'config.json')!r} is not valid JSON: {error}.") from error
    claim = config.get(CONFIG_KEY) if isinstance(config, dict) else None
    return claim if isinstance(claim, dict) else {}


def run(arguments: argparse.Namespace) -> None:
    folder = embedded.model_path() if arguments.model == embedded.NAME else Path(arguments.model)
    if not folder.is_dir():
        raise CheckpointError(
            f"{arguments.model!r} is no folder; models on the Hub must be downloaded first in this version."
        )
    claim = read_claim(folder)
    report = Report.load(folder) if (folder / REPORT_FILE).is_file() else None
    tensors = count_folder(folder)
    if arguments.json:
        print(
            json.dumps(
                {
                    "folder": str(folder),
                    "claim": claim,
                    "report": report.to_dict() if report else None,
                    "tensors": tensors,
                }
            )
        )
        return
    shown = {name: tensor for name, tensor in tensors.items() if arguments.all or tensor["zeros"]}
    width = max([len(name) for name in shown], default=6)
    for name, tensor in shown.items():
        print(f"{name:<{width}}  {'x'.join(map(str, tensor['shape'])):>14}  {percent(tensor['sparsity'])} zeros")
    if not shown:
        print("no matrix holds zeros.")
    if not claim:
        print("config.json does not say that hf_sparse pruned this model.")
        return
    totals = claim.get("totals")
    claimed = totals.get("zeros") if isinstance(totals, dict) else None
    zeros = sum(tensor["zeros"] for tensor in tensors.values())
    if not isinstance(claimed, int):
        print("config.json says that hf_sparse pruned this model, but not how many zeros it has.")
    elif zeros >= claimed:
        # Matrices that were not pruned may hold zeros too: the row of a padding token, say.
        print(f"config.json claims {claimed} zeros in the pruned sites; counted {zeros} in all matrices: they agree.")
    else:
        print(f"config.json claims {claimed} zeros, but all matrices together hold {zeros}: the claim is not true.")
    if report:
        print(report)
