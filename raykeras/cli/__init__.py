"""The command line and pipeline files."""
