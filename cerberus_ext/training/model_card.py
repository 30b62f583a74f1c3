"""The heads' README.md: a model card as the Hub reads it."""

from __future__ import annotations

import re
from typing import Any

from ..drafting.heads import CerberusConfig
from .held_out import BEST_SIZE

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(record: dict[str, Any], config: CerberusConfig) -> str:
    """record: training.json's, see `record.record`."""
    data, options = record["data"], record["options"]
    front = [
        "library_name: cerberus_ext",
        "pipeline_tag: text-generation",
        "tags:",
        "- speculative-decoding",
        "- cerberus",
    ]
    if HUB_ID.fullmatch(config.base_model):
        front.insert(0, f"base_model: {config.base_model}")
    behind = ", behind a context layer" if config.context_layer else ""
    kind = "Cerberus heads" if config.chained else "Medusa-style heads"
    among = "all tokens" if config.draft_vocab is None else f"the {config.draft_vocab} most frequent tokens"
    source = f"{data['source']}, " if "source" in data else ""
    coverage = data["draft_vocab_coverage"]
    processes = f", {record['processes']} processes" if record["processes"] > 1 else ""
    kept = next((point for point in record["curve"] if point["step"] == record["kept_step"]), None)
    return f"""---
{chr(10).join(front)}
---

# {kind} for {config.base_model}

{config.num_heads} decoding heads of {config.num_layers} layers{behind}, {record["parameters"]:,} parameters.
They draft the tokens after the next one, among {among}. With `cerberus_ext`, an implementation of
[Cerberus](https://arxiv.org/abs/2410.13344), they make the model generate faster and change nothing of what it
generates: every token is one that the model itself chose.

## Use

```python
import cerberus_ext
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{config.base_model}")
heads = cerberus_ext.CerberusHeads.from_pretrained("...")  # this folder, or its Hub id
out = cerberus_ext.decode(model, heads, ids, max_new_tokens=256)
```

## Training

- Data: {source}{data["answer_tokens"]:,} tokens in {data["lines"]:,} answers of the target model;
  {data["held_out_positions"]:,} of them, the last answers, only measured.
- Draft vocabulary: covers {coverage["training"]:.2%} of the training tokens and {coverage["held_out"]:.2%} of the
  held-out ones.
- Loss: KL to the target model's own distribution, for head k with the weight {options["head_decay"]}^(k - 1).
- AdamW, highest rate {options["lr"]}, cosine; {record["steps"]:,} steps of {options["batch"]} positions, products in
  {record["dtype"]}.
- {record["seconds"]:,} s on {record["machine"]}{processes}.
- Everything else is in `training.json`; `curves.png` shows how it went.

## Held-out results
{results(kept) if kept else "Not measured yet."}"""


def results(point: dict[str, Any]) -> str:
    """Tables of one measurement, see `Trainer.measure`."""
    heads = range(1, len(point["top1"]) + 1)
    tokens = point["tokens_per_step"]
    return f"""
How often the target model's greedy token is a head's best draft, or one of its best three (step {point["step"]}):

| head | {" | ".join(str(head) for head in heads)} |
|---|{"---|" * len(heads)}
| top-1 | {" | ".join(f"{share:.3f}" for share in point["top1"])} |
| top-3 | {" | ".join(f"{share:.3f}" for share in point["top3"])} |

Tokens a step, simulated (the heads of the best {BEST_SIZE}-node result are kept):

| nodes of the tree | {" | ".join(tokens)} |
|---|{"---|" * len(tokens)}
| tokens a step | {" | ".join(f"{value:.2f}" for value in tokens.values())} |
"""
