"""Models of packages that the converter was not made with, as their READMEs show them, live in JAX.

    port_packages.py [NAME ...] [-o docs/ported-packages.json]

The packages, their models and the sizes were written down before any of them was run. Widths and
depths are smaller than in the READMEs, nothing else. Each runs in a process of its own, and is
judged by port_judge.py.

    pip install --no-deps --target FOLDER vit-pytorch x-transformers segmentation-models-pytorch \
        denoising-diffusion-pytorch conformer pytorch-tabnet efficientnet-pytorch \
        vector-quantize-pytorch monai nystrom-attention einops einx loguru frozendict ema-pytorch \
        accelerate pytorch-fid torch-einops-utils torchvision timm
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
LIMIT_S = 600

Inputs = tuple[Any, ...] | dict[str, Any]
Made = tuple[Any, Inputs, Inputs]  # module, inputs, others of another size


def image(n: int, side: int, channels: int = 3) -> Any:
    import torch

    return torch.randn(n, channels, side, side)


def words(n: int, length: int, of: int = 256) -> Any:
    import torch

    return torch.randint(0, of, (n, length))


def vit() -> Made:
    from vit_pytorch import ViT

    made = ViT(image_size=64, patch_size=16, num_classes=10, dim=32, depth=2, heads=4, mlp_dim=64,
               dropout=0.1, emb_dropout=0.1)  # fmt: skip
    return made, (image(2, 64),), (image(3, 64),)


def deep_vit() -> Made:
    from vit_pytorch.deepvit import DeepViT

    made = DeepViT(image_size=64, patch_size=16, num_classes=10, dim=32, depth=2, heads=4,
                   mlp_dim=64, dropout=0.1, emb_dropout=0.1)  # fmt: skip
    return made, (image(2, 64),), (image(3, 64),)


def cvt() -> Made:
    from vit_pytorch.cvt import CvT

    made = CvT(num_classes=10, s1_emb_dim=16, s1_depth=1, s2_emb_dim=24, s2_heads=3, s2_depth=2,
               s3_emb_dim=32, s3_heads=4, s3_depth=2, dropout=0.0)  # fmt: skip
    return made, (image(2, 64),), (image(3, 96),)


def max_vit() -> Made:
    from vit_pytorch.max_vit import MaxViT

    made = MaxViT(num_classes=10, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=4,
                  mbconv_expansion_rate=4, mbconv_shrinkage_rate=0.25, dropout=0.1)  # fmt: skip
    return made, (image(2, 64),), (image(3, 64),)


def gpt() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=4)
    made = TransformerWrapper(num_tokens=256, max_seq_len=64, attn_layers=layers)
    return made, (words(2, 20),), (words(3, 33),)


def bert() -> Made:
    import torch
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=4)
    made = TransformerWrapper(num_tokens=256, max_seq_len=64, attn_layers=layers)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 15:] = False
    other = {"x": words(3, 33), "mask": torch.ones(3, 33, dtype=torch.bool)}
    return made, {"x": words(2, 20), "mask": mask}, other


def rotary_gpt() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=4, rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True)
    made = TransformerWrapper(num_tokens=256, max_seq_len=64, attn_layers=layers)
    return made, (words(2, 20),), (words(3, 33),)


def xtransformer_loss() -> Made:
    from x_transformers import XTransformer

    made = XTransformer(dim=32, enc_num_tokens=256, enc_depth=2, enc_heads=4, enc_max_seq_len=64,
                        dec_num_tokens=256, dec_depth=2, dec_heads=4, dec_max_seq_len=64,
                        tie_token_emb=True)  # fmt: skip
    return made, (words(2, 20), words(2, 21)), (words(3, 24), words(3, 17))


def segmentation(kind: str, encoder: str) -> Callable[[], Made]:
    def make() -> Made:
        import segmentation_models_pytorch as smp

        made = getattr(smp, kind)(
            encoder_name=encoder, encoder_weights=None, in_channels=1, classes=3
        )
        return made, (image(2, 64, 1),), (image(3, 96, 1),)

    return make


def diffusion_unet() -> Made:
    import torch
    from denoising_diffusion_pytorch import Unet

    made = Unet(dim=16, dim_mults=(1, 2, 4), flash_attn=False)
    return made, (image(2, 32), torch.tensor([3, 700])), (image(3, 48), torch.tensor([1, 2, 999]))


def conformer() -> Made:
    import torch
    from conformer import Conformer

    made = Conformer(dim=32, depth=2, dim_head=8, heads=4, ff_mult=2, conv_expansion_factor=2,
                     conv_kernel_size=7, attn_dropout=0.0, ff_dropout=0.0,
                     conv_dropout=0.0)  # fmt: skip
    return made, (torch.randn(2, 30, 32),), (torch.randn(3, 41, 32),)


def tabnet() -> Made:
    import torch
    from pytorch_tabnet.tab_network import TabNet

    made = TabNet(12, 3, n_d=8, n_a=8, n_steps=3, group_attention_matrix=torch.eye(12))
    return made, (torch.randn(4, 12),), (torch.randn(7, 12),)


def efficientnet() -> Made:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0"), (image(2, 64),), (image(3, 64),)


def vector_quantize() -> Made:
    import torch
    from vector_quantize_pytorch import VectorQuantize

    made = VectorQuantize(dim=16, codebook_size=32, decay=0.8, commitment_weight=1.0)
    return made, (torch.randn(2, 20, 16),), (torch.randn(3, 33, 16),)


def residual_vector_quantize() -> Made:
    import torch
    from vector_quantize_pytorch import ResidualVQ

    made = ResidualVQ(dim=16, num_quantizers=3, codebook_size=32)
    return made, (torch.randn(2, 20, 16),), (torch.randn(3, 33, 16),)


def finite_scalar_quantize() -> Made:
    import torch
    from vector_quantize_pytorch import FSQ

    return FSQ([8, 5, 5, 5]), (torch.randn(2, 20, 4),), (torch.randn(3, 33, 4),)


def monai_unet() -> Made:
    import torch
    from monai.networks.nets import UNet

    made = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2),
                num_res_units=2)  # fmt: skip
    return made, (torch.randn(2, 1, 16, 16, 16),), (torch.randn(3, 1, 24, 16, 16),)


def monai_unetr() -> Made:
    from monai.networks.nets import UNETR

    made = UNETR(in_channels=1, out_channels=2, img_size=32, feature_size=8, hidden_size=32,
                 mlp_dim=64, num_heads=4, spatial_dims=2)  # fmt: skip
    return made, (image(2, 32, 1),), (image(3, 32, 1),)


def monai_densenet() -> Made:
    from monai.networks.nets import DenseNet

    made = DenseNet(spatial_dims=2, in_channels=1, out_channels=3, init_features=8, growth_rate=4,
                    block_config=(2, 2))  # fmt: skip
    return made, (image(2, 48, 1),), (image(3, 64, 1),)


def nystrom_attention() -> Made:
    import torch
    from nystrom_attention import NystromAttention

    made = NystromAttention(
        dim=32, dim_head=8, heads=4, num_landmarks=8, pinv_iterations=6, residual=True
    )
    mask = torch.ones(2, 64, dtype=torch.bool)
    return made, (torch.randn(2, 64, 32), mask), (torch.randn(3, 64, 32), mask[:1].expand(3, 64))


def nystromformer() -> Made:
    import torch
    from nystrom_attention import Nystromformer

    made = Nystromformer(dim=32, dim_head=8, heads=4, depth=2, num_landmarks=8, pinv_iterations=6)
    return made, (torch.randn(2, 64, 32),), (torch.randn(3, 64, 32),)


MODELS: dict[str, Callable[[], Made]] = {
    "vit-pytorch ViT": vit,
    "vit-pytorch DeepViT": deep_vit,
    "vit-pytorch CvT": cvt,
    "vit-pytorch MaxViT": max_vit,
    "x-transformers Decoder": gpt,
    "x-transformers Encoder": bert,
    "x-transformers Decoder, rotary": rotary_gpt,
    "x-transformers XTransformer": xtransformer_loss,
    "segmentation-models-pytorch Unet": segmentation("Unet", "resnet34"),
    "segmentation-models-pytorch FPN": segmentation("FPN", "resnet18"),
    "segmentation-models-pytorch DeepLabV3Plus": segmentation("DeepLabV3Plus", "mobilenet_v2"),
    "denoising-diffusion-pytorch Unet": diffusion_unet,
    "conformer Conformer": conformer,
    "pytorch-tabnet TabNet": tabnet,
    "efficientnet-pytorch EfficientNet": efficientnet,
    "vector-quantize-pytorch VectorQuantize": vector_quantize,
    "vector-quantize-pytorch ResidualVQ": residual_vector_quantize,
    "vector-quantize-pytorch FSQ": finite_scalar_quantize,
    "monai UNet": monai_unet,
    "monai UNETR": monai_unetr,
    "monai DenseNet": monai_densenet,
    "nystrom-attention NystromAttention": nystrom_attention,
    "nystrom-attention Nystromformer": nystromformer,
}


def judge(name: str) -> dict[str, Any]:
    """What becomes of one model."""
    import torch
    from corpus_models import vision_without_operators
    from port_judge import judged

    vision_without_operators()
    torch.manual_seed(0)
    module, given, other = MODELS[name]()
    return judged(module.eval(), given, [other])


def one(name: str) -> dict[str, Any]:
    """`judge` in a process of its own."""
    started = time.perf_counter()
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    try:
        run = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True,
                             text=True, timeout=LIMIT_S, env=environment)  # fmt: skip
        lines = run.stdout.strip().splitlines()
        row = (json.loads(lines[-1]) if not run.returncode and lines
               else {"outcome": "error", "why": run.stderr[-1500:]})  # fmt: skip
    except subprocess.TimeoutExpired:
        row = {"outcome": "too slow", "why": f"{LIMIT_S} s"}
    return {"name": name} | row | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--one")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        print(json.dumps(judge(options.one)))
        return
    wanted = [n for n in MODELS if not options.names or any(x in n for x in options.names)]
    rows = []
    for name in wanted:
        rows.append(one(name))
        print(json.dumps(rows[-1])[:600], flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
