"""A baseline of this repository (baselines/) in a plain loop: what no library offers, or none for a processor."""

import job
from transformers import get_linear_schedule_with_warmup

from meft_bench.train.loop import one_step
from meft_bench.train.methods import find_method

method = find_method(job.VARIANT)
attached = method.attach(job.base(), method.Options(**job.options(job.VARIANT)), job.SEED)
optimizer = attached.make_optimizer(lr=job.swept_rate(job.VARIANT), weight_decay=0.0)
schedule = get_linear_schedule_with_warmup(optimizer, job.WARMUP, job.STEPS)
attached.model.train()
for batch in job.batches():
    one_step(optimizer, [lambda batch=batch: attached.model(**batch).loss], lambda: attached.clip_gradients(1.0))
    schedule.step()
job.finish(attached.model, optimizer, attached)
