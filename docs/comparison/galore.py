"""GaLore by galore-torch, over all weights: AdamW's moments of attention and FFN in a subspace of each gradient."""

import job
import torch
from galore_torch import GaLoreAdamW
from transformers import get_linear_schedule_with_warmup

model = job.base()
projected = [p for name, p in model.named_parameters() if "_proj." in name]
others = [p for name, p in model.named_parameters() if "_proj." not in name]
low_rank = {"params": projected, "rank": 32, "update_proj_gap": 50, "scale": 0.25, "proj_type": "std"}
optimizer = GaLoreAdamW([{"params": others}, low_rank], lr=job.swept_rate("galore"), no_deprecation_warning=True)
schedule = get_linear_schedule_with_warmup(optimizer, job.WARMUP, job.STEPS)
model.train()
for batch in job.batches():
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
job.finish(model, optimizer)
