"""Networks only: they know no noise schedule, no loss, no guidance and no device.

All share one contract. ``context = network.encode_context(...)`` turns the conditions into a
dictionary of tensors, batch first, once per sampling run; ``network(x_t, timesteps, context)`` is
what every step calls. Guidance concatenates two contexts key by key.
"""

from unclip.models.decoder import Decoder, DecoderConfig
from unclip.models.glide import Glide, GlideConfig, TextTransformerConfig
from unclip.models.layers import Context
from unclip.models.multi_query_prior import MultiQueryPrior, MultiQueryPriorConfig
from unclip.models.prior_transformer import PriorTransformer, PriorTransformerConfig
from unclip.models.text_prefix import TextPrefix, TextPrefixConfig
from unclip.models.token_transformer import TokenTransformer, TokenTransformerConfig
from unclip.models.unet import UNet, UNetConfig
from unclip.models.upsampler import Upsampler, UpsamplerConfig

__all__ = [
    "Context",
    "Decoder",
    "DecoderConfig",
    "Glide",
    "GlideConfig",
    "MultiQueryPrior",
    "MultiQueryPriorConfig",
    "PriorTransformer",
    "PriorTransformerConfig",
    "TextPrefix",
    "TextPrefixConfig",
    "TextTransformerConfig",
    "TokenTransformer",
    "TokenTransformerConfig",
    "UNet",
    "UNetConfig",
    "Upsampler",
    "UpsamplerConfig",
]
