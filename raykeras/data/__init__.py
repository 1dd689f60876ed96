"""The data pipeline: from sources of rows and from user-made batches to `tf.data`."""
