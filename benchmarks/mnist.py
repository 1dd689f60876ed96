"""The MNIST example of the Keras guide, streamed from Parquet, on two workers.

    python -m benchmarks.mnist path/to/mnist.npz

Prints the accuracy on the test set after two epochs, as in the guide, which reports 0.9567.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk
from pipelines.mnist import build, flat_pixels


def write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images `(rows, 28, 28)` of uint8 as fixed-size lists, in row groups of 2,000."""
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), 28 * 28)
    pq.write_table(pa.table({"x": pixels, "label": labels}), path, row_group_size=2_000)


def source(path: Path) -> rk.Source:
    return rk.parquet(path, x="x", y="label", transform=flat_pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="path of mnist.npz")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, np.load(arguments.data) as archive:
        folder = Path(name)
        write(folder / "train.parquet", archive["x_train"], archive["y_train"])
        result = rk.fit(
            build,
            source(folder / "train.parquet"),
            validation_split=1 / 6,
            batch_size=64,
            epochs=2,
            scale=rk.Scale(workers=arguments.workers),
            run=rk.Run(storage=str(folder / "runs")),
        )
        pixels = flat_pixels({"x": archive["x_test"]})["x"]
        loss, accuracy = result.model().evaluate(pixels, archive["y_test"], verbose=0)
    print(f"{arguments.workers} workers: test loss {loss:.4f}, test accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
