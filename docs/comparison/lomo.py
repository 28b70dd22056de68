"""LOMO (SGD fused into the backward pass), over a dense Parallel Adapter or over all weights."""

import job
from lomo_optim import Lomo
from parallel_adapter import add_parallel_adapters

model = job.base() if job.VARIANT == "full" else add_parallel_adapters(job.base(), neurons=104)
optimizer = Lomo(model, lr=job.lomo_rate(), clip_grad_norm=1.0)
model.train()
for step, batch in enumerate(job.batches()):
    rate = job.lomo_rate() * min((step + 1) / job.WARMUP, (job.STEPS - step) / (job.STEPS - job.WARMUP))
    optimizer.grad_norm(model(**batch).loss)
    optimizer.fused_backward(model(**batch).loss, rate)
job.finish(model)
