"""Trials of observers: CSV files, one row a trial, to and from the ``trials`` schema."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from brainalign.data.schema import validate
from brainalign.data.store import read
from brainalign.errors import SchemaError, UnavailableError

__all__ = ["NUMBERS", "read_trials"]

#: Columns that hold numbers; all others are text.
NUMBERS = ("rt", "noise_sd", "frequency")

_NAMES = {
    "subj": "subject",
    "object_response": "response",
    "imagename": "stimulus_id",
}
_GEIRHOS_IMAGE = re.compile(r"\d+_[^_]+_s\d+_[^_]+_[^_]+_[^_]+_(?P<image>.+)")
_TRUE, _FALSE = {"1", "1.0", "true"}, {"0", "0.0", "false"}


def read_trials(paths: str | Path | Iterable[str | Path]) -> xr.Dataset:
    """Read trials from CSV files, or from one netCDF file of the ``trials`` schema.

    Parameters
    ----------
    paths : path or iterable of path
        Each with columns ``response`` and ``category`` (or ``correct``: 1 or 0), and where known
        ``subject`` (else the file's name), ``stimulus_id``, ``condition``, ``rt`` (s), and for
        critical band masking ``noise_sd`` and ``frequency`` (cycles/image). The names of Geirhos
        et al. 2021 (``subj``, ``object_response``, ``imagename``) are taken too; their image names
        are cut to the part that all subjects share. Further columns are kept as text.

    Returns
    -------
    xarray.Dataset
        The ``trials`` schema. ``correct`` says whether response and category agree: a response such
        as ``na`` is wrong. Conditions stay the text that they are.

    Raises
    ------
    UnavailableError
        If a file is missing.
    SchemaError
        If a file is no table, a column is missing, files differ in their columns, or a value is no
        number.
    """
    import pandas as pd

    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    if not files:
        raise SchemaError("No file of trials was given.")
    if len(files) == 1 and files[0].suffix == ".nc":
        return read(files[0], "trials").load()
    tables = []
    for file in files:
        if not file.is_file():
            raise UnavailableError(f"The file of trials {file} is missing.")
        try:
            table = pd.read_csv(file, dtype=str, keep_default_na=False, skipinitialspace=True)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise SchemaError(f"{file} is no table of trials: {str(error).strip()}.") from error
        table = table.rename(columns=str.strip)
        geirhos = "imagename" in table
        table = table.rename(columns=lambda c: _NAMES.get(c, c.lower()))
        if geirhos:
            table["stimulus_id"] = [_image(name) for name in table["stimulus_id"]]
        if "subject" not in table:
            table["subject"] = file.stem
        tables.append(table)
        if set(table) != set(tables[0]):
            odd = sorted({*map(str, table)} ^ {*map(str, tables[0])})
            raise SchemaError(f"{file} and {files[0]} differ in their column {odd[0]!r}.")
    table = pd.concat(tables, ignore_index=True)
    if "response" not in table and "correct" in table:
        table["response"] = table["correct"]
    for column in ("response", *(() if "correct" in table else ("category",))):
        if column not in table:
            raise SchemaError(
                f"{files[0]} has no column {column!r}; it has {', '.join(map(repr, table))}.",
                "Trials need 'response' and 'category', or 'correct', in columns parted by commas.",
            )
    data: dict[str, Any] = {}
    for name in map(str, table):
        if name in NUMBERS:
            data[name] = ("trial", _numbers(table[name], name, files[0]))
        elif name != "correct":
            data[name] = ("trial", _text(table[name]))
    if "correct" in table:
        said = table["correct"].str.lower()
        strange = ~said.isin(_TRUE | _FALSE)
        if strange.any():
            raise SchemaError(
                f"{files[0]}: 'correct' is {said[strange].iloc[0]!r}; expected 1 or 0."
            )
        correct = said.isin(_TRUE).to_numpy()
    else:
        correct = (table["response"] == table["category"]).to_numpy()
    data["correct"] = ("trial", correct)
    trials = xr.Dataset(data).set_coords(
        [c for c in ("subject", "stimulus_id", "condition") if c in data]
    )
    if "rt" in trials:
        trials["rt"].attrs["units"] = "s"
    if "frequency" in trials:
        trials["frequency"].attrs["units"] = "cycles/image"
    return validate(trials, "trials")


def _image(name: str) -> str:
    """Return what all subjects share of an image's name: the image without its ending."""
    match = _GEIRHOS_IMAGE.fullmatch(name)
    return match["image"].rpartition(".")[0] if match else name


def _text(column: Any) -> np.ndarray:
    return column.to_numpy().astype(str)


def _numbers(column: Any, name: str, file: Path) -> np.ndarray:
    import pandas as pd

    blank = column.str.strip().str.lower().isin(("", "na", "nan"))
    numbers = pd.to_numeric(column.where(~blank, "nan"), errors="coerce")
    strange = numbers.isna() & ~blank
    if strange.any():
        raise SchemaError(f"{file}: {name!r} is {column[strange].iloc[0]!r}; expected a number.")
    return numbers.to_numpy(dtype=np.float64)
