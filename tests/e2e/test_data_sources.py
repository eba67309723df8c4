"""A run on a mixture of every source that reads rows: ended in the middle and resumed, it reads what an undisturbed one does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from miles_core.sample_io import load_samples

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"

RECIPE = """
name: {name}
device: cpu
trackers: {{}}
models:
  policy:
    config: {{model_type: qwen3, num_hidden_layers: 1, hidden_size: 32, intermediate_size: 32, num_attention_heads: 2,
             num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 128, tie_word_embeddings: true}}
    tokenizer: {{kind: bpe, vocab_size: 300, special_tokens: ["<|user|>", "<|assistant|>"]}}
    trainer: {{use: torch, lr: 1.0e-3}}
    losses: {{nll: {{use: nll}}}}
data:
  use: miles_core.data.mixture:Mixture
  parts:
    talk:
      weight: 2
      data: {{use: jsonl, path: talk.jsonl, prompt_field: messages, demonstration_field: messages, chat: {{template: chat.jinja}}}}
    files:
      weight: 1
      data: {{use: "miles_core.data.parquet:Parquet", path: "shards/*.parquet", demonstration_field: answer, shuffle_window: 4,
             metadata_fields: [level], max_prompt_tokens: 60, too_long: drop}}
    hub:
      weight: 1
      data: {{use: "miles_core.data.huggingface:HuggingFace", path: hub, split: train, streaming: true, shuffle_window: 4,
             demonstration_field: answer, chat: {{template: chat.jinja}}}}
rollout: {{use: read}}
max_staleness: 1
steps: 8
groups: 6
every: {{checkpoint: 1}}
hooks: {{stop: {{use: my_hook:Stop}}}}
"""

HOOK = """
from pathlib import Path

from miles_core import RunError

class Stop:
    def before_rollout(self, loop):
        if Path("stop").exists() and loop.step == 5:
            Path("stop").unlink()
            raise RunError("the machine went away")
"""


def write_data() -> None:
    conversations = [
        {"messages": [{"role": "user", "content": f"talk {i}"}, {"role": "assistant", "content": f"yes {i}"}]} for i in range(9)
    ]
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    Path("chat.jinja").write_text(CHAT)
    Path("shards").mkdir()
    for shard in range(2):
        rows = {"prompt": [f"file {shard}{i}" * (1 if i else 30) for i in range(7)], "answer": ["so"] * 7, "level": list(range(7))}
        pq.write_table(pa.table(rows), f"shards/{shard}.parquet", row_group_size=3)
    Path("hub").mkdir()
    datasets.Dataset.from_dict({"prompt": [f"hub {i}" for i in range(11)], "answer": ["well"] * 11}).to_json("hub/train.jsonl")


def trained(name: str) -> list[list[tuple]]:
    """What each step trained on: group, text, which part."""
    files = sorted(Path(f"runs/{name}/trajectories").glob("step-*.safetensors"))
    return [sorted((s.id.group, s.prompt, tuple(s.tokens.tolist()), s.metadata["source"]) for s in load_samples(f)) for f in files]


def test_resumed_it_reads_what_an_undisturbed_run_reads(miles, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_data()
    Path("my_hook.py").write_text(HOOK)
    for name in ("whole", "ended"):
        Path(f"{name}.yaml").write_text(RECIPE.format(name=name))
    said = miles("run", "whole.yaml")
    assert said.code == 0, said.err
    assert "part files: data_source miles_core.data.parquet:Parquet: 2 of 14 prompts have more than 60 tokens and are left out" in said.out

    Path("stop").touch()
    said = miles("run", "ended.yaml")
    assert said.code == 1 and "the machine went away" in said.err
    said = miles("resume", "runs/ended")
    assert said.code == 0, said.err

    undisturbed, resumed = trained("whole"), trained("ended")
    assert len(undisturbed) == 8 and resumed == undisturbed
    groups = [group for step in undisturbed for group, *_ in step]
    assert len(set(groups)) == 48
    parts = Counter(source for step in undisturbed for *_, source in step)
    assert all(abs(parts[part] - share * 48) <= 1 + 3 * share + 1 for part, share in (("talk", 0.5), ("files", 0.25), ("hub", 0.25))), parts
    texts = {source: text for step in undisturbed for _, text, _, source in step}
    assert texts["talk"].startswith("<|user|>talk ") and texts["talk"].endswith("\n<|assistant|>") and texts["files"].startswith("file ")
