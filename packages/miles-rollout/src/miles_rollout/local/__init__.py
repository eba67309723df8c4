"""``rollout_engine: local``: a batched sampler in this process.

``engine`` (asyncio) → ``scheduler`` (which sequences run) → ``slots`` (what is known of them) and ``model`` (forward passes over
``cache``: decoding by ``fused`` where it knows the model, all else by the modules with ``attention``, and ``routing`` on the way), then
``sampling`` and ``stops``; ``weights`` replaces what the model holds.
"""
