"""The command line: `raykeras fit | evaluate | predict PIPELINE`, `inspect DATA`, `runs STORAGE`, `watch RUN`, ….

Exit statuses: 0 success; 1 the user's code or a worker failed; 2 invalid arguments or insufficient resources;
129 after SIGHUP; 130 after Ctrl-C; 143 after SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import click

import raykeras as rk
from raykeras.core.errors import printable, redacted
from raykeras.core.tracebacks import without_package_frames


class CommandGroup(click.Group):
    """A group that turns raykeras' exceptions into messages and exit statuses."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (rk.ValidationError, rk.ResourceError) as error:
            _fail(error, 2)
        except rk.RaykerasError as error:
            _fail(error, 1)
        except KeyboardInterrupt as interrupt:
            click.echo(f"raykeras: {str(interrupt) or 'interrupted'}", err=True)
            sys.exit(130)


def _fail(error: object, status: int) -> NoReturn:
    click.echo(f"raykeras: error: {printable(str(error).expandtabs())}", err=True)
    sys.exit(status)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(rk.__version__, prog_name="raykeras")
def main() -> None:
    """Train Keras models with model.fit on a Ray cluster, from Parquet and NumPy data."""


def _parameters(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"must be key=value; got {value!r}.")
        pairs[name] = text
    return pairs


def _workers(ctx: click.Context, option: click.Parameter, value: str | None) -> Any:
    parts = [] if value is None else value.split("-")
    if not all(part.isdigit() for part in parts) or len(parts) > 2:
        raise click.BadParameter(f"must be a number, or a range such as 1-8; got {value!r}.")
    numbers = [int(part) for part in parts]
    return None if value is None else numbers[0] if len(numbers) == 1 else tuple(numbers)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Combine several options into one decorator."""

    def decorate(command: Any) -> Any:
        return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)

    return decorate


_PIPELINE = _options(
    click.argument("pipeline", type=click.Path()),
    click.option("-s", "--set", "parameters", multiple=True, metavar="KEY=VALUE", callback=_parameters,
                 help="Set a parameter of the pipeline; may be repeated."),
    click.option("--batch-size", type=int, help="Global batch size, in rows.  [default: the pipeline's]"),
    click.option("--workers", callback=_workers, metavar="N|MIN-MAX",
                 help="Number of workers, or a range if it may change during the run; 1 trains in this process."),
    click.option("--gpus-per-worker", type=int, help="GPUs of each worker."),
    click.option("--replicas-per-worker", type=int, help="Replicas on each worker; without GPUs, logical CPU devices."),
    click.option("--cpus-per-worker", type=float, help="Logical CPUs that each worker reserves in Ray."),
)  # fmt: skip


_CHECKPOINT = click.option(
    "--checkpoint", required=True, help="Folder of a checkpoint, or a .keras file; a path or an fsspec URL."
)


@main.command()
@_PIPELINE
@click.option("--epochs", type=int, help="Epoch at which to stop.  [default: the pipeline's]")
@click.option(
    "--verbose",
    type=click.Choice(["auto", "0", "1", "2"]),
    help="0: silent; 1: progress bar; 2: one line per epoch.",
)
@click.option("--storage", help='Folder or fsspec URL that contains all runs.  [default: "runs"]')
@click.option("--name", help="Name of the run.  [default: the name of the pipeline and the time]")
@click.option("--seed", type=int, help="Seed of the order of rows, the initial weights and random layers.")
@click.option("--resume", metavar="RUN", help="Folder or fsspec URL of a run to resume; replaces --storage and --name.")
@click.option("--weights-only", is_flag=True, default=None, help="Take only the weights from the run to resume.")
@click.option(
    "--checkpoint-every", metavar="WHEN", help='"epoch", a number of steps, a duration such as 10min, or "none".'
)
@click.option("--keep", type=int, help="Number of latest checkpoints to keep, in addition to the best one.")
@click.option("--monitor", help="Metric that determines the best checkpoint.")
@click.option(
    "--max-failures", type=int, help="Number of failures, without a checkpoint in between, after which the run fails."
)
@click.option("--hang-timeout-s", type=float, help="Seconds without a step after which a worker is considered hung.")
def fit(pipeline: str, parameters: dict[str, str], **options: Any) -> None:
    """Train the model of PIPELINE, a Python file that defines a function `pipeline`.

    \b
        raykeras fit pipelines/digits.py --workers 2 --epochs 5 -s batch_size=64
    """
    loaded = _load(pipeline, parameters)
    overrides = {name: value for name, value in options.items() if value is not None}
    arguments: dict[str, Any] = {"validation_data": loaded.validation, **loaded.fit}
    if "verbose" in overrides:
        overrides["verbose"] = overrides["verbose"] if overrides["verbose"] == "auto" else int(overrides["verbose"])
    if "checkpoint_every" in overrides:
        when = overrides["checkpoint_every"]
        overrides["checkpoint_every"] = None if when == "none" else int(when) if when.isdigit() else when
    overrides |= _resume_options(overrides.pop("resume", None), overrides.pop("weights_only", False))
    arguments["scale"] = _override(arguments.get("scale") or rk.Scale(), overrides)
    arguments["run"] = _override(arguments.get("run") or rk.Run(), overrides)
    if arguments["run"].name is None:
        name = f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        arguments["run"] = dataclasses.replace(arguments["run"], name=name)
    from raykeras.driver.record import called_by_pipeline

    with called_by_pipeline(pipeline, parameters):
        rk.fit(loaded.model, loaded.train, **{**arguments, **overrides})


def _load(path: str, parameters: dict[str, str]) -> rk.Pipeline:
    """Load a pipeline; print errors in its code with the frames of that code only, and exit."""
    from raykeras.cli.pipeline import load_pipeline

    try:
        return load_pipeline(path, parameters)
    except (rk.RaykerasError, click.ClickException):
        raise
    except Exception as error:
        lines = traceback.format_exception(type(error), error, without_package_frames(error.__traceback__))
        click.echo(redacted("".join(lines).rstrip()), err=True)
        sys.exit(1)


def _resume_options(path: str | None, weights_only: bool) -> dict[str, Any]:
    """Return the fields of `Run` that resume the run in a folder."""
    from raykeras.checkpoint.store import RunFolder

    options = {"resume": "weights"} if weights_only else {}
    if path is None:
        return options
    storage, _, name = path.rstrip("/").rpartition("/")
    if not RunFolder.under(storage or ".", name).is_run():
        raise rk.OptionError(
            f"`--resume` takes the folder of a run, which `fit` prints at its start; got {path!r}, which holds no run."
        )
    return {**options, "storage": storage or ".", "name": name}


@main.command()
@_PIPELINE
@_CHECKPOINT
@click.option("--steps", type=int, help="Number of batches to evaluate, from the first.  [default: all]")
def evaluate(pipeline: str, parameters: dict[str, str], checkpoint: str, **options: Any) -> None:
    """Evaluate a checkpoint of PIPELINE's model on its test data, and print the metrics as JSON.

    \b
        raykeras evaluate pipelines/digits.py --checkpoint runs/digits/checkpoints/epoch-000005
    """
    loaded, arguments = _inference_arguments(pipeline, parameters, options)
    logs = rk.evaluate(_load_model(loaded, checkpoint), loaded.test, verbose=0, **arguments)
    click.echo(json.dumps(logs))


@main.command()
@_PIPELINE
@_CHECKPOINT
@click.option("--output", required=True, help="Folder or fsspec URL for the Parquet files; must be new or empty.")
@click.option(
    "--column", "columns", multiple=True, help="Column of the data to write with the predictions; may be repeated."
)
def predict(pipeline: str, parameters: dict[str, str], checkpoint: str, **options: Any) -> None:
    """Predict PIPELINE's test data with a checkpoint of its model, and write the predictions as Parquet.

    \b
        raykeras predict pipelines/digits.py --checkpoint PATH --output predictions --column label
    """
    loaded, arguments = _inference_arguments(pipeline, parameters, options)
    click.echo(rk.predict(_load_model(loaded, checkpoint), loaded.test, **arguments))


def _inference_arguments(
    pipeline: str, parameters: dict[str, str], options: dict[str, Any]
) -> tuple[rk.Pipeline, dict[str, Any]]:
    """Return the pipeline, and the arguments of `evaluate` or `predict`."""
    loaded = _load(pipeline, parameters)
    if loaded.test is None:
        raise rk.OptionError(
            f"`raykeras.Pipeline(test=...)` is the data that is evaluated or predicted; {pipeline} does not set it."
        )
    overrides = {name: value for name, value in options.items() if value is not None}
    overrides.setdefault("batch_size", loaded.fit.get("batch_size", 32))
    return loaded, {"scale": _override(loaded.fit.get("scale") or rk.Scale(), overrides), **overrides}


def _load_model(loaded: rk.Pipeline, checkpoint: str) -> Any:
    """Load a checkpoint's weights into the pipeline's model, so that custom classes need no registration."""
    from raykeras.checkpoint.model_io import load_weights_into

    return load_weights_into(loaded.model, checkpoint)


def _as_source(data: str) -> Any:
    if data.endswith(".npy"):
        return rk.npy(data)
    return rk.npy(data, x=()) if data.endswith(".npz") else rk.parquet(data)


@contextlib.contextmanager
def _reading(data: str) -> Iterator[None]:
    """Turn the exceptions of filesystems, which may have any type, into a `SourceError`."""
    try:
        yield
    except rk.RaykerasError:
        raise
    except Exception as error:
        reason = (str(error) or "no reason given").splitlines()[0]
        raise rk.SourceError(f"The data must be readable; {data!r} is not: {type(error).__name__}: {reason}") from None


def _override(options: Any, overrides: dict[str, Any]) -> Any:
    """Return a `Scale` or `Run` with the overrides of its fields, which are removed from `overrides`."""
    if "workers" in overrides and isinstance(options, rk.Scale):
        overrides["min_workers"] = None  # also override a range of the pipeline
    names = {field.name for field in dataclasses.fields(options)} & set(overrides)
    return dataclasses.replace(options, **{name: overrides.pop(name) for name in sorted(names)})


@main.command()
@click.argument("data")
@click.option("--balance", metavar="COLUMN", help="Count the values of a column, such as the classes to predict.")
@click.option("--all", "all_columns", is_flag=True, help="List more than 40 columns.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(data: str, balance: str | None, all_columns: bool, as_json: bool) -> None:
    """Show the columns and rows of DATA, what to note before training on it, and a source to paste.

    DATA is a Parquet file, folder, glob or URL, or a .npy or .npz file.

    \b
        raykeras inspect pipelines/digits/train --balance label
    """
    from raykeras.cli.inspect_output import dumped, inspection_json, show_inspection
    from raykeras.data.inspection import inspect_source
    from raykeras.data.suggestion import suggest

    with _reading(data):
        inspection = inspect_source(_as_source(data))
        counts = None if balance is None else inspection.balance(balance)
    suggestion = suggest(inspection)
    if as_json:
        click.echo(dumped(inspection_json(inspection, suggestion, counts, data)))
    else:
        show_inspection(inspection, suggestion, counts, data, all_columns=all_columns)


@main.command()
@click.argument("name")
@click.option("--data", required=True, help="Parquet file, folder, glob or URL; or a folder with train/ and test/.")
@click.option("--y", metavar="COLUMN", help="Column to predict.  [default: one named label, target, ..., or the last]")
@click.option("--x", metavar="COLUMN", multiple=True, help="Input column; may be repeated.  [default: all suitable]")
@click.option(
    "--category", "categories", metavar="COLUMN", multiple=True, help="Integers that are categories; may be repeated."
)
def new(name: str, data: str, y: str | None, x: tuple[str, ...], categories: tuple[str, ...]) -> None:
    """Write NAME, a pipeline file that trains a small model on DATA; change the model as you like.

    \b
        raykeras new pipeline.py --data houses.parquet --y price
    """
    from raykeras.cli.new_pipeline import plan_pipeline, write_new
    from raykeras.cli.pipeline_code import pipeline_code

    with _reading(data):
        planned = plan_pipeline(name, data, x=x, y=y, categories=categories)
    write_new(planned.path, pipeline_code(planned))
    for line in planned.summary():
        click.echo(line)


@main.command()
@click.argument("storage", default="runs")
def runs(storage: str) -> None:
    """List the runs in STORAGE, a folder or an fsspec URL: their states, metrics and times.

    \b
        raykeras runs s3://bucket/runs
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = rk.runs(storage)
    if not found:
        raise rk.OptionError(f"`raykeras runs` lists the runs in a storage folder; {storage!r} holds none.")
    table = Table(*found.HEADER, box=None, pad_edge=False)
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for info in found:
        table.add_row(*map(Text, info.cells()))
    Console().print(table)


@main.command()
@click.argument("run")
@click.option("--interval-s", type=click.FloatRange(min=0.1), default=1.0, help="Seconds between reads of the log.")
def watch(run: str, interval_s: float) -> None:
    """Show the progress of RUN, a run's folder or fsspec URL, until it ends.

    \b
        raykeras watch s3://bucket/runs/digits-20261130-081502
    """
    from raykeras.driver.progress import make_display
    from raykeras.driver.runs import StoredRun

    stored = StoredRun(run)
    display = make_display(monitor=stored.state.monitor)
    with contextlib.closing(display):
        stored.follow(display, pause=lambda: time.sleep(interval_s))


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("run")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def tensorboard(run: str, options: tuple[str, ...]) -> None:
    """Start TensorBoard on the scalars of RUN. OPTIONS, such as --port 6007, are those of `tensorboard`.

    \b
        raykeras tensorboard runs/digits-20261130-081502 --port 6007
    """
    from raykeras.driver.runs import StoredRun
    from raykeras.driver.tensorboard import FOLDER

    folder = StoredRun(run).folder / FOLDER
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, *options]
    os.execv(sys.executable, command)  # signals reach TensorBoard


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("-o", "--output", default="report.html", help="Path of the HTML file.")
def report(runs: tuple[str, ...], output: str) -> None:
    """Write a report of one or several runs: an HTML page that needs no network.

    RUN is the folder or URL of a run. Several runs are laid over each other, and their configurations are compared.

    \b
        raykeras report runs/digits-20261130-081502 runs/digits-20261130-093011 -o compare.html
    """
    from raykeras.report.page import write_report

    write_report(runs, output)
    click.echo(output)


@main.command()
@click.option("--cluster", metavar="ADDRESS", help='Also check every node of a Ray cluster: "auto", or host:port.')
@click.option("--storage", metavar="URL", help="Write, read and remove a file in this folder or fsspec URL.")
@click.option("--timeout-s", type=click.FloatRange(min=1), default=60.0, help="Seconds for each node to answer.")
@click.option("--quick", is_flag=True, help="Do not import TensorFlow, which takes seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(cluster: str | None, storage: str | None, timeout_s: float, quick: bool, as_json: bool) -> None:
    """Check this machine, the storage of runs and a cluster, and say what to do about what is wrong.

    Each line passes, warns or fails. The exit status is 1 if a check fails.

    \b
        raykeras doctor --cluster auto --storage s3://bucket/runs
    """
    from rich.console import Console

    from raykeras.cli.doctor_output import checks_json, show_checks, status_of
    from raykeras.doctor.examination import examine

    with Console(stderr=True).status("checking"):
        found = examine(cluster, storage, timeout_s, imports_tensorflow=not quick)
    if as_json:
        click.echo(json.dumps(checks_json(found), indent=1))
    else:
        show_checks(found)
    sys.exit(1 if status_of(found) == "fail" else 0)


if __name__ == "__main__":
    main()
