"""Train a decoder or an upsampler: `accelerate launch train_decoder.py --config configs/...`."""

from pathlib import Path

from unclip.training.decoder import main

if __name__ == "__main__":
    main(default_config=Path(__file__).parent / "configs/decoder/shapes.yaml")
