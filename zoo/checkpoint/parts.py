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
    sizes: Counter[str] = Counter()
    weights = [n for n in names if all(map(is_weight, n.split(".")[:2]))]
    for name in weights:
        head, *path = name.split(".")
        path = path if head in COLLECTIONS else [head, *path]
        for depth in range(1, min(len(path) - 1, _DEEPEST + 1)):
            sizes[".".join(path[:depth])] += 1
    found: dict[str, str] = {}
    for prefix, size in sorted(sizes.items(), key=lambda item: (item[0].count("."), item[0])):
        within = any(prefix.startswith(f"{other}.") for other in found)
        if within or size == total or size * _LEAST < total or len(found) == _MOST:
            continue
        if told := what(prefix):
            found[prefix] = told
    return found if 3 * sum(sizes[p] for p in found) >= len(weights) else {}


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
