"""Data pipeline: sources -> rows -> messages -> rendered text -> tokens -> batches."""
