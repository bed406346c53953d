"""What the models are worth, measured: protocols and metrics of pictures, reports and sweeps of
results, the shapes world's score, the prior's distances, probes of a CLIP."""
