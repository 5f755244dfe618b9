"""Torch modules of the tests of `convert.port` whose classes differ in lists, or in parts that only
some instances have."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A layer and what is done with it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x).relu()


class Stage(nn.Module):
    """As many blocks as it is told."""

    def __init__(self, width: int, out: int, depth: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, out)
        self.blocks = nn.ModuleList([Block(out) for _ in range(depth)])
        self.after = nn.Sequential(*(Block(out) for _ in range(depth + 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return self.after(x)


class Stages(nn.Module):
    """Of other depths; `uneven` has something else than a block in one of its lists."""

    def __init__(self, uneven: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList([Stage(6, 12, 2), Stage(12, 18, 4), Stage(18, 24, 3)])
        if uneven:
            self.stages[1].blocks[1] = nn.Sequential(nn.Linear(18, 18), nn.Tanh())  # type: ignore[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class Dense(nn.Module):
    """All that was made so far, in a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 5)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.fc(torch.cat(features, 1))


class DenseNet(nn.Module):
    """Three of them, and a layer on what the last two give."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Dense(6), Dense(11), Dense(16)])
        self.last = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return self.last(torch.cat(features[2:], 1))


class Maybe(nn.Module):
    """A norm that is there or not, by a flag that does not name it."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.norm = None if plain else nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.plain:
            x = self.norm(x)  # type: ignore[misc]
        return torch.addmm(self.mix.bias, x, self.mix.weight.abs())


class Maybes(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Maybe(True), Maybe(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Branch(nn.Module):
    """Gives two; of the last instance only the first is used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.side = nn.Linear(6, 6), Maybe(True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fc(x) + y, self.side(y)


class Branches(nn.Module):
    """Whose last side branch nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Branch(), Branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = self.first(x, x)
        return self.last(x, y)[0]


class Named(nn.Sequential):
    """A Sequential of somebody's own whose parts have names, most of them numbered."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_module("stem", nn.Linear(6, width))
        for k in range(1, 5):
            self.add_module(f"block-{k}", Block(width))
        self.add_module("act", nn.Tanh())


class NamedStages(nn.Module):
    """Two of them; a part is called by its name too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Named(6), Named(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) + self.first.stem(x))


class Grid(nn.Module):
    """Takes sizes, and no array."""

    def forward(self, shape: tuple[int, int, int]) -> torch.Tensor:
        filled = torch.zeros(shape) + 1
        return filled.cumsum(1) * filled.cumsum(2)


class OnGrid(nn.Module):
    """Adds numbers to an image, of the sizes that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = Grid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        return x + self.grid((B, H, W))[:, None]


class Image(nn.Module):
    """Within a sequence, which hands on one array and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), OnGrid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Rising(nn.Module):
    """Whose first block alone takes another width."""

    def __init__(self, width: int, out: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(width, out))
        self.blocks.extend(nn.Linear(out, out) for _ in range(depth - 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).relu()


class Flat(nn.Module):
    """The widths are alike in all of them, by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Rising(6, 6, 2), Rising(6, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))
