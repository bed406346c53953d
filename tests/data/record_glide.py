"""How glide.safetensors was made: GLIDE's and guided-diffusion's own code at tiny sizes and random
weights.

    git clone https://github.com/openai/glide-text2im
    git clone https://github.com/openai/guided-diffusion
    PYTHONPATH=glide-text2im:guided-diffusion python tests/data/record_glide.py \
        tests/data/glide.safetensors

The weights follow from their names (`record_karlo.weights_of`); the file holds inputs, outputs, and
the name and shape of every weight. Of GPT-2's vocabulary it holds what the captions need.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from record_karlo import weights_of
from safetensors.torch import save_file
from torch import Tensor

VOCAB_SIZE, TEXT_LENGTH = 101, 10
TRUNK = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "dropout": 0.1,
    "num_heads": 1,
    "num_head_channels": 32,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
TEXT = {
    "text_ctx": TEXT_LENGTH,
    "xf_width": 64,
    "xf_layers": 2,
    "xf_heads": 2,
    "xf_final_ln": True,
    "xf_padding": True,
    "tokenizer": SimpleNamespace(n_vocab=VOCAB_SIZE),
}
STEP_SEEDS = (5, 6)
CAPTIONS = ["an oil painting of a corgi", "A hedgehog using a calculator!", "It's 3 o'clock", ""]


def main(path: str) -> None:
    """Run the originals and write what they answer."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    record_networks(tensors, metadata)
    record_diffusion(tensors)
    record_tokens(tensors, metadata)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


def record_networks(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Each network's answer to fixed inputs."""
    from glide_text2im import text2im_model as glide
    from guided_diffusion.unet import UNetModel

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def record(case: str, network: torch.nn.Module, **inputs: Tensor) -> None:
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        network.load_state_dict(weights_of(shapes))
        inputs["timesteps"] = torch.tensor([3, 900])
        with torch.no_grad():
            inputs["y_out"] = network.eval()(**inputs)
        metadata[case] = json.dumps(shapes)
        tensors.update({f"{case}/{name}": tensor.clone() for name, tensor in inputs.items()})

    caption = {
        "tokens": torch.randint(VOCAB_SIZE, (2, TEXT_LENGTH), generator=generator),
        "mask": torch.arange(TEXT_LENGTH) < torch.tensor([[7], [0]]),
    }
    known = {
        "inpaint_image": randn(2, 3, 16, 16),
        "inpaint_mask": (randn(2, 1, 16, 16) > 0).float(),
    }
    x, low_res = randn(2, 3, 16, 16), randn(2, 3, 4, 4)
    two_levels = TRUNK | TEXT | {"attention_resolutions": (2,), "channel_mult": (1, 2)}
    levels = {"attention_resolutions": (2, 4), "channel_mult": (1, 1, 2), "num_res_blocks": 2}
    record("base", glide.Text2ImUNet(**two_levels | levels), x=x, **caption)
    upsampler = glide.SuperResText2ImUNet(**two_levels | {"channel_mult": (1, 1)})
    record("upsampler", upsampler, x=x, low_res=low_res, **caption)
    record("inpaint", glide.InpaintText2ImUNet(**two_levels), x=x, **caption, **known)
    both = glide.SuperResInpaintText2ImUnet(**two_levels)
    record("sr_inpaint", both, x=x, low_res=low_res, **caption, **known)
    for name, new_order in (("gd_legacy", False), ("gd_neworder", True)):
        network = UNetModel(
            **TRUNK,
            image_size=16,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            num_classes=10,
            use_new_attention_order=new_order,
        )
        record(name, network, x=x, y=torch.tensor([1, 8]))


def record_diffusion(tensors: dict[str, Tensor]) -> None:
    """Schedules, and steps of both samplers with a network that always answers the same."""
    from glide_text2im import gaussian_diffusion
    from glide_text2im.model_creation import create_gaussian_diffusion

    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(2, 3, 4, 4, generator=generator)
    output = torch.randn(2, 6, 4, 4, generator=generator).clamp(-1, 1)
    tensors |= {"steps/x_T": x_T, "steps/output": output}
    for schedule in ("linear", "squaredcos_cap_v2"):
        for respacing in ("100", "27", "ddim25", "fast27"):
            diffusion = create_gaussian_diffusion(1000, schedule, respacing)
            name = f"{schedule}/{respacing}"
            tensors[f"{name}/timesteps"] = torch.tensor(diffusion.timestep_map)
            for key in ("betas", "alphas_cumprod", "posterior_log_variance_clipped"):
                tensors[f"{name}/{key}"] = torch.from_numpy(np.asarray(getattr(diffusion, key)))
            for sampler in ("p_sample", "ddim_sample"):
                generators = [torch.Generator().manual_seed(seed) for seed in STEP_SEEDS]

                def noise_like(x: Tensor, generators: Any = generators) -> Tensor:
                    return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])

                gaussian_diffusion.th.randn_like = noise_like
                loop = getattr(diffusion, f"{sampler}_loop_progressive")
                steps = [
                    step["pred_xstart"]
                    for step in loop(lambda x, t, **_: output, x_T.shape, noise=x_T, device="cpu")
                ]
                tensors[f"{name}/{sampler}"] = torch.stack(steps)


def record_tokens(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Tokens and masks of a few captions, and as much of the vocabulary as they need."""
    from glide_text2im.tokenizer.bpe import get_encoder

    encoder = get_encoder()
    rows = [encoder.padded_tokens_and_mask(encoder.encode(c), 16) for c in CAPTIONS]
    tensors["tokens/tokens"] = torch.tensor([tokens for tokens, _ in rows])
    tensors["tokens/mask"] = torch.tensor([mask for _, mask in rows])
    # Merges are applied in the order of their ranks: those whose product is part of no token of the
    # captions never matter.
    words = {encoder.decoder[token] for caption in CAPTIONS for token in encoder.encode(caption)}
    ranks = sorted(encoder.bpe_ranks, key=encoder.bpe_ranks.get)
    merges = [pair for pair in ranks if any("".join(pair) in word for word in words)]
    pieces = {*encoder.byte_encoder.values(), *("".join(pair) for pair in merges), "<|endoftext|>"}
    vocab = {piece: encoder.encoder[piece] for piece in sorted(pieces)}
    metadata["captions"] = json.dumps(CAPTIONS)
    metadata["vocab.json"] = json.dumps(vocab)
    metadata["merges.txt"] = "#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n"


if __name__ == "__main__":
    main(sys.argv[1])
