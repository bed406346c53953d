"""What the models are worth, measured: protocols and metrics of pictures, the shapes world's score,
the prior's distances, probes of a CLIP."""
