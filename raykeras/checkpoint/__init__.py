"""Durable state of a run: checkpoints, snapshots and model files."""
