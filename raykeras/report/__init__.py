"""Reports of runs: one HTML page from their events and `run.json`, drawn by Plotly."""
