"""`trainer: torch`. Read in this order: layouts, planning, attention, model, causal_lm, scalar_model, objective, optimizer, checkpoint,
trainer."""
