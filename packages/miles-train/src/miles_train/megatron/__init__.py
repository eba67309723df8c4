"""`trainer: megatron`. The model: layout, cuts, specs, qwen3, bridge, layers, model, checkpoint_files, weights, inputs, replay; read in
this order. Then the trainer on top of it: sharding, steps, optimizer, checkpoint, messages, worker, trainer.

megatron.core is imported only below ``bridge.install()``.
"""
