"""Hugging Face's Trainer: a GPT-2 of 0.1 M parameters learns Python's documentation, byte by byte.

python trainer.py
deepspeed --num_gpus 2 trainer.py --deepspeed ../huggingface.json    # the JSON names Amos
"""

import argparse
from pydoc_data.topics import topics

import amos_dist  # with DeepSpeed this is all it takes
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed", metavar="JSON")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--out", default="out", help="folder of the checkpoints")
parser.add_argument("--local_rank", type=int, help="from DeepSpeed's launcher")
arguments = parser.parse_args()

training = TrainingArguments(
    output_dir=arguments.out,
    deepspeed=arguments.deepspeed,
    learning_rate=0.03,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=5,
    max_steps=arguments.steps,
    per_device_train_batch_size=16,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)
text = torch.tensor(list("".join(topics.values()).encode()))
windows = text[: len(text) // 64 * 64].view(-1, 64)
config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=2, initializer_range=0.1)
config.bos_token_id = config.eos_token_id = None  # bytes have none
model = GPT2LMHeadModel(config)
optimizer = None  # DeepSpeed makes what its JSON names
if not arguments.deepspeed:
    groups = amos_dist.param_groups(model, sigma="paper")
    optimizer = amos_dist.Amos(groups, lr=training.learning_rate, beta=0.99, momentum=0.9)
trainer = Trainer(
    model=model,
    args=training,
    train_dataset=[{"input_ids": window, "labels": window} for window in windows],
    optimizers=(optimizer, None),
)
trainer.train()
