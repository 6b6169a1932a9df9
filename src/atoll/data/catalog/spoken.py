"""Spoken digits as log-mel spectrograms."""

import io
import wave
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.catalog.fetching import locate
from atoll.data.dataset import FederatedDataset
from atoll.errors import DataError, invalid

FILE = "free-spoken-digit-dataset.zip"
CHECKSUMS: Mapping[str, str] = MappingProxyType(
    {FILE: "02aa78ce7e704eabe8784279ee267f3ed9d2b5c17dae3316347d90d9e9e4d557"}
)

RATE = 8000
FRAME, HOP = 256, 128
"""Samples in a frame, 32 ms, and from one frame to the next."""

LONGEST = 2**20
"""Bytes of a recording; the longest of the data set has 36,568."""


def spoken_digits(*, mels: int = 40, seconds: float = 1.0, test: float = 0.2, seed: int = 0) -> FederatedDataset:
    """Ten spoken digits of six speakers: which one was said?

    A recording is a picture of its sound: the logarithm of its energy in bands that lie as the ear has them, every
    16 ms. It is cut, or filled with silence, to one length, and shifted and scaled by itself to mean 0 and variance 1,
    so that nothing about other recordings is needed for it.

    Args:
        mels: bands, at least 8.
        seconds: length; nine of ten recordings are shorter than 0.61 s.
        test: fraction of each speaker's recordings for test, with equal shares of the digits.
        seed: of the cut.

    Returns:
        The dataset, clients by the speaker's name: x float32 [n, 1, mels, frames], y int64 [n], the digit.

    Raises:
        DataError: the archive is not at hand, or is not that of the data set.

    Source: Jackson et al. 2018, Free Spoken Digit Dataset, doi:10.5281/zenodo.1342401 (CC BY-SA 4.0). Mel scale:
    O'Shaughnessy 1987, m = 2595 log10(1 + f / 700).
    """
    if isinstance(mels, bool) or not isinstance(mels, int) or not 8 <= mels <= FRAME // 2:
        raise invalid("mels", mels, f"a number of bands from 8 to {FRAME // 2}")
    if not 0.1 <= seconds <= 10:
        raise invalid("seconds", seconds, "from 0.1 to 10")
    content = locate(
        "spoken_digits", CHECKSUMS, source="https://doi.org/10.5281/zenodo.1342401 (Free Spoken Digit Dataset)"
    )[FILE]
    clients = _decoded(content, mels, round(seconds * RATE))
    return FederatedDataset.from_arrays(clients, test=test, seed=seed, stratify=True, name="spoken_digits")


@lru_cache(maxsize=1)
def _decoded(content: bytes, mels: int, length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures and digits of each speaker."""
    bank = mel_bank(mels)
    found: dict[str, tuple[list[Tensor], list[int]]] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in sorted(archive.infolist(), key=lambda e: e.filename):
            if not entry.filename.endswith(".wav"):
                continue
            digit, speaker, _ = entry.filename.rpartition("/")[2].split("_")
            if entry.file_size > LONGEST:
                raise DataError(
                    f"{entry.filename} has {entry.file_size} bytes: no recording of the data set is so long."
                )
            sound = _sound(archive.read(entry), entry.filename, length)
            sounds, labels = found.setdefault(speaker, ([], []))
            sounds.append(sound)
            labels.append(int(digit))
    return {
        speaker: (_spectrograms(torch.stack(sounds), bank)[:, None], torch.tensor(labels))
        for speaker, (sounds, labels) in sorted(found.items())
    }


def _sound(content: bytes, name: str, length: int) -> Tensor:
    """Samples [length] in [-1, 1]."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
                raise DataError(f"{name} is not a recording of one channel, 16 bits and {RATE} Hz.")
            raw = np.frombuffer(file.readframes(length), dtype="<i2")
    except (wave.Error, EOFError) as error:
        raise DataError(f"{name} is no WAV file: {error}.") from error
    out = np.zeros(length, dtype=np.float32)
    out[: len(raw)] = raw / np.float32(32768.0)
    return torch.from_numpy(out)


def mel_bank(bands: int) -> Tensor:
    """Triangles [bands, FRAME // 2 + 1] whose corners lie evenly on the mel scale from 0 Hz to half the rate."""
    top = 2595.0 * np.log10(1.0 + RATE / 2 / 700.0)
    corners: NDArray[np.float64] = 700.0 * (10.0 ** (np.linspace(0.0, top, bands + 2) / 2595.0) - 1.0)
    frequencies = np.arange(FRAME // 2 + 1) * (RATE / FRAME)
    low, middle, high = (corners[i : i + bands, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0.0, None).astype(np.float32))


def _spectrograms(sounds: Tensor, bank: Tensor) -> Tensor:
    """[n, mels, frames], each with mean 0 and variance 1."""
    spectra = torch.stft(sounds, FRAME, HOP, window=torch.hann_window(FRAME), return_complex=True)
    energy = torch.log(bank @ spectra.abs().square() + 1e-6)
    mean, deviation = energy.mean(dim=(1, 2), keepdim=True), energy.std(dim=(1, 2), keepdim=True)
    return (energy - mean) / deviation.clamp(min=1e-6)
