"""MEFT under transformers.Trainer and its subclasses (TRL's SFTTrainer): prepare(trainer) is all it takes.

model = peft.get_peft_model(base, MeftConfig(r=8464, k=64, task_type="CAUSAL_LM"))
trainer = meft_bench.prepare(Trainer(model=model, args=args, train_dataset=rows))
trainer.train()                              # trainer.train(resume_from_checkpoint=True) goes on after a kill
"""

import functools
import json
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import model_has_dtensor
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from meft_bench import heartbeat
from meft_bench.integrations.figures import Window
from meft_bench.integrations.peft_layer import HostAdapter
from meft_bench.integrations.peft_method import active_adapters, clip_grad_norm_, make_optimizer
from meft_bench.meft.adam import LazyRowAdamW, RowAdamW
from meft_bench.meft.adapter_folder import check_folder
from meft_bench.meft.files import read_safetensors
from meft_bench.meft.model import collect_gradients
from meft_bench.ranks import ENGINE_TIMEOUT, others_gone

_LOG = logging.getLogger(__name__)
MOMENTS_NAME, STATE_NAME = "meft_optimizer.safetensors", "trainer_state.json"
_GO_ON = "start all again with train(resume_from_checkpoint=True)"
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def prepare(trainer: AnyTrainer) -> AnyTrainer:
    """Make trainer train the active MEFT adapter of its model: row-wise AdamW on the host at the trainer's learning
    rate, betas, eps and weight decay; checkpoints whose host state is a safetensors file; MEFT's figures in the log.

        trainer = meft_bench.prepare(SFTTrainer(model=model, args=args, train_dataset=rows))

    Returns the same object, its class extended. Accumulation, schedules, clipping by the global norm and bf16 are the
    trainer's own. Under torchrun or accelerate launch several processes, each with its own GPU, train one adapter.
    Raises ValueError, with the alternative, for what cannot work: fp16, several GPUs in one process, a base that is
    sharded (DeepSpeed, FSDP, tensor parallel), other optimizers.
    """
    if isinstance(trainer, MeftTraining):
        return trainer
    if not isinstance(trainer.model, PeftModel):
        raise ValueError("the trainer's model is no PeftModel: use peft.get_peft_model(model, MeftConfig(r=...)) first")
    adapters = active_adapters(trainer.model)
    refuse_unsupported(trainer, adapters[0].config.adam)
    _refuse_strange(trainer, adapters)
    _make_ready(trainer.model, adapters, trainer.args)
    if trainer.args.world_size > 1:
        os.environ.setdefault(ENGINE_TIMEOUT, str(trainer.args.ddp_timeout))
    trainer.__class__ = type(f"Meft{type(trainer).__name__}", (MeftTraining, type(trainer)), {})
    setattr(trainer, "meft", Window(adapters))  # noqa: B010 (the type checker does not know the new class)
    return trainer


def _make_ready(model: PeftModel, adapters: list[HostAdapter], args: TrainingArguments) -> None:
    """Let a model that a trainer will train know what such a trainer does."""
    for adapter in adapters:
        # The trainer clips by torch's norm, and the model's zero_grad() asks for gradients too.
        adapter.looked_at_each_step = True
        for parameter in adapter.store.parameters():
            # TRL casts what trains on a quantised base to bf16, for the GPU's sake; rows on the host stay fp32.
            parameter.data = parameter.data.float()
    if args.gradient_checkpointing:
        # The base is frozen: without this, reentrant checkpointing would find nothing to differentiate.
        model.enable_input_require_grads()


def refuse_unsupported(trainer: Trainer, adam: str) -> None:
    """Raises ValueError for the first setting of trainer that MEFT cannot honour."""
    args = trainer.args
    if args.fp16:
        raise ValueError(
            "fp16=True scales the loss, and the scaler's overflow check is not made for gradients in host memory: "
            "set bf16=True, or train in fp32"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "DeepSpeed and FSDP shard parameters that MEFT keeps whole on the host: leave them off; torchrun alone "
            "trains on several GPUs, each with a whole base"
        )
    if _is_sharded(trainer):
        raise ValueError(
            "the base is sharded over the ranks (DTensor), and an adapter's rows are found from whole hidden states: "
            "load it without tp_plan, distributed_config or fully_shard, in 4 bits where it does not fit"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs would be used through torch.nn.DataParallel, whose copies of the model do not share "
            f"the rows on the host: start one process a GPU, torchrun --nproc-per-node {args.n_gpu}, or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    _refuse_optimizer(trainer, adam)


def _is_sharded(trainer: Trainer) -> bool:
    """Whether ranks hold parts of the base, or of a row's tokens, instead of the whole."""
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    parts = [getattr(parallel, f"{kind}_size", 1) or 1 for kind in ("tp", "cp", "sp", "dp_shard")]
    if max(parts) > 1:
        return True
    return model_has_dtensor(trainer.model)


def _refuse_optimizer(trainer: Trainer, adam: str) -> None:
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "paged" in name:
        raise ValueError(f"optim={name} pages moments out of GPU memory, MEFT's are on the host: set optim=adamw_torch")
    if trainer.optimizer is None and name not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(f"optim={name} is not what MEFT trains rows with (AdamW): set optim=adamw_torch")
    if trainer.optimizer is not None and adam == "lazy" and not isinstance(trainer.optimizer, LazyRowAdamW):
        raise ValueError("adam='lazy' needs the optimizer of meft_bench.make_optimizer(model, lr=...), or none given")


def _refuse_strange(trainer: Trainer, adapters: list[HostAdapter]) -> None:
    """Raises ValueError for an optimizer that was made of another model."""
    if trainer.optimizer is None:
        return
    stepped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    if not any(id(p) in stepped for adapter in adapters for p in adapter.store.parameters()):
        raise ValueError(
            "the optimizer given to the trainer has no neuron of the active adapter, so nothing would be trained: make "
            "it of the trainer's own model, when that is complete"
        )


def _refuse_others(model: PeftModel, adapters: list[HostAdapter]) -> None:
    """Raises ValueError for a trainable parameter beside the rows, which their optimizer would leave as it is."""
    rows = {id(p) for adapter in adapters for p in adapter.store.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in rows]
    if others:
        raise ValueError(
            f"{others[0]} is to be trained ({len(others)} in all beside the adapter), and MEFT's optimizer trains its "
            "rows alone: requires_grad_(False), or hand the trainer an optimizer over model.parameters()"
        )


class MeftTraining(Trainer):
    """What prepare puts in front of a Trainer's class."""

    meft: Window
    model: PeftModel

    def call_model_init(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # Given model_init instead of a model, the trainer makes a fresh one whenever it begins to train.
        model: Any = super().call_model_init(*args, **kwargs)
        adapters = active_adapters(model)
        refuse_unsupported(self, adapters[0].config.adam)
        _make_ready(model, adapters, self.args)
        self.meft = Window(adapters)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        settings = self.args
        if list(map(id, active_adapters(self.model))) != list(map(id, self.meft.adapters)):
            raise ValueError(
                "another adapter was made active since meft_bench.prepare(trainer): make and prepare a trainer after "
                "set_adapter"
            )
        if self.optimizer is None:
            _refuse_others(self.model, self.meft.adapters)
            self.optimizer = make_optimizer(
                self.model,
                lr=settings.learning_rate,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_epsilon,
                weight_decay=settings.weight_decay,
            )
        self.meft.time_optimizer(self.optimizer)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; True takes the newest whole checkpoint, and a half-written one is refused."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(str(self.args.output_dir))
        elif resume_from_checkpoint and not is_whole(Path(resume_from_checkpoint)):
            raise ValueError(f"{resume_from_checkpoint} is no whole checkpoint: resume_from_checkpoint=True finds one")
        try:
            with heartbeat.watched(_GO_ON):
                return super().train(resume_from_checkpoint or None, *args, **kwargs)
        except RuntimeError as error:
            if self.args.world_size > 1 and others_gone(error):
                raise RuntimeError(
                    f"another of {self.args.world_size} ranks has died, or did not answer within ddp_timeout="
                    f"{self.args.ddp_timeout} s: {_GO_ON}"
                ) from error
            raise

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1 and "prepare_model" not in vars(self.accelerator):
            # No DistributedDataParallel, whose hooks autograd calls: it knows of no gradient on the host.
            unwrapped = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.accelerator.prepare_model = unwrapped  # type: ignore[method-assign]
        return super()._prepare_for_training(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        found: Any = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        loss, count = (found[0] if return_outputs else found), self.args.world_size
        if count > 1 and loss.requires_grad:
            # The engine sums gradients over the ranks, and a trainer means their mean.
            loss.register_hook(lambda gradient: gradient / count)
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.meft.micro_batch():
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                # What comes next, clipping or the step, reads gradients.
                collect_gradients(self.meft.adapters)
                for adapter in self.meft.adapters:
                    adapter.store.queue.wait()
            return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.args.world_size == 1:
            return super()._clip_grad_norm(model)
        # Of several ranks the engine alone knows the sum of the gradients.
        return clip_grad_norm_(self.model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.args.world_size > 1:
            return clip_grad_norm_(self.model, math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.meft.read())
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # The trainer's state is written last and marks a checkpoint as whole, also one that is written over.
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        super()._save_rng_state(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # every rank writes a file of its own here

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        # Each rank loads into the rows that all of them share: no update may come between.
        optimizer = _unwrapped(self.optimizer)
        if self.args.world_size > 1 and isinstance(optimizer, RowAdamW):
            optimizer.settle()
        self.accelerator.wait_for_everyone()
        best = str(self.state.best_model_checkpoint)
        if is_whole(Path(best)):
            # The trainer's own way would leave an adapter with a name as it is: its file is in a folder of its own.
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model(*args, **kwargs)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = _unwrapped(self.optimizer)
        if not isinstance(optimizer, RowAdamW) or not self.args.should_save:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_moments(optimizer, Path(output_dir))
        # What is left of the optimizer, and the scheduler, go the trainer's way. The state itself stays where it is:
        # rows that rest are brought up to date by it whenever it is asked for.
        without = optimizer.register_state_dict_post_hook(lambda _, packed: {**packed, "state": {}})
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            without.remove()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = _unwrapped(self.optimizer)
        if checkpoint is None or not isinstance(optimizer, RowAdamW):
            return
        if holds_model_only(Path(checkpoint)):
            _LOG.warning("%s was saved with save_only_model: the optimizer and the schedule start anew", checkpoint)
        else:
            load_moments(optimizer, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        for name in model.peft_config:
            # peft writes the adapter called "default" into the folder itself, others into one of their own.
            folder = Path(resume_from_checkpoint) / ("" if name == "default" else name)
            check_folder(folder).check_model(model.get_base_model())
            # Which adapter is active, and what of it is frozen, stays as it is.
            model.load_adapter(str(folder), name, is_trainable=True, torch_device="cpu")


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def save_moments(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the optimizer's state tensors, numbered as its parameters are, into folder; the file is replaced whole."""
    state = optimizer.state_dict()["state"]
    tensors = {f"{number}.{key}": value for number, entry in state.items() for key, value in entry.items()}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{MOMENTS_NAME}.tmp"
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
    os.replace(temporary, folder / MOMENTS_NAME)


def load_moments(optimizer: RowAdamW, folder: Path) -> None:
    """Put back what save_moments wrote. Raises ValueError for a file that is missing, broken or another model's."""
    path = folder / MOMENTS_NAME
    if not path.is_file():
        raise ValueError(f"no {MOMENTS_NAME} in {folder}: it was not written by a trainer that prepare() made")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    routers = {id(store.handle("router")) for store in optimizer.stores if store.router is not None}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in read_safetensors(path).items():
        number, _, key = name.partition(".")
        fits = number.isdigit() and int(number) < len(parameters)
        shape = tuple(parameters[int(number)].shape) if fits else None
        if shape and key == "step":
            each = optimizer.each_row_counts and id(parameters[int(number)]) not in routers
            if bool(tensor.dim()) != each:
                other = "dense" if optimizer.each_row_counts else "lazy"
                raise ValueError(f"{path} was written with adam={other!r}: go on with that, or start anew")
            shape = shape[:1] if each else ()
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {name} {tuple(tensor.shape)} fits no parameter of this model")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def holds_model_only(checkpoint: Path) -> bool:
    """Whether a checkpoint was written with save_only_model, which leaves out all that a trainer has of the optimizer;
    where only a part is missing, the checkpoint is damaged."""
    return not any((checkpoint / name).exists() for name in (MOMENTS_NAME, "optimizer.pt", "scheduler.pt"))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        return True
    except (OSError, ValueError):
        return False


def newest_checkpoint(folder: str | Path) -> str:
    """The whole checkpoint-N in folder with the largest N. Raises ValueError when there is none.

    A copy that was set aside, such as checkpoint-4-first-try, is none.
    """
    named = {path: re.fullmatch("checkpoint-([0-9]+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    found = {int(name[1]): path for path, name in named.items() if name}
    whole = [number for number, path in found.items() if is_whole(path)]
    if not whole:
        raise ValueError(f"no whole checkpoint in {folder}: train without resume_from_checkpoint to start")
    return str(found[max(whole)])
