"""Make "MEFT" a method that peft knows. peft has no entry point for methods of other packages, so its closed list of
types gets one more member, and transformers' model.load_adapter gets the check of the folder that peft's way has."""

import functools
import importlib.metadata
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from transformers.integrations.peft import PeftAdapterMixin

from meft_bench.meft import files
from meft_bench.meft.adapter_folder import CONFIG_NAME, check_folder

TYPE, PREFIX = "MEFT", "meft_"


def peft_type() -> PeftType:
    """PeftType.MEFT, added to peft's enumeration when it is not there.

    Raises ImportError when this peft has a method of that name which is not ours.
    """
    if TYPE in PeftType.__members__:
        present = PeftType.__members__[TYPE]
        config = PEFT_TYPE_TO_CONFIG_MAPPING.get(present)
        if config is not None and not config.__module__.startswith("meft_bench."):
            raise ImportError(
                f"peft {importlib.metadata.version('peft')} has a method called MEFT of its own: "
                "use meft_bench.meft.model.attach, or an older peft"
            )
        return present
    enumeration: Any = PeftType
    member: Any = str.__new__(PeftType, TYPE)
    member._name_, member._value_ = TYPE, TYPE
    member.__objclass__ = PeftType
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(TYPE)
    enumeration._member_map_[TYPE] = member
    enumeration._value2member_map_[TYPE] = member
    if hasattr(enumeration, "_hashable_values_"):  # Python 3.13's "in" looks here
        enumeration._hashable_values_.append(TYPE)
    type.__setattr__(PeftType, TYPE, member)
    return member


def register(config_class: type, model_class: type) -> None:
    """Tell peft which classes make MEFT; a second call changes nothing."""
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=TYPE.lower(), config_cls=config_class, model_cls=model_class, prefix=PREFIX)
        _guard_transformers_loading()


def _guard_transformers_loading() -> None:
    """transformers' model.load_adapter builds the configuration without showing us its folder, so a local folder is
    checked before it starts. Adapters of other methods pass through untouched."""
    original = PeftAdapterMixin.load_adapter

    @functools.wraps(original)
    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        if peft_model_id is not None and _is_meft(Path(peft_model_id)):
            check_folder(Path(peft_model_id)).check_model(self)
        return original(self, peft_model_id, *args, **kwargs)

    PeftAdapterMixin.load_adapter = load_adapter  # type: ignore[method-assign]


def _is_meft(folder: Path) -> bool:
    try:
        return files.read_json(folder / CONFIG_NAME).get("peft_type") == TYPE
    except ValueError:
        return False
