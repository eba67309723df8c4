"""``rollout_engine: local``: a batched sampler in this process.

``engine`` (asyncio) → ``scheduler`` (which sequences run) → ``slots`` (what is known of them) and ``model`` (forward passes over
``cache`` and ``attention``, with ``routing`` on the way), then ``sampling`` and ``stops``; ``weights`` replaces what the model holds.
"""
