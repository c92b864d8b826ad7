"""A Llama of random weights whose every token is one printable character: `tiny_model.py FOLDER`.

Then each token is visible in the stream as one chunk, and counts and gaps can be checked. Byte-level
tokenizers would not do: random bytes are seldom valid UTF-8, and an engine holds such text back.
Needs torch, transformers and tokenizers, which every engine brings.
"""

import sys

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per character: ASCII, line feed, Latin letters with accents; four special tokens."""
    characters = [chr(code) for code in (0x0A, *range(0x20, 0x7F), *range(0xC0, 0x180))]
    vocabulary = {text: number for number, text in enumerate([*characters, *SPECIAL.values()])}
    inner = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=SPECIAL["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    outer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)
    outer.chat_template = TEMPLATE
    return outer


def main(folder: str) -> None:
    """Write tokenizer, config and weights."""
    tokens = tokenizer()
    tokens.save_pretrained(folder)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
