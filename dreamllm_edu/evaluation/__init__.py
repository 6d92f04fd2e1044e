"""A judge that never met the model, metrics with intervals, and the suite of all measurements."""
