"""The file of a graph, with channels last where that can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.porting.image_axes.channels_last import channels_last
from convert.porting.image_axes.image_layer_axes import NoSuchAxes
from convert.porting.image_axes.moved import Relaid
from convert.porting.plain_masks import plain_masks
from convert.porting.rendering.module_file import ModuleFile, module_file
from convert.porting.rendering.not_rendered import NotRendered
from convert.program.graph import Graph
from zoo.layout import Layout


class Writer:
    """Writes the graphs of a module, which differ in dtypes: all with the axes of the first.
    `notices` say why images have torch's axes where they were to have Flax's."""

    def __init__(
        self,
        module: Any,
        layout: Layout,
        arguments: Mapping[str, Mapping[str, Any]],
        image_axes: str,
        standalone: bool,
    ) -> None:
        self.module, self.layout, self.arguments = module, layout, arguments
        self.standalone = standalone
        self.last = image_axes == "last"
        self.notices: list[str] = []

    def first(self, graph: Graph) -> tuple[ModuleFile, Relaid]:
        """The file of the first graph, and what lies otherwise in it."""
        try:
            return self._written(graph)
        except NoSuchAxes as e:
            why = str(e)
        except NotRendered:
            if not self.last:
                raise
            why = "a part of it is called with images and with other arrays"
        self.last = False
        made = self._written(graph)
        self.notices.append(f"images have torch's axes: {why}")
        return made

    def file(self, graph: Graph) -> ModuleFile:
        """The file of another graph."""
        return self._written(graph)[0]

    def _written(self, graph: Graph) -> tuple[ModuleFile, Relaid]:
        graph = plain_masks(graph)
        found = channels_last(graph, self.module, self.layout) if self.last else None
        moved = found or Relaid(graph)
        layout = moved.layout(self.layout)
        given = moved.graph, self.module, layout, "HEADER", self.arguments
        return module_file(*given, standalone=self.standalone, moved=moved), moved
