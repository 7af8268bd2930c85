"""Checks of options that several benchmarks have, made before anything is measured: one sentence, or None."""

import os


def wrong_maps(maps) -> str | None:
    """What is wrong with the names of SMACv2 maps."""
    from envs.smacv2_sim import (
        parse_map_name,  # not above: numba must not be imported before its number of threads is set
    )

    try:
        for map_name in maps:
            parse_map_name(map_name)
    except ValueError as error:
        return f"--maps: {error}"
    return None


def wrong_json(path: str | None) -> str | None:
    """Why the file of figures, if there is to be one, cannot be written."""
    try:
        open(path or os.devnull, "a").close()
    except OSError as error:
        return f"--json {path} cannot be written ({error.strerror}): choose another file."
    return None


def wrong_gpu_option(args) -> str | None:
    """Whether CUDA graphs are asked for where there is no GPU."""
    import torch  # not above, for the same reason

    if args.cudagraphs and not (args.cuda and torch.cuda.is_available()):
        return "--cudagraphs needs a GPU that PyTorch can use, and --cuda: leave it out."
    return None
