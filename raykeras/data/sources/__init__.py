"""Sources of rows: Parquet files, NumPy arrays and Ray datasets."""
