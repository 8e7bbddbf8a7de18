"""The command line: one verb, one function; methods are configured in recipes, never by flags."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module, resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tensormix.cli.tables import show_check, show_growth, show_prediction, show_recovery, show_results, show_rows
from tensormix.rows import Row
from tensormix.storage.locks import LOCK

app = typer.Typer(
    help="Make large language models small with structured operators, and see where they break.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables for people.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; default: runs/NAME-OF-THE-FILE.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Use the folder even if it holds something else.")]
OtherModel = Annotated[
    str | None, typer.Option("--model", "-m", help="A folder, file or Hub id in the place of the recipe's model.")
]
THINGS = ("methods", "operators", "statistics", "diagnostics", "stages", "subjects")


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.yaml).")], model: OtherModel = None, as_json: Json = False
) -> None:
    """Say what a recipe would do, from the model's config alone: sites, sizes, parameters, MACs, bytes. No weights."""
    with few_imports():
        from tensormix.recipe import Recipe
        from tensormix.run.check import check as check_recipe

        result = check_recipe(Recipe.load(recipe, model))
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        show_check(console, result)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.yaml).")],
    out: Out = None,
    model: OtherModel = None,
    workers: Annotated[int, typer.Option(min=1, help="Blocks compressed at a time, where no inputs are needed.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each; default: one per core.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compress, recover, evaluate, diagnose and profile one model. Stopped? The same command goes on."""
    import torch

    from tensormix.cli.progress import stage_bars
    from tensormix.recipe import Recipe
    from tensormix.run import run_recipe, stage_rows
    from tensormix.storage.files import read_json

    loaded, folder = Recipe.load(recipe, model), out or Path("runs") / recipe.stem
    check_out(folder, "recipe.json", overwrite)
    if threads is not None:
        torch.set_num_threads(threads)
    with resumable(), stage_bars(console) as progress:
        run_recipe(
            loaded, folder, progress=progress, workers=workers, say=cache(lambda line: console.print(escape(line)))
        )
    if loaded.plan.root:
        show_growth(console, read_json(folder / "compress.json").get("larger"))
    show_results(console, measured_in(folder))
    if loaded.recover is not None:
        show_recovery(console, stage_rows(folder, "recover"))
    console.print(f"Finished. See it with: tensormix report {folder}")


@app.command()
def sweep(
    settings: Annotated[Path, typer.Argument(help="A sweep (.yaml).")],
    out: Out = None,
    model: OtherModel = None,
    page: Annotated[bool, typer.Option(help="Write the report when the last cell is done.")] = True,
    overwrite: Overwrite = False,
) -> None:
    """Run a recipe on many blocks and with many settings, and find where accuracy leaves its plateau."""
    from tensormix.recipe import Sweep
    from tensormix.sweep.depths import run_sweep

    loaded, folder = Sweep.load(settings, model), out or Path("runs") / settings.stem
    check_out(folder, "sweep.json", overwrite)
    run_cells(partial(run_sweep, loaded, folder), folder, page)


@app.command()
def compare(
    settings: Annotated[Path, typer.Argument(help="A comparison (.yaml).")],
    out: Out = None,
    model: OtherModel = None,
    page: Annotated[bool, typer.Option(help="Write the report when the last cell is done.")] = True,
    overwrite: Overwrite = False,
) -> None:
    """Run methods under the same budgets, null baselines always among them. Stopped? The same command goes on."""
    from tensormix.recipe.comparison import Comparison
    from tensormix.sweep.compare import run_comparison

    loaded, folder = Comparison.load(settings, model), out or Path("runs") / settings.stem
    check_out(folder, "comparison.json", overwrite)
    run_cells(partial(run_comparison, loaded, folder), folder, page)


def run_cells(run_all: Callable[..., object], folder: Path, page: bool) -> None:
    """Many runs with a bar for each, and the report of their folder afterwards, if that is asked for."""
    from tensormix.cli.progress import cell_bars
    from tensormix.report import build_report

    with resumable(), cell_bars(console) as progress:
        run_all(progress=progress)
    if page:
        console.print(f"Report: {build_report([folder])}", soft_wrap=True)


@app.command()
def predict(
    settings: Annotated[Path, typer.Argument(help="A sweep (.yaml).")],
    direction: Annotated[str, typer.Option(help="last, first, middle_out or middle_to_late.")] = "last",
    variant: Annotated[str | None, typer.Option(help="A method of the sweep (mixt4); default: the first.")] = None,
    model: OtherModel = None,
    as_json: Json = False,
) -> None:
    """Say at which depth a sweep will break, before anything is recovered: cheap signals of every depth."""
    from tensormix.recipe import Sweep
    from tensormix.sweep.predict import predict as predict_sweep

    rows = predict_sweep(Sweep.load(settings, model), direction=direction, variant=variant)  # type: ignore[arg-type]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        show_prediction(console, rows)


@app.command()
def demo(out: Out = None) -> None:
    """Run the main job on the embedded model: a sweep over the compression depth, no download, about 4 minutes."""
    from tensormix.demo import sweep_file

    console.print("A 12-block model is compressed with MixT at every depth, recovered and examined again.")
    sweep(sweep_file(), out or Path("runs") / "demo")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run or sweep folders.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default: report.html beside.")] = None,
) -> None:
    """Write one self-contained HTML page about finished runs."""
    from tensormix.report import build_report

    console.print(f"Report: {build_report(folders, out)}", soft_wrap=True)


@app.command("list")
def list_things(
    what: Annotated[str, typer.Argument(help=" | ".join(THINGS))] = "methods", as_json: Json = False
) -> None:
    """List methods, operators, statistics, diagnostics, stages or the exam's subjects."""
    rows = listing(what)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        show_rows(console, rows)


def listing(what: str) -> list[dict[str, Any]]:
    """The rows of one table of the package, as `make tables` wrote them down: importing the package takes seconds.

    Raises:
        ValueError: there is no such table.
    """
    tables = json.loads(resources.files("tensormix.cli").joinpath("tables.json").read_text("utf-8"))
    if what not in tables:
        from difflib import get_close_matches

        near = get_close_matches(what, THINGS, n=1)
        raise ValueError(
            f"list: there is no table {what!r}{f', did you mean {near[0]!r}?' if near else '.'} "
            f"Known: {', '.join(THINGS)}."
        )
    return tables[what]


def measured_in(folder: Path) -> Mapping[str, Sequence[Row]]:
    """The rows of evaluate in a run folder, by what they were measured of. Stages that its recipe asked for once and
    asks for no more are passed over.
    """
    from tensormix.report.read import read_run

    run = read_run(folder)
    dense = run.dense if run.recipe["plan"] else None
    if run.recipe["recover"] is None:
        last, direct = "compressed" if dense is not None else "model", []
    else:
        last, direct = "recovered", run.rows("direct") if run.recipe["evaluate"]["direct"] else []
    return {"dense": dense.rows("evaluate") if dense is not None else [], "compressed": direct} | {
        last: run.rows("evaluate")
    }


def check_out(folder: Path, ours: str, overwrite: bool) -> None:
    """Raise ValueError if `folder` holds something and not the file `ours`, by which our own folders are known."""
    there = {file.name for file in folder.iterdir()} - {LOCK} if folder.exists() else set()
    if there and ours not in there and not overwrite:
        raise ValueError(f"{folder} holds something else (no {ours}); choose another --out, or add --overwrite")


@contextmanager
def few_imports() -> Iterator[None]:
    """While open, importing transformers takes half the time: it makes millions of objects, among which the garbage
    collector finds nothing, and its losses for finding things in images are left without scipy.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    has: Any = import_module("transformers.utils")

    given = has.is_scipy_available
    if "transformers.loss" not in sys.modules:
        has.is_scipy_available = lambda: False
    try:
        yield
    finally:
        has.is_scipy_available = given
        gc.freeze()  # not looked at again, not even at the end of the process
        if was_enabled:
            gc.enable()


@contextmanager
def resumable() -> Iterator[None]:
    """Tell whoever presses Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("Stopped. Finished stages are kept; the same command goes on from there.")
        raise


def quiet_libraries() -> None:
    """Silence what other libraries say about themselves; what concerns the user is said by us."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line; what the user can mend is told in one sentence, without a traceback."""
    quiet_libraries()
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("TENSORMIX_TRACEBACK"):
            raise
        text = str(error) if isinstance(error, ValueError) else f"{error.strerror or error}: {error.filename or ''}"
        errors.print(f"[bold red]tensormix:[/] {escape(text)}", soft_wrap=True)
        errors.print("Nothing that was finished is lost. TENSORMIX_TRACEBACK=1 shows where it came from.")
        sys.exit(2)
