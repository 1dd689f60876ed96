"""Batches that the user makes: `tf.data`, `PyDataset`, `DataLoader` and generators."""
