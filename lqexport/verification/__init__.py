"""Checks of a written file against its source, and the reports, cards and uploads made from them."""
