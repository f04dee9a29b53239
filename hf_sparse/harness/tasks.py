"""Finds lm-eval's tasks by name and loads them with their data."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hf_sparse.errors import CalibrationError, ConfigError


def load(names: Sequence[str], include_path: str | Path | None) -> tuple[Any, list[Any]]:
    """lm-eval's task manager and the loaded tasks and groups."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(
            f"include_path {str(include_path)!r} is no folder; give the one that holds the tasks' YAML files."
        )
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    # lm-eval reads 14,000 files of its own for 10 seconds, which tasks that stand alone in the folder do not need.
    if set(names) - set(manager.all_subtasks):
        manager = TaskManager(include_path=folder)
    loaded: list[Any] = []
    for name in chosen(names, manager.all_tasks):
        loaded += _built(manager, name)
    return manager, loaded


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that are meant, each once; a name that is none may be a glob. Raises ConfigError where nothing matches."""
    found: dict[str, None] = {}
    for name in names:
        matching = [name] if name in known else [one for one in known if fnmatchcase(one, name)]
        if not matching:
            near = ", ".join(map(repr, get_close_matches(name, known, n=3, cutoff=0.6)))
            raise ConfigError(
                f"task {name!r} does not exist.{f' Near: {near}.' if near else ''} `lm-eval ls tasks` lists those of lm-eval; "
                "a task of your own is found in the folder given with --include-path (include_path)."
            )
        found.update(dict.fromkeys(matching))
    return list(found)


def _built(manager: Any, name: str) -> list[Any]:
    """The task, the group, or the tasks of a tag, with their data."""
    try:
        found = manager.load([name])
    except OSError as error:  # datasets says so both without a network and for data that are not there
        raise CalibrationError(
            f"the data of task {name!r} cannot be had ({_first_line(error)}); let this process reach the Hub (without HF_HUB_OFFLINE), "
            "fetch them once beforehand, or name a task whose data lie here."
        ) from error
    except Exception as error:  # a task's files may hold anything, code as well
        raise ConfigError(f"task {name!r} cannot be loaded ({type(error).__name__}: {_first_line(error)}).") from error
    for task in found["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"task {task.task_name!r} runs what the model writes as code; measure it with lm-eval's own command line, "
                "in a place where that can do no harm."
            )
    groups = found.get("groups", {})
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
