"""AdaLomo (a factored second moment, fused into the backward pass) over a dense Parallel Adapter."""

import job
from lomo_optim import AdaLomo
from parallel_adapter import add_parallel_adapters

model = add_parallel_adapters(job.base(), neurons=104)
optimizer = AdaLomo(model, lr=job.RATE)
model.train()
for step, batch in enumerate(job.batches()):
    rate = job.RATE * min((step + 1) / job.WARMUP, (job.STEPS - step) / (job.STEPS - job.WARMUP))
    optimizer.fused_backward(model(**batch).loss, rate)
job.finish(model)
