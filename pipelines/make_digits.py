"""Write `digits/`: Parquet files of the 1,797 handwritten digits that are included in scikit-learn.

    pip install scikit-learn
    python pipelines/make_digits.py

They are the test set of the UCI "Optical Recognition of Handwritten Digits" data set (E. Alpaydin and C. Kaynak,
1998): images of 8×8 pixels with values from 0 to 16. `weight` is the inverse frequency of the digit among the training
rows, scaled to a mean of 1, so that all digits have the same total weight.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

NUM_TEST = 297
NUM_FILES = 4
ROWS_PER_GROUP = 128


def main() -> None:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images.astype(np.uint8)[order], digits.target.astype(np.int64)[order]
    split = len(labels) - NUM_TEST
    counts = np.bincount(labels[:split], minlength=10)
    weights = (split / (10 * counts))[labels].astype(np.float32)
    folder = Path(__file__).parent / "digits"
    shutil.rmtree(folder, ignore_errors=True)
    cuts = np.linspace(0, split, NUM_FILES + 1).astype(int)
    for i in range(NUM_FILES):
        _write(folder / "train" / f"part-{i}.parquet", images, labels, weights, slice(cuts[i], cuts[i + 1]))
    _write(folder / "test" / "part-0.parquet", images, labels, weights, slice(split, None))


def _write(path: Path, images: np.ndarray, labels: np.ndarray, weights: np.ndarray, rows: slice) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "image": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images[rows])),
            "label": labels[rows],
            "weight": weights[rows],
        }
    )
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)


if __name__ == "__main__":
    main()
