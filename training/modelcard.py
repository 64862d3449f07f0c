"""The README.md that lies beside the weights of a checkpoint: what it is, how it was made, how to open it."""

from pathlib import Path

import yaml
from transformers import PreTrainedConfig

from training.config import Config, config_dict
from training.redaction import redact

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- transnormer
- linear-attention
---

# {name}, step {step:,}

A TransNormer language model (attention without softmax) with {layers} layers, width {width}, {heads} heads of
{head_dim} channels and a vocabulary of {vocab:,}, after {tokens:,} tokens of `{corpus}` in rows of {length:,}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

The code of the model lies in this folder; `trust_remote_code` is not needed after `import model` in its repository.
A text generator repeats what its corpus held, errors and bias included; it was made for research.

## Configuration

```yaml
{config}```
"""


def model_card(config: Config, model_config: PreTrainedConfig, step: int, tokens: int, out: Path) -> str:
    """The text of the card, as Markdown; secrets in the configuration are left out."""
    text = _CARD.format(
        name=out.name,
        step=step,
        layers=model_config.num_hidden_layers,
        width=model_config.hidden_size,
        heads=model_config.num_attention_heads,
        head_dim=model_config.head_dim,
        vocab=model_config.vocab_size,
        tokens=tokens,
        corpus=config.data.dataset or config.data.corpus,
        length=config.data.sequence_length,
        config=yaml.safe_dump(redact(config_dict(config)), sort_keys=False),
    )
    return redact(text)
