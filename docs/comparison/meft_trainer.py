"""MEFT as a peft method under transformers.Trainer."""

import job
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import meft_bench

config = meft_bench.MeftConfig(r=96, n_experts=16, p=4, k=8, seed=job.SEED, task_type="CAUSAL_LM")
model = get_peft_model(job.base(), config)
args = TrainingArguments(
    output_dir="out",
    max_steps=job.STEPS,
    per_device_train_batch_size=job.BATCH,
    learning_rate=job.RATE,
    warmup_steps=job.WARMUP,
    seed=job.SEED,
    remove_unused_columns=False,
    save_strategy="no",
    report_to=[],
)
trainer = meft_bench.prepare(Trainer(model=model, args=args, train_dataset=job.examples, data_collator=job.collate))
trainer.train()
job.finish(model)
