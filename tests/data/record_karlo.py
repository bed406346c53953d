"""How karlo.safetensors was made: Karlo's own networks at tiny sizes and random weights.

    git clone https://github.com/kakaobrain/karlo
    PYTHONPATH=karlo python tests/data/record_karlo.py tests/data/karlo.safetensors

The weights are not in the file but follow from their names (`weights_of`), so that it stays small:
it holds inputs, outputs, and the name and shape of every weight.
"""

import hashlib
import json
import sys

import torch
from safetensors.torch import save_file
from torch import Tensor


def weights_of(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A random tensor for each name: the same for the one who records and the one who tests."""
    weights = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        is_norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = 1 + 0.3 * values if is_norm else values * (0.15 if len(shape) > 1 else 0.3)
    return weights


def main(path: str) -> None:
    """Run Karlo's three networks and write what they answer."""
    from karlo.modules.unet import PLMImUNet, SuperResUNetModel
    from karlo.modules.xf import PriorTransformer

    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)

    def record(case: str, network: torch.nn.Module, **inputs: Tensor) -> None:
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        network.load_state_dict(weights_of(shapes))
        with torch.no_grad():
            inputs["y_out"] = network.eval()(**inputs)
        metadata[case] = json.dumps(shapes)
        tensors.update({f"{case}/{name}": tensor.clone() for name, tensor in inputs.items()})

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.arange(10) < torch.tensor([[10], [4]])
    text = {"text_emb": randn(2, 24), "text_enc": randn(2, 10, 24), "mask": mask}
    causal_mask = torch.full((1, 14, 14), float("-inf")).triu_(1)
    timesteps = torch.tensor([3, 900])
    prior = PriorTransformer(
        text_ctx=10, xf_width=128, xf_layers=2, xf_heads=2, xf_final_ln=True, clip_dim=24
    )
    record("prior", prior, x=randn(2, 24), timesteps=timesteps, causal_mask=causal_mask, **text)
    decoder = PLMImUNet(
        text_ctx=10,
        xf_width=40,
        in_channels=3,
        model_channels=32,
        out_channels=6,
        num_res_blocks=1,
        attention_resolutions=(2, 4),
        dropout=0.1,
        channel_mult=(1, 2, 4),
        num_heads=-1,
        num_head_channels=64,
        num_heads_upsample=-1,
        use_scale_shift_norm=True,
        resblock_updown=True,
        clip_dim=24,
        clip_emb_mult=4,
        clip_emb_type="image",
        clip_emb_drop=0.1,
    )
    picture = {"x": randn(2, 3, 16, 16), "timesteps": timesteps}
    text = {"txt_feat": text["text_emb"], "txt_feat_seq": text["text_enc"], "mask": mask}
    record("decoder", decoder, **picture, **text, y=randn(2, 24))
    upsampler = SuperResUNetModel(
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=(),
        dropout=0.0,
        channel_mult=(1, 2),
        resblock_updown=True,
        use_middle_attention=False,
    )
    record("upsampler", upsampler, **picture, low_res=randn(2, 3, 16, 16))
    save_file(tensors, path, metadata)


if __name__ == "__main__":
    main(sys.argv[1])
