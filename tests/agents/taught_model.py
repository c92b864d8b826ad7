"""The tiny model, taught four answers by heart: `taught_model.py FOLDER`, run by an engine's own Python.

A model of random weights never writes a tool call. This one sees of a conversation one character, which is all
that its chat template shows, and writes what that stands for, one character a token: two tool calls at once, three
for who leads specialists (in two spellings), or, once tools have answered, a sentence. It chooses and reads nothing.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engines"))
from tiny_model import tokenizer

TEMPLATE = """\
{%- set seen = namespace(mark="c") -%}
{%- for tool in tools or [] if tool.function.parameters.properties -%}
  {%- set wants = tool.function.parameters.properties -%}
  {%- if "task_text" in wants -%}{%- set seen.mark = "l" -%}{%- endif -%}
  {%- if "task" in wants -%}{%- set seen.mark = "t" -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == "tool" -%}{%- set seen.mark = "a" -%}{%- endif -%}
{%- endfor -%}
{{- seen.mark -}}"""
STEPS, LOSS = 600, 3e-3


def hermes(name: str, **arguments: str) -> str:
    """A tool call as vLLM's parser `hermes` reads it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def lead(prefix: str, parameter: str) -> str:
    """What asks all three specialists, as a framework names the tools and their parameter."""
    names = ("orders", "deliveries", "returns")
    return "".join(hermes(prefix + name, **{parameter: "order 1042"}) for name in names)


SENTENCES = {
    "c": hermes("find_order", order_id="1042") + hermes("delivery_days", postcode="10115"),
    "l": lead("ask_", "task_text"),
    "t": lead("", "task"),  # AutoGen; its tools are strict, and vLLM holds the model to their schema
    "a": "It left this morning and takes two days.",
}


def main(folder: str) -> None:
    """Write tokenizer, config and weights."""
    tokens = tokenizer()
    tokens.chat_template = TEMPLATE
    tokens.save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokens), hidden_size=256, intermediate_size=640, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32_768, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    texts = [tokens.encode(mark + text, add_special_tokens=False) for mark, text in SENTENCES.items()]
    longest = max(map(len, texts))
    rows = torch.tensor([[*row, *[tokens.eos_token_id] * (longest + 1 - len(row))] for row in texts])
    labels = rows.clone()
    for row, text in zip(labels, texts, strict=True):
        row[0] = -100  # the prompt
        row[len(text) + 1 :] = -100  # after the first end
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
        if loss.item() < LOSS:
            break
    assert loss.item() < LOSS, f"not learnt: {loss.item()}"
    model.generation_config.temperature, model.generation_config.do_sample = None, False
    model.to(torch.bfloat16).save_pretrained(folder)
    (Path(folder) / "generation_config.json").write_text(json.dumps({"temperature": 0.0}))


if __name__ == "__main__":
    main(sys.argv[1])
