"""The stages of `lqexport quantize`, from a source to a finished artifact."""
