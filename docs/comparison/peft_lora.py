"""LoRA by peft with torch's AdamW: adapter, gradients and moments in device memory."""

import job
import torch
from peft import LoraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

targets, rank = job.LORA[job.VARIANT]
config = LoraConfig(r=rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
model = get_peft_model(job.base(), config)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=job.RATE, weight_decay=0.0)
schedule = get_linear_schedule_with_warmup(optimizer, job.WARMUP, job.STEPS)
model.train()
for batch in job.batches():
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
job.finish(model)
