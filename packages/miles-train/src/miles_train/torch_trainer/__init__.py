"""`trainer: torch`. Read in this order: layouts, model, causal_lm, scalar_model, objective, optimizer, checkpoint, trainer."""
