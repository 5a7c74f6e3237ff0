"""``fp4dit-ao sweep``: quantizes a list of models and recipes as tasks of a Ray cluster, and evaluates what came out.

A row is a task: it takes the CPUs and GPUs that it is given, in a process of its own. What is finished is kept, so that the
same command goes on after a failure; Ray starts the task of a lost machine again, which then resumes.
"""

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4dit_ao.evaluation.fidelity import Evaluation, Fidelity
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

Options = dict[str, Any]
"""A row of the table, as it is read."""
RETRIES = 3
"""How often Ray starts the task of a lost process or machine again."""


@dataclass(frozen=True)
class Step:
    """One command of a row.

    Attributes:
        target: what it writes, whole or not at all; where that is there, the command is skipped.
        arguments: of ``fp4dit-ao``.
    """

    target: Path
    arguments: list[str]

    def done(self) -> bool:
        """Whether the target is there."""
        return self.target.is_file() or (self.target.is_dir() and any(self.target.iterdir()))


@dataclass(frozen=True)
class Row:
    """One model and the way it is quantized."""

    name: str
    steps: list[Step]


@dataclass(frozen=True)
class Outcome:
    """Result of a row.

    Attributes:
        done: whether every step ended well.
        began, ended: Unix time, in seconds.
    """

    name: str
    done: bool
    began: float
    ended: float


def sweep(
    table: Path, out: Path, *, cpus: float, gpus: float, address: str | None, check: Callable[[list[str]], None],
    run: Callable[[list[str]], int],
) -> None:  # fmt: skip
    """Runs the rows of ``table`` and prints what became of them.

    Args:
        table: JSON list of objects, see :func:`read_rows`.
        out: folder of the results, which every machine sees under this path.
        cpus, gpus: of each row; fractions share one.
        address: of the cluster; a local one is started if None.
        check: raises ``ValueError`` for arguments that ``fp4dit-ao`` does not take.
        run: runs ``fp4dit-ao`` with arguments in this process, and returns its exit status.

    Raises:
        ValueError: a wrong table.
        RuntimeError: Ray is not installed, or a row failed.
    """
    out = out.absolute()
    rows = read_rows(table, out)
    for row in rows:
        for step in row.steps:
            try:
                check(step.arguments)
            except ValueError as error:
                raise ValueError(f"{table}, row {row.name!r}: {error}") from error
    try:
        import ray
    except ImportError as error:
        raise RuntimeError("a sweep needs Ray; install it with: pip install 'fp4dit-ao[ray]'") from error
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    out.mkdir(parents=True, exist_ok=True)
    # max_calls: a process for each row, so that nothing of one is left for the next
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(execute)
    waiting = {task.remote(row, out / f"{row.name}.log", run): row for row in rows}
    outcomes: dict[str, Outcome] = {}
    while waiting:
        (ready,), _ = ray.wait([*waiting], num_returns=1)
        row = waiting.pop(ready)
        try:
            outcomes[row.name] = ray.get(ready)
        except ray.exceptions.RayError:  # its process or machine was lost too often
            outcomes[row.name] = Outcome(row.name, False, 0.0, 0.0)
        print(f"{len(outcomes)} of {len(rows)}: {_state(outcomes[row.name])} {row.name}", flush=True)
    text = markdown([outcomes[row.name] for row in rows], out)
    write_text(out / "sweep.md", text)
    print(f"\n{text}")
    failed = [row.name for row in rows if not outcomes[row.name].done]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(rows)} rows failed; see {out / failed[0]}.log; the same command goes on"
        )


def read_rows(table: Path, out: Path) -> list[Row]:
    """The rows of a table: ``{"name": …, "model": …, …, "evaluate": {…}}``.

    What is not named here are options of ``fp4dit-ao quantize``, and those in ``evaluate`` of ``fp4dit-ao evaluate``: numbers,
    texts, lists for what can be repeated, true and false for what takes no value. A row without ``evaluate`` is not evaluated.

    Raises:
        ValueError: no such table.
        OSError: the file cannot be read.
    """
    try:
        found: list[Options] = json.loads(table.read_text(encoding="utf-8"))
        names, models = [row["name"] for row in found], [row["model"] for row in found]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{table} is no list of rows such as {{"name": "gptq", "model": "reference", "rounding": "gptq"}} ({error!r})'
        ) from error
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name or names.count(name) > 1]
    if wrong or not names:
        raise ValueError(
            f"{table}: rows named {wrong}; the name of a row is that of a folder, and no other row's"
            if wrong
            else f"{table} holds no rows"
        )
    rows = []
    for name, model, options in zip(names, models, found, strict=True):
        own = {key: value for key, value in options.items() if key not in ("name", "model", "evaluate")}
        steps = [Step(out / name, ["quantize", str(model), *_arguments({"out": out / name, "resume": True} | own)])]
        if "evaluate" in options:
            judged = {"against": model, "out": out / f"{name}.json", "images": out / "images"} | (
                options["evaluate"] or {}
            )
            steps.append(Step(out / f"{name}.json", ["evaluate", str(out / name), *_arguments(judged)]))
        rows.append(Row(name, steps))
    return rows


def _arguments(options: Mapping[str, object]) -> list[str]:
    found: list[str] = []
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                found.append(flag if one else f"--no-{flag[2:]}")
            elif one is not None:
                found += [flag, str(one)]
    return found


def execute(row: Row, log: Path, run: Callable[[list[str]], int]) -> Outcome:
    """Runs the steps of a row that are not done, until one fails; what they print goes to the end of ``log``."""
    began = time.time()
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for step in row.steps:
            try:
                status = 0 if step.done() else run(step.arguments)
            except Exception:
                traceback.print_exc()
                status = 1
            if status:
                return Outcome(row.name, False, began, time.time())
    return Outcome(row.name, True, began, time.time())


def markdown(outcomes: Sequence[Outcome], out: Path) -> str:
    """A table of the rows; then, for each model that was evaluated, one of the images of its rows."""
    cells = [[x.name, _state(x), f"{x.ended - x.began:.0f}"] for x in outcomes]
    texts = [markdown_table(["row", "state", "seconds"], cells) + "\n"]
    evaluated: dict[str, Evaluation] = {}
    for outcome in outcomes:
        path = out / f"{outcome.name}.json"
        if outcome.done and path.exists():
            data = json.loads(path.read_text(encoding="utf-8"))
            shared = {name: value for name, value in data["settings"].items() if name != "model"}
            original, own, *_ = (Fidelity.from_dict(variant) for variant in data["variants"])
            about = {"environment": data["environment"], "digits": data["digits"]}
            new = Evaluation([original], shared, **about)
            evaluated.setdefault(json.dumps([shared, about], sort_keys=True), new).variants.append(own)
    return "\n".join([*texts, *(table.markdown() for table in evaluated.values())])


def _state(outcome: Outcome) -> str:
    return "done" if outcome.done else "failed"
