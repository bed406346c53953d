"""The networks: shapes, masks, dropped conditions, causality."""

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models import (
    Context,
    Decoder,
    DecoderConfig,
    PriorTransformer,
    PriorTransformerConfig,
    UNet,
    UNetConfig,
    Upsampler,
    UpsamplerConfig,
)
from unclip.models.layers import (
    AttentionBlock,
    ResBlock,
    attention,
    fold,
    norm,
    timestep_embedding,
    unfold,
)

TINY_UNET = UNetConfig(
    image_size=16,
    width=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
    head_dim=8,
    context_dim=12,
    dropout=0.0,
)
TINY_DECODER = DecoderConfig(unet=TINY_UNET, image_embed_dim=10, text_encodings_dim=14)
TINY_UPSAMPLER = UpsamplerConfig(
    unet=replace(TINY_UNET, in_channels=6, attention_resolutions=(), context_dim=None)
)
TINY_PRIOR = PriorTransformerConfig(
    embed_dim=10, text_encodings_dim=14, max_text_len=6, width=32, depth=3, head_dim=8
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def randomised(module: nn.Module) -> Any:
    """Draws every parameter, because a zero-initialised branch would hide its errors."""
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
        nn.init.normal_(parameter, std=scale)
    return module.eval()


def captions(batch: int = 2, num_tokens: int = 5) -> dict[str, Tensor]:
    lengths = torch.arange(batch) % num_tokens + 1
    return {
        "text_encodings": torch.randn(batch, num_tokens, 14),
        "text_mask": torch.arange(num_tokens) < lengths[:, None],
    }


def at(context: Context, row: int) -> Context:
    return {key: None if x is None else x[row : row + 1] for key, x in context.items()}


# ------------------------------------------------------------------------------------- layers


def test_timestep_embedding_has_cosines_first_and_stays_fp32():
    embedding = timestep_embedding(torch.tensor([0, 7], dtype=torch.bfloat16), 8)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(embedding[1, 0], torch.tensor(7.0).cos())
    torch.testing.assert_close(embedding[1, 5], torch.tensor(7.0 * 10_000**-0.25).sin())


@pytest.mark.parametrize(("channels", "groups"), [(192, 32), (320, 32), (96, 32), (48, 16), (5, 1)])
def test_norm_has_32_groups_at_published_widths(channels, groups):
    assert norm(channels).num_groups == groups


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unfold_inverts_fold(patch_size):
    x = torch.randn(2, 3, 8, 12)
    folded = fold(x, patch_size)
    assert folded.shape == (2, 3 * patch_size**2, 8 // patch_size, 12 // patch_size)
    torch.testing.assert_close(unfold(folded, patch_size), x, rtol=0, atol=0)


def test_attention_equals_its_definition_and_honours_the_mask():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([True, True, False, True, False])[None, None, None]
    scores = (q @ k.mT / 8**0.5).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(attention(q, k, v, mask), scores.softmax(-1) @ v)
    kept = mask.flatten()
    torch.testing.assert_close(attention(q, k, v, mask), attention(q, k[:, :, kept], v[:, :, kept]))


def test_missing_xformers_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match=r'pip install "unclip\[xformers\]"'):
        UNet(replace(TINY_UNET, attention_backend="xformers"))
    with pytest.raises(ImportError, match=r'pip install "unclip\[xformers\]"'):
        PriorTransformer(replace(TINY_PRIOR, attention_backend="xformers"))


def test_xformers_gets_its_own_layout(monkeypatch):
    def memory_efficient_attention(q, k, v, attn_bias):  # [B, N, A, D]; bias of full shape
        assert attn_bias.shape == (2, 3, 4, 5) and attn_bias.stride(-2) % 8 == 0
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_bias).transpose(1, 2)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()[:, None, None]
    torch.testing.assert_close(attention(q, k, v, mask, "xformers"), attention(q, k, v, mask))


def test_blocks_start_as_their_skip():
    x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
    network: Any = UNet(TINY_UNET)
    for module in network.modules():
        if isinstance(module, AttentionBlock):
            h = torch.randn(2, module.norm.num_channels, 8, 8)
            torch.testing.assert_close(module(h, torch.randn(2, 3, 12)), h)
    torch.testing.assert_close(network.down[0].res(x, emb), x)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize(("resample", "side"), [("up", 16), ("down", 4), (None, 8)])
def test_res_block_resamples_both_paths(scale_shift, resample, side):
    block = randomised(ResBlock(8, 12, 20, scale_shift=scale_shift, resample=resample))
    x, emb = torch.randn(2, 8, 8, 8), torch.randn(2, 20)
    assert block(x, emb).shape == (2, 12, side, side)
    nn.init.zeros_(block.conv2.weight), nn.init.zeros_(block.conv2.bias)
    torch.testing.assert_close(block(x, emb), block.skip(block.resample(x)))


# -------------------------------------------------------------------------------------- U-Net


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("position_embedding", [True, False])
def test_unet_shapes_and_zero_start(patch_size, position_embedding):
    config = replace(
        TINY_UNET,
        patch_size=patch_size,
        position_embedding=position_embedding,
        attention_resolutions=(8 // patch_size,),
        out_channels=6,
    )
    network = UNet(config)
    x, emb = torch.randn(2, 3, 16, 16), network.time_embed(torch.tensor([3, 500]))
    y = network(x, emb, torch.randn(2, 7, 12))
    assert y.shape == (2, 6, 16, 16)
    assert (y == 0).all()


def test_unet_has_guided_diffusions_order_of_blocks():
    config = replace(TINY_UNET, channel_mult=(1, 2, 3), attention_resolutions=(8, 4))
    network: Any = UNet(replace(config, num_res_blocks=2))
    assert [block.res.resample_to for block in network.down] == 2 * [None, None, "down"] + 2 * [
        None
    ]
    assert [i for i, block in enumerate(network.down) if block.attention] == [3, 4, 6, 7]
    assert [block.attention is not None for block in network.middle] == [True, False]
    assert [i for i, block in enumerate(network.up) if block.attention] == [0, 1, 2, 3, 4, 5]
    assert [i for i, block in enumerate(network.up) if block.up] == [2, 5]
    assert not UNet(replace(config, attention_resolutions=(), context_dim=None)).middle[0].attention


def test_unet_without_attention_runs_at_any_size():
    network = randomised(UNet(TINY_UPSAMPLER.unet))
    emb = network.time_embed(torch.tensor([3.5]))
    assert network(torch.randn(1, 6, 24, 40), emb).shape == (1, 3, 24, 40)
    with pytest.raises(ValueError, match="multiples of 2 px"):
        network(torch.randn(1, 6, 15, 16), emb)
    placed = UNet(replace(TINY_UNET, position_embedding=True))
    with pytest.raises(ValueError, match="position_embedding: false"):
        placed(torch.randn(1, 3, 24, 24), placed.time_embed(torch.tensor([3])))


def test_checkpointing_changes_neither_output_nor_gradient():
    network = randomised(UNet(TINY_UNET)).train()
    twin = UNet(replace(TINY_UNET, checkpointing=True))
    twin.load_state_dict(network.state_dict())
    x, tokens = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 12)
    for unet in (network, twin):
        unet(x, unet.time_embed(torch.tensor([3, 500])), tokens).square().mean().backward()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_autocast_carries_the_trunk_in_bf16():
    """One fp32 addend early on would put every later block in fp32, at three times the cost."""
    unet = replace(TINY_UNET, position_embedding=True)
    network: Any = Decoder(replace(TINY_DECODER, unet=unet, layout_size=4))
    seen = []
    network.unet.middle[0].register_forward_hook(lambda _, x, y: seen.append(x[0].dtype))
    context = network.encode_context(image_embed=torch.randn(2, 10), **captions())
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(2, 3, 16, 16), torch.tensor([3, 500]), context)
    assert seen == [torch.bfloat16]


def test_channels_last_and_bf16_autocast_run():
    network = randomised(Decoder(TINY_DECODER)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16)
    context = network.encode_context(image_embed=torch.randn(2, 10), **captions())
    with torch.no_grad():
        expected = network(x, torch.tensor([3, 500]), context)
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x.to(memory_format=torch.channels_last), torch.tensor([3, 500]), context)
    assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, "unet.head_dim must divide .* got 24 for 32 channels: use 16 or 32"),
        ({"attention_resolutions": (6,)}, r"among the grids \(16, 8\) .* got 6: use 8"),
        ({"patch_size": 3}, "unet.patch_size must be 1, 2 or 4; got 3"),
        ({"image_size": 15}, "unet.image_size must be a multiple of 2 .* got 15: use 16"),
        ({"channel_mult": ()}, "unet.channel_mult must name at least one level"),
        ({"dropout": 1.0}, r"unet.dropout must lie in \[0, 1\); got 1.0"),
        ({"attention_backend": "flash"}, "unet.attention_backend must be .* got 'flash'"),
        ({"attention_resolutions": ()}, "unet.context_dim must be None .* got 12"),
        ({"width": 0}, "unet.width must be at least 1; got 0"),
        ({"width": 15}, "unet.width must be even; got 15: use 16"),
    ],
)
def test_unet_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_UNET, **changes)


# ------------------------------------------------------------------------------------ decoder


def decode(network: Decoder, context: Context, x_t: Tensor) -> Tensor:
    return network(x_t, torch.tensor([3, 500])[: len(x_t)], context)


@pytest.mark.parametrize("learned_variance", [True, False])
@pytest.mark.parametrize("text_embed_dim", [None, 9])
def test_decoder_shapes(learned_variance, text_embed_dim):
    unet = replace(TINY_UNET, out_channels=6 if learned_variance else 3)
    config = replace(
        TINY_DECODER, unet=unet, learned_variance=learned_variance, text_embed_dim=text_embed_dim
    )
    network: Any = Decoder(config)
    text_embed = None if text_embed_dim is None else torch.randn(2, 9)
    conditions = {"image_embed": torch.randn(2, 10), "text_embed": text_embed, **captions()}
    context: Any = network.encode_context(**conditions)
    assert context["emb"].shape == (2, 64)
    assert context["tokens"].shape == (2, 4 + 5, 12)
    assert context["token_mask"].dtype == torch.bool
    y = decode(network, context, torch.randn(2, 3, 16, 16))
    assert y.shape == (2, unet.out_channels, 16, 16)


def test_decoder_dropping_all_is_the_null_context():
    network = randomised(Decoder(replace(TINY_DECODER, text_embed_dim=9, layout_size=4)))
    conditions = {"image_embed": torch.randn(2, 10), "text_embed": torch.randn(2, 9), **captions()}
    everything = torch.ones(2, dtype=torch.bool)
    null = network.null_context(**conditions)
    dropped = network.encode_context(**conditions, drop_image=everything, drop_text=everything)
    others = {"image_embed": torch.randn(2, 10), "text_embed": torch.randn(2, 9), **captions()}
    elsewhere = network.null_context(**others)
    for key in null:
        torch.testing.assert_close(null[key], dropped[key], rtol=0, atol=0)
        torch.testing.assert_close(null[key], elsewhere[key], rtol=0, atol=0)
        torch.testing.assert_close(null[key][0], null[key][1])

    # A dropped caption and no caption at all are the same to the network.
    x = torch.randn(2, 3, 16, 16)
    no_caption = network.encode_context(image_embed=torch.randn(2, 10), drop_image=everything)
    torch.testing.assert_close(decode(network, null, x), decode(network, no_caption, x))


def test_decoder_drops_row_by_row():
    network = randomised(Decoder(replace(TINY_DECODER, layout_size=4)))
    conditions = {"image_embed": torch.randn(2, 10), **captions()}
    full = network.encode_context(**conditions)
    null = network.null_context(**conditions)
    first = torch.tensor([True, False])
    mixed = network.encode_context(**conditions, drop_image=first, drop_text=first)
    for key in full:
        torch.testing.assert_close(mixed[key][0], null[key][0])
        torch.testing.assert_close(mixed[key][1], full[key][1])


def test_decoder_ignores_padding_and_reads_the_rest():
    network = randomised(Decoder(TINY_DECODER))
    image_embed, text, x = torch.randn(2, 10), captions(), torch.randn(2, 3, 16, 16)
    y = decode(network, network.encode_context(image_embed=image_embed, **text), x)

    noise = torch.randn_like(text["text_encodings"])
    padding = ~text["text_mask"][..., None]
    for where, changes in ((padding, False), (~padding, True)):
        other = torch.where(where, noise, text["text_encodings"])
        context = network.encode_context(
            image_embed=image_embed, text_encodings=other, text_mask=text["text_mask"]
        )
        assert torch.allclose(decode(network, context, x), y, atol=1e-5) != changes
    longer = {
        "text_encodings": F.pad(text["text_encodings"], (0, 0, 0, 3)),
        "text_mask": F.pad(text["text_mask"], (0, 3)),
    }
    context = network.encode_context(image_embed=image_embed, **longer)
    torch.testing.assert_close(decode(network, context, x), y, rtol=1e-5, atol=1e-5)


def test_decoder_on_the_image_embedding_alone():
    x, image_embed = torch.randn(2, 3, 16, 16), torch.randn(2, 10)
    network = randomised(Decoder(replace(TINY_DECODER, text_encodings_dim=None)))
    context = network.encode_context(image_embed=image_embed)
    assert context["tokens"].shape == (2, 4, 12)
    assert decode(network, context, x).shape == x.shape
    with pytest.raises(ValueError, match=r"set decoder.text_encodings_dim"):
        network.encode_context(image_embed=image_embed, **captions())

    config = DecoderConfig(
        unet=replace(TINY_UNET, attention_resolutions=(), context_dim=None),
        image_embed_dim=10,
        num_image_tokens=0,
    )
    network = randomised(Decoder(config))
    context = network.encode_context(image_embed=image_embed)
    assert context["tokens"] is None and context["token_mask"] is None
    assert decode(network, context, x).shape == x.shape


def test_decoder_with_the_empty_prompt_as_null():
    network = randomised(Decoder(replace(TINY_DECODER, null_text="empty_prompt")))
    assert {name for name, _ in network.named_parameters() if "null" in name} == {
        "null_image_embed"
    }
    image_embed, empty_prompt = torch.randn(2, 10), captions()
    null = network.null_context(image_embed=image_embed, **empty_prompt)
    everything = torch.ones(2, dtype=torch.bool)
    same = network.encode_context(image_embed=image_embed, **empty_prompt, drop_image=everything)
    torch.testing.assert_close(null["tokens"], same["tokens"])
    with pytest.raises(ValueError, match="pass the empty prompt's encodings"):
        network.encode_context(image_embed=image_embed, **empty_prompt, drop_text=everything)
    with pytest.raises(ValueError, match="pass the empty prompt's encodings"):
        network.encode_context(image_embed=image_embed)


def test_embeddings_are_scaled_to_unit_variance_unless_told_otherwise():
    image_embed = F.normalize(torch.randn(2, 10), dim=-1)
    scaled, plain = Decoder(TINY_DECODER), Decoder(replace(TINY_DECODER, embed_scale=1.0))
    plain.load_state_dict(scaled.state_dict())
    emb = scaled.encode_context(image_embed=image_embed)["emb"]
    same = plain.encode_context(image_embed=image_embed * 10**0.5)["emb"]
    torch.testing.assert_close(emb, same)
    dropped = {"image_embed": image_embed, "drop_image": torch.ones(2, dtype=torch.bool)}
    null = [network.encode_context(**dropped)["emb"] for network in (scaled, plain)]
    torch.testing.assert_close(*null)  # the null is learned at the size the layers see


def test_decoder_picture_alone_equals_picture_in_a_batch():
    network = randomised(Decoder(TINY_DECODER))
    context = network.encode_context(image_embed=torch.randn(2, 10), **captions())
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    y = network(x, timesteps, context)
    for k in range(2):
        alone = network(x[k : k + 1], timesteps[k : k + 1], at(context, k))
        torch.testing.assert_close(alone, y[k : k + 1], rtol=1e-5, atol=1e-5)


def test_decoder_refuses_another_clips_embedding():
    network = Decoder(replace(TINY_DECODER, text_embed_dim=9))
    good = {"image_embed": torch.randn(2, 10), "text_embed": torch.randn(2, 9), **captions()}
    for name, field in (
        ("image_embed", "image_embed_dim"),
        ("text_embed", "text_embed_dim"),
        ("text_encodings", "text_encodings_dim"),
    ):
        width = good[name].shape[-1]
        with pytest.raises(
            ValueError, match=rf"{name} must be {width} wide .*{field}.*got 11: .*CLIP"
        ):
            network.encode_context(**{**good, name: torch.randn(*good[name].shape[:-1], 11)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learned_variance": True}, "decoder.unet.out_channels must be 6 .* got 3: use 6"),
        ({"image_embed_dim": 0}, "decoder.image_embed_dim must be at least 1; got 0"),
        ({"image_drop_prob": 1.5}, r"decoder.image_drop_prob must lie in \[0, 1\]; got 1.5"),
        ({"layout_size": -1}, "decoder.layout_size must not be negative; got -1"),
        ({"num_image_tokens": -1}, "decoder.num_image_tokens must not be negative; got -1"),
        ({"null_text": "zeros"}, "decoder.null_text must be .* got 'zeros'"),
        ({"unet": replace(TINY_UNET, context_dim=None)}, "decoder.unet.context_dim must be set"),
        (
            {"num_image_tokens": 0, "text_encodings_dim": None},
            "decoder.unet.context_dim must be None",
        ),
    ],
)
def test_decoder_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_DECODER, **changes)


# ---------------------------------------------------------------------------------- upsampler


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_upsampler_runs_on_crops_and_on_whole_pictures(patch_size):
    unet = replace(TINY_UPSAMPLER.unet, patch_size=patch_size)
    network = randomised(Upsampler(UpsamplerConfig(unet=unet)))
    for side in (4, 16):
        context = network.encode_context(low_res=torch.rand(2, 3, side, side) * 2 - 1)
        assert context["low_res"].shape == (2, 3, 4 * side, 4 * side)
        x_t = torch.randn(2, 3, 4 * side, 4 * side)
        assert network(x_t, torch.tensor([3, 500]), context).shape == x_t.shape
    with pytest.raises(ValueError, match=r"upsampler.scale = 4"):
        network(torch.randn(2, 3, 16, 16), torch.tensor([3, 500]), context)


def test_upsampler_sees_the_small_picture_and_the_noise_level():
    network = randomised(Upsampler(replace(TINY_UPSAMPLER, noise_conditioning=True)))
    low_res, x_t, timesteps = (
        torch.rand(2, 3, 4, 4),
        torch.randn(2, 3, 16, 16),
        torch.tensor([3, 9]),
    )
    zeros = torch.zeros(2)
    y = network(x_t, timesteps, network.encode_context(low_res=low_res, noise_level=zeros))
    for other in (
        network.encode_context(low_res=-low_res, noise_level=zeros),
        network.encode_context(low_res=low_res, noise_level=zeros + 0.3),
    ):
        assert not torch.allclose(network(x_t, timesteps, other), y, atol=1e-3)
    with pytest.raises(ValueError, match=r"upsampler.noise_conditioning"):
        network.encode_context(low_res=low_res)
    with pytest.raises(ValueError, match=r"upsampler.noise_conditioning"):
        Upsampler(TINY_UPSAMPLER).encode_context(low_res=low_res, noise_level=zeros)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0}, "upsampler.scale must be at least 1; got 0"),
        ({"learned_variance": True}, "upsampler.unet.out_channels must be 6"),
        (
            {"unet": replace(TINY_UPSAMPLER.unet, in_channels=3)},
            "upsampler.unet.in_channels must be 6",
        ),
        ({"unet": replace(TINY_UNET, in_channels=6)}, "neither attention nor a position"),
    ],
)
def test_upsampler_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_UPSAMPLER, **changes)


# -------------------------------------------------------------------------------------- prior


def prior_conditions(batch: int = 2, num_tokens: int = 6) -> dict[str, Tensor]:
    return {"text_embed": torch.randn(batch, 10), **captions(batch, num_tokens)}


def test_prior_shapes_and_zero_start():
    network: Any = PriorTransformer(TINY_PRIOR)
    context: Any = network.encode_context(**prior_conditions())
    assert context["prefix_kv"].shape == (2, 3, 2, 4, 7, 8)  # [B, L, 2, A, P, K]
    y = network(torch.randn(2, 10), torch.tensor([3, 500]), context)
    assert y.shape == (2, 10)
    assert (y == 0).all()


def test_prior_prefix_is_causal():
    network = randomised(PriorTransformer(TINY_PRIOR))
    conditions = prior_conditions()
    conditions["text_mask"] = torch.ones(2, 6, dtype=torch.bool)
    before = network.encode_context(**conditions)["prefix_kv"]
    changed = dict(conditions, text_encodings=conditions["text_encodings"].clone())
    changed["text_encodings"][:, 3] += 1
    after = network.encode_context(**changed)["prefix_kv"]
    torch.testing.assert_close(after[..., :3, :], before[..., :3, :], rtol=0, atol=0)
    for position in range(3, 7):
        assert not torch.allclose(after[:, -1, ..., position, :], before[:, -1, ..., position, :])


def test_prior_ignores_padding():
    network = randomised(PriorTransformer(TINY_PRIOR))
    conditions = prior_conditions()
    x_t, timesteps = torch.randn(2, 10), torch.tensor([3, 500])
    y = network(x_t, timesteps, network.encode_context(**conditions))

    padding = ~conditions["text_mask"][..., None]
    noise = torch.randn_like(conditions["text_encodings"])
    for where, changes in ((padding, False), (~padding, True)):
        other = torch.where(where, noise, conditions["text_encodings"])
        context = network.encode_context(**{**conditions, "text_encodings": other})
        assert torch.allclose(network(x_t, timesteps, context), y, atol=1e-5) != changes
    trimmed = {  # both captions have at most two tokens
        "text_embed": conditions["text_embed"],
        "text_encodings": conditions["text_encodings"][:, :2],
        "text_mask": conditions["text_mask"][:, :2],
    }
    context = network.encode_context(**trimmed)
    torch.testing.assert_close(network(x_t, timesteps, context), y, rtol=1e-5, atol=1e-5)


def test_prior_survives_a_fully_masked_caption():
    network = randomised(PriorTransformer(TINY_PRIOR))
    conditions = prior_conditions()
    conditions["text_mask"] = torch.zeros(2, 6, dtype=torch.bool)
    context = network.encode_context(**conditions)
    assert network(torch.randn(2, 10), torch.tensor([3, 500]), context).isfinite().all()


def test_prior_dropping_text_is_the_null_context():
    network = randomised(PriorTransformer(TINY_PRIOR))
    conditions = prior_conditions()
    x_t, timesteps = torch.randn(2, 10), torch.tensor([3, 500])
    full = network(x_t, timesteps, network.encode_context(**conditions))
    null = network(x_t, timesteps, network.null_context(**conditions))
    elsewhere = network(x_t, timesteps, network.null_context(**prior_conditions()))
    torch.testing.assert_close(null, elsewhere)
    mixed = network.encode_context(**conditions, drop_text=torch.tensor([True, False]))
    mixed = network(x_t, timesteps, mixed)
    torch.testing.assert_close(mixed, torch.stack([null[0], full[1]]))


def test_prior_with_the_empty_prompt_as_null():
    network = PriorTransformer(replace(TINY_PRIOR, null_text="empty_prompt"))
    assert not any("null" in name for name, _ in network.named_parameters())
    conditions = prior_conditions()
    null, same = network.null_context(**conditions), network.encode_context(**conditions)
    torch.testing.assert_close(null["prefix_kv"], same["prefix_kv"])
    with pytest.raises(ValueError, match="empty prompt"):
        network.encode_context(**conditions, drop_text=torch.tensor([True, False]))


def test_prior_embedding_alone_equals_embedding_in_a_batch():
    network = randomised(PriorTransformer(TINY_PRIOR))
    context = network.encode_context(**prior_conditions())
    x_t, timesteps = torch.randn(2, 10), torch.tensor([3, 500])
    y = network(x_t, timesteps, context)
    for k in range(2):
        alone = network(x_t[k : k + 1], timesteps[k : k + 1], at(context, k))
        torch.testing.assert_close(alone, y[k : k + 1], rtol=1e-5, atol=1e-5)


def test_prior_refuses_what_does_not_fit():
    network = PriorTransformer(TINY_PRIOR)
    conditions = prior_conditions()
    for name, field in (("text_embed", "embed_dim"), ("text_encodings", "text_encodings_dim")):
        wrong = torch.randn(*conditions[name].shape[:-1], 11)
        with pytest.raises(ValueError, match=rf"{name} must be .*prior.{field}.*got 11: .*CLIP"):
            network.encode_context(**{**conditions, name: wrong})
    with pytest.raises(ValueError, match=r"prior.max_text_len = 6 tokens; got 7"):
        network.encode_context(**prior_conditions(num_tokens=7))
    with pytest.raises(ValueError, match="x_t must be 10 wide"):
        network(torch.randn(2, 11), torch.tensor([3, 500]), network.encode_context(**conditions))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, "prior.head_dim must divide width; got 24 for width 32: use 16 or 32"),
        ({"depth": 0}, "prior.depth must be at least 1; got 0"),
        ({"width": 31}, "prior.width must be even; got 31: use 32"),
        ({"dropout": 1.0}, r"prior.dropout must lie in \[0, 1\); got 1.0"),
        ({"null_text": "zeros"}, "prior.null_text must be .* got 'zeros'"),
        ({"attention_backend": "flash"}, "prior.attention_backend must be .* got 'flash'"),
    ],
)
def test_prior_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY_PRIOR, **changes)


# ------------------------------------------------------------------------------ all of them


def every_network() -> list[tuple[Any, Tensor, dict[str, Tensor]]]:
    """Each network with everything switched on, an x_t, and conditions, half of them dropped."""
    unet = replace(TINY_UNET, position_embedding=True, dropout=0.1)
    decoder = replace(TINY_DECODER, unet=unet, text_embed_dim=9, layout_size=4)
    prior = replace(TINY_PRIOR, dropout=0.1)
    upsampler = replace(TINY_UPSAMPLER, noise_conditioning=True)
    half = torch.tensor([True, False])
    decoder_conditions = {"text_embed": torch.randn(2, 9), **captions(), "drop_image": half}
    decoder_conditions |= {"image_embed": torch.randn(2, 10), "drop_text": half}
    upsampler_conditions = {"low_res": torch.rand(2, 3, 4, 4), "noise_level": torch.rand(2)}
    return [
        (Decoder(decoder), torch.randn(2, 3, 16, 16), decoder_conditions),
        (Upsampler(upsampler), torch.randn(2, 3, 16, 16), upsampler_conditions),
        (PriorTransformer(prior), torch.randn(2, 10), {**prior_conditions(), "drop_text": half}),
    ]


@pytest.mark.parametrize("index", range(3), ids=["decoder", "upsampler", "prior"])
def test_gradients_reach_every_parameter(index):
    network, x_t, conditions = every_network()[index]
    randomised(network).train()
    context = network.encode_context(**conditions)
    network(x_t, torch.tensor([3, 500]), context).square().mean().backward()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("index", range(3), ids=["decoder", "upsampler", "prior"])
def test_contexts_are_dictionaries_with_the_batch_first(index):
    """Guidance concatenates two contexts key by key and runs both at once."""
    network, x_t, conditions = every_network()[index]
    randomised(network)
    first = network.encode_context(**conditions)
    second = network.encode_context(**{k: x.roll(1, 0) for k, x in conditions.items()})
    both = {k: None if x is None else torch.cat([x, second[k]]) for k, x in first.items()}
    timesteps = torch.tensor([3, 500])
    y = network(torch.cat([x_t, x_t]), timesteps.repeat(2), both)
    expected = torch.cat([network(x_t, timesteps, context) for context in (first, second)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y[:2], y[2:], atol=1e-3)
