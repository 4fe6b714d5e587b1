"""What drives: the LightningModule, parts, sharding, checkpoints and resume."""
