"""What stops an export, as one error that says where."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

from convert.program.stack_lines import is_made_up
from zoo.containers.errors import UsageError, ZooError

_DATA = re.compile(r"data-dependent|DataDependent|unbacked|\bu\d+\b|_local_scalar_dense")


class NotExported(ZooError):
    """torch.export cannot say what a module computes."""


def line_of(e: BaseException) -> str:
    """The innermost line of code that is neither torch's nor ours: "net.py:12: return x.foo()"."""
    import torch

    inside = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [
        f
        for f in traceback.extract_tb(e.__traceback__)
        if not f.filename.startswith(inside)
        and not is_made_up(f.filename)
        and "/sympy/" not in f.filename
    ]
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n +([^\n]+)', str(e))
    told = [f for f in found if not f[0].startswith(inside)]
    if told:
        file, line, text = told[-1]
        return f"{file}:{line}: {text.strip()}"
    if frames:
        return f"{frames[-1].filename}:{frames[-1].lineno}: {(frames[-1].line or '').strip()}"
    return ""


def _first(e: BaseException) -> str:
    lines = [x.strip() for x in str(e).splitlines() if x.strip()]
    return f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__


def export_error(e: Exception, module: Any) -> ZooError:
    """The error for what torch.export raised."""
    if isinstance(e, ZooError):
        return e
    name, where = type(module).__name__, line_of(e)
    if _DATA.search(str(e)) or _DATA.search(type(e).__name__):
        return NotExported(
            f"{name} cannot be traced: what it does next depends on the values of a tensor",
            "compute it without if, .item() or a size from a tensor, or give that function or "
            "module a rule: convert.to_flax(..., rules={that: a JAX function})",
            [d for d in (where, _first(e)) if d],
        )
    return NotExported(
        f"{name} cannot be traced by torch.export",
        "change that line, or give the function or module around it a rule: "
        "convert.to_flax(..., rules={that: a JAX function})",
        [d for d in (where, _first(e)) if d],
    )


def call_error(e: Exception, module: Any) -> UsageError:
    """The error for a module that does not run on the inputs that it is given."""
    return UsageError(
        f"{type(module).__name__} does not run on these inputs: {_first(e)}",
        "give inputs as its forward takes them",
        [d for d in (line_of(e),) if d],
    )
