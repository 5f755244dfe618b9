"""Write the skeleton of a family: one layer in both frameworks, complete and passing all tests.

scripts/new_model NAME makes zoo/models/NAME/. Replace the layer by the model, file by file.
scripts/new_model NAME --from-torch MODULE:NAME --inputs FILE makes it of a torch module, by
`zooconvert port --family`.
"""

from __future__ import annotations

import argparse
import keyword
import subprocess
import sys
from pathlib import Path

MODELS = Path(__file__).parents[1] / "zoo" / "models"

FILES = {
    "__init__.py": '''"""{title}: one line that says what it is."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.{name}.config import PRESETS, TINY, Config
from zoo.models.{name}.layout import infer, init, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two samples."""
    return {{"x": probe.normal("x", (2, c.in_features))}}


MODEL = Model(
    name="{name}",
    version=1,
    summary="one line that says what it is (Author year)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.{name}.model_torch:{title}",
    flax="zoo.models.{name}.model_flax:{title}",
    init=init,
)
''',
    "config.py": '''"""Hyper-parameters, under upstream's names, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    in_features: int = 8
    out_features: int = 4


PRESETS = {{"{name}_small": Config()}}
TINY = {{"tiny": Config(in_features=5, out_features=3)}}
''',
    "layout.py": '''"""Every tensor once: canonical name, shape, kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from zoo.layout import Entry, Shape, linear
from zoo.model import dim
from zoo.models.{name}.config import Config


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    yield from linear("{name}_head", c.in_features, c.out_features)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where this is another model."""
    if "{name}_head.weight" not in shapes:
        return None
    return {{
        "in_features": dim(shapes, r"^{name}_head\\.weight$", 1),
        "out_features": dim(shapes, r"^{name}_head\\.weight$", 0),
    }}


def init(c: Config, name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Uniform within 1/sqrt(in_features), as nn.Linear does it."""
    bound = c.in_features**-0.5
    return rng.uniform(-bound, bound, shape)
''',
    "model_torch.py": '''"""{title} in PyTorch. Cite the paper; say which upstream the names follow.

B samples, D features.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn, relu

from zoo.models.{name}.config import Config
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options


class {title}(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.{name}_head = Linear(c.in_features, c.out_features, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, out_features)."""
        return relu(self.{name}_head(x))
''',
    "model_flax.py": '''"""{title} in Flax NNX: the twin of model_torch.py, class by class.

B samples, D features.
"""

from __future__ import annotations

from typing import Unpack

from flax import nnx
from jax import Array
from jax.nn import relu

from zoo.models.{name}.config import Config
from zoo.nn.options_flax import Options


class {title}(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.{name}_head = nnx.Linear(c.in_features, c.out_features, **kw)

    def __call__(self, x: Array) -> Array:
        """(B, D) -> (B, out_features)."""
        return relu(self.{name}_head(x))
''',
    "README.md": """# {name}

What it is. Paper, with a link. Which upstream's names it follows.

| preset | upstream | size |
|---|---|---|
| `{name}_small` | | |

## Known differences from upstream

None.
""",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("scripts/new_model", description=__doc__)
    parser.add_argument("name", help="a Python identifier in lower case")
    parser.add_argument("--from-torch", metavar="MODULE:NAME", help="what to port")
    parser.add_argument("--inputs", metavar="FILE", help="one call of it, as an .npz or .npy file")
    given = parser.parse_args(arguments)
    name = given.name.lower()
    folder = MODELS / name
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    wrong = ""
    if not name.isidentifier() or keyword.iskeyword(name):
        wrong = f"{name} is not a Python identifier"
    elif bool(given.from_torch) != bool(given.inputs):
        wrong = "--from-torch and --inputs go together"
    elif folder.exists():
        wrong = f"{folder} exists already"
    if wrong:
        print(wrong, file=sys.stderr)
        return 2
    if given.from_torch:
        command = [sys.executable, "-m", "convert", "port", given.from_torch, "--family"]
        run = subprocess.run([*command, "--inputs", given.inputs, "-o", str(folder)])
        if run.returncode:
            return run.returncode
    else:
        write(folder, name)
    print(f"wrote {shown}")
    print(f"it passes as it is: scripts/test -k {name}; scripts/fix adds it to the README")
    return 0


def write(folder: Path, name: str) -> None:
    """The skeleton."""
    folder.mkdir()
    title = "".join(part.capitalize() for part in name.split("_"))
    for file, text in FILES.items():
        (folder / file).write_text(text.format(name=name, title=title))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
