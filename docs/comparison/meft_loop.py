"""MEFT as a peft method in a plain loop: rows, gradients and moments in host memory."""

import job
import torch
from peft import get_peft_model
from transformers import get_linear_schedule_with_warmup

from meft_bench import MeftConfig, make_optimizer

config = MeftConfig(r=96, n_experts=16, p=4, k=8, seed=job.SEED, task_type="CAUSAL_LM")
model = get_peft_model(job.base(), config)
optimizer = make_optimizer(model, lr=job.RATE, weight_decay=0.0)
trained = [p for group in optimizer.param_groups for p in group["params"]]
schedule = get_linear_schedule_with_warmup(optimizer, job.WARMUP, job.STEPS)
model.train()
for batch in job.batches():
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
job.finish(model)
