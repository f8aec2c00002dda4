"""Pictures, each drawn from tensors alone: what they are of is gathered by `ff_lightning.callbacks.Pictures`."""
