"""Options of a plan in addition to the run's: devices, their rates, and the lengths of texts."""

import os
from dataclasses import dataclass, field

from bupo.options.groups import check_command_options
from bupo.options.ranges import NON_NEGATIVE_INTEGER, POSITIVE, POSITIVE_INTEGER, check_choice
from bupo.utils.errors import UserError

SHARDINGS = ("one", "ddp", "fsdp2", "zero1", "zero2")
GB = 1e9
# dense peaks from the H100's data sheet, and the share of them that a training run is assumed to reach
H100_BF16_TFLOPS, H100_FP32_TFLOPS, H100_BANDWIDTH_TB = 989.0, 67.0, 3.35
ASSUMED_UTILIZATION = {"tflops": 0.4, "bandwidth": 0.6}
H100_MEMORY_GB = 80.0
PLAN_RANGES = {
    "gpus": NON_NEGATIVE_INTEGER,
    "gpu_memory": POSITIVE,
    "tflops": POSITIVE,
    "bandwidth": POSITIVE,
    "prompt_tokens": POSITIVE_INTEGER,
    "answer_tokens": POSITIVE_INTEGER,
}


@dataclass
class PlanOptions:
    """Devices of a run and assumptions about it. The plan prints each default that it uses for `None`.

    Parameters:
        gpus (`int`, *optional*, defaults to `1`): GPUs, one process each; 0 plans for this machine's CPU.
        gpu_memory (`float`, *optional*): GB (10^9 bytes) of a GPU, by default 80; for a CPU, by default this machine's.
        sharding (`str`, *optional*): `one`, `ddp`, `fsdp2`, `zero1` or `zero2`; by default `fsdp2` on several GPUs.
        tflops (`float`, *optional*): TFLOP/s that a device reaches; by default 40 % of an H100's peak; no default for a CPU.
        bandwidth (`float`, *optional*): TB/s of memory that a device reaches; by default 60 % of an H100's peak.
        prompt_tokens, answer_tokens (`int`, *optional*): mean tokens of a prompt and of an answer.
    """

    gpus: int = field(default=1, metadata={"help": "GPUs, one process each. 0: this machine's CPU."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GB of a GPU; by default 80."})
    sharding: str | None = field(
        default=None,
        metadata={
            "help": "one, ddp, fsdp2, zero1 or zero2; by default fsdp2 on several GPUs.",
            "choices": SHARDINGS,
        },
    )
    tflops: float | None = field(
        default=None,
        metadata={"help": "TFLOP/s that a device reaches; by default 40 %% of an H100's."},
    )
    bandwidth: float | None = field(
        default=None,
        metadata={"help": "TB/s of memory that a device reaches; by default 60 %% of an H100's."},
    )
    prompt_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt; by default those of a local data set, else 256."}
    )
    answer_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of an answer in the mean; by default half of the longest."}
    )

    def check(self) -> None:
        """Raise [`UserError`] for an invalid value, or a sharding that does not fit the number of GPUs."""
        if self.sharding is not None:
            check_choice("sharding", self.sharding, SHARDINGS)
        check_command_options(self, **PLAN_RANGES)
        if self.sharding not in (None, "one") and self.gpus < 2:
            raise UserError(f"sharding {self.sharding} needs several GPUs, and gpus is {self.gpus}: leave it out")
        if self.sharding == "one" and self.gpus > 1:
            raise UserError(f"sharding one takes one GPU, and gpus is {self.gpus}: choose ddp or fsdp2")

    @property
    def is_cpu(self) -> bool:
        return self.gpus == 0

    @property
    def num_processes(self) -> int:
        return max(1, self.gpus)

    @property
    def resolved_sharding(self) -> str:
        """Sharding, with its default."""
        return self.sharding or ("fsdp2" if self.gpus > 1 else "one")

    @property
    def device_bytes(self) -> float:
        """Memory of a device in bytes."""
        if self.gpu_memory is not None:
            return self.gpu_memory * GB
        if self.is_cpu and hasattr(os, "sysconf"):
            return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return H100_MEMORY_GB * GB

    def get_flops_per_second(self, half: bool) -> float | None:
        """Return the FLOP/s of a device; `half` selects products of 16-bit numbers."""
        if self.tflops is not None:
            return self.tflops * 1e12
        return (
            None
            if self.is_cpu
            else ASSUMED_UTILIZATION["tflops"] * (H100_BF16_TFLOPS if half else H100_FP32_TFLOPS) * 1e12
        )

    @property
    def bytes_per_second(self) -> float | None:
        """Memory bandwidth of a device."""
        if self.bandwidth is not None:
            return self.bandwidth * 1e12
        return None if self.is_cpu else ASSUMED_UTILIZATION["bandwidth"] * H100_BANDWIDTH_TB * 1e12

    def describe_rates(self, half: bool) -> list[str]:
        """Return a line for each rate with its source."""
        peak, dtype = (H100_BF16_TFLOPS, "bf16") if half else (H100_FP32_TFLOPS, "fp32")
        unknown = "the {} of this CPU is not known: --{} gives {}"
        flop_rate, bandwidth = self.get_flops_per_second(half), self.bytes_per_second
        if flop_rate is None:
            lines = [unknown.format("FLOP rate", "tflops", "times")]
        elif self.tflops is None:
            lines = [f"{flop_rate / 1e12:.0f} TFLOP/s a GPU: 40 % of an H100's {peak:.0f} in {dtype} (--tflops)"]
        else:
            lines = [f"{self.tflops:g} TFLOP/s a device, as given"]
        if bandwidth is None:
            lines.append(unknown.format("bandwidth", "bandwidth", "the time of sampling and of the optimizer"))
        elif self.bandwidth is None:
            lines.append(
                f"{bandwidth / 1e12:.1f} TB/s of memory a GPU: 60 % of an H100's {H100_BANDWIDTH_TB} (--bandwidth)"
            )
        else:
            lines.append(f"{self.bandwidth:g} TB/s of memory a device, as given")
        return lines
