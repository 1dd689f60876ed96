"""Planned rows: read tasks, interleaving, the cache and the `tf.data` dataset."""
