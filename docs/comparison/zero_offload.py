"""DeepSpeed ZeRO-2 with its optimizer offloaded, over a dense Parallel Adapter."""

import deepspeed
import job
from parallel_adapter import add_parallel_adapters
from transformers import get_linear_schedule_with_warmup

model = add_parallel_adapters(job.base(), neurons=104)
config = {
    "train_micro_batch_size_per_gpu": job.BATCH,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "AdamW", "params": {"lr": job.RATE, "weight_decay": 0.0}},
}
engine, _, _, _ = deepspeed.initialize(
    model=model,
    model_parameters=[p for p in model.parameters() if p.requires_grad],
    config=config,
    lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, job.WARMUP, job.STEPS),
)
for batch in job.batches():
    engine.backward(engine(**batch).loss)
    engine.step()
job.finish(engine.module)
