"""Decides before any work what a run will do, and estimates what it will cost."""
