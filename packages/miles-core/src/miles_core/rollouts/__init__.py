"""Built-in rollout functions: ``trajectories`` samples a group, ``read`` makes samples of demonstrations."""
