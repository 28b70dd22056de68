"""torchao's CPUOffloadOptimizer over a dense Parallel Adapter: moments and gradients in host memory."""

import job
import torch
from parallel_adapter import add_parallel_adapters
from torchao.optim import CPUOffloadOptimizer
from transformers import get_linear_schedule_with_warmup

model = add_parallel_adapters(job.base(), neurons=104)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = CPUOffloadOptimizer(trained, torch.optim.AdamW, lr=job.RATE, weight_decay=0.0)
schedule = get_linear_schedule_with_warmup(optimizer, job.WARMUP, job.STEPS)
model.train()
for batch in job.batches():
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
job.finish(model)
