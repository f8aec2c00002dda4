"""What stands around the training loop: optimizers, checkpoints, checks, resumed runs."""
