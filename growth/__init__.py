"""Models at rest: checkpoints in, checkpoints out."""
