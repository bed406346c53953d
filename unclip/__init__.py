"""Two-stage text-to-image generation after unCLIP (DALL-E 2), arXiv:2204.06125.

A frozen CLIP embeds the caption; a prior maps its text embedding to an image embedding; a U-Net
decoder turns the image embedding into 64 px; upsamplers take that to 256 px and on to 1024 px.

`unclip.stages` holds what a checkpoint holds: a network with its diffusion. `unclip.hub` finds,
loads and writes models by name, folder or Hub repository. On it stand, knowing nothing of each
other, `unclip.training`, which trains each stage, and `unclip.pipeline`, which runs the cascade.
Importing this package imports none of them: `unclip.UnCLIP` is found on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

__version__ = "0.1.0"

__all__ = ["UnCLIP", "__version__"]


def __getattr__(name: str) -> Any:
    """Resolve `UnCLIP` on first use, so that `import unclip` does not wait for torch."""
    if name == "UnCLIP":
        from unclip.pipeline import UnCLIP

        return UnCLIP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
