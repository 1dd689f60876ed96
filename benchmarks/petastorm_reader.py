"""The Petastorm contender of `benchmarks.ingest`, which runs in Petastorm's environment and prints the rows per second.

python petastorm_reader.py FOLDER FEATURES BATCH_SIZE NUM_BATCHES batch|rebatch
"""

import os
import sys
import time

import tensorflow as tf
from petastorm import make_batch_reader
from petastorm.tf_utils import make_petastorm_dataset

folder, names, *sizes, method = sys.argv[1:]
features, (batch_size, num_batches) = names.split(","), map(int, sizes)
with make_batch_reader("file://" + folder, num_epochs=None, workers_count=2, shuffle_row_groups=False) as reader:
    groups = make_petastorm_dataset(reader).map(
        lambda group: (tf.stack([getattr(group, name) for name in features], 1), group.label, group.weight)
    )
    batches = groups.rebatch(batch_size) if method == "rebatch" else groups.unbatch().batch(batch_size)
    iterator = iter(batches.prefetch(4))

    @tf.function
    def take(num: tf.Tensor) -> tf.Tensor:
        rows = tf.constant(0)
        for _ in tf.range(num):
            rows += tf.shape(next(iterator)[-1])[0]
        return rows

    take(tf.constant(num_batches))
    start = time.perf_counter()
    rows = int(take(tf.constant(2 * num_batches)))
    print("rows/s", rows / (time.perf_counter() - start), flush=True)
    os._exit(0)  # TensorFlow may hang while it ends a parallel map
