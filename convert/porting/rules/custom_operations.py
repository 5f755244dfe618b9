"""Operations that are not ATen's: other packages' own, and what only asserts."""

from __future__ import annotations

from typing import Any

from convert.porting.rules import rule
from convert.porting.rules.linear_algebra import grouped_mm
from convert.porting.rules.promote import refuse


@rule("transformers.grouped_mm_fallback.default")
def grouped_mm_fallback(x: Any, weight: Any, offs: Any) -> Any:
    """A mixture of experts: rows in groups that end at `offs`, each times its expert's matrix."""
    return grouped_mm(x, weight, offs)


@rule(
    "aten._assert_tensor_metadata.default", "aten._assert_async.msg", "aten._assert_scalar.default"
)
def asserted(*_: Any, **__: Any) -> None:
    """What torch asserts while it runs holds for the shapes that it was traced with."""


def _refuse(name: str) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise refuse(f"torchvision's own operation {name}: it has no rule")

    rule(f"torchvision.{name}.default")(refused)


for _name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    _refuse(_name)
