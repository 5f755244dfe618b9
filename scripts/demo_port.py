"""Two torch models as Flax source: a net of our own, trained here, and transformers' MiniLM.

Shows the source, what was proved, and a picture. Works in .demo/ below the project. Exits with 1 if
anything is not as it should be.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from demo import CLOSE, SENTENCES, WORK, console, gap, package, pool, title, tokenize, verdict
from rich.syntax import Syntax

ROOT = Path(__file__).parents[1]


def main() -> int:
    started = time.perf_counter()
    WORK.mkdir(exist_ok=True)
    title("1. A net for digits of our own, trained in PyTorch")
    digits, images = digit_net()
    first = ported("DigitNet", digits, {"x": images[:4]}, "digits_flax.py")
    channels_last = images.transpose(0, 2, 3, 1)  # as Flax has images
    ours, theirs = first.net()(channels_last), in_torch(digits, x=images)
    same = bool((np.argmax(ours, 1) == np.argmax(theirs, 1)).all())
    console.print(
        f"\nThe same digit in {len(images)} images that it was not trained on  {verdict(same)}"
    )

    title("2. all-MiniLM-L6-v2, which transformers' BertModel is")
    bert, call = minilm()
    second = ported("BertSelfAttention", bert, call, "minilm_flax.py")
    a = pool(in_torch(bert, **call), call["attention_mask"])
    b = pool(np.asarray(second.net()(**call).last_hidden_state), call["attention_mask"])
    close = gap(a @ a.T, b @ b.T)
    console.print(
        f"\nThe ten sentences are alike up to {close:.1e} in both  {verdict(close < CLOSE)}"
    )
    drawn = picture(images, (theirs, np.asarray(ours)), (a @ a.T, b @ b.T))
    where = WORK.relative_to(ROOT)
    console.print(
        f"\nThe files are in {where}/, with layouts and weights; the picture is "
        f"{where}/{drawn.name}  [dim]{time.perf_counter() - started:.0f} s in all[/dim]"
    )
    return 0 if same and close < CLOSE else 1


def digit_net() -> tuple[Any, np.ndarray]:
    """DigitNet after a few epochs, and images (B, 1, 8, 8) that it has not seen."""
    import torch
    from demo_nets import DigitNet
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    found = load_digits()
    images = torch.tensor(found.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(found.target)
    net = DigitNet()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for rows in [r for _ in range(6) for r in torch.randperm(1500).split(100)]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    right = (net.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    console.print(f"Right in {right:.0%} of the images that it was not trained on")
    return net, images[1500:].numpy()


def minilm() -> tuple[Any, dict[str, np.ndarray]]:
    """transformers' module with the published weights, and the ten sentences."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # the checkpoint has a pooler too
    ids, mask = tokenize(SENTENCES)
    module = transformers.BertModel.from_pretrained(package(), add_pooling_layer=False)
    return module.eval(), {"input_ids": ids, "attention_mask": mask}


def ported(shown: str, module: Any, call: dict[str, np.ndarray], name: str) -> Any:
    """The port of a module: written, and shown."""
    import convert

    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        port = convert.port(module, call)
    port.save(WORK / name)
    console.print(f"[bold]$ zooconvert port ... -o {name}[/bold]\n")
    console.print(
        Syntax(one_class(port.source, shown), "python", background_color="default", word_wrap=True)
    )
    console.print(f"\n{len(port.source.splitlines())} lines; {shown} is shown. Beside torch:")
    for sizes, rows in port.proved.rows.items():
        console.print(f"  {sizes}: at most {max(r.ratio for r in rows):.2f} of the rounding noise")
    console.print(f"  {port.proved.verdict}  {verdict(port.proved.verdict == 'same')}")
    console.print(f"[dim]{time.perf_counter() - started:.1f} s[/dim]")
    return port


def one_class(source: str, name: str) -> str:
    import ast

    tree = ast.parse(source)
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    return "\n".join(source.splitlines()[found.lineno - 1 : found.end_lineno])


def in_torch(module: Any, **call: np.ndarray) -> np.ndarray:
    """What a module gives: logits, or the last hidden state."""
    import torch

    with torch.no_grad():
        output = module(**{n: torch.from_numpy(x) for n, x in call.items()})
    return np.asarray(getattr(output, "last_hidden_state", output))


def picture(
    images: np.ndarray,
    logits: tuple[np.ndarray, np.ndarray],
    similar: tuple[np.ndarray, np.ndarray],
) -> Path:
    """Digits with what both sides call them, and the similarities of both."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 7), layout="constrained")
    for axis, k in zip(axes[0], (0, 1, 2), strict=True):
        axis.imshow(images[k, 0], cmap="gray_r")
        axis.set_title(f"torch: {logits[0][k].argmax()}   Flax: {logits[1][k].argmax()}")
        axis.axis("off")
    named = zip(
        axes[1], ("torch", "Flax", "difference"), (*similar, similar[1] - similar[0]), strict=True
    )
    for axis, name, values in named:
        shown = axis.imshow(values, cmap="viridis" if name != "difference" else "RdBu")
        axis.set_title(f"similarity of sentences: {name}" if name != "difference" else name)
        figure.colorbar(shown, ax=axis, shrink=0.7)
    figure.savefig(path := WORK / "port.png", dpi=110)
    return path


if __name__ == "__main__":
    sys.exit(main())
