"""all-MiniLM-L6-v2 through ONNX: the demo's ten sentences in torch, Flax and onnxruntime, and the
weights back. Writes docs/onnx_minilm.json; exits with 1 if anything is not as it should be."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import demo
import numpy as np

RESULTS = Path(__file__).parents[1] / "docs" / "onnx_minilm.json"


def main() -> int:
    import convert
    from convert.runtime.onnx_session import OnnxSession

    ids, mask = demo.tokenize(demo.SENTENCES)
    source = demo.package() / "model.safetensors"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = convert.export(source, folder / "model.onnx")
        convert.convert(folder / "model.onnx", folder / "model.msgpack")
        convert.convert(folder / "model.msgpack", folder / "back.safetensors")
        same, total = demo.returned(source, folder / "back.safetensors")
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        hidden = OnnxSession(folder / "model.onnx").run(given)["last_hidden_state"]
        embedded = {
            "torch": demo.embed_torch(source, ids, mask),
            "flax": demo.embed_flax(folder / "model.msgpack", ids, mask),
            "onnxruntime": demo.pool(hidden, mask),
        }
    similar = {n: x @ x.T for n, x in embedded.items()}
    gaps = {
        f"{a} and {b}": demo.gap(similar[a], similar[b])
        for a, b in (("torch", "flax"), ("torch", "onnxruntime"), ("flax", "onnxruntime"))
    }
    worst = made.worst
    assert worst is not None
    found = {
        "sentences": list(ids.shape),
        "similarities": gaps,
        "returned": [same, total],
        "ratio": worst.row.ratio,
        "sizes": made.certificate.verified["sizes"],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if same == total and max(gaps.values()) < demo.CLOSE else 1


if __name__ == "__main__":
    sys.exit(main())
