"""Small files of the layouts in which recordings are published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_edf(path: Path, data: np.ndarray, names: list[str], rate: int) -> None:
    """Write (n_times, n_channels) microvolts as EDF, one-second records, 0.1 uV a step."""
    n_records, n = len(data) // rate, len(names)

    def field(text: object, width: int) -> bytes:
        return str(text).encode("ascii").ljust(width)[:width]

    head = [
        field("0", 8), field("X X X X", 80), field("Startdate X X X X", 80),
        field("01.01.20", 8), field("00.00.00", 8), field(256 * (n + 1), 8), field("", 44),
        field(n_records, 8), field(1, 8), field(n, 4),
    ]  # fmt: skip
    columns = [
        (names, 16), ([""] * n, 80), (["uV"] * n, 8), (["-3276.8"] * n, 8), (["3276.7"] * n, 8),
        (["-32768"] * n, 8), (["32767"] * n, 8), ([""] * n, 80), ([rate] * n, 8), ([""] * n, 32),
    ]  # fmt: skip
    head += [field(value, width) for values, width in columns for value in values]
    steps = np.round(data[: n_records * rate] * 10).astype("<i2")
    records = steps.reshape(n_records, rate, n).transpose(0, 2, 1)
    path.write_bytes(b"".join(head) + records.tobytes())


def write_brainvision(path: Path, data: np.ndarray, names: list[str], rate: int) -> None:
    """Write (n_times, n_channels) microvolts as BrainVision; `path` ends in .vhdr."""
    base = path.with_suffix("").name
    channels = "\n".join(f"Ch{i + 1}={name},,1,uV" for i, name in enumerate(names))
    path.write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n\n[Common Infos]\n"
        f"DataFile={base}.eeg\nMarkerFile={base}.vmrk\nDataFormat=BINARY\n"
        f"DataOrientation=MULTIPLEXED\nNumberOfChannels={len(names)}\n"
        f"SamplingInterval={1e6 / rate:g}\n\n[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n\n"
        f"[Channel Infos]\n{channels}\n"
    )
    path.with_suffix(".vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n\n[Common Infos]\n"
        f"DataFile={base}.eeg\n\n[Marker Infos]\nMk1=New Segment,,1,1,0\n"
    )
    path.with_suffix(".eeg").write_bytes(np.ascontiguousarray(data, "<f4").tobytes())


def write_tsv(path: Path, header: str, rows: list[tuple]) -> None:
    """Write a table as BIDS has them."""
    lines = [header.replace(" ", "\t"), *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def write_ieeg_bids(root: Path, *, n_runs: int = 2, seconds: int = 4, rate: int = 256) -> dict:
    """Write an iEEG-BIDS folder of one subject; return what is in it."""
    names = ["LA1", "LA2", "LB1", "NA", "TRIG"]
    folder = root / "sub-01" / "ieeg"
    folder.mkdir(parents=True)
    (root / "dataset_description.json").write_text(
        json.dumps({"Name": "small", "BIDSVersion": "1.8.0"})
    )
    rng = np.random.default_rng(0)
    data = [np.round(100 * rng.normal(size=(seconds * rate, 5)), 1) for _ in range(n_runs)]
    for run, x in enumerate(data, 1):
        side = f"sub-01_task-listen_run-{run:02d}"
        write_brainvision(folder / f"{side}_ieeg.vhdr", x, names, rate)
        (folder / f"{side}_ieeg.json").write_text(
            json.dumps({"TaskName": "listen", "PowerLineFrequency": 60, "SamplingFrequency": rate})
        )
        write_tsv(
            folder / f"{side}_channels.tsv",
            "name type units status",
            [
                ("LA1", "SEEG", "uV", "good"),
                ("LA2", "SEEG", "uV", "bad" if run == 2 else "good"),
                ("LB1", "ECOG", "uV", "good"),
                ("NA", "SEEG", "uV", "good"),
                ("TRIG", "TRIG", "uV", "good"),
                ("EDF Annotations", "MISC", "n/a", "good"),
            ],
        )
        write_tsv(
            folder / f"{side}_events.tsv",
            "onset duration trial_type",
            [(0.5, 1.0, "attend_left"), (2.0, 0.5, "BAD_seizure")],
        )
    for space, unit, scale in (("MNI152NLin2009aSym", "mm", 1), ("Other", "m", 0.001)):
        write_tsv(
            folder / f"sub-01_space-{space}_electrodes.tsv",
            "name x y z size",
            [
                ("LA1", -50 * scale, 10 * scale, 5 * scale, 4),
                ("LA2", -55 * scale, 10 * scale, 5 * scale, 4),
                ("LB1", 40 * scale, 0, 0, 4),
            ],
        )
        (folder / f"sub-01_space-{space}_coordsystem.json").write_text(
            json.dumps({"iEEGCoordinateSystem": space, "iEEGCoordinateUnits": unit})
        )
    return {"data": data, "names": names, "rate": rate}
