#!/usr/bin/env bash
# transformers 5.24.0: AutoModelForMaskedLM makes a BartForConditionalGeneration of a BART's configuration, and what that says of the
# masked tokens depends on whether labels are passed: its logits are others with labels than without.
#
# A good guess: a network for masked tokens reads input_ids, and labels only add a loss, as with BERT, so that the loss may just as
# well be computed outside from the logits. BART has a decoder: with labels it reads these, shifted, and padding where they are
# -100, that is nearly everywhere; without labels it reads input_ids, shifted. Neither call warns, the shapes are the same, and a
# loop that takes the labels out of the batch first, to weigh or to reduce the losses itself, trains and measures another function.
#
# Output seen (2026-11-28, Linux x86-64, CPU), a random network each, largest difference of logits and both losses:
#   BertForMaskedLM              0.000 3.9320 3.9320
#   BartForConditionalGeneration 0.730 3.8325 3.8944
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'transformers==5.24.0' 'numpy==2.4.6'
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'END' 2>/dev/null
import torch
from transformers import AutoModelForMaskedLM, BartConfig, BertConfig

bert = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=16,
)
bart = BartConfig(
    vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=2,
)
tokens = torch.randint(4, 50, (2, 12), generator=torch.Generator().manual_seed(0))
masked = torch.zeros_like(tokens, dtype=torch.bool)
masked[:, 3::4] = True
inputs, labels = tokens.masked_fill(masked, 3), tokens.masked_fill(~masked, -100)
differences = []
for config in (bert, bart):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        alone, labelled = model(input_ids=inputs).logits, model(input_ids=inputs, labels=labels)
    ours = torch.nn.functional.cross_entropy(alone.flatten(0, 1), labels.flatten())
    differences.append((alone - labelled.logits).abs().max().item())
    print(f"{type(model).__name__:28} {differences[-1]:.3f} {ours:.4f} {labelled.loss:.4f}")
assert differences[0] == 0
assert differences[1] > 0.01
END
