"""Numbers of a row that have the same bits whatever else is in the batch, on a CPU; `model.py` makes a transformers model give such."""
