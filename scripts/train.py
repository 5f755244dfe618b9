"""Train a model of the zoo, in either framework, from one description of the task.

scripts/train --list
scripts/train mnist_cnn.digits --framework flax --plot
scripts/train mnist_cnn.digits --framework torch --resume runs/.../checkpoint.msgpack
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))  # also under torchrun, which starts elsewhere

import click

FRAMEWORKS = click.Choice(["torch", "flax"])
DTYPES = click.Choice(["float32", "float64", "bfloat16"])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("name", metavar="TASK", required=False)
@click.option("--list", "listing", is_flag=True, help="List the tasks, and stop.")
@click.option("--framework", type=FRAMEWORKS, default="torch", show_default=True)
@click.option("--steps", type=int, help="Updates in all, those before a resumption included.")
@click.option("--epochs", type=int, help="The same in passes over the data.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and batches.")
@click.option("--optimizer", help="SGD, Adam, AdamW, RMSprop, ... [default: the task's]")
@click.option("--lr", "rate", type=float, help="Learning rate. [default: the task's]")
@click.option("--schedule", type=click.Choice(["constant", "cosine", "linear", "warmup"]))
@click.option("--batch-size", type=int, help="Of the whole batch, however it is divided.")
@click.option("--dtype", type=DTYPES, default="float32", show_default=True,
              help="bfloat16 computes in it and keeps float32 weights.")  # fmt: skip
@click.option("--set", "fields", multiple=True, metavar="FIELD=VALUE", help="Of the config.")
@click.option("--data", "folder", type=click.Path(path_type=Path), help="Where your data lie.")
@click.option("--out", type=click.Path(path_type=Path), help="[default: runs/TASK.FRAMEWORK.SEED]")
@click.option("--resume", type=click.Path(path_type=Path), metavar="CKPT",
              help="Go on from a checkpoint of either framework.")  # fmt: skip
@click.option("--every", type=int, help="Steps between checkpoints. [default: a tenth of all]")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Write TensorBoard logs there.")
@click.option("--devices", type=int, default=1, show_default=True, help="Of flax: divide batches.")
@click.option("--plot", is_flag=True, help="Draw the curve into OUT/curve.png.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def train(name: str | None, listing: bool, **options: Any) -> None:
    """Train TASK, which is PRESET.TAG, on its data, and score the result on held-out data.

    Two frameworks, one description: the same weights from one seed, the same batches in the same
    order, the same loss; dropout is off. Under torchrun, PyTorch divides every batch among the
    processes; --devices does the same in Flax.
    """
    if listing:
        _list(options["as_json"])
        return
    if name is None:
        raise click.UsageError("name a task; --list lists them")
    _train(name, **options)


def _train(
    name: str,
    *,
    framework: str,
    fields: tuple[str, ...],
    folder: Path | None,
    out: Path | None,
    resume: Path | None,
    every: int | None,
    log_dir: Path | None,
    plot: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    _host_devices(framework, settings["devices"])
    from training import plots
    from training.description import make_job
    from training.games import GAMES
    from training.playing import play
    from training.run import run
    from training.tasks import find

    main = os.environ.get("RANK", "0") == "0"
    out = out or Path("runs") / f"{name}.{framework}.{settings['seed']}"
    where: dict[str, Any] = {"out": out, "resume": resume, "every": every, "log_dir": log_dir}
    if name in GAMES:
        with _progress(quiet or not main) as on_step:
            result = play(name, framework, _overrides(fields), settings, on_step=on_step, **where)
    else:
        job = make_job(
            find(name), framework, folder=folder, overrides=_overrides(fields), **settings
        )
        with _progress(quiet or not main, job.steps) as on_step:
            result = run(job, on_step=on_step, **where)
    if not main:
        return
    if plot:
        plots.curves(out / "curve.png", {framework: (result.first, result.losses)}, name)
    if as_json:
        print(json.dumps({"task": name, "out": str(out), **result.to_json()}))
    elif not quiet:
        _tell(name, out, result, plot)


def _tell(name: str, out: Path, result: Any, plot: bool) -> None:
    files = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    losses = f"loss {result.losses[0]:.4g} -> {result.losses[-1]:.4g}, " if result.losses else ""
    print(f"{name}: {len(result.losses)} steps in {result.seconds:.1f} s, {losses}{result.score}")
    print(f"  in {out}: {', '.join(files)}")


def _overrides(fields: tuple[str, ...]) -> dict[str, Any]:
    """FIELD=VALUE, the value in JSON, or else as text."""
    from zoo.containers.errors import UsageError

    found: dict[str, Any] = {}
    for item in fields:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {item} sets nothing", "write --set FIELD=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _host_devices(framework: str, devices: int) -> None:
    """As many devices as were asked for on a CPU; must be said before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if framework == "flax" and devices > 1 and "device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"


def _progress(quiet: bool, steps: int | None = None) -> Any:
    """A context that gives a function (step, loss): a bar on a terminal, nothing elsewhere."""
    import contextlib

    @contextlib.contextmanager
    def bar() -> Any:
        if quiet or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=steps, loss="")
            yield lambda step, loss: progress.update(task, completed=step + 1, loss=f"{loss:.4g}")

    return bar()


def _list(as_json: bool) -> None:
    from training.games import GAMES
    from training.tasks import TASKS

    every = {**TASKS, **GAMES}
    rows = [
        {"task": t.name, "summary": t.summary, "data": t.licence, "local": t.local}
        for t in every.values()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    width = max(map(len, every))
    for row in rows:
        needs = "  (--data DIR)" if row["local"] else ""
        print(f"{row['task']:{width}}  {row['summary']}{needs}")


def main() -> int:
    """Run; errors are told as `zooconvert` tells them: what is wrong, and what to do."""
    from zoo.containers.errors import ZooError

    try:
        train(standalone_mode=False)
    except click.ClickException as e:
        print(f"error: {e.format_message()}\ntry: scripts/train --help", file=sys.stderr)
        return 2
    except ZooError as e:
        lines = [f"error: {e.problem}", *(f"  {d}" for d in e.details), f"try: {e.advice}"]
        print("\n".join(lines), file=sys.stderr)
        return e.exit_code
    except (KeyboardInterrupt, click.Abort):
        print("error: interrupted\ntry: --resume the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
