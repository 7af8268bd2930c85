"""Films of what was played, written by Pillow as GIF, and as MP4, too, where the package imageio-ffmpeg is."""

import importlib.util
import io
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def check_path(path):
    if Path(path).suffix != ".gif" or not Path(path).parent.is_dir():
        raise ValueError(
            f"The film's file is {str(path)!r}, expected a name that ends in .gif in a folder that exists."
        )
    return Path(path)


def save_film(frames, path, fps=8):
    """Write frames (H, W, 3) uint8 as an endless GIF, and as an MP4 beside it if imageio-ffmpeg is installed.

    Both are written under a temporary name and renamed. Returns: the paths written. Errors: ValueError for a path that
    is none of a GIF, or for no frame; OSError if it cannot be written.
    """
    path, frames = check_path(path), list(frames)
    if not frames:
        raise ValueError("There is nothing to see: no step was played.")
    palette = Image.fromarray(np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])).quantize(128)
    first, *rest = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    gif = io.BytesIO()
    first.save(gif, "GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0)
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(gif.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written; no space or permission? ({error})") from error
    if not importlib.util.find_spec("imageio_ffmpeg"):
        return [path]
    import imageio_ffmpeg

    height, width = frames[0].shape[:2]
    movie, temporary = path.with_suffix(".mp4"), path.with_name(f".{path.stem}.mp4")
    try:
        writer = imageio_ffmpeg.write_frames(str(temporary), (width, height), fps=fps)
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        os.replace(temporary, movie)
    except (OSError, RuntimeError) as error:  # no ffmpeg, or a full disk: the GIF is there
        print(f"warning: {movie} is left out ({str(error).splitlines()[0]})", file=sys.stderr)
        return [path]
    finally:
        temporary.unlink(missing_ok=True)
    return [path, movie]


def save_evaluation(frames, place, step, fps=8):
    """Write evaluation.gif (save_film) into a run folder, and show it among TensorBoard's images at that step.

    Args: place, the run folder, or a file, beside which it goes: without TensorBoard unless it is in a run folder, and
    called NAME.gif if the file is NAME.pt of another name than a run folder's policy.pt.
    Returns: the paths written.
    """
    folder, frames = Path(place) if Path(place).is_dir() else Path(place).parent, list(frames)
    name = "evaluation" if Path(place).is_dir() or Path(place).stem == "policy" else Path(place).stem
    written = save_film(frames, folder / f"{name}.gif", fps)
    if (folder / "config.json").exists():
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        height, width = frames[0].shape[:2]
        gif = written[0].read_bytes()
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        with SummaryWriter(str(folder)) as writer:
            writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="evaluation", image=image)]), step)
    print("film:", *written, flush=True)
    return written
