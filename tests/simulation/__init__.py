"""Deterministic simulation: the real driver, workers and coordinator under one seeded scheduler, with faults.

    python -m tests.simulation --seeds 2000 [--first N] [--trace]

The code of raykeras runs unchanged. What it stands on is simulated: threads and clocks (`scheduler`, `primitives`), Ray
(`cluster`, `ray_api`), storage (`storage`) and Keras' `fit` with a model that only counts rows (`training`). A
`Scenario` holds the options and the faults that belong to a seed, and `checks` compares the outcome with that of an
undisturbed run. The approach is that of FoundationDB: https://apple.github.io/foundationdb/testing.html
"""
