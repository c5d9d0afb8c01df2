"""Images, sounds and videos from files, as the processors of transformers take them.

Nothing here needs more than Pillow and numpy for images, animated images, folders of frames and
PCM WAV files at the model's rate. Other sound files need soundfile, other rates soxr: the extra
`omnimerge[audio]`.
"""

from __future__ import annotations

import math
import re
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnimerge.errors import PromptError, one_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from omnimerge.generate.sources.prompt import Prompt

FRAMES_PER_SECOND = 2.0
"""What a folder of frames counts as, for models that tell the time of a frame."""

_FRAMES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Video:
    """A decoded video.

    Attributes:
        frames: every frame, in order, all of one size.
        fps: frames per second.
    """

    frames: Sequence[Image]
    fps: float


def open_image(path: Path, prompt_id: str) -> Image:
    """Read an image as RGB, turned upright as its EXIF data say.

    Args:
        path: the image file.
        prompt_id: the prompt it belongs to, for the message.

    Returns:
        The image, fully decoded.

    Raises:
        PromptError: if the file is missing, truncated or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise _undecodable("image", path, prompt_id, one_line(error)) from error


def open_audio(path: Path, prompt_id: str, rate: int) -> NDArray[np.float32]:
    """Read a sound file as one channel at the model's sampling rate.

    Channels are averaged. Another rate is resampled with soxr in its high quality, as librosa and
    transformers do. PCM WAV files are read with the standard library; others with soundfile.

    Args:
        path: the sound file.
        prompt_id: the prompt it belongs to, for the message.
        rate: samples per second that the model takes.

    Returns:
        Samples between -1 and 1.

    Raises:
        PromptError: if the file cannot be decoded, is empty, or needs a library that is not there.
    """
    import numpy as np

    samples, found = _read_wave(path, prompt_id) or _read_sound(path, prompt_id)
    if not len(samples):
        raise _undecodable("audio", path, prompt_id, "it has no samples")
    if not np.isfinite(samples).all():
        raise _undecodable("audio", path, prompt_id, "it holds NaN or infinity")
    mono = samples.mean(axis=1, dtype=np.float32)
    return mono if found == rate else _resampled(mono, found, rate, path, prompt_id)


def open_video(path: Path, prompt_id: str) -> Video:
    """Read every frame of a video.

    Args:
        path: a folder of frames, in the order of their names and of the numbers in them; or an
            animated GIF, WebP or PNG.
        prompt_id: the prompt it belongs to, for the message.

    Returns:
        The video. A folder counts as two frames a second.

    Raises:
        PromptError: if there are no frames, they differ in size, or the format is another one.
    """
    if not path.is_dir():
        return _animation(path, prompt_id)
    frames = [open_image(file, prompt_id) for file in video_files(path)]
    if not frames:
        raise PromptError(
            f"prompt {prompt_id!r}: the folder {path} holds no frames; known are "
            + ", ".join(sorted(_FRAMES))
        )
    sizes = sorted({frame.size for frame in frames})
    if len(sizes) > 1:
        raise PromptError(
            f"prompt {prompt_id!r}: the frames in {path} are of different sizes, such as "
            f"{sizes[0]} and {sizes[-1]}; give all of one video the same size"
        )
    return Video(frames, FRAMES_PER_SECOND)


def video_files(path: Path) -> list[Path]:
    """Return the files that a video consists of.

    Args:
        path: a folder of frames, or a file.

    Returns:
        The frames in order; the file itself.
    """
    if not path.is_dir():
        return [path]
    return sorted((f for f in path.iterdir() if f.suffix.lower() in _FRAMES), key=_by_number)


def media_files(prompt: Prompt) -> list[Path]:
    """Return every file that a model is shown for a prompt.

    Args:
        prompt: the prompt.

    Returns:
        Images, sounds, then videos, frame by frame.
    """
    frames = [file for video in prompt.videos for file in video_files(video)]
    return [*prompt.images, *prompt.audios, *frames]


def _undecodable(kind: str, path: Path, prompt_id: str, reason: str) -> PromptError:
    return PromptError(
        f"prompt {prompt_id!r}: {kind} {path} cannot be decoded ({reason}); replace the file or "
        "leave the prompt out"
    )


def _read_wave(path: Path, prompt_id: str) -> tuple[NDArray[np.float32], int] | None:
    """Samples of a PCM WAV file by channel, and their rate; None for other formats."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            expected = file.getnframes() * channels * width
            data = file.readframes(file.getnframes()) if width <= 4 and rate else None
    except (wave.Error, EOFError):
        return None
    except OSError as error:
        raise _undecodable("audio", path, prompt_id, one_line(error)) from error
    if data is None:
        return None
    if len(data) < expected:
        reason = f"it ends after {len(data)} of {expected} bytes of sound"
        raise _undecodable("audio", path, prompt_id, reason)
    return _from_pcm(data, width).reshape(-1, channels), rate


def _from_pcm(data: bytes, width: int) -> NDArray[np.float32]:
    """Integers of 1 to 4 bytes, little endian, between -1 and 1; of one byte they are unsigned."""
    import numpy as np

    if width == 1:
        return ((np.frombuffer(data, np.uint8) - 128.0) / 128).astype(np.float32)
    padded = np.zeros((len(data) // width, 4), np.uint8)
    padded[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return (padded.view("<i4")[:, 0] / 2**31).astype(np.float32)


def _read_sound(path: Path, prompt_id: str) -> tuple[NDArray[np.float32], int]:
    """Samples of any format that soundfile reads."""
    soundfile = _optional("soundfile")
    if soundfile is None:
        reason = (
            "it is no PCM WAV file; for other formats `pip install 'omnimerge[audio]'`, or "
            f"`ffmpeg -i {path.name} -ac 1 {path.stem}.wav`"
        )
        raise _undecodable("audio", path, prompt_id, reason)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise _undecodable("audio", path, prompt_id, one_line(error)) from error
    return samples, rate


def _resampled(
    samples: NDArray[np.float32], found: int, rate: int, path: Path, prompt_id: str
) -> NDArray[np.float32]:
    import numpy as np

    soxr = _optional("soxr")
    if soxr is None:
        raise PromptError(
            f"prompt {prompt_id!r}: audio {path} has {found} samples a second, the model takes "
            f"{rate}; `pip install 'omnimerge[audio]'` to resample, or "
            f"`ffmpeg -i {path.name} -ar {rate} {path.stem}-{rate}.wav`"
        )
    length = math.ceil(len(samples) * rate / found)
    resampled = soxr.resample(samples, found, rate, quality="soxr_hq")[:length]
    padded = np.zeros(length, np.float32)
    padded[: len(resampled)] = resampled
    return padded


def _animation(path: Path, prompt_id: str) -> Video:
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if not getattr(image, "is_animated", False):
                raise PromptError(
                    f"prompt {prompt_id!r}: video {path} is a still image; give it as an image"
                )
            frames, seconds = [], 0.0
            for frame in ImageSequence.Iterator(image):
                frames.append(frame.convert("RGB"))
                seconds += frame.info.get("duration", 0) / 1000
    except UnidentifiedImageError as error:
        raise PromptError(
            f"prompt {prompt_id!r}: video {path} is no folder of frames and no animated GIF, WebP "
            f"or PNG; write its frames out: `mkdir {path.stem} && ffmpeg -i {path.name} -vf fps=2 "
            f"{path.stem}/%05d.png`"
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise _undecodable("video", path, prompt_id, one_line(error)) from error
    return Video(frames, len(frames) / seconds if seconds else FRAMES_PER_SECOND)


def _by_number(path: Path) -> tuple[list[tuple[int, str]], str]:
    """A key that puts frame2 before frame10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts], path.name


def _optional(name: str) -> Any:
    """A library, or None where it is not installed."""
    try:
        return import_module(name)
    except (ImportError, OSError):  # OSError: soundfile without libsndfile
        return None
