"""Exact results on several replicas: strategies and loss weighting."""
