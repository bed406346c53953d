"""Training: objectives, one `fit` loop, checkpoints; the only room that knows Accelerate."""
