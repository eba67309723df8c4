"""Real SGLang servers: their environment, their processes, and the engine that samples from them."""
