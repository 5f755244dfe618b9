"""A port as a family of the zoo: the six files, and a NOTICE that says whose work it is."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import keyword
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.live.layout_source import layout_source
from convert.live.port_files import Port
from convert.porting.ported_source import distribution_of
from convert.porting.rendering.module_file import formatted
from convert.runtime.arrays import to_numpy
from convert.runtime.user_code import module_name
from zoo.containers.errors import UsageError
from zoo.registry import families

_CONFIG = '''"""The one size that was ported: another asks for arguments in both definitions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    pass


PRESETS = {{"{name}": Config()}}
TINY = {{"tiny": Config()}}
'''
_INIT = '''"""{title}."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from {package}.config import PRESETS, TINY, Config
from {package}.layout import infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """One call, of the sizes that it was ported with."""
    return {{{inputs}}}


MODEL = Model(
    name="{name}",
    version=1,
    summary="{title}",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="{package}.model_torch:make",
    flax="{package}.model_flax:make",
)
'''
_KNOWN = {
    True: "None known: its outputs are torch's, at sizes that were not traced too.",
    False: "Nobody has looked: it was written without being run.",
}
_MAKE_TORCH = '''

def make(c: Config, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The module. It computes in the dtype of its parameters: UsageError for another."""
    if dtype is not None:
        raise UsageError("this family computes in the dtype of its parameters", "give no dtype")
    with torch.device("cpu"):  # what is not saved has values too
        return {factory}()
'''
_MAKE_FLAX = '''

def make(
    c: Config, dtype: Any = None, param_dtype: Any = jnp.float32, *, rngs: nnx.Rngs
) -> {model}:
    """The module. It computes in the dtype of its parameters: UsageError for another."""
    if dtype is not None:
        raise UsageError("this family computes in the dtype of its parameters", "give no dtype")
    net = {model}(rngs=rngs)
    for _, part in nnx.iter_modules(net):
        if isinstance(part, nnx.Embed):  # which has a dtype of its own
            part.dtype = param_dtype
    return net
'''
_ERROR = "from zoo.containers.errors import UsageError"
_README = """# {name}

{title}. Written by `zooconvert port --family`; NOTICE says from what.

| preset | upstream | size |
|---|---|---|
| `{name}` | {upstream} | {count} parameters |

## Known differences from upstream

{known}
"""


def save_family(port: Port, factory: Any, folder: str | Path) -> list[Path]:
    """Write the files of a family into `folder`, which is new and bears the family's name. Gives
    them. `factory` is what was ported: a class or function that gives the module without arguments.

    UsageError for a folder that is there or whose name cannot be imported, for a name that is a
    family's already, and for a module that cannot be one: see the messages.
    """
    folder = Path(folder)
    check_family(folder, factory)
    _check(port)
    package = _package(folder)
    of = f"{module_name(factory)}.{factory.__qualname__}"
    title = f"{factory.__name__} of {module_name(factory)}, ported"
    told = {"name": folder.name, "package": package, "title": title}
    count = f"{port.layout.parameters:,}"
    files = {
        "__init__.py": formatted(_INIT.format(**told, inputs=_inputs(port.inputs))),
        "config.py": _CONFIG.format(**told),
        "layout.py": formatted(layout_source(port.layout, package)),
        "model_torch.py": _torch_source(port, factory, package),
        "model_flax.py": _flax_source(port, package),
        "README.md": _README.format(
            **told, upstream=f"`{of}`", count=count, known=_KNOWN[port.proved.verdict == "same"]
        ),
        "NOTICE": _notice(type(port.module), of),
    }
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


def check_family(folder: Path, factory: Any) -> None:
    """UsageError for a folder that cannot be a new family's, and for what no family is made of."""
    name = folder.name
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise UsageError(f"{name} is no name for a family", "use an identifier in lower case")
    if folder.exists():
        raise UsageError(f"{folder} exists already", "name another, or remove it")
    if not folder.parent.is_dir():
        raise UsageError(f"the directory {folder.parent} does not exist", "make it first")
    if name in families():
        raise UsageError(f"there is a family {name} already", "choose another name")
    if not inspect.isclass(factory) and not inspect.isfunction(factory):
        raise UsageError(
            "a family needs what makes the module, and this is one that is made",
            "name its class, or a function that gives it: def net(): return Net(64)",
        )
    if module_name(factory) == "__main__":
        raise UsageError("a family cannot be made of a notebook's module", "move it into a file")


def _check(port: Port) -> None:
    """UsageError for all of a port that keeps it from being a family."""
    told = [
        f"{t.name} is a buffer that is saved: make it persistent=False, or a parameter"
        for e in port.layout.entries
        if e.collection == "buffers"
        for t in e.torch
    ]
    told += [f"{n} is no array" for n, x in port.inputs.items() if not hasattr(x, "shape")]
    if port.moved.orders:
        told.append("its images have their channels last: port it with image_axes='first'")
    if port.file.arrays:
        told.append(f"tables that no expression gives: {', '.join(port.file.arrays)}")
    if told:
        raise UsageError(
            f"{port.model} cannot be a family of the zoo",
            "zooconvert port without --family writes it as a file",
            told,
        )


def _package(folder: Path) -> str:
    """The dotted name by which a folder will be imported: below the packages that hold it."""
    names = [folder.name]
    above = folder.resolve().parent
    while (above / "__init__.py").exists():
        names.insert(0, above.name)
        above = above.parent
    return ".".join(names)


def _inputs(inputs: Mapping[str, Any]) -> str:
    """The arrays of a call as expressions: drawn anew, masks and the like as they are."""
    return ", ".join(f'"{n}": {_sample(n, to_numpy(x))}' for n, x in inputs.items())


def _sample(name: str, array: np.ndarray) -> str:
    if array.size and (array == array.flat[0]).all():
        return f"np.full({array.shape}, {array.flat[0].item()!r})"
    if array.dtype.kind == "b":
        return f'probe.integers("{name}", {array.shape}, 2) == 1'
    if array.dtype.kind in "iu":
        return f'probe.integers("{name}", {array.shape}, {int(array.max()) + 1})'
    return f'probe.normal("{name}", {array.shape})'


def _torch_source(port: Port, factory: Any, package: str) -> str:
    """A file of somebody's own as it is; what is installed is imported."""
    name = factory.__name__
    made = _MAKE_TORCH.format(factory=name)
    imports = [_ERROR, "import torch", f"from {package}.config import Config"]
    if distribution_of(factory) is not None:
        head = (
            f'"""{port.model} in PyTorch: upstream\'s own."""\n\nfrom __future__ import annotations'
        )
        imports.append(f"from {factory.__module__} import {name}")
        return formatted("\n".join([head, "", *imports, made]))
    source = Path(inspect.getsourcefile(factory) or "").read_text()
    lines = source.rstrip().splitlines()
    above = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    at = max((n.end_lineno or n.lineno for n in above), default=0)
    future = "from __future__ import annotations" in source
    if not future and not above:
        imports.insert(0, "from __future__ import annotations")
    return formatted("\n".join([*lines[:at], *imports, *lines[at:], made]))


def _flax_source(port: Port, package: str) -> str:
    imports = [
        "from __future__ import annotations", "from typing import Any", "import jax.numpy as jnp",
        f"from {package}.config import Config", _ERROR,
    ]  # fmt: skip
    text = port.source.replace("from __future__ import annotations\n", "\n".join(imports), 1)
    return formatted(text.rstrip() + "\n" + _MAKE_FLAX.format(model=port.model))


_LICENCES = re.compile(r"(^|/)(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)


_NAMED = ("License-Expression", "License")


def _notice(of: type, name: str) -> str:
    """Whose work a family is, with the licence as its package has it."""
    lines = [f"{name} in Flax was derived from its PyTorch source by `zooconvert port`."]
    found = distribution_of(of)
    if found is None:
        file = Path(getattr(sys.modules.get(of.__module__), "__file__", None) or of.__module__).name
        lines += [f"That source is {file}; its licence holds for this folder too."]
        return "\n".join([*lines, ""])
    data = importlib.metadata.metadata(found)
    lines += [f"That source is of {found} {data['Version']}, whose licence holds for this folder:"]
    texts = [p for p in importlib.metadata.files(found) or [] if _LICENCES.search(str(p))]
    for path in texts:
        lines += ["", f"-- {path.name} --", "", Path(str(path.locate())).read_text().rstrip()]
    if not texts:
        lines += ["", next((data[k] for k in _NAMED if k in data), "see the package")]
    return "\n".join([*lines, ""])
