"""What device_budget buys: one pure function that splits it, for the engine, the planner and the profile.

Every layer has an equal share, spent in the order of what it saves:

    1. router    the router and its fp32 gradient, where it is trained
    2. keys      a copy of all keys, in the wire's format (or as int8), so that neurons are selected on the device: with
                 retrieval="auto" where they fit, with "host" never. Selection also needs the router's weights.
    3. rows      as many as fit, with all that their training needs: values and keys (values alone beside a copy of keys
                 in the wire's format), fp32 gradients, fp32 master weights and moments; and before them the router's
                 master weights and moments. Their AdamW runs on the device, and nothing of them crosses. If not all
                 fit, those used most are kept.
                 On a device that is no CPU they are a multiple of 64, as are those of its products.
                 Without master weights and moments, and so more of them, where an optimizer there cannot be: with
                 distinctive updates, which step a few rows and not all; with several ranks, who share the host's rows;
                 under a transformers Trainer, which looks at gradients in every step; and where not one row with them
                 fits.

A row with its optimizer takes about three times what a row without takes, and saves more: where a step is short, the
host's AdamW is what it waits for, and the rows used most are most of what crosses.

0 is the paper's MEFT. Some parts lie on the device at any budget, and they come first: the router of a device that is
no CPU or with lookahead, and the keys with retrieval="device". Symbols are those of config.py.
"""

from dataclasses import dataclass

import torch

from meft_bench.meft.config import MeftOptions

_FP32 = 4
ALIGNED = 64
"""Rows of a half-precision product are a multiple of this many on a device that is no CPU: odd numbers are slow."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """What lies on the device. rows and moments count rows of each layer; nbytes is over all layers."""

    router: bool
    """The router is there; its gradient too where it is trained."""
    keys: bool
    """All keys are there, so that neurons can be selected: as a copy, or among the rows if all of those are kept."""
    rows: int
    """Rows kept with their gradients, up to R."""
    moments: int
    """Rows whose master weights, moments and AdamW are on the device too: all that are kept, or none."""
    nbytes: int
    """Device bytes of all of it. Marks and counts, a few bytes a row, are left out."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Device bytes of the parts in one layer."""

    neurons: int
    router: int
    """Its weights, and its fp32 gradient if it is trained; 0 without one on the device."""
    keys: int
    """A copy of all keys to select with."""
    keys_are_rows: bool
    """Whether that copy holds what rows would: then a row beside it is its value alone."""
    row: int
    """Key, value and their fp32 gradients."""
    value: int
    """The same without the key's weights."""
    moments: int
    """Master weights and moments of a row."""
    router_moments: int

    @property
    def everything(self) -> int:
        """A resident adapter."""
        keys = 0 if self.keys_are_rows else self.keys
        return self.router + keys + self.router_moments + self.neurons * (self.row + self.moments)


def prices(config: MeftOptions, width: int, dtype: torch.dtype, *, router_there: bool = False) -> Prices:
    """What each part costs at hidden size `width`. dtype is the model's; router_there: of split()."""
    item = wire_dtype(config, dtype).itemsize
    halves, experts = (1 if config.frozen_keys else 2), config.experts or 0
    copied, int8 = config.retrieval != "host", keys_are_int8(config)
    router = moments = 0
    if config.trains_router:
        router, moments = experts * width * (item + _FP32), experts * width * _state_bytes(config)
    elif config.key_experts and (copied or router_there):
        router = experts * width * item
    return Prices(
        neurons=config.neurons,
        router=router,
        keys=config.neurons * (width + _FP32 if int8 else width * item) if copied else 0,
        keys_are_rows=not int8,
        row=width * (2 * item + halves * _FP32),
        value=width * (item + halves * _FP32),
        moments=width * halves * _state_bytes(config),
        router_moments=moments,
    )


def wire_dtype(config: MeftOptions, dtype: torch.dtype) -> torch.dtype:
    """The number format of rows that cross and of those kept."""
    return torch.bfloat16 if config.wire == "bf16" else dtype


def keys_are_int8(config: MeftOptions) -> bool:
    """Whether the device's copy of the keys is int8 with a scale per row, and not in the wire's format. "auto" never
    makes a choice coarser than it would be on the host."""
    if config.retrieval == "device" and not config.key_experts:
        return True
    return config.retrieval != "host" and config.scoring == "int8"


def _state_bytes(config: MeftOptions) -> int:
    """Of a parameter whose optimizer is on the device: its fp32 master and two moments."""
    return _FP32 + 2 * (2 if config.moments == "bf16" else _FP32)


def split(
    config: MeftOptions,
    layers: int,
    width: int,
    dtype: torch.dtype,
    *,
    router_there: bool = False,
    host_optimizer: bool = False,
) -> Split:
    """What config.device_budget buys for this many layers of hidden size `width` in a model of this dtype.

    router_there: the device is no CPU, so that a router lies there at any budget.
    host_optimizer: none can be on the device, whatever it has room for: several processes train one adapter, or the
    training loop looks at gradients in every step. Raises ValueError for a budget that
    is not 0 and buys nothing.
    """
    if config.placement == "device":
        return Split(router=False, keys=False, rows=0, moments=0, nbytes=0)
    price = prices(config, width, dtype, router_there=router_there)
    keys = config.retrieval == "device"
    router = price.router > 0 and (keys or router_there or (config.trains_router and config.lookahead > 0))
    given = router or keys
    rest = max(0, config.device_budget // layers - router * price.router - keys * price.keys)
    if config.trains_router and not router:
        router = rest >= price.router
        rest = rest - price.router if router else 0
    to_select = price.keys + (0 if router else price.router)
    if config.retrieval == "auto" and rest >= to_select:
        keys, router, rest = True, price.router > 0, rest - to_select
    each = price.value if keys and price.keys_are_rows else price.row
    moments = 0
    if not (config.is_distinctive or host_optimizer):
        moments = max(0, min(price.neurons, (rest - price.router_moments) // (each + price.moments)))
        if router_there and ALIGNED <= moments < price.neurons:
            moments -= moments % ALIGNED
    rows = moments or min(price.neurons, rest // each)
    if config.device_budget and not (given or router or keys or rows):
        _refuse(config, layers, price)
    nbytes = router * price.router + keys * price.keys + rows * each + moments * price.moments
    nbytes += price.router_moments if moments else 0
    return Split(router=router, keys=keys, rows=rows, moments=moments, nbytes=layers * nbytes)


def _refuse(config: MeftOptions, layers: int, price: Prices) -> None:
    least, what = (price.router, "router") if config.trains_router else (price.row, "row")
    raise ValueError(
        f"device_budget={config.device_budget} bytes buys nothing: {layers} layers need at least {layers * least} "
        f"({least} for the {what} of each), or 0"
    )


def whole(config: MeftOptions, layers: int, width: int, dtype: torch.dtype, *, router_there: bool = False) -> int:
    """The least budget that buys everything: a resident adapter. router_there: of split()."""
    return layers * prices(config, width, dtype, router_there=router_there).everything


def at(
    share: float, config: MeftOptions, layers: int, width: int, dtype: torch.dtype, *, router_there: bool = False
) -> int:
    """The budget in bytes that is this share, 0 to 1, of whole()."""
    return int(share * whole(config, layers, width, dtype, router_there=router_there))
