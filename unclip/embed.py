"""Embed captioned pictures once: `accelerate launch -m unclip.embed --data ... --out DIR`."""

from unclip.training.embed import main

if __name__ == "__main__":
    main()
