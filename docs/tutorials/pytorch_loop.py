"""Your own PyTorch loop under Miles: 676 numbers learn the alphabet. Run it: ``uv run python docs/tutorials/pytorch_loop.py``

Model, sampling, loss and optimizer are plain PyTorch. Groups, advantages, metrics, trajectories, a trace, checkpoints and resume
come from Miles: stop it with Ctrl-C and go on with ``miles resume runs/alphabet``.
"""

import itertools
import string

import torch

import miles_core as miles

LETTERS = string.ascii_lowercase
policy = torch.nn.Embedding(26, 26)  # the logits of the next letter
torch.nn.init.zeros_(policy.weight)
optimizer = torch.optim.Adam(policy.parameters(), lr=0.3)


@miles.rollout(gives={"logprobs", "rewards"})
@torch.no_grad()
def say(prompt, context):
    """Sixteen times: seven letters after the prompt's; a point for each that follows the one before it in the alphabet."""
    weights = context.engines["policy"].weights  # a copy of the modules, as of the last publish
    samples = []
    for trajectory in range(16):
        generator = torch.Generator().manual_seed(context.key(prompt, trajectory) >> 1)
        tokens, logprobs = [LETTERS.index(prompt.text)], []
        for _ in range(7):
            logp = weights["policy"](torch.tensor(tokens[-1])).log_softmax(-1)
            tokens.append(int(torch.multinomial(logp.exp(), 1, generator=generator)))
            logprobs.append(float(logp[tokens[-1]]))
        reward = sum(b == a + 1 for a, b in itertools.pairwise(tokens)) / 7
        id = context.sample_id(prompt, trajectory)
        samples.append(miles.Sample.answer(id, tokens[:1], tokens[1:], logprobs, version=weights.version, reward=reward))
    return samples


@miles.update(state={"policy": policy, "optimizer": optimizer})
def learn(batch):
    """One optimizer step; row p of a packed column speaks of the token predicted at p."""
    rows = batch.tensors()
    mask = rows["loss_mask"]
    logp = policy(rows["tokens"][mask]).log_softmax(-1)[range(int(mask.sum())), rows["targets"][mask]]
    loss = -((logp - rows["logprobs"][mask]).exp() * rows["advantages"][mask]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss.item()}


if __name__ == "__main__":
    outcome = miles.run(say, learn, data=list(LETTERS[:19]), name="alphabet", steps=60, groups=8)
    print(f"{outcome.steps} steps; what was learned: {outcome.run_dir}/models/final/policy/policy.safetensors")
