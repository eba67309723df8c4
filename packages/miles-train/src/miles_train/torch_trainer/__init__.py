"""`trainer: torch`. Read in this order: layouts, model, optimizer, checkpoint, trainer."""
