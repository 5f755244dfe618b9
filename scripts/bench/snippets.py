"""What runs in a process of its own and says itself how long it took: ours, and the libraries'.

Each has a setup, which is not timed, and a job. `path` is the checkpoint, `out` where to write.
"""

from __future__ import annotations

TIMED = """
import os, resource, sys, time
path, out = sys.argv[1:]
{setup}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
{job}
seconds = time.perf_counter() - started
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""
_COLD = """
os.sync()
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
os.close(fd)
"""
_READ = """
from concurrent.futures import ThreadPoolExecutor
def part(start):
    view = memoryview(BUFFER)[start:start + STEP] if WHOLE else memoryview(bytearray(STEP))
    return os.preadv(fd, [view], start)
fd = os.open(path, os.O_RDONLY)
with ThreadPoolExecutor(2) as pool:
    list(pool.map(part, range(0, SIZE, STEP)))
"""
_SIZES = "SIZE, STEP = os.path.getsize(path), 8 << 20\n"
_BERT = """
from zoo.registry import get
found = get("bert_large_uncased")
"""
_BY_HAND = """
abstract = nnx.eval_shape(lambda: definition(found.config, rngs=nnx.Rngs(0)))
layout = found.model.layout_of(found.config)
arrays = load_file(path)
state = nnx.state(abstract)
flat = dict(nnx.to_flat_state(state))
for entry in layout.entries:
    if not entry.flax:
        continue
    array = arrays[entry.torch[0].name]
    if entry.ops:
        made = np.empty(array.shape[::-1], array.dtype)
        for i in range(0, made.shape[0], 256):
            for j in range(0, made.shape[1], 16):
                made[i:i + 256, j:j + 16] = array.T[i:i + 256, j:j + 16]
        array = made
    key = tuple(int(k) if k.isdigit() else k for k in entry.flax[0].name.split("."))
    flat[key] = flat[key].replace(jnp.asarray(array))
nnx.update(abstract, nnx.from_flat_state(flat.items()))
"""
_EIGHT = """
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("model",))
def spec(name, shape):
    axes = [a for a, n in enumerate(shape) if n % 8 == 0]
    return P(*(None,) * axes[-1], "model") if axes else P()
"""
_BY_HAND_ON_EIGHT = _BY_HAND.replace(
    "jnp.asarray(array)",
    "jax.device_put(array, NamedSharding(mesh, spec('', array.shape)))",
)
_ORBAX = """
import numpy as np, orbax.checkpoint as ocp
from safetensors.numpy import load_file
tree = {}
for name, value in load_file(path).items():
    *parts, leaf = name.split(".")
    node = tree
    for part in parts:
        node = node.setdefault(part, {})
    node[leaf] = value
checkpointer = ocp.StandardCheckpointer()
"""

SNIPPETS: dict[str, dict[str, str]] = {
    "check": {
        "setup": f"import convert.api\n{_COLD}",
        "job": "assert convert.api.check(path).intact",
    },
    "cold read": {"setup": f"{_SIZES}WHOLE = False\n{_COLD}", "job": _READ},
    "load torch": {
        "setup": "import torch, zoo, zoo.loading.into_torch\n"
        f"{_BERT}found.model.definition('torch')",
        "job": "net = zoo.load(path, 'torch', model='bert_large_uncased')",
    },
    "load_file": {
        "setup": "import torch\nfrom safetensors.torch import load_file\n"
        f"from transformers import BertConfig, BertModel\n{_BERT}"
        "config = BertConfig(**found.model.to_hf(found.config))",
        "job": "net = BertModel(config)\nnet.load_state_dict(load_file(path), strict=False)",
    },
    "read torch": {
        "setup": f"import torch\n{_SIZES}WHOLE = True",
        "job": f"BUFFER = torch.empty(SIZE, dtype=torch.uint8).numpy()\n{_READ}",
    },
    "load flax": {
        "setup": f"import jax, zoo, zoo.loading.into_flax\n{_BERT}found.model.definition('flax')",
        "job": "net = zoo.load(path, 'flax', model='bert_large_uncased')",
    },
    "by hand flax": {
        "setup": "import numpy as np, jax.numpy as jnp\nfrom flax import nnx\n"
        f"from safetensors.numpy import load_file\n{_BERT}"
        "definition = found.model.definition('flax')",
        "job": _BY_HAND,
    },
    "load shards": {
        "setup": f"{_EIGHT}import zoo, zoo.loading.into_flax\n{_BERT}"
        "found.model.definition('flax')",
        "job": "net = zoo.load(path, 'flax', model='bert_large_uncased', sharding=(mesh, spec))",
    },
    "by hand shards": {
        "setup": f"{_EIGHT}import jax.numpy as jnp\nfrom flax import nnx\n"
        f"from safetensors.numpy import load_file\n{_BERT}"
        "definition = found.model.definition('flax')",
        "job": _BY_HAND_ON_EIGHT,
    },
    "write orbax": {
        "setup": "import convert.api",
        "job": "convert.api.convert(path, out, 'orbax', framework='flax', verify=False)",
    },
    "orbax save": {
        "setup": _ORBAX,
        "job": "checkpointer.save(out, tree)\ncheckpointer.wait_until_finished()\nos.sync()",
    },
    "read orbax": {
        "setup": "from functools import partial\nfrom zoo.checkpoint.ahead import prefetch\n"
        "from zoo.checkpoint.slabs import default_workers\n"
        "from zoo.containers import open_checkpoint",
        "job": "with open_checkpoint(path) as r:\n"
        "    held = list(prefetch([partial(r.read, n) for n in r.tensors], default_workers()))",
    },
    "orbax restore": {
        "setup": "import orbax.checkpoint as ocp\nc = ocp.PyTreeCheckpointer()",
        "job": "held = c.restore(path)",
    },
}
