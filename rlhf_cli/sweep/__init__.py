"""Sweeps: `rlhf train -m`."""
