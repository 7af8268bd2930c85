"""Checks of options that several benchmarks have, made before anything is measured: one sentence, or None."""

import math
import os

from envs.smacv2_sim import parse_map_name


def too_low(**options) -> str | None:
    """Which of these options, each given as its values and the lowest possible one, is below that or not finite."""
    for name, (values, low) in options.items():
        for value in values:
            if not low <= value < math.inf:
                return f"--{name.replace('_', '-')} is {value}; it must be finite and at least {low}."
    return None


def wrong_maps(maps) -> str | None:
    """What is wrong with the names of SMACv2 maps."""
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
