"""Blocks, their local losses and their votes, in plain PyTorch."""
