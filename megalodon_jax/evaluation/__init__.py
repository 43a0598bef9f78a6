"""Evaluation: held-out batches (`summary`) and documents of any length (`streaming`)."""
