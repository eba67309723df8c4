"""evaluator: measures a policy on data of its own. Here it is asked three sums, greedily, and its first guess counts.

In a recipe:

    evaluators: {easy: {use: "easy_sums:EasySums", sums: ["1 + 1 + 1", "2 + 3 + 4"]}}
"""

import numpy as np

from miles_core.protocols import Evaluation, GenerateRequest, SamplingParams


class EasySums:
    def __init__(self, *, sums: list[str]):
        self.sums = sums

    async def evaluate(self, players):
        """``players`` has the engines, which serve the weights in question. Metrics come back as ``eval/easy/<name>``."""
        policy = players.policies[0]
        engine, tokenizer = players.engines[policy], players.tokenizers[policy]
        right, sampling = 0, SamplingParams(max_tokens=12, temperature=0.0)
        for text in self.sums:
            prompt = np.array(tokenizer.encode(f"{text} ?"), np.int32)
            answer = await engine.generate(GenerateRequest(f"easy {text}", prompt, sampling, key=0))
            right += f" ans {sum(map(int, text.split(' + ')))}" in tokenizer.decode(answer.tokens.tolist())
            await engine.release(f"easy {text}")
        return Evaluation({"right": right / len(self.sums)})
