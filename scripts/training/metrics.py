"""From outputs and targets of the held-out examples to a score."""

from __future__ import annotations

import numpy as np

from training.description import Batch
from training.score import Score, bootstrap, counted, mean

Results = list[tuple[dict[str, np.ndarray], Batch]]


def accuracy(results: Results) -> Score:
    """Right classes among all elements whose weight is not zero."""
    right = n = 0
    for outputs, batch in results:
        judged = batch.weight("target") > 0
        hits = outputs["output"].argmax(-1) == batch.targets["target"]
        right += int(hits[judged].sum())
        n += int(judged.sum())
    return counted("accuracy", right, n)


def binary_accuracy(results: Results) -> Score:
    """Probabilities above one half."""
    return _binary(results, 0.5)


def logit_accuracy(results: Results) -> Score:
    """Logits above zero."""
    return _binary(results, 0.0)


def _binary(results: Results, threshold: float) -> Score:
    hits = [(o["output"] > threshold) == (b.targets["target"] > 0.5) for o, b in results]
    whole = np.concatenate(hits).ravel()
    return counted("accuracy", int(whole.sum()), whole.size)


def whole_sequences(results: Results) -> Score:
    """Sequences of which every token is right. Given the right tokens before it, which comes to the
    same as greedy decoding: up to the first wrong token both see the same."""
    right = n = 0
    for outputs, batch in results:
        logits = outputs["output.logits"] if "output.logits" in outputs else outputs["output"]
        hits = logits.argmax(-1) == batch.targets["target"]
        right += int((hits | (batch.weight("target") == 0)).all(axis=1).sum())
        n += len(hits)
    return counted("whole sequences right", right, n)


def explained(results: Results) -> Score:
    """R squared: the share of the targets' variance that the outputs explain; a case is a row."""
    pairs = np.concatenate(
        [np.stack([o["output"], b.targets["target"]], axis=-1) for o, b in results]
    )  # (cases, outputs, 2)

    def r2(cases: np.ndarray) -> float:
        output, target = cases[..., 0], cases[..., 1]
        return float(1 - ((target - output) ** 2).sum() / ((target - target.mean(0)) ** 2).sum())

    return bootstrap("R squared", r2, pairs)


def bits_per_sample(results: Results) -> Score:
    """Cross entropy of the next sample in bits, a sequence's average; a case is a sequence."""
    cases = []
    for outputs, batch in results:
        logits = outputs["output"].astype(np.float64)
        logits = logits - logits.max(-1, keepdims=True)
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        taken = np.take_along_axis(log, batch.targets["target"][..., None], -1)[..., 0]
        weight = batch.weight("target")
        cases.append(-(taken * weight).sum(1) / weight.sum(1) / np.log(2))
    return mean("bits per sample", np.concatenate(cases))


def frame_error(results: Results) -> Score:
    """Root of the mean squared error of the predicted frames; a case is an utterance."""
    cases = []
    for outputs, batch in results:
        gap = outputs["output.frames"] - batch.targets["frames"]
        cases.append(np.sqrt((gap**2).mean(axis=(1, 2))))
    return mean("frame error", np.concatenate(cases))
