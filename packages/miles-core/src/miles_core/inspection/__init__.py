"""What can be said of a run from its directory, while it goes on and afterwards: its trajectories, its model, how it compares.

Reading needs numpy and safetensors only; texts need the tokenizer's library, exporting from a checkpoint needs what the run needed.
"""
