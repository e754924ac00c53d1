"""Options of a plan in addition to the run's: devices, the rates that they reach, and lengths of texts."""

import os
from dataclasses import dataclass

from bupo.options.groups import check_command_options
from bupo.options.ranges import NON_NEGATIVE_INTEGER, POSITIVE, POSITIVE_INTEGER, option
from bupo.utils.errors import UserError

SHARDINGS = ("one", "ddp", "fsdp2", "zero1", "zero2")
GB = 1e9
# dense peaks from the H100's data sheet, and the share of them that a training run is assumed to reach
H100_BF16_TFLOPS, H100_FP32_TFLOPS, H100_BANDWIDTH_TB = 989.0, 67.0, 3.35
ASSUMED_UTILIZATION = {"tflops": 0.4, "bandwidth": 0.6}
H100_MEMORY_GB = 80.0


@dataclass
class PlanOptions:
    """The devices of a run, and assumptions about rates and lengths. The plan prints the defaults it assumes.

    With `gpus` 0 the run is planned for this machine's CPU, whose memory is measured and whose rates are unknown.
    """

    gpus: int = option(1, help="GPUs, one process each. 0: this machine's CPU.", range=NON_NEGATIVE_INTEGER)
    gpu_memory: float | None = option(
        None, help="Memory of a GPU in GB (10^9 bytes); by default 80, on a CPU the machine's.", range=POSITIVE
    )
    sharding: str | None = option(
        None, help="How GPUs share the model; by default fsdp2 on several GPUs.", choices=SHARDINGS
    )
    tflops: float | None = option(
        None, help="TFLOP/s that a device reaches; by default 40 %% of an H100's peak.", range=POSITIVE
    )
    bandwidth: float | None = option(
        None, help="Memory bandwidth that a device reaches, in TB/s; by default 60 %% of an H100's.", range=POSITIVE
    )
    prompt_tokens: int | None = option(
        None,
        help="Mean tokens of a prompt; by default measured on a local data set, else 256.",
        range=POSITIVE_INTEGER,
    )
    answer_tokens: int | None = option(
        None, help="Mean tokens of an answer; by default half of the longest.", range=POSITIVE_INTEGER
    )

    def check(self) -> None:
        """Raise [`UserError`] for a value that is refused, or for a sharding that does not fit the number of GPUs."""
        check_command_options(self)
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
        """Bytes per second of a device's memory, or None for a CPU without `bandwidth`."""
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
