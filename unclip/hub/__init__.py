"""Names and folders of models: shipped with the package, on this computer, or on the Hugging Face
Hub; loading them whole or in part, and writing them."""

from unclip.hub.dalle2_pytorch import load_dalle2_pytorch_prior
from unclip.hub.folders import (
    check_stages,
    load_clip_of,
    load_stages,
    save_stages,
    write_run_model,
)
from unclip.hub.model import Stages
from unclip.hub.names import resolve, shipped_names
from unclip.hub.publish import publish

__all__ = [
    "Stages",
    "check_stages",
    "load_clip_of",
    "load_dalle2_pytorch_prior",
    "load_stages",
    "publish",
    "resolve",
    "save_stages",
    "shipped_names",
    "write_run_model",
]
