"""The word for an edit, by what it touches: a constant 1, positions, a value that by-passes what
another one goes through."""

from __future__ import annotations

import re
from collections.abc import Collection

from convert.diagnose.repair.edit import NAMELESS, Node, scalars
from convert.program.operations import Program

_ORDERED = ("topk", "sort", "argsort", "argmax", "argmin", "max", "min", "amax", "amin")
_RISING = ("softmax", "log_softmax", "sigmoid", "tanh", "exp", "log")
_WINDOWS = re.compile(r"^(_?conv|(adaptive_)?(max|avg)_pool)")
_PASSED = ("relu", "gelu", "silu", "tanh", "sigmoid", "dropout", "batch_norm", "contiguous",
           "clamp", "permute", "transpose", "mul", "add", "movedim")  # fmt: skip


def of_both(one: str, other: str) -> str:
    """The word for two edits at once: theirs if it is one, "rearranged" being any order."""
    if {one, other} in ({"padding", "dilation"}, {"padding", "stride"}):
        return "dilation" if "dilation" in (one, other) else "stride"  # the padding follows from it
    words = {one, other} - {"rearranged"} or {"rearranged"}
    orders = {"heads", "rope", "blocks", "flatten", "rearranged"}
    alike = one == other or (len(words) == 1 and words <= orders)
    return words.pop() if alike else NAMELESS


def bypasses(program: Program, one: int, other: int) -> bool:
    """Whether one value by-passes what the other is made of it by."""
    return one in program.before.get(other, ())


def of_bypass(program: Program, value: int, passed: int, users: Collection[int]) -> str | None:
    """The word for a value that all of these users, and no others of it are there, take in place of
    the one that is made of it: what makes it is left out. None where that is not so."""
    if not bypasses(program, value, passed) or set(program.users.get(passed, ())) - set(users):
        return None
    between = [
        o
        for o in program.operations
        for v in o.made
        if (v == passed or bypasses(program, v, passed)) and bypasses(program, value, v)
    ]
    return of_name(" ".join(o.module.rpartition(".")[2] for o in between))


def of_name(name: str) -> str:
    """The word for what is left out, by what it is called."""
    return "rope" if re.search("rot|rope", name.lower()) else "left_out"


def bypasses_layers(program: Program, one: int, other: int) -> bool:
    """Whether there are layers among what it by-passes."""
    return any(v == other or bypasses(program, v, other) for v in program.layers
               if bypasses(program, one, v))  # fmt: skip


def of_negated(node: Node) -> str:
    """The word for a sign: of what is only put in order, or of positions, it is their order."""
    users = [node.program.operations[i].name for v in node.operation.made
             for i in node.program.users.get(v, ())]  # fmt: skip
    if users and set(users) <= {"sigmoid"}:
        return "swapped"  # the gate's complement
    in_order = node.name == "arange" or _only_ordered(node.program, node.operation.made[0])
    # A difference may be taken the other way round, far before it: that is not told from a factor.
    return "reversed" if in_order else NAMELESS


def _only_ordered(program: Program, value: int) -> bool:
    """Whether nothing but the order of the numbers matters to what takes the value."""
    users = [program.operations[i] for i in program.users.get(value, ())]
    return bool(users) and all(
        o.name in _ORDERED or (o.name in _RISING and _only_ordered(program, o.made[0]))
        for o in users
    )


def is_fixed(program: Program, value: int) -> bool:
    """Whether a value follows from parameters and numbers in the code alone, as a bias looked up by
    relative positions does."""
    layer = program.layers.get(value)
    if value in program.leaves:
        given = layer[1] if layer else ()
        leaf = program.leaves[value]
        taken = leaf.name.startswith("`")  # a value of the run that this program begins behind
        fixed = leaf.kind in ("parameter", "buffer", "constant") and not taken
        return fixed or (bool(given) and all(is_fixed(program, v) for v in given))
    maker = program.makers.get(value)
    return maker is not None and all(is_fixed(program, v) for v in program.operations[maker].refs)


def of_layer(program: Program, name: str) -> str:
    """The word for a layer that is left out: of one with parameters what it is given is taken, as
    the parameters are there."""
    held = any(leaf.kind == "parameter" and leaf.name.startswith(f"{name}.")
               for leaf in program.leaves.values())  # fmt: skip
    return "operand" if held else "left_out"


def of_sum(node: Node) -> str:
    """A summand: the residual is what by-passes the others."""
    refs = node.operation.refs
    if any(is_fixed(node.program, r) for r in refs):
        return "left_out"  # a bias of positions
    pairs = ((a, b) for a in refs for b in refs if a != b)
    return "residual" if any(bypasses(node.program, a, b) for a, b in pairs) else "left_out"


def of_one_added(node: Node) -> str | None:
    """A plain 1 added to what only multiplies is a scale about one."""
    if not any(v == 1 for _, v in scalars(node.operation)):
        return None
    leaf = node.program.leaves.get(node.operation.refs[0])
    users = [node.program.operations[i].name
             for v in node.operation.made for i in node.program.users.get(v, ())]  # fmt: skip
    multiplies = bool(users) and all(name == "mul" for name in users)
    return "scale_plus_one" if multiplies or (leaf and leaf.kind == "parameter") else None


def of_zeros(program: Program, index: int) -> str:
    """The word for zeros in place of what an operation gives: of what is put beside something, as
    often as is needed, they pad it."""
    users = {u for v in program.operations[index].made for u in program.users.get(v, ())}
    while any(program.operations[u].name in ("repeat", "expand", "tile") for u in users):
        users = {
            u for k in users for v in program.operations[k].made for u in program.users.get(v, ())
        }
    names = {program.operations[u].name for u in users}
    return "padding" if names and names <= {"cat", "concat", "stack"} else "left_out"


def of_window(node: Node) -> str | None:
    """Where a slice cuts what a convolution or a pool gives, its padding is at stake."""
    value = node.operation.refs[0]
    maker = node.program.makers.get(value)
    name = "" if maker is None else node.program.operations[maker].name
    layer = node.program.layers.get(value, ("",))[0].rpartition(".")[2]  # one that was not opened
    return "padding" if _WINDOWS.match(name) or re.search("conv|pool", layer.lower()) else None


def is_image(node: Node) -> bool:
    """Whether the value comes, element by element, from a convolution or a pool."""
    program, value = node.program, node.operation.refs[0]
    while (maker := program.makers.get(value)) is not None:
        operation = program.operations[maker]
        if _WINDOWS.match(operation.name):
            return True
        if operation.name not in _PASSED or not operation.refs:
            return False
        value = operation.refs[0]
    return False


def is_one_step(node: Node) -> bool:
    """Whether the operation is one of several that one expression makes in turn, each of what the
    one before has made: a step of a loop."""
    site = node.operation.site
    if site is None:
        return False
    for i, other in enumerate(node.program.operations):
        if i != node.index and other.site is not None and other.name == node.name:
            same = (other.site.position, other.site.calls) == (site.position, site.calls)
            first, last = sorted((i, node.index))
            made, later = (node.program.operations[k].made[0] for k in (first, last))
            if same and bypasses(node.program, made, later):
                return True
    return False
