"""The size of every row at a share of the base's parameters, by model. Data alone."""

from typing import Any

# Per model, the size that comes nearest to a share of the base's parameters (MEFT's router counted). MEFT's tuples are
# R, N, P, K; without Key-Experts R, K. LoRA on the attention stops at the width of the model: "40%" is 24.5 % there;
# its "0.5%" is 0.38 %. What a run really has is in its record, and every page shows it where it is another.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "embedded": {
        "lora": {"0.5%": 2, "2%": 10, "10%": 52, "40%": 128},
        "lora_ffn": {"0.5%": 1, "2%": 3, "4%": 7, "10%": 17, "40%": 70},
        "lora_all": {"2%": 2, "10%": 10},
        "adapter_h": {"0.5%": 2, "2%": 7, "10%": 35, "40%": 139},
        "parallel_adapter": {"0.5%": 5, "2%": 21, "4%": 43, "10%": 104, "40%": 416},
        "product_keys": {"10%": 12},
        "shira": {"10%": 10},
        "meft": {
            "0.5%": (4, 2, 1, 2),
            "2%": (18, 6, 2, 4),
            "10%": (96, 16, 4, 8),
            "40%": (384, 32, 4, 16),
            "150%": (1536, 128, 8, 8),
        },
        "meft_no_ke": {"2%": (21, 4), "10%": (104, 8), "40%": (416, 16)},
    },
    "stories260K": {
        "lora": {"10%": 23},
        "lora_ffn": {"10%": 7},
        "lora_all": {"10%": 5},
        "adapter_h": {"10%": 14},
        "parallel_adapter": {"10%": 40},
        "meft": {"10%": (36, 12, 4, 8)},
        "meft_no_ke": {"10%": (40, 8)},
    },
    # A width that 9 heads share by 3 (queries 576 wide, values 192); LoRA on the attention at full rank would be 16 %.
    "smollm2-135m": {
        "lora": {"2%": 47, "10%": 233},
        "lora_ffn": {"2%": 14, "10%": 71},
        "lora_all": {"2%": 9, "10%": 44},
        "adapter_h": {"2%": 26, "10%": 130},
        "parallel_adapter": {"2%": 78, "10%": 389},
        "meft": {
            "2%": (72, 12, 4, 8),
            "10%": (360, 60, 8, 16),
            "34%": (1248, 156, 8, 32),
            # For the union alone.
            "11%": (384, 64, 8, 16),
            "41%": (1536, 128, 8, 32),
            "161%": (6144, 256, 8, 64),
        },
        "meft_no_ke": {"10%": (389, 16)},
    },
    # The paper's own sizes (Table 1 and the released configurations): its "10%" is R = 3072 (12 %) for the Parallel
    # Adapter and R = 8464 (34 % with the router) for MEFT, which stands here at both.
    "llama-7b": {
        "lora": {"2%": 256, "10%": 1280},
        "lora_ffn": {"2%": 93, "10%": 465},
        "lora_all": {"2%": 54, "10%": 270},
        "adapter_h": {"2%": 171, "10%": 857},
        "parallel_adapter": {"2%": 512, "10%": 2560, "12%": 3072, "24%": 6144},
        "meft": {"12%": (3072, 192, 8, 64), "34%": (8464, 368, 8, 64)},
        "meft_no_ke": {"34%": (8464, 64)},
    },
    # The released configurations: R = 4096 on NQ, 3600 elsewhere; one of each share here, chosen by task in paper().
    "mistral-7b": {
        "lora": {"2%": 340, "10%": 1700},
        "lora_ffn": {"2%": 82, "10%": 409},
        "lora_all": {"2%": 55, "10%": 276},
        "adapter_h": {"2%": 184, "10%": 921},
        "parallel_adapter": {"2%": 552, "10%": 2763, "12%": 3072},
        "meft": {"12%": (3072, 192, 8, 64), "14%": (3600, 240, 8, 64), "16%": (4096, 256, 8, 64)},
        "meft_no_ke": {"14%": (3600, 64), "16%": (4096, 64)},
    },
}
