"""Train a diffusion prior: `accelerate launch train_prior.py [--config configs/prior/X.yaml]`."""

from pathlib import Path

from unclip.training.prior import main

if __name__ == "__main__":
    main(default_config=Path(__file__).parent / "configs/prior/diffusion.yaml")
