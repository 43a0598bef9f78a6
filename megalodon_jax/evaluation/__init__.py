"""How well a model predicts text: held-out batches (`summary`), long files (`streaming`)."""
