"""What the models are worth, measured: the shapes world's score and linear probes of a CLIP."""
