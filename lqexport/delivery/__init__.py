"""From a model to a verified file in one call: the names of what is written, the checks before work, and the run."""
