"""Checks a written file against its source, and makes reports, model cards and uploads of the results."""
