"""What devices have: memory and processors."""

import os

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that nobody uses, on a GPU or on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def multiprocessors(device: torch.device) -> int | None:
    """Streaming multiprocessors of a GPU; None for any other device, or where there is no GPU to ask."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return None


def gpu_names() -> list[str]:
    """Names of all GPUs."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
