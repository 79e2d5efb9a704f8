"""Features of a set of stimuli: many layers in one pass, into a store that resumes."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from brainalign.data import store as artefacts
from brainalign.data.schema import validate
from brainalign.device import resolve_device
from brainalign.errors import BrainalignError, ConfigError, SchemaError, near
from brainalign.features.layers import OUTPUT, Pooling, hooked, pool, pooled_shape, tensor_of
from brainalign.features.models import Model, load_model

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Stimuli", "extract", "images_of"]

log = logging.getLogger(__name__)

BLOCK = 128
FEATURES_PER_CHUNK = 8192
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stimuli(Protocol):
    """What extraction asks of a set of stimuli (`brainalign.data.stimuli.StimulusSet` has it)."""

    @property
    def ids(self) -> list[str]:
        """The stimulus ids, in order."""

    @property
    def hash(self) -> str:
        """The hash of the ordered ids and contents."""

    def open(self, i: int) -> Image:
        """Return image `i`."""

    def __len__(self) -> int: ...


def extract(
    model: Model | str,
    stimuli: Stimuli,
    layers: str | Sequence[str] | None = None,
    *,
    pooling: Pooling = "mean",
    store: str | Path | None = None,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    autocast: str | None = None,
    attention: str | None = None,
    workers: int = 2,
    progress: bool | None = None,
) -> dict[str, xr.Dataset]:
    r"""Return what a model's layers compute for every stimulus.

    With a store, each layer is a zarr folder ``MODEL/LAYER.POOLING.KEY.zarr`` named by a hash of
    what it holds: model name, options and weights, layer, pooling, preprocessing, autocast,
    attention and stimuli, but not batch size, device or number of workers. What is there is not
    computed again.
    A layer is written beside, in a hidden ``.partial.zarr``, one block of 128 stimuli at a time,
    and renamed when whole; a run that was cut off goes on after the blocks that read back whole.

    Parameters
    ----------
    model : Model or str
        The model, or its name.
    stimuli : StimulusSet
        The images.
    layers : str or sequence of str, optional
        Names, globs (``blocks.*``) or regular expressions (``re:blocks\.\d+``); by default the
        model's blocks and its output.
    pooling : {"mean", "class", "none", "flatten", "unit"}
        ``mean`` averages over patch tokens or over the positions of a map; ``class`` takes the
        class token; ``none`` keeps all tokens (positions of a map are its tokens): the
        ``token_features`` schema; ``flatten`` makes one vector of everything;
        ``unit`` divides a layer's vector by its Euclidean norm (the normalised embedding of CLIP).
        A layer whose output is a vector stays as it is otherwise.
    store : path, optional
        The folder of the store; without it the features are held in memory.
    batch_size : int
        Images per forward pass.
    device : str or torch.device
        Where the model runs; ``"auto"`` is CUDA where there is one.
    autocast : {None, "bf16", "fp16"}
        Mixed precision of the forward pass; pooling and storage are float32 in any case.
    attention : str, optional
        Another attention mechanism in all attention layers of the image tower that it can replace,
        such as ``"neighborhood:k=7"``; see `brainalign_kernels.swap_attention`. It is swapped into
        trained weights and measures damage: a model trained with it would compute something else.
        The model is as before afterwards.
    workers : int
        Threads that decode and transform images ahead of the model.
    progress : bool, optional
        Whether to draw a progress bar; by default in a terminal.

    Returns
    -------
    dict of str to xarray.Dataset
        By layer, in the model's order, each of the ``features`` (or ``token_features``) schema;
        opened lazily from the store where there is one.

    Raises
    ------
    UnknownNameError
        If a layer is unknown; with near matches.
    ConfigError
        If a layer cannot be pooled so, an argument is out of range, or `attention` is unknown or
        cannot replace any layer that images pass.
    DiskSpaceError
        If the features would not fit on the disk.
    BrainalignError
        If a layer is not finite for some stimulus; it is named.
    """
    if isinstance(model, str):
        model = load_model(model, device=device)
    if autocast is not None and autocast not in AUTOCAST:
        raise ConfigError(
            f"autocast is {autocast!r}.{near(str(autocast), AUTOCAST)}", "Known: None, bf16, fp16."
        )
    if batch_size < 1 or workers < 1:
        raise ConfigError(
            f"batch_size and workers must be at least 1; they are {batch_size} and {workers}."
        )
    if len(stimuli) == 0:
        raise SchemaError("There are no stimuli to extract features of.")
    if not isinstance(device, str) or device != "auto":
        model.to(resolve_device(device))
    swapped: AbstractContextManager[Any] = contextlib.nullcontext()
    if attention is not None:
        attention, swapped = _swap(model, attention)
    with swapped:
        return _extract(
            model,
            stimuli,
            layers,
            pooling,
            store,
            batch_size,
            autocast,
            attention,
            workers,
            progress,
        )


def _swap(model: Model, attention: str) -> tuple[str, AbstractContextManager[Any]]:
    """Swap a model's attention and try it; return its full specification, and what undoes it."""
    from brainalign_kernels import ShapeError, UnsupportedError
    from brainalign_kernels.adapters import parse, swap_attention

    if model.placed is not None:
        raise ConfigError(
            f"{model.name} was trained with the attention {model.attention!r} and has it in "
            f"place; attention={attention!r} would be swapped into it.",
            "Leave attention out; damage is measured in a model trained with softmax attention.",
        )
    try:
        chosen = parse(attention)
        with contextlib.ExitStack() as stack, torch.no_grad():
            swap = stack.enter_context(swap_attention(model.module, chosen))
            model.forward(model.noise()[None])
            if not swap.calls:
                raise UnsupportedError("its image tower has no attention layer that it can replace")
            stack.pop_all()
    except (ShapeError, UnsupportedError) as error:
        raise ConfigError(f"attention={attention!r} in {model.name}: {error}") from error
    log.info("%s: %s replaces the attention of %s", model.name, chosen, ", ".join(swap.layers))
    return str(chosen), swap


def _extract(
    model: Model,
    stimuli: Stimuli,
    layers: str | Sequence[str] | None,
    pooling: Pooling,
    store: str | Path | None,
    batch_size: int,
    autocast: str | None,
    attention: str | None,
    workers: int,
    progress: bool | None,
) -> dict[str, xr.Dataset]:
    names = model.select(layers)
    shapes = {name: pooled_shape(model.traced[name], pooling) for name in names}
    attrs = {name: _attrs(model, stimuli, name, pooling, autocast, attention) for name in names}
    sinks: dict[str, _Memory | _Store] = {}
    for name in names:
        frame = _frame(stimuli, model.name, name, attrs[name])
        if store is None:
            sinks[name] = _Memory(frame, shapes[name])
        else:
            sinks[name] = _Store(frame, shapes[name], Path(store))
    if store is not None:
        missing = sum(s.bytes_missing for s in sinks.values() if isinstance(s, _Store))
        artefacts.require_disk(store, missing)
    open_sinks = {name: s for name, s in sinks.items() if not s.complete}
    for sink in open_sinks.values():
        sink.begin()
    blocks = [
        range(start, min(start + BLOCK, len(stimuli))) for start in range(0, len(stimuli), BLOCK)
    ]
    todo = [b for b in blocks if any(b.start not in s.done for s in open_sinks.values())]
    # A batch never crosses a block, so that a resumed run forms the batches of an unbroken one.
    batches = [b[i : i + batch_size] for b in todo for i in range(0, len(b), batch_size)]
    run = _Runner(model, list(open_sinks), pooling, autocast)
    filling = {name: np.empty((BLOCK, *shapes[name]), np.float32) for name in open_sinks}
    with (
        run,
        contextlib.closing(images_of(model.transform, stimuli, batches, workers)) as loaded,
        tqdm(
            total=sum(map(len, batches)),
            desc=model.name,
            unit="image",
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        for batch, images in loaded:
            for name, values in run(images).items():
                _check_finite(values, name, model.name, stimuli, batch, autocast)
                at = batch.start % BLOCK
                filling[name][at : at + len(batch)] = values
            if batch.stop % BLOCK == 0 or batch.stop == len(stimuli):
                start = (batch.stop - 1) // BLOCK * BLOCK
                for name, sink in open_sinks.items():
                    if start not in sink.done:
                        sink.put(start, filling[name][: batch.stop - start])
            bar.update(len(batch))
    return {name: sink.finish() for name, sink in sinks.items()}


def images_of(
    transform: Callable[[Image], Tensor],
    stimuli: Stimuli,
    batches: Sequence[range],
    workers: int = 2,
) -> Generator[tuple[range, Tensor], None, None]:
    """Yield each batch with its transformed images, decoded by threads one batch ahead."""

    def load(i: int) -> Tensor:
        try:
            return transform(stimuli.open(i))
        except BrainalignError:
            raise
        except (OSError, ValueError) as error:
            raise SchemaError(
                f"Stimulus {stimuli.ids[i]!r} (number {i}) cannot be read as an image: {error}."
            ) from error

    with ThreadPoolExecutor(workers) as pool_:
        queue: deque[tuple[range, list[Future[Tensor]]]] = deque()
        try:
            for batch in batches:
                queue.append((batch, [pool_.submit(load, i) for i in batch]))
                if len(queue) > 1:
                    ready, futures = queue.popleft()
                    yield ready, torch.stack([f.result() for f in futures])
            while queue:
                ready, futures = queue.popleft()
                yield ready, torch.stack([f.result() for f in futures])
        finally:
            pool_.shutdown(wait=True, cancel_futures=True)


class _Runner:
    """Runs a model on batches and pools the layers hooked."""

    def __init__(
        self, model: Model, names: list[str], pooling: Pooling, autocast: str | None
    ) -> None:
        self.model, self.names, self.pooling, self.autocast = model, names, pooling, autocast
        self.pooled: dict[str, Tensor] = {}
        self.stack = contextlib.ExitStack()

    def _receive(self, name: str, output: Tensor) -> None:
        self.pooled[name] = pool(output, self.model.traced[name], self.pooling)

    def __enter__(self) -> _Runner:
        self.stack.enter_context(hooked(self.model.module, self.names, self._receive))
        # Not inference_mode: buffers that a model caches in it could never be used with gradients.
        self.stack.enter_context(torch.no_grad())
        # TensorFloat-32, the default of cuDNN, would part a GPU from a CPU in the third digit.
        self.stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
        if self.autocast is not None:
            self.stack.enter_context(
                torch.autocast(self.model.device.type, dtype=AUTOCAST[self.autocast])
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def __call__(self, images: Tensor) -> dict[str, np.ndarray]:
        self.pooled.clear()
        output = tensor_of(self.model.forward(images.to(self.model.device, non_blocking=True)))
        if OUTPUT in self.names and OUTPUT not in self.pooled and output is not None:
            self._receive(OUTPUT, output)
        return {name: self.pooled[name].cpu().numpy() for name in self.names}


def _check_finite(
    values: np.ndarray,
    layer: str,
    model: str,
    stimuli: Stimuli,
    batch: range,
    autocast: str | None,
) -> None:
    good = np.isfinite(values.reshape(len(values), -1)).all(1)
    if good.all():
        return
    first = batch[int(np.argmin(good))]
    raise BrainalignError(
        f"Layer {layer!r} of {model} is not finite (NaN or infinite) for stimulus "
        f"{stimuli.ids[first]!r} (number {first}).",
        f"Run without autocast={autocast!r}, or with 'bf16'."
        if autocast == "fp16"
        else "Check the weights, the preprocessing and this image.",
    )


def _attrs(
    model: Model,
    stimuli: Stimuli,
    layer: str,
    pooling: str,
    autocast: str | None,
    attention: str | None,
) -> dict[str, str]:
    # The model's own attention is no attribute: it must not change the key of stores that exist.
    swapped = {} if attention is None else {"attention": attention}
    if model.placed is not None:
        swapped["trained_attention"] = model.attention
    return swapped | {
        "pooling": pooling,
        "preprocessing": json.dumps(model.preprocessing, sort_keys=True),
        "weights_sha256": model.weights_sha256,
        "stimuli_sha256": stimuli.hash,
        "autocast": autocast or "none",
        "units": "arbitrary",
    }


def _frame(stimuli: Stimuli, model: str, layer: str, attrs: Mapping[str, str]) -> xr.Dataset:
    """Return the features' Dataset without its features."""
    return xr.Dataset(
        coords={"stimulus_id": ("stimulus", stimuli.ids), "model": model, "layer": layer},
        attrs=dict(attrs),
    )


def _schema(shape: tuple[int, ...]) -> tuple[str, tuple[str, ...]]:
    if len(shape) == 1:
        return "features", ("stimulus", "feature")
    return "token_features", ("stimulus", "token", "feature")


class _Memory:
    """Features of one layer, held in memory."""

    complete = False

    def __init__(self, frame: xr.Dataset, shape: tuple[int, ...]) -> None:
        self.frame = frame
        self.kind, self.dims = _schema(shape)
        self.shape = (frame.sizes["stimulus"], *shape)
        self.done: set[int] = set()

    def begin(self) -> None:
        self.values = np.empty(self.shape, np.float32)

    def put(self, start: int, values: np.ndarray) -> None:
        self.values[start : start + len(values)] = values

    def finish(self) -> xr.Dataset:
        ds = self.frame.assign(features=(self.dims, self.values, {"units": "arbitrary"}))
        return validate(ds.assign_attrs(artefacts.provenance()), self.kind)


class _Store:
    """Features of one layer, in a zarr folder that is built block by block."""

    def __init__(self, frame: xr.Dataset, shape: tuple[int, ...], folder: Path) -> None:
        self.frame = frame
        self.kind, self.dims = _schema(shape)
        self.shape = (frame.sizes["stimulus"], *shape)
        model, layer = str(frame["model"].item()), str(frame["layer"].item())
        key = artefacts.sha256_of(model, layer, frame.attrs)
        name = f"{_slug(layer)}.{frame.attrs['pooling']}.{key[:16]}"
        self.path = folder / _slug(model) / f"{name}.zarr"
        self.partial = self.path.with_name(f".{name}.partial.zarr")
        self.complete = self.path.is_dir()
        self.done = set() if self.complete else self._blocks_done()

    @property
    def bytes_missing(self) -> int:
        rows = 0 if self.complete else self.shape[0] - min(len(self.done) * BLOCK, self.shape[0])
        return rows * int(np.prod(self.shape[1:])) * 4

    def _blocks_done(self) -> set[int]:
        """Return where the blocks begin that an earlier run wrote and that read back whole."""
        import zarr

        if not self.partial.is_dir():
            return set()
        try:
            array = zarr.open_group(self.partial, mode="r")["features"]
        except (KeyError, OSError, ValueError):
            return set()
        if not isinstance(array, zarr.Array) or (array.shape, _rows(array)) != (
            self.shape,
            min(BLOCK, self.shape[0]),
        ):
            return set()
        done = set()
        for start in range(0, self.shape[0], BLOCK):
            try:
                values = np.asarray(array[start : start + BLOCK])
            except (OSError, ValueError, RuntimeError, IndexError):
                log.warning("%s: the block at %d is damaged and made again", self.partial, start)
                # Writing into a shard reads it first: a damaged one has to go.
                shutil.rmtree(self._shard(start))
                continue
            # What was never written reads as the fill value, NaN; what is written is finite.
            if np.isfinite(values).all():
                done.add(start)
        return done

    def _shard(self, start: int) -> Path:
        return self.partial / "features" / "c" / str(start // BLOCK)

    def begin(self) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        if not self.done:
            text = np.dtypes.StringDType()
            frame = self.frame.assign_coords(
                {
                    k: (v.dims, np.array(v.values.tolist(), text))
                    for k, v in self.frame.coords.items()
                }
            ).assign_attrs({"schema": self.kind, **artefacts.provenance()})
            frame.to_zarr(
                self.partial,
                mode="w",
                zarr_format=3,
                consolidated=False,
                encoding=artefacts.zarr_encoding(frame),
            )
            rows = min(BLOCK, self.shape[0])
            width = min(self.shape[-1], FEATURES_PER_CHUNK)
            chunks = (rows, *(1 for _ in self.shape[1:-1]), width)
            whole = (rows, *self.shape[1:-1], -(-self.shape[-1] // width) * width)
            zarr.open_group(self.partial, mode="r+").create_array(
                "features",
                shape=self.shape,
                dtype="float32",
                chunks=chunks,
                shards=whole,
                fill_value=np.nan,
                compressors=(Crc32cCodec(),),
                dimension_names=self.dims,
                attributes={"units": "arbitrary"},
            )
        self.array: Any = zarr.open_group(self.partial, mode="r+")["features"]

    def put(self, start: int, values: np.ndarray) -> None:
        self.array[start : start + len(values)] = values
        self.done.add(start)

    def finish(self) -> xr.Dataset:
        if not self.complete and self.path.is_dir():
            # Another run was first; what it made is the same.
            shutil.rmtree(self.partial, ignore_errors=True)
        elif not self.complete:
            starts = range(0, self.shape[0], BLOCK)
            lost = [s for s in starts if not self._shard(s).is_dir()]
            if lost or not (self.partial / "zarr.json").is_file():
                raise BrainalignError(
                    f"Blocks of {self.partial} vanished while they were written: another run "
                    "seems to extract the same features into the same store.",
                    "Wait for it to end, then run again.",
                )
            artefacts.read(self.partial, self.kind)
            artefacts.swap_in(self.partial, self.path)
        self.complete = True
        return artefacts.read(self.path, self.kind)


def _rows(array: Any) -> int:
    return int((array.shards or array.chunks)[0])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "model"
