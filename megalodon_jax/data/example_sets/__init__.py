"""Sets of labelled examples: generated (ListOps), from local files, from tensorflow-datasets."""
