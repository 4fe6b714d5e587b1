"""The LightningModule, trainable parts, sharding, checkpoints and exact resume."""
