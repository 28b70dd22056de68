"""SHiRA by peft with torch's AdamW: fixed random entries of the base's linear layers are trained."""

import job
import torch
from peft import ShiraConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

config = ShiraConfig(r=10, random_seed=job.SEED, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(job.base(), config)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=job.swept_rate("shira"), weight_decay=0.0)
schedule = get_linear_schedule_with_warmup(optimizer, job.WARMUP, job.STEPS)
model.train()
for batch in job.batches():
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
job.finish(model)
