"""The command line: `raykeras fit | evaluate | predict PIPELINE`, `raykeras inspect DATA`.

Enters: arguments. Leaves: an exit status: 0 done, 1 the user's code or a worker failed, 2 what was
asked for cannot be done, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

import raykeras as rk


class _Group(click.Group):
    """Turns our exceptions into messages and exit statuses."""

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
    click.echo(f"raykeras: error: {error}", err=True)
    sys.exit(status)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(rk.__version__, prog_name="raykeras")
def main() -> None:
    """Keras' model.fit, on a Ray cluster, fed from Parquet and NumPy."""


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
        raise click.BadParameter(f"must be a number, or two such as 1-8; got {value!r}.")
    numbers = [int(part) for part in parts]
    return None if value is None else numbers[0] if len(numbers) == 1 else tuple(numbers)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator."""

    def decorate(command: Any) -> Any:
        return functools.reduce(lambda made, option: option(made), reversed(options), command)

    return decorate


_PIPELINE = _options(
    click.argument("pipeline", type=click.Path()),
    click.option("-s", "--set", "parameters", multiple=True, metavar="KEY=VALUE", callback=_parameters,
                 help="A parameter of the pipeline; may be repeated."),
    click.option("--batch-size", type=int, help="Rows of a global batch.  [default: the pipeline's]"),
    click.option("--workers", callback=_workers, metavar="N|LEAST-MOST", help="Worker processes; 1 runs in this one."),
    click.option("--gpus-per-worker", type=int, help="GPUs of each worker."),
    click.option("--replicas-per-worker", type=int, help="Logical CPU devices of each worker, without GPUs."),
    click.option("--cpus-per-worker", type=float, help="Logical CPUs that each worker holds in Ray."),
)  # fmt: skip
_CHECKPOINT = click.option(
    "--checkpoint", required=True, help="A checkpoint's folder, or a .keras file, on any fsspec storage."
)


@main.command()
@_PIPELINE
@click.option("--epochs", type=int, help="Epoch at which to stop.  [default: the pipeline's]")
@click.option("--verbose", type=click.Choice(["auto", "0", "1", "2"]), help="0 silent, 1 a bar, 2 a line an epoch.")
@click.option("--storage", help='Folder or fsspec URL of all runs.  [default: "runs"]')
@click.option("--name", help="Name of the run.  [default: the pipeline's and the time]")
@click.option("--seed", type=int, help="Seeds the order of rows, the weights and random layers.")
@click.option("--resume", metavar="RUN", help="Folder or URL of a run to go on with, instead of storage and name.")
@click.option("--weights-only", is_flag=True, default=None, help="Of the run that is resumed take only the weights.")
@click.option("--checkpoint-every", metavar="WHEN", help='"epoch", a number of steps, a time such as 10min, or "none".')
@click.option("--keep", type=int, help="Newest checkpoints to keep, besides the best.")
@click.option("--monitor", help="Metric by which a checkpoint is best.")
@click.option("--max-failures", type=int, help="Failures without a new checkpoint between, after which the run fails.")
@click.option("--hang-timeout-s", type=float, help="Seconds without a step after which a worker is taken to hang.")
def fit(pipeline: str, parameters: dict[str, str], **options: Any) -> None:
    """Trains the model of PIPELINE, a Python file with a function `pipeline`."""
    from raykeras.pipeline import load_pipeline

    loaded = load_pipeline(pipeline, parameters)
    given = {name: value for name, value in options.items() if value is not None}
    arguments: dict[str, Any] = {"validation_data": loaded.validation, **loaded.fit}
    if "verbose" in given:
        given["verbose"] = given["verbose"] if given["verbose"] == "auto" else int(given["verbose"])
    if "checkpoint_every" in given:
        when = given["checkpoint_every"]
        given["checkpoint_every"] = None if when == "none" else int(when) if when.isdigit() else when
    given |= _resumed(given.pop("resume", None), given.pop("weights_only", False))
    arguments["scale"] = _replaced(arguments.get("scale") or rk.Scale(), given)
    arguments["run"] = _replaced(arguments.get("run") or rk.Run(), given)
    if arguments["run"].name is None:
        name = f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        arguments["run"] = dataclasses.replace(arguments["run"], name=name)
    rk.fit(loaded.model, loaded.train, **{**arguments, **given})


def _resumed(path: str | None, weights_only: bool) -> dict[str, Any]:
    """Fields of `Run` by which the run in a folder goes on."""
    from raykeras.checkpoint import RunFolder

    options = {"resume": "weights"} if weights_only else {}
    if path is None:
        return options
    storage, _, name = path.rstrip("/").rpartition("/")
    if not RunFolder.under(storage or ".", name).is_run():
        raise rk.OptionError(f"`--resume` takes the folder of a run, which training printed first; {path!r} is none.")
    return {**options, "storage": storage or ".", "name": name}


@main.command()
@_PIPELINE
@_CHECKPOINT
@click.option("--steps", type=int, help="Evaluate the first so many batches only.")
def evaluate(pipeline: str, parameters: dict[str, str], checkpoint: str, **options: Any) -> None:
    """Evaluates a checkpoint of PIPELINE's model on its test data, and prints the metrics as JSON."""
    loaded, arguments = _inference(pipeline, parameters, options)
    logs = rk.evaluate(_restored(loaded, checkpoint), loaded.test, **arguments)
    click.echo(json.dumps(logs))


@main.command()
@_PIPELINE
@_CHECKPOINT
@click.option("--output", required=True, help="Folder or fsspec URL for the Parquet files; must be new or empty.")
@click.option("--column", "columns", multiple=True, help="A column of the data to write along; may be repeated.")
def predict(pipeline: str, parameters: dict[str, str], checkpoint: str, **options: Any) -> None:
    """Writes what a checkpoint of PIPELINE's model predicts for its test data as Parquet."""
    loaded, arguments = _inference(pipeline, parameters, options)
    click.echo(rk.predict(_restored(loaded, checkpoint), loaded.test, **arguments))


def _inference(
    pipeline: str, parameters: dict[str, str], options: dict[str, Any]
) -> tuple[rk.Pipeline, dict[str, Any]]:
    """The pipeline, and the arguments of `evaluate` or `predict`."""
    from raykeras.pipeline import load_pipeline

    loaded = load_pipeline(pipeline, parameters)
    if loaded.test is None:
        raise rk.OptionError(f"`raykeras.Pipeline(test=...)` is what is evaluated and predicted; {pipeline} has none.")
    given = {name: value for name, value in options.items() if value is not None}
    given.setdefault("batch_size", loaded.fit.get("batch_size", 32))
    return loaded, {"scale": _replaced(loaded.fit.get("scale") or rk.Scale(), given), **given}


def _restored(loaded: rk.Pipeline, checkpoint: str) -> Any:
    """The pipeline's own model with a checkpoint's weights: its classes need no registration."""
    from raykeras.transfer import weights_into

    return weights_into(loaded.model, checkpoint)


def _source_of(data: str) -> Any:
    if data.endswith(".npy"):
        return rk.npy(data)
    return rk.npy(data, x=()) if data.endswith(".npz") else rk.parquet(data)


def _replaced(options: Any, given: dict[str, Any]) -> Any:
    """A `Scale` or `Run` with what the command line gives of it, which is taken out of `given`."""
    if "workers" in given and isinstance(options, rk.Scale):
        options = dataclasses.replace(options, least_workers=None)  # of the pipeline's own pair
    names = {field.name for field in dataclasses.fields(options)} & set(given)
    return dataclasses.replace(options, **{name: given.pop(name) for name in sorted(names)})


@main.command()
@click.argument("data")
def inspect(data: str) -> None:
    """Shows the columns, files and rows of DATA, as raykeras reads them."""
    from rich.console import Console
    from rich.table import Table

    start = time.perf_counter()
    opened = _source_of(data).open()
    seconds = time.perf_counter() - start
    table = Table("column", "kind", "dtype", "shape", "bytes a row", box=None)
    for field in opened.fields.values():
        dtype = field.dtype.removeprefix("arrow:")
        is_usable = not field.dtype.startswith("arrow:") and field.name not in opened.unusable
        kind = field.kind if is_usable else "unusable"
        nbytes = "" if kind == "unusable" or field.kind != "dense" else f"{field.row_nbytes:,}"
        table.add_row(field.name, kind, dtype, "×".join(map(str, field.shape)) or "1", nbytes)
    console = Console()
    console.print(table)
    units = opened.unit_rows
    sizes = " to ".join(f"{size:,}" for size in sorted({int(units.min()), int(units.max())}))
    console.print(
        f"\n{opened.num_rows:,} rows in {len(opened.files):,} files, {len(units):,} units of {sizes} rows each"
    )
    kept = f", {opened.kept_footers:,} files known from the last time" if opened.kept_footers else ""
    console.print(f"metadata read in {seconds:.1f} s{kept}")


if __name__ == "__main__":
    main()
