"""What joins the rooms: `convert`, `plan` and `verify`. Functions that one room answers alone are
that room's; `convert/__init__.py` names them all, and the command line calls nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convert.compare.report import Report
from convert.compare.settings import EXPLAIN, OPTIMIZERS, STEPS, Level, Settings, check_level
from convert.engine.execute import run
from convert.engine.prepare import Order, Prepared, prepare
from convert.engine.workplace import Leftover, leftovers, locked
from convert.matching.evidence import MatchedLayout
from zoo import hub
from zoo.checkpoint.certificate import Certificate, now, versions
from zoo.checkpoint.intact import Checked
from zoo.checkpoint.intact import check as run_check
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.request import make_request
from zoo.containers.errors import NotEquivalent, UsageError
from zoo.layout import Tree

if TYPE_CHECKING:
    from convert.live.port_files import Port

Source = str | os.PathLike[str]


def convert(
    src: Source,
    dst: Source | None = None,
    to: str | None = None,
    *,
    framework: str | None = None,
    tree: Tree = "nnx",
    dialect: str | None = None,
    model: str | None = None,
    config: Source | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    learning_rate: float | None = None,
    layout: Any = None,
    prefix: str | None = None,
    force: bool = False,
    verify: bool = True,
    level: Level = "bits",
    max_memory: int | None = None,
    workers: int | None = None,
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
    on_plan: Callable[[Prepared], None] = lambda prepared: None,
) -> Certificate:
    """Convert the checkpoint `src` to the other framework, or with `dialect` to other names of
    either; `dst` appears whole, or not at all.

    `src` is whatever `zoo.hub` understands. `dst` None lies beside it: STEM.flax/ or
    STEM.safetensors. `to` is "orbax", "msgpack", "safetensors" or "pt" (None: by dst's suffix, else
    orbax or safetensors). `framework` is the target's, "flax" or "torch" (None: the one that `to`
    belongs to, else the one that the source is not of). `tree` is how a Flax checkpoint is nested:
    "nnx", "linen", "linen-compact", or "nnx-scan" and "linen-scan", where equal layers are stacked
    along a leading axis; `dialect` instead is a name under which upstream publishes the family
    ("torchvision", "transformers": `zooconvert models --dialects`). `dtype` casts floating-point
    tensors. `learning_rate` is that of the last update, for a momentum that optax keeps times it.
    `layout` says what the tensors are where no family has them: a `zoo.layout.Layout`, its JSON
    data, or the path of a JSON file or of a checkpoint that one came with. It travels with the
    result, so that the way back needs none. `prefix` is what stands before the names of the one
    model that is meant, where `src` holds several: "student".
    `verify` re-reads the result and maps it back; `level` is as in `convert.verify`: above "bits"
    both twins are run. `max_memory` is how many bytes of tensors are held at a time (None: 96 MB;
    ops that mix all of a tensor may take more, which `plan` tells), by `workers` threads.
    An interrupt (KeyboardInterrupt, a kill) leaves a hidden directory beside `dst`, from which the
    same call with `resume` goes on: what was written is not written again, all of it is verified.
    It is refused where the source or an argument is another; where nothing was begun, all is done.
    A .pt file, and what comes from memory, cannot be resumed: UsageError.
    `on_plan` is called once everything is known and nothing is written.

    Raises ZooError; see `zoo.containers.errors` for its kinds.
    """
    order = Order(
        src=src,
        dst=dst,
        to=to,
        framework=framework,
        tree=tree,
        dialect=dialect,
        model=model,
        config=config,
        dtype=dtype,
        max_shard_size=max_shard_size,
        learning_rate=learning_rate,
        layout=layout,
        prefix=prefix,
        force=force,
        verify=verify,
        level=level,
        max_memory=max_memory,
        workers=workers,
    )
    with ExitStack() as stack:
        prepared = prepare(order, stack)
        on_plan(prepared)
        return run(prepared, resume=resume, progress=progress)


def plan(src: Source, dst: Source | None = None, to: str | None = None, **kw: Any) -> Prepared:
    """What `convert` of the same arguments would do, refusing what it would refuse.

    Reads names and shapes, writes nothing. The source is closed again: it is for looking at.
    """
    with ExitStack() as stack:
        return prepare(Order(src, dst, to, **kw), stack)


def check(source: Source, *, progress: Progress = lambda stage, done, total: None) -> Checked:
    """Whether a checkpoint is still what its certificate says that was written: every tensor, the
    header, the optimizer, the files beside. Everything is read.

    Raises UsageError where there is no certificate, CorruptInput where nothing can be read any
    more; what is damaged is in the result.
    """
    return run_check(hub.locate(source), progress)


def clean(directory: Source, *, dry_run: bool = False) -> list[Leftover]:
    """Remove what conversions that were killed left in a directory: hidden workplaces, those that
    could be resumed too. What was whole already is put in its place. Running ones are left alone.
    With `dry_run` they are only listed.

    Raises UsageError for what is not a directory.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory", "name the directory of the conversions")
    with locked(path, wait=True):
        return leftovers(path, remove=not dry_run)


def match(
    torch_side: Any,
    flax_side: Any,
    inputs: Any = None,
    *,
    flax_inputs: Any = None,
    pairs: Mapping[str, str] | None = None,
    rotary: str | None = None,
) -> MatchedLayout:
    """The layout of two models that should be one: which tensor is which, and by what ops.

    A side is a checkpoint of any container, or a module: a torch.nn.Module; an nnx.Module, a bound
    linen.Module, (linen.Module, variables) or (function, params). Where both hold the same weights,
    values decide, bit for bit; else names and shapes, and, of two modules with `inputs` (as
    `verify` takes them), the order of execution and the outputs. `pairs` settle what is open:
    torch's name -> Flax's, or "" for a tensor that Flax does not have. `rotary` says how Flax's
    query and key lie where features are rotated and nothing else tells: "same", or "pairs" for
    features (0, 1), (2, 3), ... where torch rotates halves.

    The result is a layout like a family's, with `evidence` for every entry, `notices`, and
    `checked`: whether values or outputs were compared, and not names alone.

    Raises ZooError where anything is open, listing it with its candidates: no layout is guessed.
    """
    if inputs is None:
        from convert.matching.match_tensors import match_tensors

        return match_tensors(torch_side, flax_side, pairs, rotary)
    if any(isinstance(side, str | os.PathLike) for side in (torch_side, flax_side)):
        raise UsageError(
            "inputs are for two modules, and a checkpoint cannot be run",
            "leave them out, or load the checkpoint into its module first",
        )
    from convert.compare.matched_modules import match_modules

    return match_modules(torch_side, flax_side, inputs, flax_inputs, pairs, rotary)


def verify(
    a: Any,
    b: Any,
    inputs: Any = None,
    level: Level | None = None,
    *,
    model: str | None = None,
    config: Source | Mapping[str, Any] | None = None,
    prefix: str | None = None,
    flax_inputs: Any = None,
    layers: Mapping[str, str] | None = None,
    layout: Any = None,
    variables: Mapping[str, Any] | None = None,
    optimizers: Sequence[str] = OPTIMIZERS,
    steps: int = STEPS,
    seed: int = 0,
    explain: float = EXPLAIN,
    titles: tuple[str, str] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Whether two models are the same: the verdict, and what it stands on.

    `a` and `b` are checkpoints of the zoo's models, of any containers and frameworks; or a
    torch.nn.Module and an nnx.Module, a bound linen.Module, (linen.Module, variables), or
    (function, params) for a JAX function that is called as function(params, *inputs).

    Levels, each with those before it:
    "bits": every tensor, mapped to torch's names and shapes, bit for bit (the default for
    checkpoints). "outputs": both are run in eval mode, in float32 and in float64; every output and
    intermediate is judged by the rounding noise (the default for modules). "gradients": of a scalar
    loss with respect to every parameter and floating-point input. "training": `steps` steps of each
    of `optimizers` on the one batch.

    `inputs` are NumPy, torch or JAX arrays: one, a tuple or list (positional) or a dict (by name;
    with torch's axes). Checkpoints have sample inputs of their own. For modules: "auto" draws them
    from `seed`, and a notice says what it drew; `flax_inputs` where the Flax one takes others, else
    images are moved to channels-last where it asks for that; `layers` pairs that names do not tell,
    torch name -> Flax path; `variables` those of an unbound linen module. `model` and `config` say
    what checkpoints do not, `prefix` which model is meant where either of them holds several;
    `layout` says of either how the tensors lie, as in `convert.convert`. `seed` is that of the
    loss's weights. `titles` name the two modules in the report. Where they differ and no known
    cause fits, `explain` seconds at most go into a search for one; 0 searches for none.

    Neither model is changed. Raises ZooError where they cannot be compared; a difference is no
    error but the verdict.
    """
    options = Settings(tuple(dict.fromkeys(optimizers)), steps, seed, explain)
    if isinstance(inputs, str) and inputs != "auto":
        raise UsageError(f"inputs is the text {inputs!r}", f"write level={inputs!r}")
    if level is not None:
        check_level(level)
    started = time.perf_counter()
    if all(isinstance(side, str | os.PathLike) for side in (a, b)):
        if any(x is not None for x in (flax_inputs, layers, variables)):
            raise UsageError(
                "flax_inputs, layers and variables are for modules, not for checkpoints",
                "leave them out",
            )
        if isinstance(inputs, str):
            raise UsageError(
                "inputs are drawn for modules; checkpoints have samples of their own",
                "leave inputs='auto' (--inputs auto) out",
            )
        from convert.compare.checkpoints import verify_checkpoints

        request = make_request(model, config, layout, prefix)
        report = verify_checkpoints(a, b, level or "bits", request, inputs, options, progress)
    else:
        from convert.compare.modules import Hints, compare_modules

        if any(x is not None for x in (model, config, prefix)):
            raise UsageError(
                "model, config and prefix are for checkpoints, not for modules", "leave them out"
            )
        hints = Hints(layers, layout, variables)
        report = compare_modules(
            (a, b), titles, (inputs, flax_inputs), level or "outputs", hints, options
        )
    report.versions, report.created = versions(), now()
    report.seconds = round(time.perf_counter() - started, 3)
    return report


def to_flax(
    module: Any,
    inputs: Any,
    weights: Any = None,
    *,
    others: Sequence[Any] = (),
    rules: Mapping[Any, Callable[..., Any]] | None = None,
    image_axes: Literal["first", "last"] = "first",
    verify: bool | Literal["gradients"] = True,
    untested: bool = False,
) -> Any:
    """Any torch module as a ready nnx.Module: the same model, with the same weights, in eval mode.

    `module` is a torch.nn.Module, or a class or function that gives one without arguments; or a
    function of torch code (a loss), whose modules are those that it mentions. `inputs` is one call
    of it: an array, a tuple or list (positional) or a dict (by name), in torch's axes. What is no
    array is baked in. Sizes are dynamic where torch.export finds nothing that fixes them; a call of
    sizes that the graph is not for is traced and proved when it comes, from `module`, which is kept
    for that. `others` are further calls, of other sizes, for which that is done at once.
    `weights` is a checkpoint or a state_dict to take in place of the module's own. `rules` are JAX
    functions for what torch's name alone does not tell, by what they stand for: the name of an
    operation, a module class (f(layer, *args)) or a Python function (f(*args)).
    `image_axes="last"` takes and gives floating-point arrays of four and five axes with their
    channels last.

    With `verify`, outputs are held against torch's in float32 and float64, at these sizes and at
    others; `"gradients"` holds parameters' gradients too. The result's `report` says what was
    proved and what was baked in.

    Raises ZooError where the module cannot be traced or an operation has no rule (with file and
    line, all at once), NotEquivalent where the outputs differ.
    """
    from convert.porting.to_flax import live_module, torch_module

    module = torch_module(module)
    if weights is not None:
        from convert.live.into_definition import with_weights

        module = with_weights(module, weights)
    return live_module(
        module,
        inputs,
        others=others,
        rules=rules,
        image_axes=image_axes,
        verify=verify,
        untested=untested,
    )


def port(
    module: Any,
    inputs: Any,
    weights: Any = None,
    *,
    others: Sequence[Any] = (),
    level: Level | None = None,
    image_axes: Literal["last", "first"] = "last",
    verify: bool = True,
    untested: bool = False,
    standalone: bool = False,
) -> Port:
    """A torch module as Flax source: readable NNX classes that are the same model.

    `module` is a torch.nn.Module, or a class or function that gives one without arguments (then the
    arguments of its parts' constructors keep their names); `inputs`, `others`, `weights` and
    `untested` are those of `to_flax`. What comes back has the `source`, the `layout` of its
    weights, and `save(path)`, which writes them with the weights: the file imports jax, flax and
    zoo.nn only, and is yours. With `standalone` it holds what it uses of zoo.nn, and imports jax
    and flax only.

    Images have their channels last in it, as Flax's layers want them: the convolutions are Flax's
    own, and the source takes (B, H, W, C) where torch's module takes (B, C, H, W), and gives images
    so; `inputs` have torch's axes all the same. Where torch's order is needed inside, a transpose
    says why. With `image_axes` "first" all axes are torch's; they are in either case in a model
    without layers of images.

    With `verify`, the source is imported afresh and its outputs are held against torch's in float32
    and float64, at these sizes and at others. With `level`, the two modules are compared by
    `convert.verify` at that level too, every layer by itself, and the report is saved as a page.

    Raises ZooError where the module cannot be traced, an operation has no rule or its code cannot
    be written as source; NotEquivalent where anything differs.
    """
    from convert.live.port_files import Port
    from convert.porting.ported_source import made_of, ported

    module, arguments = made_of(module)
    if weights is not None:
        from convert.live.into_definition import with_weights

        module = with_weights(module, weights)
    found = ported(
        module, inputs, arguments,
        others=others, image_axes=image_axes, verify=verify, untested=untested,
        standalone=standalone,
    )  # fmt: skip
    made = Port(**vars(found))
    if level is None:
        return made
    theirs = made.flax_inputs() if made.moved.inputs else inputs
    report = _verify(made.module, made.net(), inputs, level, layout=made.layout, flax_inputs=theirs)
    if report.verdict != "same":
        raise NotEquivalent(
            f"the port of {type(made.module).__name__} differs from it at level {level}",
            "report this; convert.to_flax gives the model as a live module",
            _told(report).splitlines()[:12],
        )
    return replace(made, report=report)


def _told(report: Report) -> str:
    from convert.compare.summary_text import text

    return text(report)


_verify = verify  # which an argument of `port` hides
