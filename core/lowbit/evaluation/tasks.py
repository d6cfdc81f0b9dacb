"""Tasks of the lm-evaluation-harness (``lowbit[eval]``), on a model that lowbit loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lowbit.errors import OptionError


def need_harness() -> None:
    """Raise OptionError when the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise OptionError("--tasks needs the lm-evaluation-harness; pip install 'lowbit[eval]'")


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Return for each task its metrics, as the harness names them (``acc,none``, ``acc_stderr,none``, ...).

    ``limit`` uses only so many examples of each task. The harness fetches the data of a task from the Hugging Face hub, or reads
    a task of one's own from a YAML file. Raises OptionError for a task that it does not know.
    """
    need_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if unknown := [task for task in tasks if not _known(task, manager)]:
        raise OptionError(f"the lm-evaluation-harness knows no task {unknown[0]!r}; lm-eval ls tasks lists them")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    found = simple_evaluate(wrapped, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=1000)
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _known(task: str, manager: Any) -> bool:
    return task.endswith(".yaml") or bool(manager.match_tasks([task]))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Keep what is a number: the harness mixes names and aliases in."""
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
