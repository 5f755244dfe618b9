"""Models below prefixes of a header that as a whole is none, or is more than one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from zoo.checkpoint.peel import COLLECTIONS, is_weight
from zoo.containers.errors import UsageError, ZooError

_LEAST = 10  # a part is worth naming where it has at least one in so many of a file's tensors
_DEEPEST = 6  # parts of a prefix
_MOST = 8  # parts that are named


def parts(names: Collection[str], total: int, what: Callable[[str], str | None]) -> dict[str, str]:
    """Prefix -> what the tensors below it are, by `what`; outermost first, none within another.

    `names` are some of the `total` tensors of a file. A prefix is looked at where there are modules
    below it, and not all of the tensors, nor next to none. Nothing is returned where what is found
    is less than a third of `names`.
    """
    weights = [n for n in names if all(map(is_weight, n.split(".", 2)[:2]))]
    bare = [n.partition(".")[2] if n.partition(".")[0] in COLLECTIONS else n for n in weights]
    sizes: Counter[str] = Counter()
    for depth in range(1, _DEEPEST + 1):  # below what is too small nothing is looked at
        above = [_above(n, depth) for n in bare]
        sizes.update(prefix for prefix in above if prefix)
        pairs = zip(bare, above, strict=True)
        bare = [n for n, prefix in pairs if prefix and sizes[prefix] * _LEAST >= total]
    found: dict[str, str] = {}
    for prefix, size in sorted(sizes.items(), key=lambda item: (item[0].count("."), item[0])):
        within = any(prefix.startswith(f"{other}.") for other in found)
        if within or size == total or size * _LEAST < total or len(found) == _MOST:
            continue
        if told := what(prefix):
            found[prefix] = told
    return found if 3 * sum(sizes[p] for p in found) >= len(weights) else {}


def _above(name: str, depth: int) -> str:
    """The first parts of a name, so many; nothing where there is no module below them."""
    path = name.split(".", depth + 1)
    return ".".join(path[:depth]) if len(path) == depth + 2 else ""


def several(offered: Mapping[str, str]) -> ZooError:
    """The error that offers the models within one file."""
    one = next(iter(offered))
    if len(offered) == 1:
        return UsageError(
            f"only the tensors below {one} are a model of the zoo ({offered[one]})",
            f"take them alone with --prefix {one}",
        )
    return UsageError(
        f"the file holds {len(offered)} models",
        f"say which with --prefix, such as --prefix {one}",
        [f"below {prefix}: {what}" for prefix, what in offered.items()],
    )


def nothing_below(prefix: str, names: Iterable[str]) -> ZooError:
    """The error for a prefix that nothing has."""
    heads = list(dict.fromkeys(n.partition(".")[0] for n in names))
    listed = ", ".join(heads[:_MOST]) + (", ..." if len(heads) > _MOST else "")
    return UsageError(f"no tensor lies below {prefix!r}", f"the names begin with {listed}")
