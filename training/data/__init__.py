"""Rows -> checked conversations -> tokens and labels -> batches."""
