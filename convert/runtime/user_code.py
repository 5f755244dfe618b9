"""Users' own modules by name: `pkg.mod:Net`, `path/to/file.py:Net`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from zoo.containers.errors import UsageError, printable

_SPEC = re.compile(r"(?P<where>.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_][\w.]*)")
_EXAMPLE = "write pkg.mod:Net or path/to/file.py:Net"


def is_target(text: str) -> bool:
    """Whether this names something in Python code, and is not a checkpoint."""
    found = _SPEC.fullmatch(text)
    return found is not None and found["where"] not in ("pkg", "hf") and not os.path.exists(text)


def load(
    text: str,
    seed: int,
    say: Callable[[str], None],
    only_shapes: bool = False,
    make: bool = True,
) -> Any:
    """The module that `text` names: an instance, or what a class or factory gives without
    arguments (with `rngs=nnx.Rngs(seed)` where it asks for rngs); (module, variables) for Linen.

    Without `make`, it is what the name stands for itself. With `only_shapes`, a torch module is
    made on the device "meta" where its code allows it: it takes no memory. Runs the user's code,
    and says so before it does. UsageError for what cannot be had.
    """
    found = _SPEC.fullmatch(text)
    if found is None:
        raise UsageError(f"{text!r} names nothing in Python code", _EXAMPLE)
    where, name = found["where"], found["name"]
    say(f"importing {printable(where)} runs its code")
    value: Any = _import(where)
    for i, part in enumerate(name.split(".")):
        if not hasattr(value, part):
            above = ".".join([where, *name.split(".")[:i]])
            raise UsageError(f"{above} has no {part}", _near(value, part))
        value = getattr(value, part)
    if not make:
        return value
    if only_shapes and _is_factory(value):
        with contextlib.suppress(Exception):
            return _on_meta(value, text, seed)
    return made(value, text, seed)


_OF_FILE = "zooconvert_user_"


def module_name(of: Any) -> str:
    """The name by which a user knows the module of a class or function: of one that was loaded from
    a file by its path, and of the script that runs, the file's; "__main__" is a notebook's."""
    name = of.__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file).stem if name.startswith((_OF_FILE, "__main__")) and file else name


def _import(where: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if where.endswith(".py"):
            return _import_file(Path(where))
        return importlib.import_module(where)
    except ModuleNotFoundError as e:
        if e.name and (where == e.name or where.startswith(f"{e.name}.")):
            raise UsageError(
                f"there is no module {where}",
                f"see that it is installed or lies below {here}, or give the path of its file",
            ) from None
        raise UsageError(f"{where} imports {e.name}, which is not installed", "install it") from e
    except UsageError:
        raise
    except (Exception, SystemExit) as e:
        raise _broken(f"importing {where}", e) from e


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}", _EXAMPLE)
    name = _OF_FILE + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)  # so that it finds its neighbours, as when it is run
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_factory(value: Any) -> bool:
    return inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, partial)


def _on_meta(value: Any, text: str, seed: int) -> Any:
    """What a class or function gives on torch's device "meta". Code that reads values fails there,
    and what it loads goes nowhere, of which torch warns."""
    import torch

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return made(value, text, seed)


def made(value: Any, text: str, seed: int = 0) -> Any:
    """`value`, or what it gives when it is called, as in `load`; `text` is what errors call it."""
    if not _is_factory(value):
        return value
    arguments: dict[str, Any] = {}
    parameters = _parameters(value)
    missing = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if "rngs" in parameters:
        from flax import nnx

        arguments["rngs"] = nnx.Rngs(seed)
        missing = [n for n in missing if n != "rngs"]
    if missing:
        raise UsageError(
            f"{text} needs {', '.join(missing)}, and is called without arguments",
            _factory(value, missing),
        )
    _seed_torch(seed)
    try:
        return value(**arguments)
    except (Exception, SystemExit) as e:
        raise _broken(f"{text}()", e) from e


def _parameters(value: Any) -> dict[str, inspect.Parameter]:
    """What a call takes. Of a class its own `__init__` tells: NNX's metaclass hides it."""
    try:
        if not inspect.isclass(value):
            return dict(inspect.signature(value).parameters)
        return dict(list(inspect.signature(value.__init__).parameters.items())[1:])
    except (TypeError, ValueError):
        return {}


def _factory(value: Any, missing: list[str]) -> str:
    """The function to write instead, in one line."""
    arguments = ", ".join(f"{name}=..." for name in missing)
    called = f"{getattr(value, '__name__', 'Net')}({arguments})"
    return f"write a function without arguments and name that: def net(): return {called}"


def _seed_torch(seed: int) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _broken(what: str, error: BaseException) -> UsageError:
    line = " ".join(str(error).split())[:200]
    return UsageError(
        f"{what} fails: {type(error).__name__}: {line}",
        "see that it runs by itself; --debug shows where it fails",
    )


def _near(value: Any, name: str) -> str:
    from difflib import get_close_matches

    known = [n for n in vars(value) if not n.startswith("_")]
    near = get_close_matches(name, known, 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:12])}"
